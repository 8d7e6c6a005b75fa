"""Folding: the same function to the last bit, in integers, without a trace of how it was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONTEXT, VOCABULARY, WIDTH, Line, token_ids
from torch import Tensor

from qcompress.errors import ContractError, ExportError
from qcompress.models import FAMILIES
from qcompress.models.folded import assemble
from qcompress.models.rebuild import rebuild
from qcompress.pipeline.stages.fold import check_compute, check_scale, fold
from qcompress.quant.layers import QuantizedWeight
from qcompress.system.artifacts import FoldedModel, TrainedModel

BLOCK = {"bits": 4, "block": 32}
FORMATS: dict[str, Any] = {
    "w8a8": "w8a8",
    "w8a16": "w8a16",
    "int4 blocks": "w4a16-g32",
    "int4 blocks with int8 activations": {"weights": BLOCK, "activations": "int8", "embeddings": "int8"},
    "int4 in int8": "w4a8",
    "int8 blocks": {"weights": {"bits": 8, "block": 64}, "activations": "int8", "embeddings": "int8"},
    "float tables": {"preset": "w8a8", "embeddings": "float"},
    "tables only": {"embeddings": "int8"},
    "int4 tables": {"preset": "w8a8", "embeddings": BLOCK},
    "int3 in int8": "w3a8",
    "int2 in int8": "w2a8",
    "int2 blocks": {"weights": {"bits": 2, "block": 32}, "embeddings": {"bits": 3}},
    "ternary, one scale": "ternary-a8",
    "int8, one scale": {"preset": "w8a8", "weights": {"granularity": "tensor"}},
    "one float layer, one int4": {
        "preset": "w8a8",
        "layers": {"transformer.h.0.mlp.*": "float", "transformer.h.1.mlp.c_fc": {"weights": BLOCK}},
    },
}


def mask_inputs(ids: Tensor, side: str) -> dict[str, Tensor]:
    """Inputs of the exported graph with padding of several lengths."""
    mask = torch.ones_like(ids)
    for row in range(len(ids)):
        mask[row, : 3 * row if side == "left" else 0] = 0
        mask[row, CONTEXT - (3 * row if side == "right" else 0) :] = 0
    inputs = FAMILIES["gpt2"].graph_inputs(ids, mask)
    return {name: value for name, value in inputs.items() if name != "input_ids"}


@pytest.fixture(params=["tied", "untied"])
def source(request: pytest.FixtureRequest) -> Path:
    """A checkpoint whose head shares its table, and one whose head does not."""
    return request.getfixturevalue({"tied": "tiny_model", "untied": "untied_model"}[request.param])


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_the_folded_model_computes_the_bits_of_the_trained_one(
    line: Callable[..., Line], source: Path, form: Any
) -> None:
    made = line(source=source, format=form).train().fold()
    ids = token_ids()
    assert not torch.equal(made.logits("fold", ids), made.logits("float", ids))
    trained, folded = rebuild(made.float_model, made.trained).model, assemble(made.folded)
    with torch.no_grad():
        for some in (ids, ids[:1], ids[:2, :7], ids[:1, :1]):
            assert torch.equal(trained(some).logits, folded(some).logits)
        for side in ("left", "right"):
            inputs = mask_inputs(ids, side)
            assert torch.equal(trained(ids, **inputs).logits, folded(ids, **inputs).logits)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_the_file_holds_codes_scales_and_the_float_rest_and_nothing_else(
    line: Callable[..., Line], source: Path, form: Any
) -> None:
    made = line(source=source, format=form).train().fold()
    tensors, checkpoint = made.tensors("fold"), load_file(source / "model.safetensors")
    expected = set(checkpoint)
    for item in made.plan:
        if item.weights is None:
            continue
        name, layer = item.name, item.layer
        if item.activations:
            expected.add(f"{name}.input.scale")
            assert tensors[f"{name}.input.scale"].shape == ()
        if layer.tied_to:
            continue
        expected = expected - {f"{name}.weight"} | {f"{name}.weight.codes", f"{name}.weight.scale"}
        table = layer.kind == "embedding"
        shape = (layer.out_features, layer.in_features) if table else (layer.in_features, layer.out_features)
        codes, scale = tensors[f"{name}.weight.codes"], tensors[f"{name}.weight.scale"]
        assert codes.dtype == torch.int8 and tuple(codes.shape) == shape
        block = item.weights.block
        blocked = (
            tuple(size // block if axis == int(table) else size for axis, size in enumerate(shape))
            if block
            else ()
        )
        assert tuple(scale.shape) == (blocked or (layer.out_features,))
        low, high = item.weights.bounds
        assert low <= int(codes.min()) and int(codes.max()) <= high
        if item.weights.granularity == "tensor":
            assert len(scale.unique()) == 1 and int(codes.abs().max()) == high  # the largest may be negative
        else:
            assert int(codes.max()) == high and len(scale.unique()) > 1  # absmax uses the whole range
    assert set(tensors) == expected
    for name in expected & set(checkpoint):
        assert torch.equal(tensors[name], checkpoint[name]), name
    facts = json.loads((made.folded.path / "folded.json").read_text())
    assert facts["codes"] == sum(tensor.numel() for tensor in tensors.values() if tensor.dtype == torch.int8)


def test_ternary_codes_are_folded_by_the_threshold_that_training_left_and_not_by_rounding(
    line: Callable[..., Line],
) -> None:
    options = {"format": "ternary-a8", "method": "lsq", "quantizer": "ternary", "steps": 4}
    made = line(**options, train={"lr": {"weight": 3e-3}}).train().fold()
    trained, folded = made.tensors("train"), made.tensors("fold")
    names = [item.name for item in made.plan if item.weights and not item.layer.tied_to]
    assert len(names) == 10
    assert {name for name in trained if name.endswith(".threshold")} == {
        f"{n}.weight.threshold" for n in names
    }
    assert not any("threshold" in name for name in folded)
    differ = 0
    for name in names:
        weight, codes = trained[f"{name}.weight"], folded[f"{name}.weight.codes"]
        scale, threshold = trained[f"{name}.weight.scale"], trained[f"{name}.weight.threshold"]
        table = name in ("transformer.wte", "transformer.wpe")
        assert scale.shape == threshold.shape == ((len(weight),) if table else ())
        aligned = [values[:, None] if table else values for values in (scale, threshold)]
        expected = weight.sign() * (weight.abs() > aligned[1])
        assert torch.equal(codes.float(), expected)
        assert (folded[f"{name}.weight.scale"] == scale).all()
        differ += int(((weight / aligned[0]).round().clamp(-1, 1) != expected).sum())
    assert differ > 100
    plain = line(format="ternary-a8", method="lsq", steps=1).train().tensors("train")
    assert not any("threshold" in name for name in plain)


def test_a_weight_is_its_codes_times_its_scales_within_half_a_step(
    line: Callable[..., Line], source: Path
) -> None:
    made = line(source=source, format="w8a8").train().fold()
    tensors, checkpoint = made.tensors("fold"), load_file(source / "model.safetensors")
    names = [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]
    assert len(names) == (10 if "lm_head.weight" not in checkpoint else 11)
    for name in names:
        weight, scale = checkpoint[name], tensors[f"{name}.scale"]
        if name == "lm_head.weight":
            weight = weight.t()
        aligned = scale[:, None] if name.endswith(("wte.weight", "wpe.weight")) else scale
        error = (tensors[f"{name}.codes"] * aligned - weight).abs() / aligned
        assert 0.3 < float(error.max()) <= 0.5 + 1e-4, name


def test_config_and_tokenizer_go_along_and_the_stages_own_files_do_not(line: Callable[..., Line]) -> None:
    made = line()
    (made.float_model.path / "manifest.json").write_text("{}")
    made.train().fold()
    names = {file.name for file in made.folded.path.iterdir()}
    assert names == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "folded.json",
        "folded.safetensors",
    }


def test_folding_twice_gives_the_same_bytes_and_knows_nothing_of_the_method(
    line: Callable[..., Line],
) -> None:
    made = line(method="quadapter", steps=2).train().fold()
    first = {file.name: file.read_bytes() for file in made.folded.path.iterdir()}
    facts = made.facts()
    facts["phases"] = [{"name": "something else"}]
    (made.trained.path / "trained.json").write_text(json.dumps(facts))
    shutil.rmtree(made.folded.path)
    made.fold()
    assert {file.name: file.read_bytes() for file in made.folded.path.iterdir()} == first
    assert not any(
        word in name for name in made.tensors("fold") for word in ("theta", "ratio", "rescale", "quantizer")
    )


def test_in_half_precision_every_float_is_half_and_the_codes_stay(line: Callable[..., Line]) -> None:
    made = line(format={"preset": "w8a8", "compute": "fp16"}).train().fold()
    model = assemble(made.folded, torch.float16)
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {kind for name, kind in kinds.items() if name.endswith(".codes")} == {torch.int8}
    assert {kind for name, kind in kinds.items() if not name.endswith(".codes")} == {torch.float16}
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
    ids = token_ids()
    with torch.no_grad():
        half = model(ids).logits.float()
    assert float((half - made.logits("fold", ids)).abs().mean()) < 0.05  # inputs near a tie round otherwise


# Refusals --------------------------------------------------------------------------------------------


def with_tensors(made: Line, change: Callable[[dict[str, Tensor]], object]) -> Line:
    """The line with its trained tensors changed."""
    folder = made.folder / "changed"
    shutil.copytree(made.trained.path, folder / "train")
    tensors = made.tensors()
    change(tensors)
    save_file(tensors, folder / "train" / "trained.safetensors")
    return replace(made, folder=folder)


@pytest.mark.parametrize("value", [0.0, -1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight", "transformer.h.0.attn.c_attn.input"]
)
def test_a_scale_that_tensorrt_would_refuse_is_refused_by_name(
    line: Callable[..., Line], name: str, value: float
) -> None:
    made = line().train()

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}.scale"].view(-1)[-1] = value

    with pytest.raises(ContractError, match=rf"{name}: scales must be positive and finite"):
        with_tensors(made, spoil).fold()
    check_scale(torch.tensor([1e-8, 1.0]), "fine")


LAYER = "transformer.h.1.mlp.c_fc"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (f"{LAYER}.weight.scale", 2e-8, r"the scale 2e-08 becomes 0 in fp16"),
        (f"{LAYER}.weight.scale", 7e4, r"7e\+04 is beyond the largest fp16, 65504"),
        (f"{LAYER}.bias", -1e5, r"1e\+05 is beyond the largest fp16, 65504"),
        ("transformer.ln_f.weight", 65520.0, r"beyond the largest fp16"),
    ],
)
def test_what_half_precision_does_not_hold_is_refused_by_name(
    line: Callable[..., Line], name: str, value: float, words: str
) -> None:
    made = line(format={"preset": "w8a8", "compute": "fp16"}, method="lsq").train()

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    changed = with_tensors(made, spoil)
    with pytest.raises(ExportError, match=rf"{name}: .*{words}") as refused:
        changed.fold()
    assert refused.value.exit_code == 5 and "bf16" in refused.value.fix
    whole = with_tensors(line(method="lsq").train(), spoil)
    whole.fold()  # fp32 holds it
    for compute in ("fp32", "bf16"):
        assert check_compute({name: torch.tensor([value])}, compute) == {}


def test_what_is_not_a_number_hides_no_overflow_and_fp32_loses_nothing() -> None:
    with pytest.raises(ExportError, match=r"x: 7e\+04 is beyond the largest fp16"):
        check_compute({"x": torch.tensor([float("nan"), 7e4])}, "fp16")
    assert check_compute({"x.scale": torch.tensor([1e-40])}, "fp32") == {}


def test_scales_that_lose_digits_in_half_precision_are_told(line: Callable[..., Line]) -> None:
    """3.3e-7 is 5.54 of fp16's smallest steps of 2**-24: 6 of them are 8.4 % more."""
    made = line(format={"preset": "w8a8", "compute": "fp16"}).train()
    assert fold_notes(made) == []
    changed = with_tensors(made, lambda tensors: tensors[f"{LAYER}.weight.scale"].view(-1)[-1:].fill_(3.3e-7))
    (note,) = fold_notes(changed)
    assert note.startswith("scales below the smallest normal fp16 lose digits in 1 tensors: 8.4 % in ")
    assert f"{LAYER}.weight.scale" in note


def fold_notes(made: Line) -> list[str]:
    made.folded.path.mkdir()
    return fold(made.float_model, made.trained, made.folded.path)


def test_codes_outside_their_format_are_refused(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = line(format="w4a8").train()
    codes = QuantizedWeight.codes
    monkeypatch.setattr(QuantizedWeight, "codes", lambda layer: (codes(layer)[0] + 1, codes(layer)[1]))
    with pytest.raises(ContractError, match=r"transformer.h.0.attn.c_attn: codes outside \[-8, 7\]"):
        made.fold()


@pytest.mark.parametrize("change", ["an unknown tensor", "a missing tensor"])
def test_a_folded_file_that_is_not_the_models_is_refused(line: Callable[..., Line], change: str) -> None:
    made = line().train().fold()
    tensors, name = made.tensors("fold"), "transformer.ln_f.bias"
    if change == "an unknown tensor":
        tensors[f"{name}.old"] = tensors[name].clone()
    else:
        del tensors[name]
    save_file(tensors, made.folded.path / "folded.safetensors")
    with pytest.raises(ContractError, match=r"the model and the file differ in \['transformer.ln_f.bias"):
        assemble(FoldedModel(made.folded.path))


def test_a_trained_folder_without_its_facts_is_refused(line: Callable[..., Line], tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="trained.json is missing from a finished stage"):
        fold(line().float_model, TrainedModel(tmp_path), tmp_path)


def test_sizes_of_the_model_are_those_this_file_assumes(line: Callable[..., Line]) -> None:
    layers = {layer.name: layer for layer in line().architecture.layers}
    assert len(layers) == 11
    assert (layers["transformer.wte"].out_features, layers["transformer.wte"].in_features) == (
        VOCABULARY,
        WIDTH,
    )
