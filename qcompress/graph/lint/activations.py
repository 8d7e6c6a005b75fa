"""Linter checks of activations, scales, types and the whole graph: one generator per rule. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from onnx import NodeProto, TensorProto

from qcompress.encodings.walk import (
    DEQUANTIZE,
    MOVES,
    QUANTIZE,
    REPEATING,
    attribute,
    is_a,
    operand,
    result,
    users_of,
    way_to,
)
from qcompress.graph.qdq import (
    SCALE,
    ZERO_POINT,
    activations_of,
    axis_of,
    code_type,
    dequantizer_of,
    layer_name,
    node_name,
    parameters,
)
from qcompress.graph.tensors import type_word
from qcompress.graph.view import FLOATS, Shape, View
from qcompress.schema.targets import Target

FORMATS_KEY = "qcompress.formats"
"""Metadata key of an ONNX file for the formats of its layers, as JSON."""

OPSETS = (21, 25)
"""First opset with int4, and last opset that TensorRT 11 documents."""

MATMULS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
CODE_MOVES = (*MOVES, "Concat", "Slice", "Split", "Clip")
"""Operators allowed between QuantizeLinear and DequantizeLinear, for key-value caches and narrower codes."""

TAKEN = ("INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1")
"""Types that TensorRT quantizes to."""

OWN_RULES = ("UINT8", "INT32")
"""Types that separate rules check."""

INTEGER_OPERATORS = ("MatMulInteger", "ConvInteger", "QGemm", "MatMulNBits", "GatherBlockQuantized")
"""Operators of ONNX and ONNX Runtime on codes, besides QLinear... and DynamicQuantize..."""


class Broken(NamedTuple):
    """One violation of a rule: the layer, and a description of the value found."""

    layer: str
    found: str


MIDDLE = 128
"""Zero point of uint8 codes that are int8 codes, shifted; ONNX Runtime shifts them itself."""


# Zero points and scales ---------------------------------------------------------------------------


def _judged(view: View, index: int, judge: Callable[[np.ndarray], str]) -> Iterator[Broken]:
    """Violations that `judge` reports on scales or zero points; each stored tensor is judged once."""
    known: dict[str, str] = {}
    for node, name in parameters(view, index):
        if name not in known:
            values = view.values(name)
            known[name] = "" if values is None else judge(values)
        if known[name]:
            yield Broken(layer_name(view, node), known[name])


def zero_points(view: View, target: Target) -> Iterator[Broken]:
    def judge(values: np.ndarray) -> str:
        numbers = values.astype(np.int64)
        if target.backend is None and values.dtype == np.uint8:
            numbers = numbers[numbers != MIDDLE]
        return f"zero point {numbers[numbers != 0].flat[0]}" if np.any(numbers) else ""

    yield from _judged(view, ZERO_POINT, judge)


def moving_zero_points(view: View, target: Target) -> Iterator[Broken]:
    for node, name in parameters(view, ZERO_POINT):
        if name not in view.fixed:
            yield Broken(layer_name(view, node), f"zero point {name!r} is known at run time only")


def moving_scales(view: View, target: Target) -> Iterator[Broken]:
    for node, name in parameters(view, SCALE):
        if name not in view.fixed and not (target.backend is None and _is_row(view, node, name)):
            yield Broken(layer_name(view, node), f"scale {name!r} is known at run time only")


def _is_row(view: View, node: NodeProto, scale: str) -> bool:
    """True for the DequantizeLinear of table rows: Gather looks up its codes and scales in stored tensors."""
    makers = (_maker(view, name) for name in (operand(node, 0), scale))
    return all(is_a(maker, "Gather") and operand(maker, 0) in view.fixed for maker in makers)


def _maker(view: View, name: str) -> NodeProto | None:
    """Node that computes a value, in front of MOVES."""
    way = way_to(view, view.producers.get(name))
    return next((node for node in way if node.op_type not in MOVES), None)


def scales_not_positive(view: View, target: Target) -> Iterator[Broken]:
    def judge(values: np.ndarray) -> str:
        bad = values[~(values.astype(np.float64) > 0)]  # `not >` rather than `<=`, which NaN would pass
        return f"scale {float(bad.flat[0]):g} ({bad.size} of {values.size})" if bad.size else ""

    yield from _judged(view, SCALE, judge)


def scales_not_finite(view: View, target: Target) -> Iterator[Broken]:
    def judge(values: np.ndarray) -> str:
        count = int(np.isposinf(values.astype(np.float64)).sum())
        return f"scale inf ({count} of {values.size})" if count else ""

    yield from _judged(view, SCALE, judge)


def scale_types(view: View, target: Target) -> Iterator[Broken]:
    for node in view.named(QUANTIZE):
        kinds = [view.types.get(operand(node, index)) for index in (1, 0)]
        if all(kind in FLOATS for kind in kinds) and kinds[0] != kinds[1]:
            yield Broken(layer_name(view, node), f"{FLOATS[kinds[0]]} scale of a {FLOATS[kinds[1]]} tensor")
    for node in view.named(*MATMULS, "Add", "Mul"):
        kinds = [view.types.get(operand(node, index)) for index in (0, 1)]
        if all(kind in FLOATS for kind in kinds) and kinds[0] != kinds[1]:
            sources = [dequantizer_of(view, operand(node, index)) for index in (0, 1)]
            index = next((index for index in (0, 1) if sources[index]), None)
            if index is not None:
                mine, other = FLOATS[kinds[index]], FLOATS[kinds[1 - index]]
                text = f"{mine} scale, and {node_name(node)} computes with {other}"
                yield Broken(layer_name(view, sources[index]), text)


def scale_shapes(view: View, target: Target) -> Iterator[Broken]:
    for node in view.named(QUANTIZE, DEQUANTIZE):
        scale, place = view.shape(operand(node, 1)), axis_of(view, node)
        if operand(node, 1) not in view.constants or scale is None or place is None:
            continue
        axis, shape = place
        block = attribute(node, "block_size", 0)
        if not (_fits_blocks(scale, shape, axis, block) if block else _fits_channels(scale, shape, axis)):
            blocks = f", blocks of {block}" if block else ""
            text = f"scale {list(scale)} for {list(shape)}, axis {axis}{blocks}"
            yield Broken(layer_name(view, node), text)


def _fits_channels(scale: Shape, shape: Shape, axis: int) -> bool:
    """True for one scale per tensor or one per index of the axis; unknown lengths fit."""
    if scale in ((), (1,)):
        return True
    return len(scale) == 1 and axis in range(len(shape)) and _same(shape[axis], scale[0])


def _fits_blocks(scale: Shape, shape: Shape, axis: int, block: int) -> bool:
    """True if the scales have the shape of the tensor with the axis divided by `block`, rounded up: another
    rule reports remainders.
    """
    if len(scale) != len(shape) or axis not in range(len(shape)):
        return False
    length = shape[axis]
    needed = [*shape[:axis], -(-length // block) if isinstance(length, int) else None, *shape[axis + 1 :]]
    return all(_same(size, count) for size, count in zip(needed, scale, strict=True))


def _same(size: int | str | None, count: int | str | None) -> bool:
    """True if two lengths are equal or `size` is unknown."""
    return not isinstance(size, int) or size == count


# Types --------------------------------------------------------------------------------------------


def unsigned_activations(view: View, target: Target) -> Iterator[Broken]:
    zero: dict[str, bool] = {}
    for node in activations_of(view) if target.backend else ():  # ONNX Runtime computes with uint8
        name = operand(node, 2)
        if code_type(view, node) != "UINT8":
            continue
        if name not in zero:
            values = view.values(name)
            zero[name] = values is None or not np.any(values)
        if zero[name]:
            values = view.constants.get(name)
            how = "" if values is not None else ", ONNX's choice where no zero point is given"
            yield Broken(node_name(node), f"uint8{how}")


def integer_biases(view: View, target: Target) -> Iterator[Broken]:
    for node in view.named(DEQUANTIZE):
        if code_type(view, node) == "INT32":
            yield Broken(layer_name(view, node), "int32 codes")


def other_integers(view: View, target: Target) -> Iterator[Broken]:
    for node in view.named(QUANTIZE, DEQUANTIZE):
        kind, constant = code_type(view, node), operand(node, 0) in view.fixed
        # behind a QuantizeLinear only that node is reported
        follows = node.op_type == DEQUANTIZE and not constant and operand(node, 0) in view.producers
        unsigned_weight = kind == "UINT8" and constant
        if kind == "INT2" and constant and 2 in target.weight_bits:
            continue
        if unsigned_weight or (kind not in ("", *TAKEN, *OWN_RULES) and not follows):
            yield Broken(layer_name(view, node), f"{kind.lower()} codes")


def per_channel_activations(view: View, target: Target) -> Iterator[Broken]:
    for node in activations_of(view):
        scale = view.shape(operand(node, 1)) or ()
        if operand(node, 1) in view.constants and np.prod(scale, dtype=np.int64) != 1:
            yield Broken(node_name(node), f"scale {list(scale)}")


def int4_activations(view: View, target: Target) -> Iterator[Broken]:
    for node in activations_of(view):
        if code_type(view, node) == "INT4":
            yield Broken(node_name(node), "int4 codes")


def compute_types(view: View, target: Target) -> Iterator[Broken]:
    """One violation per type, since all matmuls of a model share it."""
    for kind, word in FLOATS.items():
        if word in target.compute:
            continue
        users = [node_name(node) for node in view.named(*MATMULS) if view.types.get(operand(node, 0)) == kind]
        if kind == TensorProto.BFLOAT16:
            users += [name for name, tensor in view.constants.items() if tensor.data_type == kind]
        if users:
            yield Broken(users[0], f"{word} (places: {len(users)})")


def old_opset(view: View, target: Target) -> Iterator[Broken]:
    if view.opset < OPSETS[0]:
        yield Broken("(graph)", f"opset {view.opset}")


def new_opset(view: View, target: Target) -> Iterator[Broken]:
    if view.opset > OPSETS[1]:
        yield Broken("(graph)", f"opset {view.opset}")


# The graph as a whole -----------------------------------------------------------------------------


def constant_readers(view: View, target: Target) -> Iterator[Broken]:
    """ONNX Runtime looks up codes, and moves them once, when it opens the graph."""
    allowed = (
        DEQUANTIZE,
        *(("Gather", "GatherBlockQuantized", "Transpose") if target.backend is None else ()),
    )
    for name, tensor in view.constants.items():
        if type_word(tensor.data_type) not in ("INT8", "INT4", "INT2"):
            continue
        for node in view.readers.get(name, []):
            is_parameter = node.op_type in (QUANTIZE, DEQUANTIZE, "Clip") and operand(node, 0) != name
            if node.op_type not in allowed and not is_parameter:
                yield Broken(name, f"read by {node.op_type} {node_name(node)}")


def lone_quantizers(view: View, target: Target) -> Iterator[Broken]:
    # in the form for ONNX Runtime heads are repeated as codes
    is_form = target.backend is None
    moves = (*CODE_MOVES, *REPEATING) if is_form else CODE_MOVES
    readers = (DEQUANTIZE, "Shape") if is_form else (DEQUANTIZE,)
    for node in view.named(QUANTIZE):
        for reader, _ in users_of(view, result(node), moves):
            if reader.op_type not in readers:
                yield Broken(node_name(node), f"codes read by {reader.op_type} {node_name(reader)}")


def integer_operators(view: View, target: Target) -> Iterator[Broken]:
    for node in view.nodes:
        op = node.op_type
        if op == "GatherBlockQuantized" and target.backend is None:
            continue  # ONNX Runtime has no other operator that looks up int4 codes
        if op in INTEGER_OPERATORS or op.startswith(("QLinear", "DynamicQuantize")):
            yield Broken(node_name(node), op)


def lost_quantization(view: View, target: Target) -> Iterator[Broken]:
    try:
        promised = _says_quantized(json.loads(view.metadata.get(FORMATS_KEY, "null")))
    except (ValueError, RecursionError):
        promised = False
    if promised and not any(view.named(QUANTIZE, DEQUANTIZE)):
        yield Broken("(graph)", f"metadata {FORMATS_KEY} names integer formats, the graph has no Q/DQ node")


def _says_quantized(formats: object) -> bool:
    """True if any nested value is an integer format: `int8`, `ternary`, `w8a8`, or a mapping with `bits`."""
    if isinstance(formats, dict):
        return isinstance(formats.get("bits"), int) or any(map(_says_quantized, formats.values()))
    if isinstance(formats, list):
        return any(map(_says_quantized, formats))
    return isinstance(formats, str) and re.match(r"u?int\d|ternary|w\da\d", formats) is not None
