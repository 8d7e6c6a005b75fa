"""Q/DQ nodes of a view: weights, activations and their parameters. No torch.

An *activation* is the output of QuantizeLinear on a tensor that is not constant, a *weight* the output of
DequantizeLinear on a constant. The *parameters* of either are its scale and its zero point.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from qcompress.graph.tensors import type_word
from qcompress.graph.view import DEQUANTIZE, QUANTIZE, Shape, View, attribute, operand, result

MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten")
"""Operators that move the elements of a tensor without changing their values."""

SCALE, ZERO_POINT = 1, 2
"""Positions of the parameters among a node's inputs."""


def node_name(node: NodeProto) -> str:
    """Name of a node; if it has none, of its output or its operator."""
    return node.name or result(node) or node.op_type


def layer_name(view: View, node: NodeProto) -> str:
    """Name for messages of a Q or DQ node: the stored tensor of a weight, the node of an activation."""
    return view.root(operand(node, 0)) if operand(node, 0) in view.fixed else node_name(node)


def weights_of(view: View) -> Iterator[NodeProto]:
    """DequantizeLinear nodes of constants."""
    return (node for node in view.named(DEQUANTIZE) if operand(node, 0) in view.fixed)


def activations_of(view: View) -> Iterator[NodeProto]:
    """QuantizeLinear nodes of tensors that are not constant."""
    return (node for node in view.named(QUANTIZE) if operand(node, 0) not in view.fixed)


def code_type(view: View, node: NodeProto) -> str:
    """Type of the codes that QuantizeLinear writes or DequantizeLinear reads, empty if unknown."""
    kind = view.types.get(result(node) if node.op_type == QUANTIZE else operand(node, 0))
    return type_word(kind) if kind else ""


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
            view.sources[name] = node if node is not None and node.op_type == DEQUANTIZE else None
            break
        name = operand(node, 0)
        if name in passed:  # a malformed graph may have cycles
            view.sources[name] = None
            break
    view.sources.update(dict.fromkeys(passed, view.sources[name]))
    return view.sources[name]


def users_of(view: View, name: str, through: tuple[str, ...]) -> Iterator[NodeProto]:
    """Nodes that read a tensor, directly or through operators of `through`."""
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
    """Q and DQ nodes with the name of their scale or zero point (`index`). Skips a DequantizeLinear whose
    QuantizeLinear has the same parameter.
    """
    for node in view.named(QUANTIZE, DEQUANTIZE):
        before = view.producers.get(operand(node, 0))
        undoes = node.op_type == DEQUANTIZE and before is not None and before.op_type == QUANTIZE
        if operand(node, index) and not (undoes and operand(before, index) == operand(node, index)):
            yield node, operand(node, index)
