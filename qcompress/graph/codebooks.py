"""Weights that a graph looks up: indices into a table of vectors (product quantization). No torch.

Found by their shape, whoever wrote them: a Gather from a constant table of two axes, whose indices are a
constant of narrow integers behind a Cast, or rows of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from onnx import NodeProto

from qcompress.graph.tensors import type_word
from qcompress.graph.view import DEQUANTIZE, View, attribute, operand, result

NARROW = ("UINT8", "INT8", "UINT16", "INT16")
"""Types that indices are stored in; Gather takes none of them, hence the Cast."""

MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")


@dataclass(frozen=True)
class Lookup:
    """One table with the indices that point into it."""

    indices: str
    """Initializer of the indices, two axes."""
    table: str
    """Initializer of the vectors or of their codes, [k, block]."""
    parts: tuple[str, ...]
    """Every initializer that belongs to the weight."""
    readers: tuple[str, ...]
    """Operators that compute with the weight; Gather where rows are taken."""
    shape: tuple[int, ...]
    block: int
    information_bits: float
    """Bits of one weight's share of an index."""


def lookups(view: View) -> dict[str, Lookup]:
    """By the name of the table's initializer, in the order of the graph."""
    found: dict[str, Lookup] = {}
    for node in view.named("Gather"):
        table, scale = _table(view, operand(node, 0))
        indices, by_rows = _indices(view, operand(node, 1))
        if not table or not indices:
            continue
        known, ends = found.get(table), _ends(view, node, by_rows)
        if known is not None:
            readers = tuple(dict.fromkeys((*known.readers, *ends)))
            found[table] = replace(known, readers=readers)
            continue
        count, block = view.constants[table].dims
        parts = tuple(part for part in (indices, table, *scale) if part in view.constants)
        shape = _shape(view, node, indices, block)
        bits = math.log2(max(count, 2)) / block
        found[table] = Lookup(indices, table, parts, ends, shape, block, bits)
    return found


def _table(view: View, name: str) -> tuple[str, tuple[str, ...]]:
    """The table that a value is, and what it is decoded with; nothing where it is no table."""
    maker = view.producers.get(name)
    scale: tuple[str, ...] = ()
    if maker is not None and maker.op_type == DEQUANTIZE:
        name, scale = operand(maker, 0), tuple(maker.input[1:])
    tensor = view.constants.get(name)
    return (name, scale) if tensor is not None and len(tensor.dims) == 2 and tensor.dims[1] else ("", ())


def _indices(view: View, name: str) -> tuple[str, bool]:
    """The constant of two axes that indices come from, and whether they are rows of it."""
    maker, by_rows = view.producers.get(name), False
    if maker is not None and maker.op_type == "Gather":
        name, by_rows = operand(maker, 0), True
        maker = view.producers.get(name)
    if maker is None or maker.op_type != "Cast":
        return "", False
    tensor = view.constants.get(operand(maker, 0))
    found = tensor is not None and len(tensor.dims) == 2 and type_word(tensor.data_type) in NARROW
    return (operand(maker, 0), by_rows) if found else ("", False)


def _ends(view: View, gather: NodeProto, by_rows: bool) -> tuple[str, ...]:
    """Operators behind the moves of a decoded weight."""
    if by_rows:
        return ("Gather",)
    found, waiting, seen = [], [result(gather)], set()
    while waiting:
        name = waiting.pop()
        for reader in view.readers.get(name, []) if name not in seen else []:
            if reader.op_type in MOVES:
                waiting.append(result(reader))
            else:
                found.append(reader.op_type)
        seen.add(name)
    return tuple(dict.fromkeys(found))


def _shape(view: View, gather: NodeProto, indices: str, block: int) -> tuple[int, ...]:
    """As the operator computes with it: vectors lie along the axis that a Transpose brings to the front, or
    along the last one.
    """
    first, second = view.constants[indices].dims
    turned = any(reader.op_type == "Transpose" for reader in view.readers.get(result(gather), []))
    if turned and attribute(gather, "axis", 0) == 0:
        return first * block, second
    return first, second * block
