"""Linter checks of convolutions: one generator per rule. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from qcompress.encodings.walk import attribute, operand
from qcompress.graph.lint.activations import Broken
from qcompress.graph.qdq import axis_of, code_type, dequantizer_of, layer_name
from qcompress.graph.view import View
from qcompress.schema.targets import Target

OUTPUTS = {"Conv": 0, "ConvTranspose": 1}
"""Axis of the output channels in a weight, by operator."""


def _kernels(view: View) -> Iterator[tuple[NodeProto, NodeProto]]:
    """Convolutions with a quantized stored weight, and the DequantizeLinear of that weight."""
    for node in view.named(*OUTPUTS):
        source = dequantizer_of(view, operand(node, 1))
        if source is not None and operand(source, 0) in view.fixed:
            yield node, source


def int4_kernels(view: View, target: Target) -> Iterator[Broken]:
    for _, weight in _kernels(view):
        if code_type(view, weight) in ("INT4", "INT2"):
            yield Broken(layer_name(view, weight), f"{code_type(view, weight).lower()} codes")


def blocked_kernels(view: View, target: Target) -> Iterator[Broken]:
    for _, weight in _kernels(view):
        if block := attribute(weight, "block_size", 0):
            yield Broken(layer_name(view, weight), f"blocks of {block}")


def kernels_by_other_axes(view: View, target: Target) -> Iterator[Broken]:
    for node, weight in _kernels(view):
        scale, place = view.shape(operand(weight, 1)), axis_of(view, weight)
        if attribute(weight, "block_size", 0) or not scale or scale == (1,) or place is None:
            continue
        if place[0] != OUTPUTS[node.op_type]:
            yield Broken(layer_name(view, weight), f"scales along axis {place[0]} of {node.op_type}")


def kernels_alone(view: View, target: Target) -> Iterator[Broken]:
    for node, weight in _kernels(view):
        if dequantizer_of(view, operand(node, 0)) is None:
            yield Broken(layer_name(view, weight), "integer weight, float input")
