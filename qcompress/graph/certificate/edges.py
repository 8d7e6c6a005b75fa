"""Walks through an ONNX graph for the certificate: the matmuls that read a decoded weight, and the Q/DQ pair
that quantizes the other operand. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from qcompress.encodings.walk import matmuls, same, zero_is_zero
from qcompress.models.plan import LayerPlan, sharers

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True)
class Graph:
    """An ONNX graph with indices of its initializers, producers and readers."""

    file: Path
    initializers: dict[str, TensorProto]
    producer: dict[str, NodeProto]
    readers: dict[str, list[NodeProto]]
    nodes: tuple[NodeProto, ...]
    order: dict[str, int]
    """Position in `nodes` of the node that produces a value."""

    @classmethod
    def read(cls, file: Path) -> Graph:
        """Read a graph; `array` reads external data later, one tensor at a time."""
        graph = onnx.load(str(file), load_external_data=False).graph
        readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        return cls(
            file=file,
            initializers={tensor.name: tensor for tensor in graph.initializer},
            producer={name: node for node in graph.node for name in node.output},
            readers=readers,
            nodes=tuple(graph.node),
            order={name: place for place, node in enumerate(graph.node) for name in node.output},
        )

    def array(self, name: str) -> np.ndarray | None:
        """Values of an initializer, None if the graph has none of this name."""
        tensor = self.initializers.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor, base_dir=str(self.file.parent))


class Use(NamedTuple):
    """Position of a layer among the `count` layers that share its weight. Their matmuls have the same order
    in the graph as the layers in the plan.
    """

    place: int = 0
    count: int = 1


def uses_of(plan: tuple[LayerPlan, ...]) -> dict[str, Use]:
    """Map each layer with a matmul to its Use, by layer name."""
    groups = sharers(plan).values()
    return {name: Use(place, len(names)) for names in groups for place, name in enumerate(names)}


def own_matmuls(graph: Graph, sources: list[str], use: Use) -> list[tuple[NodeProto, str]]:
    """Return the matmul of a layer among those that read its decoded weight (`sources`), with the name of the
    weight input. Returns all of them if their number differs from `use.count`.
    """
    pairs = [pair for source in sources for pair in matmuls(graph, source)]
    pairs.sort(key=lambda pair: graph.order[pair[0].output[0]])
    return pairs[use.place : use.place + 1] if len(pairs) == use.count else pairs


def input_pairs(
    graph: Graph, sources: list[str], tensors: Any, item: LayerPlan, use: Use
) -> tuple[int, bool]:
    """Count the Q/DQ pairs on the input of a layer's matmul, and compare their scales, zero points and bounds
    with the folded ones (True if equal). `sources`: values that hold the decoded weight.
    """
    if item.layer.kind == "embedding":
        return 0, True
    pairs, equal = 0, True
    for matmul, own in own_matmuls(graph, sources, use):
        other = next((name for name in matmul.input[:2] if name != own), None)
        pair = input_pair(graph, other or "")
        if pair is None:
            continue
        pairs += 1
        if not item.activations:
            continue
        reference = tensors.get_tensor(f"{item.name}.input.scale")
        equal &= bounds_fit(graph, pair.clip, item.activations.bounds)
        for node in (pair.quantize, pair.dequantize):
            scale = graph.array(node.input[1])
            equal &= scale is not None and same(scale, reference.astype(scale.dtype))
            equal &= zero_is_zero(graph, node)
    return pairs, equal


def verdict(
    graph: Graph, sources: list[str], tensors: Any, item: LayerPlan, use: Use, codes_equal: bool,
    scales_equal: bool, reasons: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Certificate entry of a layer and its input; `sources`: values that hold the decoded weight."""
    pairs, input_equal = input_pairs(graph, sources, tensors, item, use)
    expected = 1 if item.activations else 0
    if pairs != expected:
        reasons.append(f"{pairs} Q/DQ pairs in front of the matmul, {expected} expected")
    if not input_equal:
        reasons.append("the input's scale, zero point or bounds differ")
    return {
        "name": item.name,
        "weight_codes_equal": codes_equal,
        "scales_equal": scales_equal and input_equal,
        "qdq_pairs": pairs,
        "expected_pairs": expected,
        "passed": not reasons,
        "reasons": reasons,
    }


class Pair(NamedTuple):
    """The Q/DQ nodes that quantize an activation."""

    quantize: NodeProto
    dequantize: NodeProto
    clip: NodeProto | None
    """Clip between the two nodes, for bounds narrower than int8."""


def input_pair(graph: Graph, value: str) -> Pair | None:
    """Q/DQ pair whose DequantizeLinear produces a value, None without one."""
    decoder = graph.producer.get(value)
    if decoder is None or decoder.op_type != "DequantizeLinear":
        return None
    return pair_of(graph, graph.producer.get(decoder.input[0]), decoder)


def pair_of(graph: Graph, node: NodeProto | None, decoder: NodeProto) -> Pair | None:
    """Q/DQ pair of `decoder`; `node` produces its codes and is QuantizeLinear or the Clip behind it."""
    clip = node if node is not None and node.op_type == "Clip" else None
    quantize = node if clip is None else graph.producer.get(clip.input[0])
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return None
    return Pair(quantize, decoder, clip)


def bounds_fit(graph: Graph, clip: NodeProto | None, bounds: tuple[int, int]) -> bool:
    """True if codes are limited to `bounds`; the int8 bounds need no Clip."""
    if clip is None:
        return bounds == (-128, 127)
    ends = [graph.array(name) for name in clip.input[1:]]
    return all(end is not None for end in ends) and [int(end) for end in ends] == list(bounds)
