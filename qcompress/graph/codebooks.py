"""Codebook weights of a graph: indices into a table of vectors (product quantization). No torch.

They are identified by structure, so graphs of other tools count too: Gather from a constant table with two
axes, whose indices are a constant of narrow integers behind a Cast, or rows of such a constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from onnx import NodeProto

from qcompress.encodings.walk import DEQUANTIZE, MOVES, attribute, operand, result, users_of
from qcompress.graph.tensors import type_word
from qcompress.graph.view import View

NARROW = ("UINT8", "INT8", "UINT16", "INT16")
"""Types of stored indices; Gather accepts none of them, hence the Cast."""


@dataclass(frozen=True)
class Lookup:
    """One codebook weight: a table and the indices into it."""

    indices: str
    """Name of the indices' initializer, which has two axes."""
    table: str
    """Name of the initializer of the vectors or their codes, [k, block]."""
    parts: tuple[str, ...]
    """Names of all initializers of the weight."""
    readers: tuple[str, ...]
    """Operators that compute with the weight; Gather for a look-up of rows."""
    shape: tuple[int, ...]
    block: int
    information_bits: float
    """Bits of an index per weight."""


def lookups(view: View) -> dict[str, Lookup]:
    """Find all codebook weights, by the name of the table's initializer, in the order of the graph."""
    books: dict[str, Lookup] = {}
    for node in view.named("Gather"):
        table, scale = _table(view, operand(node, 0))
        indices, by_rows = _indices(view, operand(node, 1))
        if not table or not indices:
            continue
        known, ends = books.get(table), _ends(view, node, by_rows)
        if known is not None:
            readers = tuple(dict.fromkeys((*known.readers, *ends)))
            books[table] = replace(known, readers=readers)
            continue
        count, block = view.constants[table].dims
        parts = tuple(part for part in (indices, table, *scale) if part in view.constants)
        shape = _shape(view, node, indices, block)
        bits = math.log2(max(count, 2)) / block
        books[table] = Lookup(indices, table, parts, ends, shape, block, bits)
    return books


def _table(view: View, name: str) -> tuple[str, tuple[str, ...]]:
    """Name of the table behind a value, and its decoder's parameters; empty if the value is not a table."""
    maker = view.producers.get(name)
    scale: tuple[str, ...] = ()
    if maker is not None and maker.op_type == DEQUANTIZE:
        name, scale = operand(maker, 0), tuple(maker.input[1:])
    tensor = view.constants.get(name)
    return (name, scale) if tensor is not None and len(tensor.dims) == 2 and tensor.dims[1] else ("", ())


def _indices(view: View, name: str) -> tuple[str, bool]:
    """Name of the constant behind indices (empty if there is none), and True if they are rows of it."""
    maker, by_rows = view.producers.get(name), False
    if maker is not None and maker.op_type == "Gather":
        name, by_rows = operand(maker, 0), True
        maker = view.producers.get(name)
    if maker is None or maker.op_type != "Cast":
        return "", False
    tensor = view.constants.get(operand(maker, 0))
    is_indices = tensor is not None and len(tensor.dims) == 2 and type_word(tensor.data_type) in NARROW
    return (operand(maker, 0), by_rows) if is_indices else ("", False)


def _ends(view: View, gather: NodeProto, by_rows: bool) -> tuple[str, ...]:
    """Operators that compute with a decoded weight, directly or behind MOVES."""
    if by_rows:
        return ("Gather",)
    return tuple(dict.fromkeys(reader.op_type for reader, _ in users_of(view, result(gather), MOVES)))


def _shape(view: View, gather: NodeProto, indices: str, block: int) -> tuple[int, ...]:
    """Logical shape of the weight: vectors lie along the axis that a Transpose moves to the front, else along
    the last axis.
    """
    first, second = view.constants[indices].dims
    turned = any(reader.op_type == "Transpose" for reader in view.readers.get(result(gather), []))
    if turned and attribute(gather, "axis", 0) == 0:
        return first * block, second
    return first, second * block
