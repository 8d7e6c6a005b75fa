"""Forms of convolutions for ONNX Runtime: the same bits as before without its optimizations, and the kernels
with them. The graphs are made node by node.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from form_cases import assert_same_bits, kernels, pair, rules, saved
from graphs import Graph, codes, tensor_value
from lines import plain_session
from onnx import TensorProto, numpy_helper

from qcompress.encodings.walk import pair_of
from qcompress.graph import convolution_forms
from qcompress.graph.certificate.edges import differences
from qcompress.graph.view import read


def convolutions(activation: str, bits: int = 8, pool: bool = False, scale: float = 0.05) -> onnx.ModelProto:
    """Two convolutions with an activation between them."""
    graph = Graph()
    x = pair(graph, "x", "first.input")
    x = convolution(graph, "first", x)
    limits = [graph.tensor("low", np.float32(0)), graph.tensor("six", np.float32(6))]
    if activation:
        x = graph.node(activation, [x, *(limits if activation == "Clip" else [])], "activated")
    if pool:
        x = graph.node("MaxPool", [x], "pooled", kernel_shape=[2, 2], strides=[2, 2])
    second = pair(graph, x, "second.input", scale)
    if bits < 8:
        ends = [graph.tensor(f"end_{end}", np.int8(end), TensorProto.INT8) for end in (0, 2**bits - 1)]
        clip = graph.node("Clip", ["second.input/QuantizeLinear", *ends], "second.input/Clip")
        graph.nodes[-2].input[0] = clip
        graph.nodes[-2], graph.nodes[-1] = graph.nodes[-1], graph.nodes[-2]
    graph.node("QuantizeLinear", [convolution(graph, "second", second), "first.input.scale"], "codes")
    graph.nodes[-1].input.append("first.input.zero")
    graph.node("DequantizeLinear", ["codes", "first.input.scale", "first.input.zero"], "y")
    inputs = [tensor_value("x", TensorProto.FLOAT, "batch", 8, 8, 8)]
    return graph.model(inputs, [tensor_value("y", TensorProto.FLOAT, "batch", 8, "height", "width")])


def convolution(graph: Graph, layer: str, x: str) -> str:
    graph.tensor(f"{layer}.codes", codes(layer, (8, 8, 3, 3)), TensorProto.INT8)
    graph.tensor(f"{layer}.scale", np.full(8, 0.01))
    graph.tensor(f"{layer}.zero", np.zeros(8), TensorProto.INT8)
    parts = [f"{layer}.codes", f"{layer}.scale", f"{layer}.zero"]
    weight = graph.node("DequantizeLinear", parts, f"{layer}.dq", axis=0)
    graph.tensor(f"{layer}.bias", np.random.default_rng(4).standard_normal(8))
    return graph.node("Conv", [x, weight, f"{layer}.bias"], f"{layer}.conv", pads=[1, 1, 1, 1])


IMAGES = {"x": 3 * np.random.default_rng(6).standard_normal((2, 8, 8, 8)).astype(np.float32)}


def unsigned(model: ir.Model) -> None:
    assert convolution_forms.store_unsigned(model, {"second.input"}) >= 1


@pytest.mark.parametrize(
    ("activation", "bits", "pool", "scale", "fused"),
    [
        ("Relu", 8, False, 0.05, 2),
        ("Relu", 4, False, 0.4, 2),
        ("Relu", 8, True, 0.05, 2),
        ("Clip", 8, False, 6 / 127, 2),
        ("Clip", 8, False, 0.1, 1),  # code 60 is 6: the Clip cuts below the largest code and stays
    ],
)
def test_a_convolution_with_an_activation_is_fused_with_the_same_codes(
    tmp_path: Path, activation: str, bits: int, pool: bool, scale: float, fused: int
) -> None:
    before, after = saved(convolutions(activation, bits, pool, scale), tmp_path, unsigned)
    assert_same_bits(before, after, IMAGES)
    # the second convolution has no activation behind it, but a Clip of int8 codes before it
    assert kernels(before)["QLinearConv"] == (1 if bits == 8 else 0)
    assert kernels(after)["QLinearConv"] == fused
    view = read(after)
    clip = next(node for node in view.nodes if node.name == "second.input/Clip")
    ends = [int(view.values(name)) for name in clip.input[1:]]
    assert ends == [0, 2**bits - 1 if bits < 8 else 127]
    assert rules(after, "cpu") == set()


def test_only_codes_of_values_that_are_never_negative_may_begin_at_0(tmp_path: Path) -> None:
    _, after = saved(convolutions("Relu"), tmp_path, unsigned)
    view = read(after)
    (decoder,) = [node for node in view.nodes if node.name == "second.input/DequantizeLinear"]
    pair = pair_of(view, decoder)
    scale = np.float32(0.05)
    assert differences(view, pair, np.asarray(scale), (-128, 127), nonnegative=True) == []
    assert "bounds" in differences(view, pair, np.asarray(scale), (-128, 127))[0]


def test_pairs_of_values_of_any_sign_are_left_alone() -> None:
    model = ir.from_proto(convolutions(""))
    assert convolution_forms.store_unsigned(model, {"another.input"}) == 0
    assert all(node.op_type != "Clip" for node in model.graph)


def padded(behind: bool = False, clipped: bool = False, shared: bool = False, pads: tuple[int, ...] = (0, 1),
           value: float = 0, zero: int = 0) -> onnx.ModelProto:  # fmt: skip
    """A Relu, a Pad at begin and end of the last two axes (or at all of `pads`), and a convolution. The Q/DQ
    pair is behind the Pad, or the Pad `behind` it.
    """
    graph = Graph()
    x = graph.node("Relu", ["x"], "activated")
    ends = pads if len(pads) > 2 else (0, 0, pads[0], pads[0], 0, 0, pads[1], pads[1])
    parts = [
        graph.tensor("pads", np.array(ends), TensorProto.INT64),
        graph.tensor("value", np.float32(value)),
    ]
    if not behind:
        x = graph.node("Pad", [x, *parts], "padded")
    x = pair(graph, x, "conv.input")
    if zero:
        graph.tensors[-1].CopyFrom(numpy_helper.from_array(np.int8(zero), "conv.input.zero"))
    if clipped:
        limits = [graph.tensor(f"end_{end}", np.int8(end), TensorProto.INT8) for end in (0, 15)]
        graph.nodes[-2].input[0] = graph.node(
            "Clip", ["conv.input/QuantizeLinear", *limits], "conv.input/Clip"
        )
        graph.nodes[-2], graph.nodes[-1] = graph.nodes[-1], graph.nodes[-2]
    if behind:
        x = graph.node("Pad", [x, *parts], "padded")
    convolution(graph, "conv", x)
    if shared:
        graph.node("Sigmoid", ["padded"], "z")
    inputs = [tensor_value("x", TensorProto.FLOAT, "batch", 8, 8, 8)]
    names = ["conv.conv", "z"] if shared else ["conv.conv"]
    outputs = [tensor_value(name, TensorProto.FLOAT, "batch", 8, f"{name}.2", f"{name}.3") for name in names]
    return graph.model(inputs, outputs)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("behind", [False, True])
def test_zeros_around_an_image_become_padding_of_the_convolution(
    tmp_path: Path, behind: bool, clipped: bool
) -> None:
    before, after = saved(padded(behind, clipped), tmp_path, convolution_forms.fold_pads)
    assert_same_bits(before, after, IMAGES)
    nodes = {node.name: node for node in onnx.load(after).graph.node}
    assert "padded" not in nodes
    # one at each side was the convolution's own; rows and columns were added at the end only
    (pads,) = [list(item.ints) for item in nodes["conv.conv"].attribute if item.name == "pads"]
    assert pads == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"shared": True}, {"value": 0.5}, {"pads": (0, 0, -1, 0, 0, 0, 0, 0)}, {"zero": 3},
        {"pads": (0, 1, 0, 0, 0, 0, 0, 0)}, {"behind": True, "shared": True},
    ],
    ids=str,
)  # fmt: skip
def test_other_pads_stay(options: dict[str, object]) -> None:
    model = padded(**options)
    graph = ir.from_proto(model)
    assert convolution_forms.fold_pads(graph) == 0
    assert [node.op_type for node in graph.graph] == [node.op_type for node in model.graph.node]


def pooled(axes: tuple[int, ...] = (-1, -2), keepdims: int = 1, behind: bool = True) -> onnx.ModelProto:
    """The mean over some axes of decoded values, and with `behind` a pair for it."""
    graph = Graph()
    parts = [pair(graph, "x"), graph.tensor("axes", np.array(axes), TensorProto.INT64)]
    y = graph.node("ReduceMean", parts, "mean", keepdims=keepdims)
    y = pair(graph, y, scale=0.003) if behind else y
    sizes = [1 if axis - 4 in axes else 8 for axis in (1, 2, 3) if keepdims or axis - 4 not in axes]
    model = graph.model(
        [tensor_value("x", TensorProto.FLOAT, "batch", 8, 8, 8)],
        [tensor_value(y, TensorProto.FLOAT, "batch", *sizes)],
    )
    return onnx.shape_inference.infer_shapes(model)


def test_the_mean_of_an_image_is_that_of_its_codes(tmp_path: Path) -> None:
    before, after = saved(pooled(), tmp_path, convolution_forms.pool_images)
    assert kernels(before)["ReduceMean"] == 1 and kernels(after)["QLinearGlobalAveragePool"] == 1
    ours = [plain_session(file).run(None, IMAGES)[0] for file in (before, after)]
    x = np.rint(IMAGES["x"].astype(np.float64) / 0.05).clip(-128, 127).mean((2, 3), keepdims=True) * 0.05
    for mean in ours:  # rounded to steps of 0.003
        assert np.abs(mean - x.clip(-0.384, 0.381)).max() <= 0.0015 + 1e-6 and mean.std() > 0.03


@pytest.mark.parametrize(
    "options", [{"axes": (-1,)}, {"axes": (-2, -3)}, {"keepdims": 0}, {"behind": False}], ids=str
)
def test_other_means_stay(options: dict[str, object]) -> None:
    assert convolution_forms.pool_images(ir.from_proto(pooled(**options))) == 0


def two_readers(kind: str = "Conv") -> onnx.ModelProto:
    """A convolution whose output two pairs of one scale quantize: one for a `kind`, one for an addition."""
    graph = Graph()
    x = convolution(graph, "first", pair(graph, "x", "first.input"))
    pair(graph, x, "second.input")
    graph.node("QuantizeLinear", [x, "second.input.scale", "second.input.zero"], "skip/QuantizeLinear")
    parts = ["skip/QuantizeLinear", "second.input.scale", "second.input.zero"]
    skip = graph.node("DequantizeLinear", parts, "skip/DequantizeLinear")
    one = "second.input/DequantizeLinear"
    branch = convolution(graph, "second", one) if kind == "Conv" else graph.node(kind, [one], "other")
    graph.node("Add", [pair(graph, branch, "branch"), skip], "sum")
    pair(graph, "sum", "y")
    inputs = [tensor_value("x", TensorProto.FLOAT, "batch", 8, 8, 8)]
    outputs = [tensor_value("y/DequantizeLinear", TensorProto.FLOAT, "batch", 8, "height", "width")]
    return graph.model(inputs, outputs)


def test_codes_of_several_readers_are_shifted_to_uint8(tmp_path: Path) -> None:
    before, after = saved(two_readers(), tmp_path, convolution_forms.shift_shared)
    assert_same_bits(before, after, IMAGES)
    assert kernels(before)["QLinearConv"] == 0
    assert kernels(after)["QLinearConv"] == 2 and kernels(after)["QLinearAdd"] == 1
    assert rules(after, "cpu") == set() and "zero-point" in rules(after, "rtx-ada")
    assert convolution_forms.shift_shared(ir.from_proto(two_readers("Sigmoid"))) == 0
    assert convolution_forms.shift_shared(ir.from_proto(convolutions("Relu"))) == 0


def test_only_128_in_both_nodes_is_certified_as_a_shift(tmp_path: Path) -> None:
    _, after = saved(two_readers(), tmp_path, convolution_forms.shift_shared)
    model = onnx.load(after)

    def reasons(zeros: tuple[int, int], bounds: tuple[int, int] = (-128, 127)) -> list[str]:
        for node in model.graph.node:
            if node.name.startswith("skip/"):
                node.input[2] = f"zero_{zeros[node.op_type.startswith('De')]}"
        for value in zeros:
            model.graph.initializer.append(numpy_helper.from_array(np.uint8(value), f"zero_{value}"))
        onnx.save(model, tmp_path / "changed.onnx")
        view = read(tmp_path / "changed.onnx")
        (decoder,) = [node for node in view.nodes if node.name == "skip/DequantizeLinear"]
        return differences(view, pair_of(view, decoder), np.asarray(np.float32(0.05)), bounds)

    assert reasons((128, 128)) == []
    assert reasons((127, 127)) and reasons((128, 127)) and reasons((0, 128)) and reasons((128, 128), (0, 15))
