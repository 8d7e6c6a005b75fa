"""Comparing stored tensors, and following a decoded weight through an ONNX graph. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import NodeProto

    from qcompress.graph.certificate.edges import Graph


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays agree in shape, type and every bit."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def first_difference(found: np.ndarray, expected: np.ndarray, what: str) -> str:
    """In words, where two arrays that are not the same differ."""
    if found.shape != expected.shape:
        return f"{what}: shape {list(found.shape)}, expected {list(expected.shape)}"
    where = np.argwhere(found != expected)
    place = tuple(int(index) for index in where[0])
    return f"{what}: {len(where)} differ, first at {list(place)}: {found[place]}, expected {expected[place]}"


def zero_is_zero(graph: Graph, node: NodeProto) -> bool:
    """Whether a Q or DQ node has no zero point, or one of zeros."""
    if len(node.input) < 3 or not node.input[2]:
        return True
    zero = graph.array(node.input[2])
    return zero is not None and not np.any(zero.astype(np.int8))


def matmuls(graph: Graph, value: str) -> list[tuple[NodeProto, str]]:
    """Matmuls that read a decoded weight, directly or transposed, and the name they read it by."""
    found = []
    for node in graph.readers.get(value, []):
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            found.append((node, value))
        elif node.op_type == "Transpose":
            found += matmuls(graph, node.output[0])
    return found
