"""What an ONNX file stores: bits, granularity and bytes of every weight, ours or not. No torch.

A *weight* is a constant that a matmul, a convolution or Gather reads, through DequantizeLinear or as floats.
Information bits are counted from the codes that are there: as many as number all values between the smallest
and the largest code, so that 2-bit codes in an int4 tensor have 4 stored bits and 2 of information.
Everything that is stored is counted once: a tied table for its first reader, a scale that two layers share
for the first of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto

from qcompress.targets.checks import MATMULS
from qcompress.targets.graph import (
    DEQUANTIZE,
    FLOATS,
    QUANTIZE,
    View,
    attribute,
    operand,
    read,
    result,
    type_word,
)
from qcompress.targets.quantizers import MOVES, code_type, dequantizer_of, users_of, weights_of
from qcompress.targets.sizes import BITS, stored_bytes

ENDINGS = (".codes", "_quantized", "_q4", "_Q4")
"""What tools add to the name of a weight when they store its codes."""

INTEGERS = ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")

READERS = (*MATMULS, "Gather", "MatMulNBits")


@dataclass(frozen=True)
class Weight:
    """One stored weight."""

    name: str
    readers: tuple[str, ...]
    """Operators that compute with it."""
    shape: tuple[int, ...]
    stored: str
    """Element type of the file."""
    stored_bits: int
    information_bits: float
    """Bits that number every code between the smallest and the largest, log2(3) for three of them; as stored
    for floats.
    """
    granularity: str
    """`tensor`, `channel`, `block N`, or empty for a float weight."""
    input: str
    """Type in which its other operand comes: int8, float; empty for a table."""
    bytes: int
    """Codes, scales and zero points."""
    share: float
    """Of the file and its data."""


def contents(file: Path) -> dict[str, Any]:
    """The weights in the order in which the graph reads them, and totals in bytes: {"weights": [...],
    "totals": {"weights", "float", "other", "graph", "file"}, "nodes": {operator: count}}.

    `float` are float tensors that are no weights (biases, norms), `other` index and shape constants, `graph`
    what is left of the file: nodes and names.
    """
    view = read(file)
    size = sum(path.stat().st_size for path in (view.file, *view.data_files))
    counted: set[str] = set()
    weights = [_weight(view, nodes, counted, size) for nodes in _stored(view)]
    rest = {name: tensor for name, tensor in view.constants.items() if name not in counted}
    floats = sum(stored_bytes(tensor) for tensor in rest.values() if tensor.data_type in FLOATS)
    tensors = sum(stored_bytes(tensor) for tensor in view.constants.values())
    own = sum(weight.bytes for weight in weights)
    counts: dict[str, int] = {}
    for node in view.nodes:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return {
        "weights": [asdict(weight) for weight in weights],
        "totals": {
            "weights": own,
            "float": floats,
            "other": tensors - own - floats,
            "graph": size - tensors,
            "file": size,
            "elements": sum(math.prod(weight.shape) for weight in weights),
        },
        "nodes": dict(sorted(counts.items())),
    }


def _stored(view: View) -> Iterator[list[NodeProto]]:
    """For each stored weight the nodes that read it: its DequantizeLinear nodes, or what computes with it in
    float.
    """
    found: dict[str, list[NodeProto]] = {}
    decoders = {id(node) for node in weights_of(view)}
    for node in view.nodes:
        if id(node) in decoders:
            name = view.root(operand(node, 0))
            if name in view.constants and len(view.constants[name].dims) > 1:
                found.setdefault(name, []).append(node)
        elif node.op_type in READERS:
            for index in (0, 1):
                name = view.root(operand(node, index)) if operand(node, index) in view.fixed else ""
                tensor = view.constants.get(name)
                is_weight = tensor is not None and len(tensor.dims) > 1 and tensor.data_type in FLOATS
                if (is_weight and name not in found) or (
                    node.op_type == "MatMulNBits" and index == 1 and tensor
                ):
                    found.setdefault(name, []).append(node)
    return iter(found.values())


def _weight(view: View, nodes: list[NodeProto], counted: set[str], size: int) -> Weight:
    first = nodes[0]
    if first.op_type == DEQUANTIZE:
        name = view.root(operand(first, 0))
        readers = [reader for node in nodes for reader in users_of(view, result(node), MOVES)]
        granularity = _granularity(view, first)
        parts = [name, *(operand(node, index) for node in nodes for index in (1, 2))]
    else:
        name = next(root for index in (1, 0) if (root := view.root(operand(first, index))) in view.constants)
        readers, granularity, parts = nodes, "", [name]
        if first.op_type == "MatMulNBits":
            granularity = f"block {attribute(first, 'block_size', 0)}"
            parts += [operand(first, index) for index in (2, 3)]
    tensor = view.constants[name]
    fresh = [part for part in dict.fromkeys(parts) if part in view.constants and part not in counted]
    counted.update(fresh)
    own = sum(stored_bytes(view.constants[part]) for part in fresh)
    stored, bits = _bits(view, first, name)
    return Weight(
        name=_short(name),
        readers=tuple(dict.fromkeys(node.op_type for node in readers)),
        shape=tuple(tensor.dims),
        stored=stored,
        stored_bits=BITS.get(type_word(tensor.data_type), 0),
        information_bits=bits,
        granularity=granularity,
        input=_input(view, readers),
        bytes=own,
        share=own / size,
    )


def _short(name: str) -> str:
    return next((name.removesuffix(end) for end in ENDINGS if name.endswith(end)), name)


def _bits(view: View, node: NodeProto, name: str) -> tuple[str, float]:
    """Element type as stored, and bits of information."""
    kind = type_word(view.constants[name].data_type)
    if node.op_type == "MatMulNBits":
        return kind.lower(), attribute(node, "bits", 4)
    if view.constants[name].data_type in FLOATS:
        rounded = code_type(view, node) if node.op_type == DEQUANTIZE else kind
        return FLOATS[view.constants[name].data_type], BITS.get(rounded, BITS[kind])
    codes = view.values(name)
    if kind not in INTEGERS or not codes.size:
        return kind.lower(), BITS.get(kind, 0)
    codes = codes.astype(np.int16)  # the types of four bits have no minimum
    levels = int(codes.max()) - int(codes.min()) + 1
    return kind.lower(), math.log2(3) if levels == 3 else max((levels - 1).bit_length(), 1)


def _granularity(view: View, node: NodeProto) -> str:
    block = attribute(node, "block_size", 0)
    if block:
        return f"block {block}"
    scale = view.shape(operand(node, 1))
    if scale is None or not all(isinstance(length, int) for length in scale):
        return ""
    return "tensor" if math.prod(scale) == 1 else "channel"


def _input(view: View, readers: list[NodeProto]) -> str:
    """Type of the codes that the other operand is decoded from, float if it is not."""
    kinds = set()
    for node in readers:
        if node.op_type == "Gather" or node.op_type not in READERS:
            continue
        others = [name for name in node.input[:2] if name and name not in view.fixed]
        source = dequantizer_of(view, others[0]) if others else None
        kinds.add(code_type(view, source).lower() if source is not None else "float")
    return " and ".join(sorted(kinds))


def summary(found: dict[str, Any]) -> str:
    """Totals in words."""
    totals = found["totals"]
    bits = 8 * totals["weights"] / max(totals["elements"], 1)
    pairs = found["nodes"].get(QUANTIZE, 0)
    return (
        f"{totals['file']:,} bytes: weights {totals['weights']:,} ({bits:.2f} bits each, with scales), "
        f"other floats {totals['float']:,}, other tensors {totals['other']:,}, graph {totals['graph']:,}; "
        f"{pairs} QuantizeLinear nodes"
    )
