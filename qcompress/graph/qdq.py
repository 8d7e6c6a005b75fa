"""Q/DQ nodes of a view: their codes, axes and parameters. No torch.

An *activation* is the output of QuantizeLinear on a tensor that is not constant. The *parameters* of a node
are its scale and its zero point. `encodings/walk.py` has the walk from a DequantizeLinear to its
QuantizeLinear, and `weights.py` lists weights.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from qcompress.encodings.walk import (
    DEQUANTIZE,
    MOVES,
    QUANTIZE,
    attribute,
    is_a,
    lookup_of,
    operand,
    pair_of,
    result,
)
from qcompress.graph.view import Shape, View

SCALE, ZERO_POINT = 1, 2
"""Positions of the parameters among a node's inputs."""


def node_name(node: NodeProto) -> str:
    """Name of a node; if it has none, of its output or its operator."""
    return node.name or result(node) or node.op_type


def layer_name(view: View, node: NodeProto) -> str:
    """Name for messages of a Q or DQ node: the stored tensor of a weight, the node of an activation."""
    return view.root(operand(node, 0)) if operand(node, 0) in view.fixed else node_name(node)


def activations_of(view: View) -> Iterator[NodeProto]:
    """QuantizeLinear nodes of tensors that are not constant."""
    return (node for node in view.named(QUANTIZE) if operand(node, 0) not in view.fixed)


def code_type(view: View, node: NodeProto) -> str:
    """Type of the codes that QuantizeLinear writes or DequantizeLinear reads, empty if unknown."""
    return view.word(result(node) if node.op_type == QUANTIZE else operand(node, 0))


def axis_of(view: View, node: NodeProto) -> tuple[int, Shape] | None:
    """Nonnegative axis and input shape of a Q or DQ node; None if the rank is unknown."""
    shape = view.shape(operand(node, 0))
    if shape is None:
        return None
    axis = attribute(node, "axis", 1)
    return axis + len(shape) if axis < 0 else axis, shape


def dequantizer_of(view: View, name: str) -> NodeProto | None:
    """DequantizeLinear that produces a tensor, directly or through MOVES, else None."""
    passed: dict[str, None] = {}
    while name not in view.sources:
        passed[name] = None
        node = view.producers.get(name)
        if node is None or node.op_type not in MOVES:
            view.sources[name] = node if is_a(node, DEQUANTIZE) else None
            break
        name = operand(node, 0)
        if name in passed:  # a malformed graph may have cycles
            view.sources[name] = None
            break
    view.sources.update(dict.fromkeys(passed, view.sources[name]))
    return view.sources[name]


def parameters(view: View, index: int) -> Iterator[tuple[NodeProto, str]]:
    """Q and DQ nodes with the name of their scale or zero point (`index`); for rows that are looked up as
    codes, with the stored scale. Skips a DequantizeLinear whose QuantizeLinear has the same parameter.
    """
    for node in view.named(QUANTIZE, DEQUANTIZE):
        pair = pair_of(view, node)
        is_known = (
            pair is not None and pair.clip is None and operand(pair.quantize, index) == operand(node, index)
        )
        if operand(node, index) and not is_known:
            lookup = lookup_of(view, node) if index == SCALE else None
            yield node, (lookup and lookup.scale) or operand(node, index)
