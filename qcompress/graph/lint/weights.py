"""Linter checks of weights: int4, blocks and readers; one generator per rule. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from qcompress.encodings.walk import DEQUANTIZE, QUANTIZE, attribute, operand
from qcompress.graph.lint.activations import MATMULS, OPSETS, TAKEN, Broken
from qcompress.graph.qdq import axis_of, code_type, dequantizer_of, layer_name, node_name
from qcompress.graph.view import View
from qcompress.graph.weights import find_weights
from qcompress.schema.formats import INT2_OPSET
from qcompress.schema.targets import BLOCKS, Target


def int4_opset(view: View, target: Target) -> Iterator[Broken]:
    for node in view.named(QUANTIZE, DEQUANTIZE):
        kind = code_type(view, node)
        if view.opset < OPSETS[0] and (kind == "INT4" or attribute(node, "block_size", 0)):
            yield Broken(layer_name(view, node), f"int4 or blocks in opset {view.opset}")
        if kind == "INT2" and view.opset < INT2_OPSET:
            yield Broken(layer_name(view, node), f"int2 in opset {view.opset}")


def int4_target(view: View, target: Target) -> Iterator[Broken]:
    """One violation per graph, since the device lacks the type."""
    layers = [weight.name for weight in find_weights(view) if weight.code_type == "INT4"]
    if layers and 4 not in target.weight_bits:
        yield Broken(layers[0], f"int4 codes (weights: {len(layers)})")


def _blocked(view: View, node: NodeProto) -> tuple[int, int] | None:
    """Length of the blocked axis and the block size; None without blocks or with unknown length."""
    block, place = attribute(node, "block_size", 0), axis_of(view, node)
    if not block or place is None or place[0] not in range(len(place[1])):
        return None
    length = place[1][place[0]]
    return (length, block) if isinstance(length, int) else None


def uneven_blocks(view: View, target: Target) -> Iterator[Broken]:
    for node in view.named(QUANTIZE, DEQUANTIZE):
        if (blocked := _blocked(view, node)) and blocked[0] % blocked[1]:
            yield Broken(layer_name(view, node), f"{blocked[0]} values in blocks of {blocked[1]}")


def odd_blocks(view: View, target: Target) -> Iterator[Broken]:
    for weight in find_weights(view):
        if weight.integers and weight.block and weight.block not in BLOCKS:
            yield Broken(weight.name, f"blocks of {weight.block}")


def int4_channels(view: View, target: Target) -> Iterator[Broken]:
    for weight in find_weights(view):
        if weight.code_type == "INT4" and not weight.block:
            yield Broken(weight.name, "int4 without blocks")


def _int4_products(view: View) -> Iterator[tuple[NodeProto, NodeProto, NodeProto]]:
    """Matmuls of an int4 weight and an int8 activation: matmul, and DequantizeLinear of weight and
    activation.
    """
    if not any(weight.code_type == "INT4" for weight in find_weights(view)):
        return
    for node in view.named("MatMul", "Gemm"):
        sources = [dequantizer_of(view, operand(node, index)) for index in (0, 1)]
        if all(sources) and operand(sources[0], 0) not in view.fixed and operand(sources[1], 0) in view.fixed:
            activation, weight = sources
            if code_type(view, weight) == "INT4" and code_type(view, activation) == "INT8":
                yield node, weight, activation


def int4_products(view: View, target: Target) -> Iterator[Broken]:
    for _, weight, _ in _int4_products(view):
        yield Broken(layer_name(view, weight), "int4 weights, int8 activations")


def int4_block_products(view: View, target: Target) -> Iterator[Broken]:
    if target.backend != "tensorrt_rtx":
        return
    for node, weight, activation in _int4_products(view):
        blocked, rank = _blocked(view, weight), _rank(view, node, activation)
        if blocked and blocked[0] > blocked[1] and rank != 2:
            known = f"of rank {rank}" if rank else "of unknown rank"
            yield Broken(layer_name(view, weight), f"int4 blocks of {blocked[1]}, int8 activation {known}")


def _rank(view: View, matmul: NodeProto, activation: NodeProto) -> int | None:
    """Rank of a matmul's activation, from the first known shape between the float tensor and the matmul."""
    quantizer = view.producers.get(operand(activation, 0))
    names = [operand(matmul, 0), operand(activation, 0)]
    names += [operand(quantizer, 0)] if quantizer is not None else []
    return next((len(shape) for name in names if (shape := view.shape(name)) is not None), None)


def weight_readers(view: View, target: Target) -> Iterator[Broken]:
    for weight in find_weights(view):
        if weight.integers and weight.code_type in TAKEN:
            for reader in weight.readers():
                if reader.op_type not in (*MATMULS, "Gather"):
                    yield Broken(weight.name, f"read by {reader.op_type} {node_name(reader)}")
