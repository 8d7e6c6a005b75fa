"""The Q/DQ nodes of a view, in the words of the linter. No torch.

An *activation* is what QuantizeLinear makes of a tensor that is not constant, a *weight* what
DequantizeLinear makes of one that is. The *parameters* of either are its scale and its zero point.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from qcompress.graph.tensors import type_word
from qcompress.graph.view import DEQUANTIZE, QUANTIZE, Shape, View, attribute, operand, result

MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten")
"""Operators that carry a tensor along as it is."""

SCALE, ZERO_POINT = 1, 2
"""Positions of the parameters among a node's inputs."""


def node_name(node: NodeProto) -> str:
    return node.name or result(node) or node.op_type


def layer_name(view: View, node: NodeProto) -> str:
    """A weight is known by the name of its stored tensor, an activation by the node that rounds it."""
    return view.root(operand(node, 0)) if operand(node, 0) in view.fixed else node_name(node)


def weights_of(view: View) -> Iterator[NodeProto]:
    return (node for node in view.named(DEQUANTIZE) if operand(node, 0) in view.fixed)


def activations_of(view: View) -> Iterator[NodeProto]:
    return (node for node in view.named(QUANTIZE) if operand(node, 0) not in view.fixed)


def code_type(view: View, node: NodeProto) -> str:
    """Type of the codes that QuantizeLinear makes or DequantizeLinear reads, empty if unknown."""
    kind = view.types.get(result(node) if node.op_type == QUANTIZE else operand(node, 0))
    return type_word(kind) if kind else ""


def axis_of(view: View, node: NodeProto) -> tuple[int, Shape] | None:
    """Axis counted from the front, and shape of the input; None if its rank is unknown."""
    shape = view.shape(operand(node, 0))
    if shape is None:
        return None
    axis = attribute(node, "axis", 1)
    return axis + len(shape) if axis < 0 else axis, shape


def dequantizer_of(view: View, name: str) -> NodeProto | None:
    """The DequantizeLinear that a tensor comes from, if only moves lie between."""
    passed: dict[str, None] = {}
    while name not in view.sources:
        passed[name] = None
        node = view.producers.get(name)
        if node is None or node.op_type not in MOVES:
            view.sources[name] = node if node is not None and node.op_type == DEQUANTIZE else None
            break
        name = operand(node, 0)
        if name in passed:  # a malformed graph may go in circles
            view.sources[name] = None
            break
    view.sources.update(dict.fromkeys(passed, view.sources[name]))
    return view.sources[name]


def users_of(view: View, name: str, through: tuple[str, ...]) -> Iterator[NodeProto]:
    """Nodes that use a tensor, directly or after operators of `through`."""
    queue, seen = [name], {name}
    while queue:
        for node in view.readers.get(queue.pop(), []):
            view.steps.take()
            if node.op_type in through:
                fresh = set(node.output) - seen
                queue += fresh
                seen |= fresh
            else:
                yield node


def parameters(view: View, index: int) -> Iterator[tuple[NodeProto, str]]:
    """Quantizers with the name of their scale or zero point; a DequantizeLinear that only undoes a
    QuantizeLinear with the same parameter is left out.
    """
    for node in view.named(QUANTIZE, DEQUANTIZE):
        before = view.producers.get(operand(node, 0))
        undoes = node.op_type == DEQUANTIZE and before is not None and before.op_type == QUANTIZE
        if operand(node, index) and not (undoes and operand(before, index) == operand(node, index)):
            yield node, operand(node, index)
