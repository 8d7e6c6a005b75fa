"""Blocks of a checkpoint picked, dropped and shared, against stock models whose lists of blocks were made by
hand.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_bert
import tiny_vit
import torch
from safetensors.torch import load_file
from tiny_bert import SEQUENCE
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, ViTForImageClassification

from qcompress.errors import ModelError
from qcompress.models import FAMILIES, describe
from qcompress.models.architecture import CAUSAL_LM, Head
from qcompress.models.layer_selection import SHARED, BlocksError, Depth, choose, owners
from qcompress.pipeline.stages.load import fingerprint, load
from qcompress.schema.recipe import Model

BLOCKS = 4
FAMILIES_OF_ONE_SHAPE = ("gpt2", "bert", "roberta", "distilbert", "vit")
HEADS = {"gpt2": CAUSAL_LM, "vit": tiny_vit.HEAD} | dict.fromkeys(
    ("bert", "roberta", "distilbert"), Head(SEQUENCE, tiny_bert.LABELS)
)
DEPTH = Depth("n", "stack", r"(?:model\.)?h\.")

PICKED = {
    "every-other": [0, 2],
    "pairs": [0, 0, 2, 2],
    "turned": [3, 1],
    "one": [2],
    "apart": [1, 3, 1],
}
"""What is asked for, and the blocks that it stands for."""


@pytest.fixture(scope="module", params=FAMILIES_OF_ONE_SHAPE)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(family: str, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four blocks. Read only."""
    folder = tmp_path_factory.mktemp(family)
    if family == "gpt2":
        return tiny.make_checkpoint(folder, text_file, blocks=BLOCKS)
    if family == "vit":
        return tiny_vit.save_vit(folder, blocks=BLOCKS)
    with pytest.MonkeyPatch.context() as patch:
        sizes = copy.deepcopy(tiny_bert.SIZES)
        setattr(sizes[family], FAMILIES[family].DEPTH.key, BLOCKS)
        patch.setattr(tiny_bert, "SIZES", sizes)
        return tiny_bert.save_encoder(folder, text_file, family)


def stock(family: str, source: Path) -> nn.Module:
    """The model as transformers alone loads it."""
    kind: Any = {"gpt2": GPT2LMHeadModel, "vit": ViTForImageClassification}.get(family)
    kind = kind or tiny_bert.CLASSES[family, SEQUENCE]
    model = kind.from_pretrained(source, attn_implementation="eager").eval()
    model.config.use_cache = False  # a block's place in the cache is its own
    return model


def inputs(family: str) -> dict[str, Tensor]:
    if family == "gpt2":
        return FAMILIES["gpt2"].graph_inputs(tiny.token_ids())
    return tiny_vit.pixels() if family == "vit" else tiny_bert.token_inputs(family, pad="right")


def picked(family: str, source: Path, blocks: Any, out: Path) -> nn.Module:
    """The model of a recipe with those `model.blocks`, as the load stage leaves it."""
    out.mkdir()
    model = Model(family=family, source=str(source), blocks=blocks)
    load(model, source, fingerprint(source), out, HEADS[family])
    return FAMILIES[family].load_float(out, out)


def logits(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        return model(**inputs(family)).logits


@pytest.mark.parametrize("asked", PICKED)
def test_a_model_of_some_blocks_is_the_stock_model_with_its_list_made_by_hand(
    asked: str, family: str, source: Path, tmp_path: Path
) -> None:
    numbers = PICKED[asked]
    blocks = asked if asked in ("every-other", "pairs") else numbers
    model = picked(family, source, blocks, tmp_path / "load")
    expected = stock(family, source)
    stack, _, name = FAMILIES[family].DEPTH.stack.rpartition(".")
    whole = getattr(expected.get_submodule(stack), name)
    own = nn.ModuleList([copy.deepcopy(whole[number]) for number in numbers])
    setattr(expected.get_submodule(stack), name, own)
    assert torch.equal(logits(model, family), logits(expected, family))

    unique = nn.ModuleList([whole[number] for number in sorted(set(numbers))])
    setattr(expected.get_submodule(stack), name, unique)
    architecture = describe(family, source, HEADS[family], blocks)
    assert architecture.parameters == sum(one.numel() for one in expected.parameters())
    assert architecture.parameters == sum(one.numel() for one in model.parameters())
    assert len(architecture.blocks) == len(numbers)
    stored = load_file(tmp_path / "load" / "model.safetensors")
    assert sum(one.numel() for one in stored.values()) == architecture.parameters
    assert describe(family, tmp_path / "load", HEADS[family]) == architecture


def test_shared_blocks_are_the_same_parameters_and_their_layers_are_tied(
    family: str, source: Path, tmp_path: Path
) -> None:
    model = picked(family, source, "pairs", tmp_path / "load")
    stack = model.get_submodule(FAMILIES[family].DEPTH.stack)
    first, second = dict(stack[2].named_parameters()), dict(stack[3].named_parameters())
    assert first.keys() == second.keys() and all(first[name] is second[name] for name in first)
    assert all(parameter is not first[name] for name, parameter in stack[1].named_parameters())
    architecture = describe(family, source, HEADS[family], "pairs")
    prefix = FAMILIES[family].DEPTH.stack
    ties = {layer.name: layer.tied_to for layer in architecture.layers if layer.name.startswith(prefix)}
    expected = {
        name: name.replace(f"{prefix}.1.", f"{prefix}.0.").replace(f"{prefix}.3.", f"{prefix}.2.")
        for name in ties
    }
    assert ties == {name: None if name == owner else owner for name, owner in expected.items()}
    assert not architecture.sites, "a factor of one place would be another one's as well"
    empty = FAMILIES[family].empty(tmp_path / "load").get_submodule(prefix)
    assert [id(one) for one in empty[3].parameters()] == [id(one) for one in empty[2].parameters()]


def test_a_model_that_shares_is_picked_from_again(family: str, source: Path, tmp_path: Path) -> None:
    """The checkpoint of a shared model lacks what is shared; picking goes by what each block really is."""
    picked(family, source, [0, 0, 2, 2], tmp_path / "shared")
    shared = tmp_path / "shared"
    for blocks, numbers in (
        ("every-other", [0, 0]),
        ([1, 3], [0, 2]),
        ([3, 2], [2, 2]),
        (None, [0, 0, 2, 2]),
    ):
        folder = tmp_path / f"again-{'-'.join(map(str, numbers))}"
        model = (
            picked(family, shared, blocks, folder) if blocks else FAMILIES[family].load_float(shared, shared)
        )
        assert torch.equal(
            logits(model, family),
            logits(picked(family, source, numbers, folder.with_suffix(".other")), family),
        )


def test_a_checkpoint_that_lacks_more_than_what_is_shared_is_refused(
    family: str, source: Path, tmp_path: Path
) -> None:
    picked(family, source, "pairs", tmp_path / "load")
    config = json.loads((tmp_path / "load" / "config.json").read_text())
    del config[SHARED]
    (tmp_path / "load" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="lacks|no such tensor"):
        FAMILIES[family].load_float(tmp_path / "load", tmp_path / "load")
    with pytest.raises(ModelError):
        describe(family, tmp_path / "load", HEADS[family])


# By hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shared", "blocks", "expected", "own"),
    [
        (None, "every-other", {0: 0, 2: 1, 4: 2}, None),
        (None, "pairs", {0: 0, 2: 2, 4: 4}, [0, 0, 2, 2, 4]),
        (None, [4, 0, 4], {4: 0, 0: 1}, [0, 1, 0]),
        (None, range(2), {0: 0, 1: 1}, None),
        ([0, 0, 2, 2, 4], "every-other", {0: 0, 4: 2}, [0, 0, 2]),
        ([0, 0, 2, 2, 4], [1, 3], {0: 0, 2: 1}, None),
        ([0, 1, 0, 1, 4], "pairs", {0: 0, 4: 4}, [0, 0, 0, 0, 4]),
    ],
)
def test_numbers_become_names(shared: Any, blocks: Any, expected: dict[int, int], own: Any) -> None:
    config = {"n": 5, "other": 1} | ({} if shared is None else {SHARED: shared})
    new, names = choose(config, DEPTH, blocks)
    found = {number: names(f"model.h.{number}.a.weight") for number in range(5)}
    assert {number: name for number, name in found.items() if name} == {
        number: f"model.h.{place}.a.weight" for number, place in expected.items()
    }
    assert new.get(SHARED) == own and new["other"] == 1
    assert names("h.0.b") == (f"h.{expected[0]}.b" if 0 in expected else None)
    assert names("head.h.3.weight") == "head.h.3.weight" and names("wte.weight") == "wte.weight"


@pytest.mark.parametrize("blocks", [[5], [-1], [0, 9], []])
def test_a_block_that_is_not_there(blocks: list[int]) -> None:
    with pytest.raises(BlocksError, match=r"block -1|block 5|block 9|no block"):
        choose({"n": 5}, DEPTH, blocks)


def test_blocks_that_know_their_place_are_not_moved() -> None:
    config = {"n": 5, "by_place": True}
    depth = Depth("n", "stack", "h\\.", placed=("by_place",))
    assert choose(config, depth, [0, 1])[0]["n"] == 2
    for blocks in ([0, 2], "pairs", [1]):
        with pytest.raises(BlocksError, match="by_place"):
            choose(config, depth, blocks)
    assert choose({**config, "by_place": False}, depth, [0, 2])[0]["n"] == 2
    assert "scale_attn_by_inverse_layer_idx" in FAMILIES["gpt2"].DEPTH.placed


@pytest.mark.parametrize("n", ["4", None, True])
def test_a_count_that_is_none(n: Any) -> None:
    with pytest.raises(ModelError, match="must be an integer"):
        owners({"n": n, SHARED: [0, 0]}, DEPTH)


@pytest.mark.parametrize(
    "value", [[0, 0], [1, 1, 2, 3, 4], [0, 0, 1, 3, 4], [0, 1, 2, 3, True], "pairs", [0.0] * 5]
)
def test_a_list_that_makes_no_sense(value: Any) -> None:
    with pytest.raises(ModelError, match=SHARED):
        owners({"n": 5, SHARED: value}, DEPTH)


@pytest.mark.parametrize("name", ["resnet", "cifar-resnet", "efficientnet", "mobilenet-v2"])
def test_blocks_of_several_shapes_are_not_picked(name: str, tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    with pytest.raises(BlocksError, match="several shapes"):
        describe(name, tmp_path / "model", tiny_vit.HEAD, [0])
