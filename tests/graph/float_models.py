"""Small float models for the quantizers of other tools, made with onnx.helper."""

from __future__ import annotations

import numpy as np
import onnx
from graphs import FLOAT_TYPES, Graph, tensor_value

WIDTHS = (32, 64, 32, 16)
"""Features between the three matmuls of `matmuls`."""

WEIGHTS = {"fc.weight": (32, 64), "proj.weight": (64, 32), "head.weight": (32, 16)}
BIASES = 64 + 32 + 16

CHANNELS = {"first.weight": (16, 16, 3, 3), "second.weight": (32, 16, 3, 3), "head.weight": (10, 32)}
CHANNEL_BIASES = 16 + 32 + 10


def floats(name: str, *shape: int) -> np.ndarray:
    """Weights of both signs, other ones for every name."""
    return np.random.default_rng(list(name.encode())).normal(0, 0.5, shape)


def matmuls(compute: str = "fp32", opset: int = 21) -> onnx.ModelProto:
    """x [batch, sequence, 32] -> y [batch, sequence, 16]: three matmuls with biases, Relu, Tanh."""
    graph, kind, source = Graph(), FLOAT_TYPES[compute], "x"
    for (name, shape), after in zip(WEIGHTS.items(), ("Relu", "Tanh", ""), strict=True):
        layer = name.removesuffix(".weight")
        product = graph.node(
            "MatMul", [source, graph.tensor(name, floats(name, *shape), kind)], f"{layer}.product"
        )
        bias = graph.tensor(f"{layer}.bias", np.linspace(-1, 1, shape[1]), kind)
        source = graph.node("Add", [product, bias], f"{layer}.sum" if after else "y")
        source = graph.node(after, [source], f"{layer}.active") if after else source
    ends = [tensor_value(name, kind, "batch", "sequence", size) for name, size in (("x", 32), ("y", 16))]
    return graph.model(ends[:1], ends[1:], opset)


def convolutions() -> onnx.ModelProto:
    """x [batch, 16, 8, 8] -> y [batch, 10]: two convolutions, pooling and a Gemm, with biases."""
    graph, source = Graph(), "x"
    for name, shape in CHANNELS.items():
        layer = name.removesuffix(".weight")
        bias = graph.tensor(f"{layer}.bias", np.linspace(-1, 1, shape[0]))
        inputs = [source, graph.tensor(name, floats(name, *shape)), bias]
        if layer == "head":
            graph.node("Gemm", inputs, "y", transB=1)
            break
        source = graph.node("Conv", inputs, f"{layer}.out", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        source = graph.node("Relu", [source], f"{layer}.active")
        if layer == "second":
            source = graph.node("Flatten", [graph.node("GlobalAveragePool", [source], "pool")], "flat")
    ends = tensor_value("x", 1, "batch", 16, 8, 8), tensor_value("y", 1, "batch", 10)
    return graph.model([ends[0]], [ends[1]])


def table() -> onnx.ModelProto:
    """ids [batch, sequence] -> y [batch, sequence, 32]: a table of 128 x 64, and a matmul."""
    graph = Graph()
    rows = graph.node("Gather", [graph.tensor("table.weight", floats("table", 128, 64)), "ids"], "rows")
    graph.node("MatMul", [rows, graph.tensor("head.weight", floats("head", 64, 32))], "y")
    ends = tensor_value("ids", 7, "batch", "sequence"), tensor_value("y", 1, "batch", "sequence", 32)
    return graph.model([ends[0]], [ends[1]])


def samples(model: onnx.ModelProto) -> np.ndarray:
    """Calibration data."""
    dims = [dim.dim_value or 4 for dim in model.graph.input[0].type.tensor_type.shape.dim]
    return np.random.default_rng(5).normal(0, 1, dims).astype(np.float32)
