"""Weight scales behind large biases: no int32 bias of a runtime saturates, and the function stays.

The oracle is ONNX Runtime with all optimizations off against its default session, opened here without any of
the package's code; the bound is checked with numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import Line, token_ids
from tiny_nets import NetLine, net_line, pixels, recipe_values, save_images, save_net

from qcompress import api
from qcompress.pipeline.stages.export import export
from qcompress.pipeline.stages.fold import fold
from qcompress.pipeline.stages.verify import _raised
from qcompress.quant.int32_bias import least_scales, raise_scales
from qcompress.schema.recipe import Export
from qcompress.system.artifacts import read_json

LIMIT = 2.0**30


def norms(tensors: dict[str, torch.Tensor], *gammas: float) -> None:
    """Channels of every batch norm nearly (or wholly) switched off, with a shift that stays: one third with
    one gamma, one sixth with each of several.
    """
    for name in [name for name in tensors if name.endswith("running_mean")]:
        owner = name.removesuffix(".running_mean")
        for place, gamma in enumerate(gammas):
            some = slice(place, None, 3 if len(gammas) == 1 else 6)
            tensors[f"{owner}.weight"][some] = gamma
            tensors[f"{owner}.bias"][some] = torch.linspace(-1, 1, len(tensors[f"{owner}.bias"][some])) + 0.1


def classifier(tensors: dict[str, torch.Tensor], weight: float, bias: float) -> None:
    """One output of the linear classifier with tiny weights, another one with a large bias."""
    name = next(name for name in tensors if name.endswith("weight") and tensors[name].shape[0] == 6)
    tensors[name][1] *= weight
    tensors[name.replace("weight", "bias")][1] = bias


PLANTED: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "gamma 1e-12": lambda tensors: norms(tensors, 1e-12),
    "gamma 1e-6, -1e-9 and 0": lambda tensors: norms(tensors, 1e-6, -1e-9, 0.0),
    "tiny linear weights": lambda tensors: classifier(tensors, 1e-12, 2.0),
    "no linear weights": lambda tensors: classifier(tensors, 0.0, 200.0),
}


def planted(
    folder: Path, kind: str, change: Callable[[dict[str, torch.Tensor]], None], **form: Any
) -> NetLine:
    source = save_net(folder / "model", kind)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    archive = save_images(folder / "images.npz")
    return net_line(folder / "line", kind, archive, source=source, **form).train().fold()


def logits(file: Path, x: np.ndarray, *, optimized: bool) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"pixel_values": x})[0]


def quotients(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """|bias| / (input scale * weight scale) of every channel with all three."""
    found = []
    for name in tensors:
        layer = name.removesuffix(".weight.scale")
        if layer != name and f"{layer}.bias" in tensors and f"{layer}.input.scale" in tensors:
            bias, scale, own = (
                tensors[f"{layer}.{part}"].double().numpy()
                for part in ("bias", "input.scale", "weight.scale")
            )
            found.append(np.abs(bias) / (scale * own))
    assert len(found) >= 4
    return np.concatenate(found)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("basic", change) for change in PLANTED),
        ("cifar", "gamma 1e-12"),
        ("cifar", "gamma 1e-6, -1e-9 and 0"),
    ],
)
def test_the_default_session_computes_what_the_graph_says(tmp_path: Path, kind: str, change: str) -> None:
    line = planted(tmp_path, kind, PLANTED[change])
    assert quotients(load_file(line.folded.path / "folded.safetensors")).max() <= LIMIT * (1 + 1e-6)
    out = tmp_path / "export"
    out.mkdir()
    export(line.folded, Export(), "cpu", {"version": "0", "recipe": "tiny"}, out)
    x = pixels(24)
    plain, default = (logits(out / "model.onnx", x.numpy(), optimized=one) for one in (False, True))
    span = np.ptp(plain)
    assert span > 0 and np.abs(default - plain).mean() <= 0.01 * span
    # what fold raised changes nothing that fp32 could show
    folded, trained = line.logits("fold", x).numpy(), line.logits("train", x).numpy()
    assert np.abs(folded - trained).mean() <= 2e-3 * span


def test_the_counts_stand_in_folded_json_and_sizes_json_and_in_the_notes(tmp_path: Path) -> None:
    line = planted(tmp_path, "basic", PLANTED["gamma 1e-12"])
    (tmp_path / "again").mkdir()
    notes = fold(line.float_model, line.trained, tmp_path / "again")
    raised = read_json(line.folded.path / "folded.json")["raised"]
    count = sum(layer["scales"] for layer in raised.values())
    assert count > 20 and all(layer["codes"] > 0 for layer in raised.values())
    assert [note for note in notes if f"{count} weight scales of {len(raised)} layers are raised" in note]
    out = tmp_path / "export"
    out.mkdir()
    export(line.folded, Export(), "cpu", {"version": "0", "recipe": "tiny"}, out)
    sizes = read_json(out / "sizes.json")
    assert sizes["raised_scales"] == count
    assert {layer["name"]: layer["raised_scales"] for layer in sizes["layers"] if layer["raised_scales"]} == {
        name: layer["scales"] for name, layer in raised.items()
    }


@pytest.mark.parametrize(
    "form",
    [
        {"format": {"preset": "w8a16"}},
        {"format": "w8a8", "data": None},
    ],
    ids=["float inputs", "ordinary weights"],
)
def test_no_scale_is_raised_where_no_bias_saturates(tmp_path: Path, form: dict[str, Any]) -> None:
    form = {key: value for key, value in form.items() if value is not None}
    change = PLANTED["gamma 1e-12"] if form["format"] != "w8a8" else lambda tensors: None
    line = planted(tmp_path, "basic", change, **form)
    assert read_json(line.folded.path / "folded.json")["raised"] == {}


FORMATS = {
    "w8a8": {"format": "w8a8"},
    "one scale of a tensor": {"format": {"preset": "w8a8", "weights": {"granularity": "tensor"}}},
    "int4": {"format": {"preset": "w4a8"}},
    "fp16": {"format": {"preset": "w8a8", "compute": "fp16"}},
    "blocks": {"format": {"weights": {"bits": 4, "block": 32}, "activations": "int8"}},
}


@pytest.mark.parametrize("name", FORMATS)
def test_linear_layers_of_a_transformer(
    line: Callable[..., Line], tiny_model: Path, tmp_path: Path, name: str
) -> None:
    """Columns of 1e-9 and of 0 behind biases of 1: GPT-2 stores [in, out]."""
    source = tmp_path / "model"
    source.mkdir()
    for file in tiny_model.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    layer = "transformer.h.0.mlp.c_fc"
    tensors[f"{layer}.weight"][:, 3] *= 1e-7 if name == "fp16" else 1e-9
    tensors[f"{layer}.weight"][:, 5] = 0
    tensors[f"{layer}.bias"][3:6] = 40.0 if name == "fp16" else 1.0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    made = line(source=source, **FORMATS[name]).train().fold()
    raised, found = read_json(made.folded.path / "folded.json")["raised"], made.tensors("fold")
    if name == "blocks":
        assert raised == {}
        return
    own, bias = found[f"{layer}.weight.scale"].double(), found[f"{layer}.bias"].double()
    assert (bias.abs() / (own * found[f"{layer}.input.scale"].double())).max() <= LIMIT * (1 + 1e-6)
    if name in ("w8a8", "int4"):
        assert raised[layer]["scales"] >= 2
    ids = token_ids()
    exact, got = made.logits("train", ids).numpy(), made.logits("fold", ids).numpy()
    assert np.abs(exact - got).max() <= 1e-5 * np.ptp(exact)


def test_a_raised_channel_moves_by_less_than_the_rounding_of_its_bias() -> None:
    random = np.random.default_rng(0)
    codes = torch.from_numpy(random.integers(-128, 128, (64, 300)).astype(np.int8))
    scale = torch.from_numpy((10.0 ** random.uniform(-30, -1, 64)).astype(np.float32))
    bias = torch.from_numpy(random.normal(0, 3, 64).astype(np.float32))
    own = torch.tensor(0.02)
    changed, raised, count, moved = raise_scales(codes, scale, least_scales(bias, own))
    before, after = (c.numpy() * s.double().numpy()[:, None] for c, s in ((codes, scale), (changed, raised)))
    inputs = 128 * 0.02 * np.ones(300)
    drift = np.abs(before - after) @ inputs
    assert (drift <= 300 * np.abs(bias.numpy()) * 2.0**-24 * 1.001).all()
    kept = (raised == scale).numpy()
    assert count == int((~kept).sum()) and 5 < count < 64 and moved == int((codes != changed).sum()) > 0
    assert torch.equal(changed[kept], codes[kept])
    assert (np.abs(bias.numpy()) / (0.02 * raised.numpy()) <= LIMIT * (1 + 1e-6)).all()


def test_a_scale_at_the_bound_stays_and_a_bias_of_0_asks_for_nothing() -> None:
    codes, scale = torch.tensor([[-128, 127]] * 3, dtype=torch.int8), torch.tensor([1.0, 1e-30, 2.0])
    least = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    changed, raised, count, moved = raise_scales(codes, scale, least)
    assert (count, moved) == (0, 0) and torch.equal(changed, codes) and torch.equal(raised, scale)


@pytest.mark.parametrize("compute", [torch.float32, torch.float16, torch.bfloat16])
def test_a_raised_scale_is_a_value_of_the_compute_type(compute: torch.dtype) -> None:
    """Rounded up: a bound of 1.1e-6 is a subnormal of fp16, where the next value below is 6 % smaller."""
    least = torch.tensor([1.1e-6, 3.3e-5, 0.25, 1.0000001], dtype=torch.float64)
    codes = torch.full((4, 3), 100, dtype=torch.int8)
    _, raised, count, _ = raise_scales(codes, torch.full((4,), 1e-7), least, compute)
    assert count == 4 and torch.equal(raised.to(compute).float(), raised)
    assert bool((raised.double() >= least).all())
    assert bool((raised.double() / least < 1 + {2: 0.06, 4: 3e-7}[compute.itemsize]).all())


def test_a_raised_scale_counts_where_no_code_changes() -> None:
    """Codes of -1, 0 and 1 under a scale raised by less than 2: the folded weight differs all the same."""
    codes = torch.tensor([[1, 0, -1]], dtype=torch.int8)
    changed, raised, scales, count = raise_scales(codes, torch.tensor([1.0]), torch.tensor([1.7]).double())
    assert torch.equal(changed, codes) and (scales, count) == (1, 0) and raised.item() > 1.6
    assert _raised({"raised": {"fc": {"scales": scales, "codes": count}}}) == 1


@pytest.mark.parametrize(("raises", "word"), [(True, "accept"), (False, "regression")])
def test_the_default_session_of_a_graph_made_elsewhere_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raises: bool, word: str
) -> None:
    """There is no folded model: it is held against the same graph without optimizations."""
    if not raises:
        monkeypatch.setattr("qcompress.pipeline.stages.fold._raise_scales", lambda *parts: {})
    line = planted(tmp_path, "basic", PLANTED["gamma 1e-12"])
    out = tmp_path / "export"
    out.mkdir()
    export(line.folded, Export(), "cpu", {"version": "0", "recipe": "tiny"}, out)
    values = recipe_values("basic", "images.npz")
    recipe = {
        **{key: values[key] for key in ("name", "model", "task")},
        "data": {"evaluate": values["data"]["evaluate"]},
        "export": {"graph": "export/model.onnx"},
        "build": {"target": "cpu", "here": "never"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = api.run(tmp_path / "recipe.yaml", tmp_path / "runs")
    verdict = read_json(run.path / "verdict.json")
    assert verdict["verdict"] == word, verdict["reasons"]
    assert any("deployed: mean_abs to onnx" in reason for reason in verdict["reasons"]) != raises
