"""GPT-2: what is said about it, against transformers' own model; and that nothing looks ahead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONTEXT, VOCABULARY, WIDTH, Line, make_checkpoint, token_ids
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, GPT2Model
from transformers.pytorch_utils import Conv1D

from qcompress.errors import ModelError
from qcompress.models import FAMILIES, describe, gpt2, load_tokenizer
from qcompress.models.folded import assemble
from qcompress.models.rebuild import rebuild
from qcompress.parity.runners import float_runner

KINDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied": False},
    "n_inner": {"inner": 96},
    "GPT2Model": {},
    "GPT2Model in half precision": {},
    "sharded": {"tied": False},
}


@pytest.fixture(params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, text_file: Path) -> Path:
    """Every layout a GPT-2 comes in."""
    folder = make_checkpoint(tmp_path / "model", text_file, **KINDS[request.param])
    if request.param.startswith("GPT2Model"):
        model = GPT2Model.from_pretrained(folder)
        (model.half() if "half" in request.param else model).save_pretrained(folder)
        assert "wte.weight" in load_file(folder / "model.safetensors")
    if request.param == "sharded":
        model = GPT2LMHeadModel.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_the_described_layers_are_those_of_the_stock_model(checkpoint: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(checkpoint)
    architecture = describe("gpt2", checkpoint)
    found = {layer.name: (layer.kind, layer.in_features, layer.out_features) for layer in architecture.layers}
    expected: dict[str, tuple[str, int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            expected[name] = ("embedding", module.embedding_dim, module.num_embeddings)
        elif isinstance(module, Conv1D):
            expected[name] = ("linear", *module.weight.shape)
        elif isinstance(module, nn.Linear):
            expected[name] = ("head", module.in_features, module.out_features)
    assert found == expected and len(found) == 11
    assert list(found) == list(expected)  # in the order of the forward pass
    tied = model.lm_head.weight is model.transformer.wte.weight
    assert architecture.layer("lm_head").tied_to == ("transformer.wte" if tied else None)
    assert architecture.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (architecture.context, architecture.vocabulary) == (CONTEXT, VOCABULARY)
    assert architecture.layer("transformer.wte").weights == VOCABULARY * WIDTH


def readers_of(model: nn.Module, norm: nn.Module) -> tuple[str, ...]:
    """The modules whose input is the norm's output, and nobody else sees it."""
    readers: list[str] = []
    outputs: list[Tensor] = []
    handles = [norm.register_forward_hook(lambda module, inputs, output: outputs.append(output))]
    for name, module in model.named_modules():
        if list(module.children()):
            continue

        def look(module: nn.Module, arguments: tuple[Any, ...], name: str = name) -> None:
            if outputs and arguments and arguments[0] is outputs[-1]:
                readers.append(name)

        handles.append(module.register_forward_pre_hook(look))
    model(token_ids(1))
    for handle in handles:
        handle.remove()
    return tuple(readers)


def test_blocks_and_rescaling_sites_are_modules_in_the_order_of_the_forward_pass(checkpoint: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(checkpoint)
    architecture = describe("gpt2", checkpoint)
    assert [model.get_submodule(name) for name in architecture.blocks] == list(model.transformer.h)
    norms = [site for site in architecture.sites if site.kind == "norm"]
    assert len(norms) == 4 and len(architecture.sites) == 6
    for site in norms:
        norm = model.get_submodule(site.writer)
        assert isinstance(norm, nn.LayerNorm) and norm.weight.numel() == site.channels
        assert readers_of(model, norm) == site.readers


def test_the_float_row_is_stock_transformers_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    model = gpt2.load_float(checkpoint)
    assert type(model) is GPT2LMHeadModel
    stock = {type(module) for module in GPT2LMHeadModel(model.config).modules()}
    assert {type(module) for module in model.modules()} == stock
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    independent = AutoModelForCausalLM.from_pretrained(
        checkpoint, attn_implementation="eager", dtype="float32"
    ).eval()
    ids = token_ids()
    with torch.no_grad():
        expected = independent(ids).logits
        assert torch.equal(model(ids).logits, expected)
    assert expected.std() > 0.3 and not model.training and model.dtype == torch.float32


def test_the_float_runner_gives_the_logits_of_an_independently_loaded_model(
    line: Callable[..., Line],
) -> None:
    made = line()
    runner = float_runner(made.float_model, torch.device("cpu"))
    assert type(runner.model) is GPT2LMHeadModel
    independent = AutoModelForCausalLM.from_pretrained(made.source, attn_implementation="eager").eval()
    ids, mask = token_ids(), torch.ones(3, CONTEXT, dtype=torch.int64)
    mask[1, 20:] = 0
    with torch.no_grad():
        expected = independent(ids, attention_mask=mask).logits
    found = torch.from_numpy(runner({"input_ids": ids.numpy(), "attention_mask": mask.numpy()}))
    assert torch.equal(found[mask.bool()], expected[mask.bool()])


# Nothing looks ahead ---------------------------------------------------------------------------------


def padded(length: int, left: int, right: int) -> Tensor:
    mask = torch.ones(1, length, dtype=torch.int64)
    mask[:, :left] = 0
    mask[:, length - right :] = 0
    return mask


FORMS = {"w8a8": "w8a8", "int4 blocks": {"weights": {"bits": 4, "block": 32}, "activations": "int8",
                                         "embeddings": "int8"}}  # fmt: skip


@pytest.mark.parametrize(("left", "right"), [(0, 0), (5, 0), (0, 6), (3, 4)])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_logit_does_not_move_when_a_later_token_or_padding_changes(
    line: Callable[..., Line], form: Any, left: int, right: int
) -> None:
    made = line(format=form).train().fold()
    ids, mask = token_ids(1), padded(CONTEXT, left, right)
    position = 14
    changed = ids.clone()
    changed[:, position + 1 :] = (changed[:, position + 1 :] + 7) % VOCABULARY
    changed[mask == 0] = 11  # what stands in the padding is nobody's business
    seen = slice(left, position + 1)
    for model in (rebuild(made.float_model, made.trained).model, assemble(made.folded)):
        with torch.no_grad():
            before, after = (
                model(**FAMILIES["gpt2"].graph_inputs(tokens, mask)).logits[0] for tokens in (ids, changed)
            )
        assert torch.equal(before[seen], after[seen])
        assert not torch.equal(before[position + 1 : CONTEXT - right], after[position + 1 : CONTEXT - right])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_what_is_measured(line: Callable[..., Line], side: str) -> None:
    """A short sequence by itself, and among padding: the same tokens at the same positions."""
    made = line(format="w8a8").train().fold()
    short = token_ids(1, 20)
    ids = torch.full((1, CONTEXT), 3)
    place = slice(CONTEXT - 20, CONTEXT) if side == "left" else slice(0, 20)
    ids[:, place] = short
    mask = torch.zeros_like(ids)
    mask[:, place] = 1
    with torch.no_grad():
        model = assemble(made.folded)
        alone = model(**FAMILIES["gpt2"].graph_inputs(short)).logits
        among = model(**FAMILIES["gpt2"].graph_inputs(ids, mask)).logits[:, place]
    torch.testing.assert_close(among, alone, rtol=0, atol=1e-4)  # sums over other lengths round differently


def test_positions_count_the_tokens_that_are_not_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = gpt2.graph_inputs(torch.zeros(2, 5, dtype=torch.int64), mask)
    assert tuple(inputs) == gpt2.INPUTS and inputs["attention_mask"] is mask
    assert inputs["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    plain = gpt2.graph_inputs(torch.zeros(2, 3, dtype=torch.int64))
    assert (
        plain["attention_mask"].tolist() == [[1] * 3] * 2
        and plain["position_ids"].tolist() == [[0, 1, 2]] * 2
    )


# Refusals --------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path, tiny_model: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "remove"}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "says model_type 'bert', and the recipe says family gpt2"),
        ({"model_type": "remove"}, "says model_type None"),
        ({"n_layer": "remove"}, "n_layer must be a positive integer, found None"),
        ({"n_embd": "64"}, "n_embd must be a positive integer, found '64'"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, found 0"),
        ({"n_positions": -1}, "n_positions must be a positive integer, found -1"),
        (
            {"n_layer": 3},
            r"h.2.attn.c_attn.weight: config.json asks for shape \[64, 192\], .* no such tensor",
        ),
        (
            {"n_embd": 32},
            r"wte.weight: config.json asks for shape \[300, 32\], the checkpoint has \[300, 64\]",
        ),
        (
            {"n_inner": 96},
            r"c_fc.weight: config.json asks for shape \[64, 96\], the checkpoint has \[64, 256\]",
        ),
        ({"n_positions": 33}, r"wpe.weight: config.json asks for shape \[33, 64\]"),
        ({"tie_word_embeddings": False}, r"lm_head.weight: .* the checkpoint has no such tensor"),
    ],
)
def test_a_config_that_is_not_the_checkpoints_is_refused(
    copy: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(copy, **changes)
    with pytest.raises(ModelError, match=message):
        describe("gpt2", copy)


def test_old_checkpoints_with_their_causal_masks_as_tensors_are_read(copy: Path, tiny_model: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        for block in (0, 1):
            tensors[f"transformer.h.{block}.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT).tril()
            tensors[f"transformer.h.{block}.attn.masked_bias"] = torch.tensor(-1e4)

    edit_tensors(copy, add)
    assert describe("gpt2", copy) == describe("gpt2", tiny_model)
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(gpt2.load_float(copy)(ids).logits, gpt2.load_float(tiny_model)(ids).logits)


def test_a_checkpoint_without_a_bias_is_refused_and_not_filled_at_random(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.pop("transformer.h.0.ln_1.bias"))
    with pytest.raises(
        ModelError, match=r"the checkpoint lacks transformer.h.0.ln_1.bias \(1 tensors in all\)"
    ):
        gpt2.load_float(copy)


def test_a_tied_config_with_another_head_in_the_file_is_refused(copy: Path) -> None:
    """transformers would untie them, and the one table would no longer be the model."""
    edit_tensors(copy, lambda t: t.update({"lm_head.weight": 1.5 * t["transformer.wte.weight"]}))
    with pytest.raises(ModelError, match="config.json ties lm_head to wte, and the checkpoint's lm_head"):
        gpt2.load_float(copy)
    edit_tensors(copy, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    model = gpt2.load_float(copy)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_tokenizer_is_the_checkpoints_own(tiny_model: Path, text_file: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    sample = text_file.read_text(encoding="utf-8")[:2000] + " \u00e9\u4e16\n"
    ids = tokenizer(sample, add_special_tokens=False)["input_ids"]
    assert max(ids) < VOCABULARY and len(ids) < 2000
    assert tokenizer.decode(ids) == sample


# A real checkpoint -----------------------------------------------------------------------------------


def test_a_real_byte_level_tokenizer_of_gpt2_round_trips_text(assets: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(assets / "tokenizers" / "gpt2" / name, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = load_tokenizer(tmp_path)
    text = (assets / "text" / "wikitext-2" / "wiki.test.tokens").read_text(encoding="utf-8")[:5000]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert 900 < len(ids) < 1500 and tokenizer.decode(ids) == text
