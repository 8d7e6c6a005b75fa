"""Layers that one forward pass calls more than once: one weight, one scale, a Q/DQ pair for each call."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import called_twice_nets
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from lines import cli, plain_session
from onnx import numpy_helper
from safetensors.numpy import load_file
from torch import nn

from qcompress.graph.certificate.layers import certify
from qcompress.models.plan import plans_from_json
from qcompress.models.structure import discover
from qcompress.system.artifacts import read_json

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported graph of `called_twice_nets` at W8A8."""
    folder = tmp_path_factory.mktemp("twice")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCOMPRESS_STRUCTURES", str(folder / "structures"))
        shutil.copyfile(HERE / "called_twice_nets.py", folder / "called_twice_nets.py")
        random = np.random.default_rng(0)
        images, labels = random.integers(0, 256, (24, 16, 16, 3), np.uint8), np.arange(24) % 3
        np.savez(folder / "images.npz", image=images, label=labels)
        data = {"npz": ["images.npz"], "columns": {"image": "image", "label": "label"}}
        values = {
            "name": "twice", "model": {"python": "called_twice_nets.py"}, "format": "w8a8", "method": "ptq",
            "task": {"name": "image-classification", "mean": [0.5] * 3, "std": [0.5] * 3},
            "data": {"calibration": data, "evaluate": {"test": data}}, "build": {"target": "cpu"},
        }  # fmt: skip
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        done = cli("run", folder / "recipe.yaml", "--out", folder / "runs")
        assert done.code == 0, done.stderr + done.stdout
    return (folder / "runs" / "twice" / "latest").resolve()


def pairs(model: onnx.ModelProto, layer: str) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Quantizer of the input and operation of each call of a layer, by the graph's edges."""
    makers = {name: node for node in model.graph.node for name in node.output}
    decoded = {
        node.output[0] for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] == f"{layer}.weight.codes"
    }  # fmt: skip
    decoded |= {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Transpose" and node.input[0] in decoded
    }
    found = []
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm") and node.input[1] in decoded:
            quantize = makers[node.input[0]]
            while quantize.op_type != "QuantizeLinear":
                quantize = makers[quantize.input[0]]
            found.append((quantize, node))
    return found


def test_two_calls_share_the_codes_and_the_scale_of_the_larger_range(run: Path) -> None:
    """The scale is the largest input of both calls over 127."""
    model = onnx.load(run / "model.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    net = called_twice_nets.make()[0].eval()
    seen: dict[str, list[float]] = {"linear": [], "shared": []}
    for name, peaks in seen.items():
        net.get_submodule(name).register_forward_pre_hook(
            lambda module, args, peaks=peaks: peaks.append(float(args[0].abs().max()))
        )
    images = np.load(run.parents[2] / "images.npz")["image"]
    with torch.no_grad():
        net(torch.from_numpy(images).movedim(-1, 1) / 127.5 - 1)
    assert seen["linear"][1] > 2 * seen["linear"][0]
    for name, peaks in seen.items():
        calls = pairs(model, f"model.{name}")
        assert len(calls) == 2 and calls[0][0].output[0] != calls[1][0].output[0]
        for quantize, _ in calls:
            assert stored[quantize.input[1]] == pytest.approx(max(peaks) / 127, rel=2e-2)
    codes = Counter(name for name in stored if name.endswith("weight.codes"))
    assert codes["model.linear.weight.codes"] == codes["model.shared.weight.codes"] == 1


def test_the_graph_computes_the_net(run: Path) -> None:
    """Against the float net, which the 8 bits follow."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(run / "model.onnx", options, providers=["CPUExecutionProvider"])
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = called_twice_nets.make()[0].eval()(x).numpy()
    assert np.abs(found - expected).max() < 0.03 * np.ptp(expected)
    layers = {item.name: item.layer for item in plan_of(run)}
    assert layers["model.shared"].calls == 2
    assert layers["model.linear"].calls == 2 and not layers["model.linear"].nonnegative


def test_two_batch_norms_behind_two_calls_fold_into_nothing() -> None:
    net = called_twice_nets.Twice(nn.BatchNorm2d).eval()
    found = discover(net, {"x": torch.randn(2, 3, 16, 16)}, {"x": torch.randn(2, 3, 12, 12)})
    layers = {layer.name: layer for layer in found.layers}
    assert (layers["shared"].calls, layers["shared"].norm) == (2, None)
    assert not [site for site in found.sites if {"shared", "linear"} & {site.writer, *site.readers}]


def folded_of(run: Path) -> Path:
    return next(path.parent for path in run.parents[1].rglob("folded.safetensors"))


def plan_of(run: Path):
    return plans_from_json(read_json(folded_of(run) / "folded.json")["plan"])


@pytest.mark.parametrize("call", [0, 1])
def test_a_wrong_scale_in_one_call_is_found(run: Path, call: int, tmp_path: Path) -> None:
    model = onnx.load(run / "model.onnx")
    plan, folded = plan_of(run), folded_of(run)
    onnx.save(model, tmp_path / "same.onnx")
    assert certify(tmp_path / "same.onnx", folded, plan)["complete"]
    quantize, _ = pairs(model, "model.linear")[call]
    scale = load_file(folded / "folded.safetensors")["model.linear.input.scale"]
    model.graph.initializer.append(numpy_helper.from_array(scale * np.float32(1.01), "wrong"))
    quantize.input[1] = "wrong"
    onnx.save(model, tmp_path / "wrong.onnx")
    certificate = certify(tmp_path / "wrong.onnx", folded, plan)
    assert [layer["name"] for layer in certificate["layers"] if not layer["passed"]] == ["model.linear"]


def test_every_call_is_counted_in_the_certificate(run: Path) -> None:
    layers = {layer["name"]: layer for layer in read_json(run / "certificate.json")["layers"]}
    assert layers["model.linear"]["qdq_pairs"] == layers["model.linear"]["expected_pairs"] == 2
    assert layers["model.stem"]["qdq_pairs"] == 1


def test_lookups_of_one_table_read_its_codes_and_keep_their_own_forward(tmp_path: Path) -> None:
    """Oracle: the rows of the table rounded by hand."""
    shutil.copyfile(HERE / "called_twice_nets.py", tmp_path / "called_twice_nets.py")
    random = np.random.default_rng(0)
    ids, others = random.integers(0, 20, (2, 16, 5))
    np.savez(tmp_path / "ids.npz", ids=ids, others=others)
    values = {
        "name": "lookups", "model": {"python": "called_twice_nets.py:lookups"}, "task": "any",
        "format": {"preset": "w8a8", "embeddings": "int8"}, "method": "ptq", "build": {"target": "rtx-ada"},
        "data": {"calibration": {"npz": ["ids.npz"]}, "evaluate": {"test": {"npz": ["ids.npz"]}}},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCOMPRESS_STRUCTURES", str(tmp_path / "structures"))
        done = cli("run", tmp_path / "recipe.yaml", "--out", tmp_path / "runs", "--until", "export")
    assert done.code == 0, done.stderr + done.stdout
    (file,) = (tmp_path / "runs").rglob(".cache/export/*/model.onnx")
    table = called_twice_nets.lookups()[0].first.weight.detach().numpy()
    scale = np.abs(table).max(1, keepdims=True) / 127
    rounded = np.rint(table / scale) * scale
    session = plain_session(file)
    first, second, _ = session.run(["first", "second", "logits"], {"ids": ids, "others": others})
    np.testing.assert_allclose(first, rounded[ids], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(second, 3 * rounded[others], rtol=1e-5, atol=1e-7)
    stored = [tensor for tensor in onnx.load(file).graph.initializer if tensor.name.endswith("weight.codes")]
    assert [tensor.name for tensor in stored] == ["model.first.weight.codes"]
