"""What lies in a checkpoint: values that are not numbers, names of wrappers, a tied head alone, shards that
lack. The oracle of a loaded model is stock transformers on the checkpoint before it was altered.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lines import cli, make_project
from safetensors.torch import load_file, save_file
from tiny import token_ids
from tiny_bert import save_encoder
from tiny_nets import FAMILY, save_net
from torch import Tensor
from transformers import GPT2LMHeadModel

from qcompress.errors import ModelError
from qcompress.models import FAMILIES
from qcompress.models.architecture import Head
from qcompress.models.checkpoint_files import read_tensors
from qcompress.pipeline.stages.load import fingerprint, load
from qcompress.schema.recipe import Model
from qcompress.system.artifacts import FloatModel

Tensors = dict[str, Tensor]


@pytest.fixture
def copy(tmp_path: Path, tiny_model: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def alter(folder: Path, change: Callable[[Tensors], Tensors | None]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors = change(tensors) or tensors
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, {"format": "pt"})
    return folder


def stock(source: Path) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(source, attn_implementation="eager").eval()


def loaded(source: Path, out: Path) -> tuple[GPT2LMHeadModel, list[str]]:
    """The model as the stages open it, and the notes of the load stage."""
    out.mkdir()
    notes = load(Model(family="gpt2", source=str(source)), source, fingerprint(source), out)
    model = FloatModel.of(out, "", source)
    return FAMILIES["gpt2"].load_float(model.source, model.path), notes


# Values that are not numbers ----------------------------------------------------------------------


def put(name: str, value: float, place: tuple[int, ...] = (0,)) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            put("transformer.h.1.mlp.c_fc.weight", float("nan"), (2, 3)),
            r"c_fc.weight has 1 of 16384.*\[2, 3\]",
        ),
        (
            put("transformer.h.0.attn.c_attn.weight", float("inf"), (5, 7)),
            r"c_attn.weight .*\[5, 7\] \(inf\)",
        ),
        (put("transformer.h.0.mlp.c_proj.bias", float("-inf"), (9,)), r"c_proj.bias .*\[9\] \(-inf\)"),
        (put("transformer.ln_f.weight", float("nan"), (0,)), r"ln_f.weight"),
        (put("transformer.wte.weight", float("nan"), (17, 1)), r"transformer.wte.weight .*\[17, 1\]"),
        (
            lambda tensors: {name: (value * 1e6).half() for name, value in tensors.items()},
            r"\(-?inf\).*and \d+ more tensors.*\n.*fp16 ends at 65504",
        ),
    ],
    ids=["nan weight", "inf weight", "inf bias", "norm", "table", "fp16 overflow"],
)
def test_a_value_that_is_not_finite_is_named(
    copy: Path, tmp_path: Path, change: Callable[[Tensors], Tensors | None], says: str
) -> None:
    with pytest.raises(ModelError, match=f"(?s){says}"):
        loaded(alter(copy, change), tmp_path / "load")


@pytest.mark.parametrize("kind", ["basic", "efficientnet", "cifar", "mobilenet"])
@pytest.mark.parametrize(
    ("statistic", "value"),
    [("running_mean", float("nan")), ("running_var", float("inf")), ("running_var", -1.0)],
)
def test_statistics_of_batch_norms_are_numbers_and_variances_are_not_negative(
    kind: str, statistic: str, value: float, tmp_path: Path
) -> None:
    family = FAMILY[kind]
    source = save_net(tmp_path / "net", kind)
    name = next(name for name in read_tensors(source) if name.endswith(statistic))
    alter(source, put(name, value, (3,)))
    with pytest.raises(ModelError, match=rf"{statistic} has 1 of \d+, the first at \[3\]"):
        FAMILIES[family].load_float(source)


def test_a_value_that_the_model_does_not_use_is_no_reason_to_refuse(tmp_path: Path, text_file: Path) -> None:
    source = save_encoder(tmp_path / "bert", text_file, "bert")
    alter(source, lambda tensors: {**tensors, "cls.predictions.bias": torch.full((4,), float("nan"))})
    FAMILIES["bert"].load_float(source)
    alter(source, put("bert.encoder.layer.0.output.dense.bias", float("nan")))
    with pytest.raises(ModelError, match="bert.encoder.layer.0.output.dense.bias has 1 of"):
        FAMILIES["bert"].load_float(source)


def test_a_run_ends_with_the_name_of_the_tensor_before_anything_is_trained(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "project", tiny_model, text_file)
    alter(project.folder / "model", put("transformer.h.1.ln_2.bias", float("nan"), (4,)))
    done = cli(*project.command())
    assert done.code == 2 and "transformer.h.1.ln_2.bias has 1 of 64, the first at [4] (nan)" in done.stderr
    assert "Traceback" not in done.stderr and not list(project.out.glob("*/latest"))


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "module.module."])
def test_the_names_of_a_wrapper_are_taken_off_and_told(
    copy: Path, tmp_path: Path, tiny_model: Path, wrapper: str
) -> None:
    ids = token_ids()
    expected = stock(tiny_model)(ids).logits
    alter(copy, lambda tensors: {f"{wrapper}{name}": value for name, value in tensors.items()})
    model, notes = loaded(copy, tmp_path / "load")
    assert torch.equal(model(ids).logits, expected)
    (note,) = notes
    assert f"{wrapper}transformer." in note


def test_a_wrapped_encoder_keeps_its_head_and_its_labels(tmp_path: Path, text_file: Path) -> None:
    source = save_encoder(tmp_path / "bert", text_file, "bert")
    whole = load_file(source / "model.safetensors")
    alter(source, lambda tensors: {f"module.{name}": value for name, value in tensors.items()})
    out = tmp_path / "load"
    out.mkdir()
    head = Head("sequence-classification", None, None)
    load(Model(family="bert", source=str(source)), source, fingerprint(source), out, head)
    model = FAMILIES["bert"].load_float(FloatModel.of(out, "", source).source, out)
    state = model.state_dict()
    assert "classifier.weight" in whole and all(
        torch.equal(state[name], value) for name, value in whole.items()
    )


def test_a_prefix_that_only_some_tensors_have_is_no_wrapper(copy: Path, tmp_path: Path) -> None:
    def some(tensors: Tensors) -> Tensors:
        return {(f"module.{name}" if ".h.1." in name else name): value for name, value in tensors.items()}

    with pytest.raises(ModelError, match="no such tensor"):
        loaded(alter(copy, some), tmp_path / "load")


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_a_tied_head_alone_is_the_table(copy: Path, tmp_path: Path, tiny_model: Path, wrapper: str) -> None:
    ids = token_ids()
    expected = stock(tiny_model)(ids).logits

    def head_alone(tensors: Tensors) -> Tensors:
        tensors = {name: value for name, value in tensors.items() if name != "lm_head.weight"}
        tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
        return {f"{wrapper}{name}": value for name, value in tensors.items()}

    model, notes = loaded(alter(copy, head_alone), tmp_path / "load")
    assert torch.equal(model(ids).logits, expected)
    assert model.lm_head.weight is model.transformer.wte.weight and len(notes) == 1


def test_an_untied_head_alone_is_not_the_table(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))

    def head_alone(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")

    alter(copy, head_alone)
    with pytest.raises(ModelError, match="transformer.wte.weight: .*no such tensor"):
        loaded(copy, tmp_path / "load")


# Shards -------------------------------------------------------------------------------------------


def _index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    change(content["weight_map"])
    file.write_text(json.dumps(content))


BROKEN: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing": (lambda folder, shard: shard.unlink(), "is missing"),
    "a folder": (lambda folder, shard: (shard.unlink(), shard.mkdir()), "is missing"),
    "empty": (lambda folder, shard: shard.write_bytes(b""), "not a readable safetensors file"),
    "truncated": (lambda folder, shard: shard.write_bytes(shard.read_bytes()[:-100]), "its header promises"),
    "a tensor that no shard has": (
        lambda folder, shard: _index(folder, lambda names: names.update({"transformer.x": shard.name})),
        "says that transformer.x is in .*, and no shard holds it",
    ),
    "a tensor of another shard": (
        lambda folder, shard: _index(
            folder, lambda names: names.update(dict.fromkeys(sorted(names)[:1], sorted(names.values())[-1]))
        ),
        "says that .* is in .*, and it is in ",
    ),
    "no tensor": (lambda folder, shard: _index(folder, lambda names: names.clear()), "it names no tensor"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_check_and_run_say_the_same_of_shards_that_are_not_whole(
    how: str, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "project", tiny_model, text_file)
    folder = project.folder / "model"
    (folder / "model.safetensors").unlink()
    GPT2LMHeadModel.from_pretrained(tiny_model).save_pretrained(folder, max_shard_size="100KB")
    spoil, says = BROKEN[how]
    spoil(folder, sorted(folder.glob("model-*.safetensors"))[1])
    checked, ran = cli("check", project.recipe), cli(*project.command())
    assert checked.code == ran.code == 2
    for done in (checked, ran):
        assert re.search(says, done.stderr) and "Traceback" not in done.stderr
