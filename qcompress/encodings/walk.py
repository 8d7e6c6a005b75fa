"""Comparison of stored tensors, and the matmuls that read a decoded weight. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import NodeProto

    from qcompress.graph.certificate.edges import Graph


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """True if two arrays have equal shapes, types and bits."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def first_difference(actual: np.ndarray, expected: np.ndarray, what: str) -> str:
    """Describe the first difference between two unequal arrays; `what` names them in the sentence."""
    if actual.shape != expected.shape:
        return f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    where = np.argwhere(actual != expected)
    place = tuple(int(index) for index in where[0])
    return f"{what}: {len(where)} differ, first at {list(place)}: {actual[place]}, expected {expected[place]}"


def zero_is_zero(graph: Graph, node: NodeProto) -> bool:
    """True if the zero point of a Q or DQ node is absent or all zeros."""
    if len(node.input) < 3 or not node.input[2]:
        return True
    zero = graph.array(node.input[2])
    return zero is not None and not np.any(zero.astype(np.int8))


def matmuls(graph: Graph, value: str) -> list[tuple[NodeProto, str]]:
    """Matmuls and convolutions that read a value directly or after Transpose, with their input's name."""
    readers = []
    for node in graph.readers.get(value, []):
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            readers.append((node, value))
        elif node.op_type == "Transpose":
            readers += matmuls(graph, node.output[0])
    return readers
