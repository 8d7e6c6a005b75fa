"""Small QDQ ONNX graphs, made node by node with onnx.helper: no exporter, no torch.

`linear` is one quantized matmul, the smallest graph of the product's form; `decoder` has the form and the
sizes of a GPT-2 without attention: a tied table, and four quantized matmuls in each block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

FLOAT_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@dataclass
class Graph:
    """A graph in the making. Every method that adds a tensor gives back its name."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)

    def tensor(self, name: str, values: np.ndarray, kind: int = TensorProto.FLOAT) -> str:
        """An initializer of the ONNX type `kind`; int4 values are packed, the first in the low nibble."""
        values = np.asarray(values)
        if kind in (TensorProto.INT4, TensorProto.UINT4):
            nibbles = np.append(values.reshape(-1), [0] * (values.size % 2)).astype(np.int8) & 15
            raw = (nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8).tobytes()
        elif kind in (TensorProto.INT2, TensorProto.UINT2):
            crumbs = values.reshape(-1, 4).astype(np.int8) & 3  # the first in the lowest bits
            raw = (crumbs << np.array([0, 2, 4, 6])).sum(1).astype(np.uint8).tobytes()
        elif kind == TensorProto.BFLOAT16:
            raw = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        else:
            raw = values.astype(helper.tensor_dtype_to_np_dtype(kind)).tobytes()
        self.tensors.append(helper.make_tensor(name, kind, values.shape, raw, raw=True))
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        """A node named after its only output."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def model(self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto],
              opset: int = 21, formats: str | None = None) -> onnx.ModelProto:  # fmt: skip
        """The finished model; `formats` is what metadata says about its quantization."""
        graph = helper.make_graph(self.nodes, "graph", inputs, outputs, self.tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        if formats is not None:
            helper.set_model_props(model, {"qcompress.formats": formats})
        return model


def codes(name: str, shape: tuple[int, ...], bits: int = 8) -> np.ndarray:
    """Random codes of every value that `bits` bits can hold; two names never get the same ones, because a
    builder stores equal constants once."""
    return np.random.default_rng(list(name.encode())).integers(
        -(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=np.int8
    )


def dequantize_weight(graph: Graph, name: str, shape: tuple[int, int], bits: int = 8,
                      block: int | None = None, kind: int = TensorProto.FLOAT,
                      axis: int = 1) -> str:  # fmt: skip
    """DQ of a constant weight: per channel along `axis` in int8, or in blocks along axis 0 in int4."""
    container = {8: TensorProto.INT8, 4: TensorProto.INT4, 2: TensorProto.INT2}[bits]
    graph.tensor(f"{name}.codes", codes(name, shape, bits), container)
    scale_shape = (-(-shape[0] // block), shape[1]) if block else (shape[axis],)
    scale = np.random.default_rng(list(name.encode())).uniform(0.001, 0.01, scale_shape)
    inputs = [f"{name}.codes", graph.tensor(f"{name}.scale", scale, kind)]
    if block:
        return graph.node("DequantizeLinear", inputs, f"{name}.dq", axis=0, block_size=block)
    inputs.append(graph.tensor(f"{name}.zero", np.zeros(scale_shape), container))
    return graph.node("DequantizeLinear", inputs, f"{name}.dq", axis=axis)


def quantize_activation(graph: Graph, source: str, kind: int = TensorProto.FLOAT, name: str = "") -> str:
    """Q and DQ with one scale and zero point 0, int8."""
    name = name or source
    scale = graph.tensor(f"{name}.input.scale", np.float32(0.05), kind)
    zero = graph.tensor(f"{name}.input.zero", np.int8(0), TensorProto.INT8)
    quantized = graph.node("QuantizeLinear", [source, scale, zero], f"{name}.q")
    return graph.node("DequantizeLinear", [quantized, scale, zero], f"{name}.q.dq")


def tensor_value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    """An input or output of a graph."""
    return helper.make_tensor_value_info(name, kind, shape)


def linear(bits: int = 8, block: int | None = None, activations: bool = True, compute: str = "fp32",
           opset: int = 21, shape: tuple[int, int] = (128, 64)) -> onnx.ModelProto:  # fmt: skip
    """x [batch, in] @ weight [in, out], with int8 or int4 weights and int8 or float activations."""
    graph, kind = Graph(), FLOAT_TYPES[compute]
    source = quantize_activation(graph, "x", kind) if activations else "x"
    weight = dequantize_weight(graph, "weight", shape, bits, block, kind)
    graph.node("MatMul", [source, weight], "y")
    inputs, outputs = tensor_value("x", kind, "batch", shape[0]), tensor_value("y", kind, "batch", shape[1])
    return graph.model([inputs], [outputs], opset)


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; the defaults make a model of about 2 MB in int8."""

    blocks: int = 2
    width: int = 128
    vocabulary: int = 1024
    context: int = 64


GPT2_SMALL = Shape(blocks=12, width=768, vocabulary=50257, context=1024)
"""The 124M model."""


def decoder(shape: Shape = Shape(), bits: int | None = 8, activations: bool = True,  # noqa: B008
            table_bits: int | None = 8) -> onnx.ModelProto:  # fmt: skip
    """Token and position tables, blocks of four matmuls with a residual, and a head tied to the table.

    Inputs `input_ids`, `attention_mask`, `position_ids` int64 [batch, sequence]; output `logits`.
    `bits` None: the weights are stored as the float values of the int8 graph.
    """
    graph = Graph()
    table = _table(graph, "wte", (shape.vocabulary, shape.width), table_bits)
    positions = _table(graph, "wpe", (shape.context, shape.width), table_bits)
    tokens = graph.node("Gather", [table, "input_ids"], "tokens")
    hidden = graph.node(
        "Add", [tokens, graph.node("Gather", [positions, "position_ids"], "places")], "embedded"
    )
    mask = graph.node("Cast", ["attention_mask"], "mask.float", to=TensorProto.FLOAT)
    axis = graph.tensor("last", np.int64([-1]), TensorProto.INT64)
    hidden = graph.node("Mul", [hidden, graph.node("Unsqueeze", [mask, axis], "mask")], "masked")
    for index in range(shape.blocks):
        residual = hidden
        for part, rows, columns in (("attn", 1, 3), ("proj", 1, 1), ("fc", 1, 4), ("out", 4, 1)):
            size = (rows * shape.width, columns * shape.width)
            hidden = _linear(graph, f"h.{index}.{part}", hidden, size, bits, activations)
            if part == "attn":
                bounds = (graph.tensor(f"h.{index}.{word}", np.int64([value]), TensorProto.INT64)
                          for word, value in (("start", 0), ("end", shape.width), ("axis", -1)))  # fmt: skip
                hidden = graph.node("Slice", [hidden, *bounds], f"h.{index}.values")
        hidden = graph.node("Add", [residual, hidden], f"h.{index}")
    head = graph.node("Transpose", [table], "head.weight", perm=[1, 0])
    source = quantize_activation(graph, hidden) if activations else hidden
    graph.node("MatMul", [source, head], "logits")
    inputs = [
        tensor_value(name, TensorProto.INT64, "batch", "sequence")
        for name in ("input_ids", "attention_mask", "position_ids")
    ]
    output = tensor_value("logits", TensorProto.FLOAT, "batch", "sequence", shape.vocabulary)
    return graph.model(inputs, [output])


def _table(graph: Graph, name: str, shape: tuple[int, int], bits: int | None) -> str:
    if bits is None:
        return graph.tensor(f"{name}.weight", codes(name, shape) * np.float32(0.005))
    return dequantize_weight(graph, name, shape, bits, axis=0)


def _linear(graph: Graph, name: str, source: str, shape: tuple[int, int], bits: int | None,
            activations: bool) -> str:  # fmt: skip
    source = quantize_activation(graph, source) if activations else source
    if bits is None:
        weight = graph.tensor(f"{name}.weight", codes(name, shape) * np.float32(0.005))
    else:
        weight = dequantize_weight(graph, name, shape, bits, block=64 if bits == 4 else None)
    product = graph.node("MatMul", [source, weight], f"{name}.product")
    bias = graph.tensor(f"{name}.bias", np.linspace(-1, 1, shape[1]))
    return graph.node("Add", [product, bias], f"{name}.sum")


def save(model: onnx.ModelProto, file: Path, external: bool = False) -> Path:
    """Write a model, its tensors beside it if asked; give back the file."""
    onnx.save_model(model, file, save_as_external_data=external, location=f"{file.name}.data",
                    size_threshold=1024)  # fmt: skip
    return file
