"""Convolutions whose weights are looked up: trained, folded with their batch norms, certified, built."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file
from tiny_nets import Done, net_line, pixels, save_images
from torch import nn

from qcompress.graph.certificate.layers import certify, matmul_inputs
from qcompress.graph.view import read
from qcompress.models.rebuild import rebuild
from qcompress.pipeline.stages.build import build_file
from qcompress.pipeline.stages.export import export
from qcompress.quant.batchnorm import gain_and_bias
from qcompress.quant.codebook import CodebookWeight
from qcompress.quant.conv import QuantizedConv
from qcompress.schema.formats import CodebookFormat
from qcompress.schema.quantizers import Codebook
from qcompress.schema.recipe import Build, Export
from qcompress.system.artifacts import read_json

K = 16


def book(block: int, **more: Any) -> dict[str, Any]:
    return {"codebook": "gather", "block": block, "centroids": K, **more}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # every vector is a kernel; the noise draws kernels as well
    "kernels": ("cifar", {"format": {"weights": book(9)}, "method": "quant-noise"}),
    "int8": ("basic", {"format": {"weights": book(1, table="int8"), "activations": "int8"}}),
    "depthwise": (
        "efficientnet",
        {
            "format": {
                "weights": book(1),
                "compute": "fp16",
                "layers": {
                    "*.blocks.0.depthwise_conv.*": {"weights": book(9)},
                    "*.blocks.[12].depthwise_conv.*": {"weights": book(25)},
                },
            }
        },
    ),
    "decoded": (
        "cifar",
        {"format": {"weights": book(9, table="int8", codebook="decode-int8"), "activations": "int8"}},
    ),
}
FEW = ("kernels", "decoded")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in FEW else [pytest.mark.slow]) for name in CASES],
)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp(request.param)
    kind, sections = CASES[request.param]
    line = net_line(folder / "line", kind, save_images(folder / "images.npz"), **sections).train().fold()
    (folder / "export").mkdir()
    export(line.folded, Export(), "rtx-ada", {"version": "0", "recipe": "tiny"}, folder / "export")
    return Done(line, folder / "export")


def apart(found: np.ndarray, expected: np.ndarray, done: Done) -> float:
    """Largest difference, as a fraction of the range; where inputs are rounded, and codes may flip on
    ties, the median one.
    """
    difference = np.abs(found - expected)
    rounds = any(item.activations for item in done.line.plan)
    return float(np.median(difference) if rounds else difference.max()) / float(np.ptp(expected))


def test_folding_keeps_the_function_and_every_batch_norm_is_in_it(done: Done) -> None:
    x = pixels(8)
    trained, folded = done.line.logits("train", x), done.line.logits("fold", x)
    assert apart(trained.numpy(), folded.numpy(), done) < 1e-5
    assert not torch.allclose(trained, done.line.logits("float", x), atol=1e-2)
    model = done.line.model("fold")
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    tensors = load_file(done.line.folded.path / "folded.safetensors")
    for name in done.books:
        layer = done.line.architecture.layer(name)
        vectors = layer.weights // tensors[f"{name}.weight.centroids"].shape[1]
        indices = tensors[f"{name}.weight.assignments"]
        assert indices.dtype == torch.uint8 and indices.shape == (
            layer.out_features,
            vectors // layer.out_features,
        )
        assert f"{name}.weight" not in tensors and int(indices.max()) < K
        assert (f"{name}.gain" in tensors) is (layer.norm is not None)


def test_the_weight_is_the_table_at_the_indices_in_the_layout_of_the_paper(done: Done) -> None:
    """Vector j of output channel o, row by row: input channels, then the kernel's rows and columns."""
    tensors = load_file(done.line.folded.path / "folded.safetensors")
    model = done.line.model("fold")
    for name in done.books:
        indices, table = (tensors[f"{name}.weight.{part}"] for part in ("assignments", "centroids"))
        scale = tensors.get(f"{name}.weight.scale", torch.tensor(1.0))
        found = model.get_submodule(name).weight.decoded()
        assert found.shape == done.line.architecture.layer(name).shape
        for channel in (0, len(indices) - 1):
            row = [float(value * scale) for index in indices[channel] for value in table[int(index)]]
            assert found[channel].flatten().tolist() == pytest.approx(row, rel=1e-6)


def test_the_graph_is_certified_and_computes_what_was_folded(done: Done) -> None:
    x = pixels(6)
    certificate = read_json(done.path / "certificate.json")
    assert certificate["complete"] and not certificate["float_copies"]
    expected = done.line.logits("fold", x).numpy()
    half = done.line.recipe.format.compute == "fp16"
    with np.errstate(over="ignore"):  # the reference's Sigmoid
        reference = ReferenceEvaluator(str(done.file)).run(["logits"], {"pixel_values": x.numpy()})[0]
    by_runtime = done.run(x)
    for found in (by_runtime, reference):
        assert apart(found, expected, done) < (2e-3 if half else 1e-5)
    model = onnx.load(str(done.file))
    readers = Counter(name for node in model.graph.node for name in node.input)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in done.books:
        indices = stored[f"{name}.weight.assignments"]
        assert indices.data_type == onnx.TensorProto.UINT8 and readers[indices.name] == 1
    shapes = {item.layer.shape for item in done.line.plan if item.layer.kind == "conv"}
    floats = [tensor for tensor in stored.values() if tensor.data_type in (1, 10)]
    assert not [tensor.name for tensor in floats if tuple(tensor.dims) in shapes]
    inputs = matmul_inputs(read(done.file), done.line.plan)
    assert set(done.books) <= set(inputs)


def test_another_table_fails_the_certificate(done: Done, tmp_path: Path) -> None:
    if not done.books:
        pytest.skip("decoded codes are certified as codes")
    model = onnx.load(str(done.file))
    name = done.books[1]
    (table,) = [one for one in model.graph.initializer if one.name == f"{name}.weight.centroids"]
    values = numpy_helper.to_array(table).copy()
    values[3] = values[4]
    table.CopyFrom(numpy_helper.from_array(values, table.name))
    onnx.save(model, str(tmp_path / "changed.onnx"))
    found = certify(tmp_path / "changed.onnx", done.line.folded.path, done.line.plan)
    assert [item["name"] for item in found["layers"] if not item["passed"]] == [name]


def test_tensorrt_rtx_builds_it(done: Done, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    build_file(done.file, Build(target="rtx-ada", profiles=[{"batch": [1, 2, 4]}]), tmp_path, lambda *_: None)
    assert (tmp_path / "model.plan").stat().st_size > 0


@pytest.mark.parametrize("gradient", ["sum", "mean"])
def test_the_gradient_of_a_centroid_is_that_of_all_kernels_that_it_stands_for(gradient: str) -> None:
    torch.manual_seed(3)
    module = nn.Conv2d(4, 6, 3, padding=1)
    form = CodebookFormat(block=9, centroids=5)
    quantizer = CodebookWeight(Codebook(gradient=gradient), form, 0, (6, 36), False)
    layer = QuantizedConv(module, None, quantizer, None)
    quantizer.settle(layer.coded_weight().detach())
    x = torch.randn(2, 4, 7, 7)
    layer(x).square().sum().backward()

    table = quantizer.centroids.detach().clone().requires_grad_()
    weight = table[quantizer.assignments.long()].reshape(6, 4, 3, 3)
    F.conv2d(x, weight, module.bias, padding=1).square().sum().backward()
    counts = torch.bincount(quantizer.assignments.flatten().long(), minlength=5)
    assert counts.sum() == 24 and len(set(counts.tolist())) > 1
    expected = table.grad if gradient == "sum" else table.grad / counts.clamp_min(1)[:, None]
    assert torch.allclose(quantizer.centroids.grad, expected, rtol=1e-5, atol=1e-6)


def test_the_nets_have_norms_that_turn_weights_around(done: Done) -> None:
    """Behind a negative gamma a weight is turned before k-means and after the look-up, which the tests above
    see.
    """
    prepared = rebuild(done.line.float_model, done.line.trained)
    assert any(
        bool((layer.norm.weight < 0).any())
        for layer in prepared.layers.values()
        if isinstance(layer, QuantizedConv) and layer.norm is not None
    )


@pytest.mark.parametrize("biased", [False, True])
def test_gain_and_bias_are_the_batch_norm_behind_a_turned_weight(biased: bool) -> None:
    torch.manual_seed(5)
    module, norm = nn.Conv2d(3, 8, 3, bias=biased), nn.BatchNorm2d(8).eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.normal_()
    norm.running_var.uniform_(0.5, 2)
    assert bool((norm.weight < 0).any()) and bool((norm.weight > 0).any())
    x = torch.randn(2, 3, 9, 9)
    gain, bias = gain_and_bias(module.bias, norm)
    turned = module.weight * norm.weight.sign().view(-1, 1, 1, 1)
    found = F.conv2d(x, turned) * gain.view(-1, 1, 1) + bias.view(-1, 1, 1)
    assert torch.allclose(found, norm(module(x)), atol=1e-5) and bool((gain > 0).all())
