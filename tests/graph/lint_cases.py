"""Graphs that break each rule of the linter, and for each rule one that comes close and does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from graphs import (
    Graph,
    Shape,
    codes,
    decoder,
    dequantize_weight,
    linear,
    quantize_activation,
    tensor_value,
)
from onnx import TensorProto as T  # noqa: N817
from onnx import helper

Make = Callable[[], onnx.ModelProto]


@dataclass(frozen=True)
class Case:
    """A graph that breaks a rule, what the linter must say about it, and who else refuses it."""

    rule: str
    name: str
    make: Make
    layer: str
    found: str
    refused_by: str | None = None
    """parser, builder, checker, or None where TensorRT-RTX builds the graph."""
    target: str = "rtx-ampere"


def with_tensor(model: onnx.ModelProto, name: str, values: object, kind: int = T.FLOAT) -> onnx.ModelProto:
    """The model with another value in an initializer."""
    replacement = Graph()
    replacement.tensor(name, np.asarray(values), kind)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(replacement.tensors[0])
    return model


def with_input(model: onnx.ModelProto, name: str, kind: int) -> onnx.ModelProto:
    """The model with a scalar input instead of an initializer."""
    kept = [tensor for tensor in model.graph.initializer if tensor.name != name]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.append(tensor_value(name, kind))
    return model


def with_scale(values: object) -> Make:
    return lambda: with_tensor(linear(), "weight.scale", values)


def with_activation_scale(value: float) -> Make:
    return lambda: with_tensor(linear(), "x.input.scale", np.float32(value))


def with_block_scale(value: float) -> Make:
    scales = one_of(128, value).reshape(2, 64)
    return lambda: with_tensor(int4_matmul((128, 64), 64)(), "weight.scale", scales)


def one_of(count: int, value: float) -> np.ndarray:
    """Good scales but for the eighth."""
    scales = np.full(count, 0.01)
    scales[7] = value
    return scales


def activation_type(kind: int, zero_point: int = 0) -> Make:
    return lambda: with_tensor(linear(), "x.input.zero", np.array(zero_point), kind)


def weight_type(kind: int) -> Make:
    def make() -> onnx.ModelProto:
        model = with_tensor(linear(), "weight.codes", np.abs(codes("weight", (128, 64), 4)), kind)
        return with_tensor(model, "weight.zero", np.zeros(64), kind)

    return make


def no_zero_point(**attributes: int) -> Make:
    """QuantizeLinear without a zero point makes uint8, unless `output_dtype` says otherwise."""

    def make() -> onnx.ModelProto:
        model = linear()
        for node in model.graph.node[:2]:
            del node.input[2]
        model.graph.node[0].attribute.extend(helper.make_attribute(*item) for item in attributes.items())
        return model

    return make


def per_channel_activation(count: int) -> Make:
    def make() -> onnx.ModelProto:
        model = with_tensor(linear(), "x.input.scale", np.full(count, 0.05))
        return with_tensor(model, "x.input.zero", np.zeros(count), T.INT8)

    return make


def float_scale_in_half() -> onnx.ModelProto:
    return with_tensor(linear(compute="fp16"), "x.input.scale", np.float32(0.05))


def float_weight_scale_in_half() -> onnx.ModelProto:
    return with_tensor(linear(activations=False, compute="fp16"), "weight.scale", np.full(64, 0.01))


def small(build: Callable[[Graph], None], outputs: int = 64, formats: str | None = None) -> Make:
    """x [batch, 128] -> y [batch, outputs], in fp32."""

    def make() -> onnx.ModelProto:
        graph = Graph()
        build(graph)
        ends = [tensor_value("x", T.FLOAT, "batch", 128)], [tensor_value("y", T.FLOAT, "batch", outputs)]
        return graph.model(*ends, formats=formats)

    return make


def int32_bias(graph: Graph) -> None:
    weight = dequantize_weight(graph, "weight", (128, 64))
    product = graph.node("MatMul", [quantize_activation(graph, "x"), weight], "product")
    stored = [graph.tensor("bias", np.arange(64), T.INT32), graph.tensor("bias.scale", np.full(64, 0.01))]
    graph.node("Add", [product, graph.node("DequantizeLinear", stored, "bias.dq", axis=0)], "y")


def float_bias(graph: Graph) -> None:
    weight = dequantize_weight(graph, "weight", (128, 64))
    product = graph.node("MatMul", [quantize_activation(graph, "x"), weight], "product")
    graph.node("Add", [product, graph.tensor("bias", np.arange(64))], "y")


def codes_moved_by(op: str, **attributes: object) -> Callable[[Graph], None]:
    """Stored codes [64, 128] that pass an operator before they are dequantized to [128, 64]."""

    def build(graph: Graph) -> None:
        stored = graph.tensor("weight", codes("weight", (64, 128)), T.INT8)
        moved = graph.node(op, [stored, *attributes.pop("inputs", [])], "moved", **attributes)
        scale = graph.tensor("weight.scale", np.full(64, 0.01))
        graph.node("MatMul", ["x", graph.node("DequantizeLinear", [moved, scale], "dq", axis=1)], "y")

    return build


def codes_cast(graph: Graph) -> None:
    stored = graph.tensor("weight", codes("weight", (128, 64)), T.INT8)
    graph.node("MatMul", ["x", graph.node("Cast", [stored], "cast", to=T.FLOAT)], "y")


def codes_gathered(graph: Graph) -> None:
    rows = graph.tensor("rows", np.arange(128)[::-1].copy(), T.INT64)
    gathered = graph.node(
        "Gather", [graph.tensor("weight", codes("weight", (128, 64)), T.INT8), rows], "rows.codes"
    )
    scale = graph.tensor("weight.scale", np.full(64, 0.01))
    graph.node("MatMul", ["x", graph.node("DequantizeLinear", [gathered, scale], "dq", axis=1)], "y")


def float_transposed(graph: Graph) -> None:
    weight = dequantize_weight(graph, "weight", (64, 128), axis=0)
    graph.node("MatMul", ["x", graph.node("Transpose", [weight], "moved", perm=[1, 0])], "y")


def weight_through(op: str) -> Callable[[Graph], None]:
    def build(graph: Graph) -> None:
        weight = graph.node(op, [dequantize_weight(graph, "weight", (128, 64))], "between")
        graph.node("MatMul", ["x", weight], "y")

    return build


def weight_added(graph: Graph) -> None:
    graph.node("Add", ["x", dequantize_weight(graph, "weight", (1, 128))], "y")


def quantized(graph: Graph) -> str:
    """Codes of x."""
    scale, zero = graph.tensor("scale", np.float32(0.05)), graph.tensor("zero", np.int8(0), T.INT8)
    return graph.node("QuantizeLinear", ["x", scale, zero], "q")


def integer_matmul(graph: Graph) -> None:
    weight = graph.tensor("weight", codes("weight", (128, 64)), T.INT8)
    graph.node("Cast", [graph.node("MatMulInteger", [quantized(graph), weight], "product")], "y", to=T.FLOAT)


def dynamic_matmul(graph: Graph) -> None:
    """onnxruntime's quantize_dynamic with uint8 weights."""
    graph.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="q"))
    weight = graph.tensor("weight", np.abs(codes("weight", (128, 64))), T.UINT8)
    product = graph.node("MatMulInteger", ["q", weight, "z"], "product")
    graph.node("Mul", [graph.node("Cast", [product], "cast", to=T.FLOAT), "s"], "y")


def codes_multiplied(graph: Graph) -> None:
    """onnxruntime's quantize_static with QuantFormat.QOperator, symmetric."""
    activation = [quantized(graph), "scale", "zero"]
    weight = [graph.tensor("weight", codes("weight", (128, 64)), T.INT8), "scale", "zero"]
    product = graph.node("QLinearMatMul", [*activation, *weight, "scale", "zero"], "product")
    graph.node("DequantizeLinear", [product, "scale", "zero"], "y")


def packed(kind: int) -> Make:
    """onnxruntime's MatMulNBitsQuantizer with QuantFormat.QOperator: two codes in a byte, around 8."""

    def make() -> onnx.ModelProto:
        graph = Graph()
        weight = graph.tensor("weight", np.full((64, 2, 32), 0x88), T.UINT8)
        inputs = ["x", weight, graph.tensor("weight.scale", np.full(128, 0.01), kind)]
        sizes = {"K": 128, "N": 64, "bits": 4, "block_size": 64}
        graph.node("MatMulNBits", inputs, "y", domain="com.microsoft", **sizes)
        model = graph.model([tensor_value("x", kind, "batch", 128)], [tensor_value("y", kind, "batch", 64)])
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        return model

    return make


def codes_as_float(graph: Graph) -> None:
    graph.node("Cast", [quantized(graph)], "y", to=T.FLOAT)


def clipped_codes(graph: Graph) -> None:
    """4-bit activations as the product spells them: int8 codes behind a Clip."""
    bounds = [graph.tensor("low", np.int8(-8), T.INT8), graph.tensor("high", np.int8(7), T.INT8)]
    clipped = graph.node("Clip", [quantized(graph), *bounds], "clipped")
    source = graph.node("DequantizeLinear", [clipped, "scale", "zero"], "dq")
    graph.node("MatMul", [source, dequantize_weight(graph, "weight", (128, 64))], "y")


def float_matmul(graph: Graph) -> None:
    graph.node("MatMul", ["x", graph.tensor("weight", codes("weight", (128, 64)) * 0.01)], "y")


def convolved(
    bits: int = 8, axis: int = 0, block: int | None = None, activations: bool = True, op: str = "Conv",
    groups: int = 1,
) -> Make:  # fmt: skip
    """x [batch, 64, 16, 16] through a 3x3 convolution with 64 outputs."""

    def make() -> onnx.ModelProto:
        graph, shape = Graph(), (64, 64 // groups, 3, 3)
        source = quantize_activation(graph, "x") if activations else "x"
        graph.tensor("weight.codes", codes("weight", shape, bits), {8: T.INT8, 4: T.INT4}[bits])
        sizes = shape if block else (shape[axis],)
        sizes = tuple(size // block if block and place == axis else size for place, size in enumerate(sizes))
        graph.tensor("weight.scale", np.random.default_rng(0).uniform(0.001, 0.01, sizes))
        blocked = {"block_size": block} if block else {}
        weight = graph.node(
            "DequantizeLinear", ["weight.codes", "weight.scale"], "weight.dq", axis=axis, **blocked
        )
        graph.node(op, [source, weight], "y", pads=[1, 1, 1, 1], group=groups)
        size = ("batch", 64, 16, 16)
        return graph.model([tensor_value("x", T.FLOAT, *size)], [tensor_value("y", T.FLOAT, *size)])

    return make


def int4_matmul(shape: tuple[int, int], block: int | None, opset: int = 21) -> Make:
    return lambda: linear(4, block, activations=False, shape=shape, opset=opset)


def int2_matmul(opset: int = 25) -> Make:
    def make() -> onnx.ModelProto:
        model = linear(2, None, activations=False, opset=opset)
        model.ir_version = 13
        return model

    return make


def bf16() -> onnx.ModelProto:
    return linear(compute="bf16", opset=22)


def looked_up(graph: Graph, form: str, bits: int = 8) -> None:
    """A table [128, 64] decoded in front of Gather, or rows of codes and scales decoded behind it."""
    graph.tensor("table.codes", codes("table", (128, 64), bits), {8: T.INT8, 4: T.INT4}[bits])
    graph.tensor("table.scale", np.full(128, 0.01))
    if form == "decoded":
        table = graph.node("DequantizeLinear", ["table.codes", "table.scale"], "table.dq", axis=0)
        graph.node("Gather", [table, "x"], "y")
        return
    rows = graph.node("Gather", ["table.codes", "x"], "rows.codes")
    scales = graph.node("Gather", ["table.scale", "x"], "rows.scale")
    scales = graph.node("Unsqueeze", [scales, graph.tensor("last", np.int64([-1]), T.INT64)], "row.scale")
    graph.node("DequantizeLinear", [rows, scales], "y", axis=2, block_size=64)


def table(form: str) -> Make:
    """x int64 [batch, sequence] -> y [batch, sequence, 64]."""

    def make() -> onnx.ModelProto:
        graph = Graph()
        looked_up(graph, form)
        shape = "batch", "sequence"
        return graph.model([tensor_value("x", T.INT64, *shape)], [tensor_value("y", T.FLOAT, *shape, 64)])

    return make


def readers_of_one_pair(*ops: str, reader: str = "", kind: int = T.INT8, behind: bool = False) -> Make:
    """x [batch, 8, 128] through one Q/DQ pair into products with a weight each; `reader`: one more reader of
    the pair; `behind`: Q/DQ pairs behind the products.
    """

    def make() -> onnx.ModelProto:
        graph, ends = Graph(), []
        pair = quantize_activation(graph, "x")
        if kind != T.INT8:
            graph.tensors.pop()
            graph.tensor("x.input.zero", np.uint8(128), kind)
        size = ("batch", 128, 8, 8) if "Conv" in ops else ("batch", 8, 128)
        for index, op in enumerate(ops):
            name = f"w{index}"
            if op == "Conv":
                graph.tensor(f"{name}.codes", codes(name, (128, 128, 1, 1)), T.INT8)
                graph.tensor(f"{name}.scale", np.full(128, 0.01))
                stored = [f"{name}.codes", f"{name}.scale"]
                weight = graph.node("DequantizeLinear", stored, f"{name}.dq", axis=0)
            else:
                weight = dequantize_weight(graph, name, (128, 128))
            product = graph.node(op, [pair, weight], f"y{index}")
            ends.append(quantize_activation(graph, product) if behind else product)
        if reader:
            ends.append(graph.node(reader, [pair, pair] if reader == "Add" else [pair], "r"))
        outputs = [tensor_value(end, T.FLOAT, *size) for end in ends]
        return graph.model([tensor_value("x", T.FLOAT, *size)], outputs)

    return make


def joined(graph: Graph) -> None:
    """Three layers as one matmul, whose columns a Split takes apart."""
    weight = dequantize_weight(graph, "a+b+c", (128, 192))
    product = graph.node("MatMul", [quantize_activation(graph, "x"), weight], "product")
    sizes = graph.tensor("sizes", np.int64([64, 64, 64]), T.INT64)
    graph.nodes.append(helper.make_node("Split", [product, sizes], ["a", "b", "c"], name="split", axis=-1))
    graph.node("Add", [graph.node("Add", ["a", "b"], "ab"), "c"], "y")


def biased(
    op: str = "MatMul",
    rank: int = 2,
    behind: str = "",
    bias: tuple[int, ...] = (64,),
    activations: bool = True,
) -> Make:
    """x [batch, (8,) 128] through a product with a float bias, and `behind`: Tanh, Q, or Tanh and Q."""

    def make() -> onnx.ModelProto:
        graph = Graph()
        source = quantize_activation(graph, "x") if activations else "x"
        inputs = [source, dequantize_weight(graph, "weight", (128, 64))]
        stored = graph.tensor("bias", np.arange(np.prod(bias)).reshape(bias))
        if op == "Gemm":
            end = graph.node("Gemm", [*inputs, stored], "product")
        else:
            end = graph.node("Add", [graph.node("MatMul", inputs, "product"), stored], "sum")
        end = graph.node("Tanh", [end], "tanh") if "Tanh" in behind else end
        end = quantize_activation(graph, end) if "Q" in behind else end
        graph.node("Identity", [end], "y")
        shape = ("batch", 8) if rank == 3 else ("batch",)
        ends = [tensor_value(name, T.FLOAT, *shape, width) for name, width in (("x", 128), ("y", 64))]
        return graph.model(ends[:1], ends[1:])

    return make


def float_weight(op: str, behind: bool = False) -> Make:
    """x [batch, 128] through a Q/DQ pair into a product with a float weight."""

    def build(graph: Graph) -> None:
        weight = graph.tensor("weight", codes("weight", (128, 64)) * 0.01)
        end = graph.node(op, [quantize_activation(graph, "x"), weight], "product")
        graph.node("Identity", [quantize_activation(graph, end) if behind else end], "y")

    return small(build)


FORMATS = '{"weight": {"weights": {"bits": 8, "block": null}, "activations": null}}'
FLOAT_FORMATS = '{"weight": {"weights": null, "activations": null}}'
WEIGHT, CODES, Q = "weight", "weight.codes", "x.q"

CASES: tuple[Case, ...] = (
    Case("zero-point", "int8 activation", activation_type(T.INT8, 3), Q, "zero point 3", "parser"),
    Case("zero-point", "uint8 activation", activation_type(T.UINT8, 128), Q, "zero point 128", "parser"),
    Case("zero-point", "one channel of a weight",
         lambda: with_tensor(linear(), "weight.zero", one_of(64, 1).round(), T.INT8), CODES,
         "zero point 1", "parser"),
    Case("zero-point-not-constant", "input", lambda: with_input(linear(), "x.input.zero", T.INT8), Q,
         "'x.input.zero' is known at run time only", "builder"),
    Case("scale-not-constant", "input", lambda: with_input(linear(), "x.input.scale", T.FLOAT), Q,
         "'x.input.scale' is known at run time only"),
    Case("scale-not-positive", "zero", with_scale(one_of(64, 0)), CODES, r"scale 0 \(1 of 64\)", "parser"),
    Case("scale-not-positive", "negative", with_scale(one_of(64, -0.01)), CODES, r"scale -0.01", "parser"),
    Case("scale-not-positive", "nan", with_scale(one_of(64, np.nan)), CODES, "scale nan", "parser"),
    Case("scale-not-positive", "minus inf", with_scale(one_of(64, -np.inf)), CODES, "scale -inf", "parser"),
    Case("scale-not-positive", "all zero", with_scale(np.zeros(64)), CODES, r"\(64 of 64\)", "parser"),
    Case("scale-not-positive", "negative, in blocks", with_block_scale(-0.01), CODES, r"\(1 of 128\)"),
    Case("scale-not-positive", "zero, in blocks", with_block_scale(0), CODES, r"scale 0 \(1 of 128\)"),
    Case("scale-not-positive", "activation", with_activation_scale(0), Q, r"scale 0 \(1 of 1\)", "parser"),
    Case("scale-not-finite", "weight", with_scale(one_of(64, np.inf)), CODES, r"scale inf \(1 of 64\)"),
    Case("scale-not-finite", "activation", with_activation_scale(np.inf), Q, r"scale inf \(1 of 1\)"),
    Case("scale-type", "activation", float_scale_in_half, Q, "fp32 scale of a fp16 tensor", "parser"),
    Case("scale-type", "weight", float_weight_scale_in_half, CODES,
         "fp32 scale, and y computes with fp16", "parser"),
    Case("scale-shape", "too few", with_scale(np.full(63, 0.01)), CODES, r"scale \[63\] for", "parser"),
    Case("scale-shape", "other axis", with_scale(np.full(128, 0.01)), CODES, r"scale \[128\]", "parser"),
    Case("scale-shape", "rank 2", with_scale(np.full((1, 64), 0.01)), CODES, r"\[1, 64\] for", "parser"),
    Case("scale-shape", "too many blocks",
         lambda: with_tensor(int4_matmul((128, 64), 64)(), "weight.scale", np.full((3, 64), 0.01)), CODES,
         r"scale \[3, 64\] for \[128, 64\], axis 0, blocks of 64", "parser"),
    Case("scale-shape", "too few columns",
         lambda: with_tensor(int4_matmul((128, 64), 64)(), "weight.scale", np.full((2, 63), 0.01)), CODES,
         r"scale \[2, 63\]", "parser"),
    Case("uint8-activation", "zero point 0", activation_type(T.UINT8), Q, "uint8$"),
    Case("uint8-activation", "no zero point", no_zero_point(), Q, "uint8, ONNX's choice"),
    Case("int32-bias", "bias", small(int32_bias), "bias", "int32 codes", "parser"),
    Case("integer-type", "int16 weight", weight_type(T.INT16), CODES, "int16", "parser"),
    Case("integer-type", "uint16 weight", weight_type(T.UINT16), CODES, "uint16", "parser"),
    Case("integer-type", "uint8 weight", weight_type(T.UINT8), CODES, "uint8", "parser"),
    Case("integer-type", "uint4 weight", weight_type(T.UINT4), CODES, "uint4", "parser"),
    Case("integer-type", "int2 weight", int2_matmul(), CODES, "int2", "parser"),
    Case("integer-type", "int16 activation", activation_type(T.INT16), Q, "int16", "parser"),
    Case("integer-type", "uint4 activation", activation_type(T.UINT4), Q, "uint4", "parser"),
    Case("activation-per-channel", "each channel", per_channel_activation(128), Q, r"scale \[128\]"),
    Case("int4-activation", "int4", activation_type(T.INT4), Q, "int4"),
    Case("int4-opset", "opset 20", int4_matmul((128, 64), 64, opset=20), CODES, "opset 20", "checker"),
    Case("int4-opset", "int2 in opset 24", int2_matmul(24), CODES, "int2 in opset 24", "parser", "cpu"),
    Case("int4-target", "turing", lambda: linear(4, 64, activations=False, compute="fp16"), CODES,
         r"int4 codes \(weights: 1\)", "builder", "rtx-turing"),
    Case("block-remainder", "three scales", int4_matmul((160, 64), 64), CODES,
         "160 values in blocks of 64", "parser"),
    Case("block-remainder", "two scales that divide", int4_matmul((160, 64), 128), CODES,
         "160 values in blocks of 128"),
    Case("block-size", "16", int4_matmul((128, 64), 16), CODES, "blocks of 16"),
    Case("block-size", "256", int4_matmul((512, 64), 256), CODES, "blocks of 256"),
    Case("int4-per-channel", "no blocks", int4_matmul((128, 64), None), CODES, "int4 without blocks"),
    Case("int4-weight-int8-activation", "rank 2", lambda: linear(4, 64), CODES,
         "int4 weights, int8 activations"),
    Case("int4-blocks-int8-activation", "rank 3", lambda: decoder(Shape(blocks=1), 4), "h.0.attn.codes",
         "int4 blocks of 64, int8 activation of unknown rank", "builder"),
    Case("conv-int4", "int8 input", convolved(4), CODES, "int4 codes", "builder"),
    Case("conv-int4", "float input", convolved(4, activations=False), CODES, "int4 codes"),
    Case("conv-blocks", "int8", convolved(axis=1, block=32), CODES, "blocks of 32", "parser"),
    Case("conv-blocks", "int4", convolved(4, axis=1, block=64), CODES, "blocks of 64", "parser"),
    Case("conv-axis", "input channels", convolved(axis=1), CODES, "scales along axis 1 of Conv$"),
    Case("conv-axis", "transposed", convolved(op="ConvTranspose"), CODES, "axis 0 of ConvTranspose"),
    Case("conv-float-input", "dense", convolved(activations=False), CODES, "integer weight, float input"),
    Case("conv-float-input", "depthwise", convolved(activations=False, groups=64), CODES, "float input"),
    Case("constant-reader", "Transpose", small(codes_moved_by("Transpose", perm=[1, 0])), WEIGHT,
         "read by Transpose moved", "builder"),
    Case("constant-reader", "Cast", small(codes_cast), WEIGHT, "read by Cast cast", "builder"),
    Case("constant-reader", "Gather", small(codes_gathered), WEIGHT, "read by Gather rows.codes", "builder"),
    Case("weight-reader", "Relu", small(weight_through("Relu")), CODES, "read by Relu between"),
    Case("weight-reader", "Add", small(weight_added, outputs=128), CODES, "read by Add y"),
    Case("quantizer-alone", "MatMulInteger", small(integer_matmul), "q",
         "codes read by MatMulInteger", "parser"),
    Case("quantizer-alone", "Cast", small(codes_as_float, outputs=128), "q", "codes read by Cast y"),
    Case("integer-operator", "MatMulNBits in fp32", packed(T.FLOAT), "y", "MatMulNBits", "parser"),
    Case("integer-operator", "MatMulNBits in fp16", packed(T.FLOAT16), "y", "MatMulNBits", "parser"),
    Case("integer-operator", "MatMulInteger", small(dynamic_matmul), "q", "DynamicQuantizeLinear", "parser"),
    Case("integer-operator", "QLinearMatMul", small(codes_multiplied), "product", "QLinearMatMul", "parser"),
    Case("quantization-lost", "float", small(float_matmul, formats=FORMATS), "(graph)", "no Q/DQ node"),
    Case("compute-type", "fp32 on Turing", linear, "y", r"fp32 \(places: 1\)", "builder", "rtx-turing"),
    Case("compute-type", "bf16 on Turing", bf16, "y", r"bf16 \(places: 3\)", "builder", "rtx-turing"),
    Case("compute-type", "bf16 on a processor", bf16, "y", "bf16", None, "cpu"),
    Case("compute-type", "bf16 on a T4", bf16, "y", "bf16", None, "t4"),
    Case("opset-new", "26", lambda: linear(opset=26), "(graph)", "opset 26"),
    Case("opset-old", "20", lambda: linear(opset=20), "(graph)", "opset 20"),
    Case("table-decoded", "rows of a table", table("decoded"), "table.codes",
         "^32,768 bytes decoded in each run$", None, "cpu"),
    Case("pair-shared", "three matmuls", readers_of_one_pair("MatMul", "MatMul", "MatMul"), Q,
         "^read by MatMul y0, MatMul y1, MatMul y2$", None, "cpu"),
    Case("pair-shared", "a residual", readers_of_one_pair("MatMul", reader="Add"), Q,
         "^read by MatMul y0, Add r$", None, "cpu"),
    Case("pair-shared", "two convolutions", readers_of_one_pair("Conv", "Conv", behind=True), Q,
         "^read by Conv y0, Conv y1$", None, "cpu"),
    Case("pair-no-zero-point", "int8", no_zero_point(output_dtype=T.INT8), Q,
         "^int8 without a zero point, read by MatMul y$", None, "cpu"),
    Case("gemm-float-bias", "MatMul and Add of rank 2", biased(), CODES,
         "^MatMul of rank 2, Add with a float bias at product$", None, "cpu"),
    Case("gemm-float-bias", "Tanh in front of QuantizeLinear", biased(behind="Tanh Q"), CODES,
         "^MatMul of rank 2, Add with a float bias at product$", None, "cpu"),
    Case("gemm-float-bias", "Gemm", biased("Gemm"), CODES,
         "^Gemm with a float bias at product$", None, "cpu"),
    Case("pair-one-sided", "float weight", float_weight("MatMul"), WEIGHT,
         "^float weight, int8 input of MatMul product$", None, "cpu"),
    Case("pair-one-sided", "float weight of Gemm", float_weight("Gemm"), WEIGHT,
         "^float weight, int8 input of Gemm product$", None, "cpu"),
    Case("pair-one-sided", "float input", biased(behind="Q", activations=False), CODES,
         "^integer weight, float input, QuantizeLinear directly behind MatMul product$", None, "cpu"),
)  # fmt: skip
"""The first case of a rule shows where the rule comes from; `refused_by` is what was measured."""

SOUND: dict[str, tuple[Make, str]] = {
    "zero-point": (linear, "rtx-ampere"),
    "zero-point-not-constant": (no_zero_point(output_dtype=T.INT8), "rtx-ampere"),
    "scale-not-constant": (linear, "cpu"),
    "scale-not-positive": (with_scale(one_of(64, 1e-30)), "rtx-ampere"),
    "scale-not-finite": (with_scale(one_of(64, 1e30)), "rtx-ampere"),
    "scale-type": (lambda: linear(compute="fp16"), "rtx-ampere"),
    "scale-shape": (int4_matmul((128, 64), 64), "rtx-ampere"),
    "uint8-activation": (no_zero_point(output_dtype=T.INT8), "rtx-ampere"),
    "int32-bias": (small(float_bias), "rtx-ampere"),
    "integer-type": (weight_type(T.INT8), "rtx-ampere"),
    "activation-per-channel": (per_channel_activation(1), "rtx-ampere"),
    "int4-activation": (activation_type(T.INT8), "rtx-ampere"),
    "int4-opset": (int4_matmul((128, 64), 64, opset=21), "rtx-ampere"),
    "int4-target": (lambda: linear(activations=False, compute="fp16"), "rtx-turing"),
    "block-remainder": (int4_matmul((192, 64), 64), "rtx-ampere"),
    "block-size": (int4_matmul((128, 64), 32), "rtx-ampere"),
    "int4-per-channel": (int4_matmul((128, 64), 128), "rtx-ampere"),
    "int4-weight-int8-activation": (int4_matmul((128, 64), 64), "rtx-ampere"),
    "int4-blocks-int8-activation": (lambda: decoder(Shape(blocks=1), 4, activations=False), "rtx-ampere"),
    "conv-int4": (int4_matmul((128, 64), 64), "rtx-ampere"),
    "conv-blocks": (convolved(), "rtx-ampere"),
    "conv-axis": (convolved(axis=1, op="ConvTranspose"), "rtx-ampere"),
    "conv-float-input": (convolved(groups=64), "rtx-ampere"),
    "constant-reader": (small(float_transposed), "rtx-ampere"),
    "weight-reader": (small(weight_through("Identity")), "rtx-ampere"),
    "quantizer-alone": (small(clipped_codes), "rtx-ampere"),
    "integer-operator": (linear, "rtx-ampere"),
    "quantization-lost": (small(float_matmul, formats=FLOAT_FORMATS), "rtx-ampere"),
    "compute-type": (bf16, "rtx-ampere"),
    "opset-new": (lambda: linear(opset=25), "rtx-ampere"),
    "opset-old": (lambda: linear(opset=21), "rtx-ampere"),
    "table-decoded": (table("decoded"), "rtx-ampere"),
    "pair-shared": (small(joined), "cpu"),
    "pair-no-zero-point": (linear, "cpu"),
    "gemm-float-bias": (biased(behind="Q"), "cpu"),
    "pair-one-sided": (float_weight("Gemm", behind=True), "cpu"),
}
"""For each rule a graph that comes close to breaking it, and breaks none; with its target."""
