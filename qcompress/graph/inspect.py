"""Listing of the weights in an ONNX file of any origin: bits, granularity and bytes. No torch.

A *weight* is a constant that a matmul, a convolution or Gather reads: through DequantizeLinear, as floats, as
codes that the operator decodes (ONNX Runtime's operators), or as indices into a codebook. Information bits =
ceil(log2(max_code - min_code + 1)); three levels count as log2(3). For example, 2-bit codes in an int4 tensor
have 4 stored bits and 2 information bits. Each stored tensor is counted once: a tied table for its first
reader, a shared scale for its first layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto

from qcompress.encodings.walk import DEQUANTIZE, MOVES, QUANTIZE, attribute, operand, result, users_of
from qcompress.graph.codebooks import Lookup, lookups
from qcompress.graph.lint.activations import MATMULS
from qcompress.graph.lint.soundness import demand_sound
from qcompress.graph.qdq import code_type, dequantizer_of, weights_of
from qcompress.graph.tensors import BITS, stored_bytes, type_word
from qcompress.graph.view import FLOATS, View, read

ENDINGS = re.compile(r"(\.codes|\.assignments|_quantized|(_DQ)?_[qQ]\d|_i4)$")
"""Suffixes that tools add to the name of a quantized weight: qcompress, ONNX Runtime's 8-bit and 4-bit
quantizers, nvidia-modelopt.
"""

INTEGERS = ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")

READERS = (*MATMULS, "Gather")

DECODERS = {
    "QLinearMatMul": (3, 4, 5), "QLinearConv": (3, 4, 5), "QGemm": (3, 4, 5), "MatMulInteger": (1, 3),
    "ConvInteger": (1, 3), "MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3),
}  # fmt: skip
"""Operators that read codes: input positions of the codes, and of their scales and zero points."""


@dataclass(frozen=True)
class Weight:
    """One stored weight."""

    name: str
    readers: tuple[str, ...]
    """Operators that compute with the weight."""
    shape: tuple[int, ...]
    stored: str
    """Element type in the file."""
    stored_bits: float
    information_bits: float
    """ceil(log2(max_code - min_code + 1)), log2(3) for three levels; `stored_bits` for floats."""
    granularity: str
    """`tensor`, `channel`, `block N`, `vectors of N` for a codebook, or empty for a float weight."""
    input: str
    """Type of the other operand: int8 or float, empty for a table."""
    bytes: int
    """Bytes of codes, scales and zero points."""
    share: float
    """Fraction of the file and its external data."""


def contents(file: Path) -> dict[str, Any]:
    """List the weights in the order in which the graph reads them, and totals in bytes: {"weights": [...],
    "totals": {"weights", "float", "other", "graph", "file", "elements"}, "nodes": {operator: count}}.

    `float`: float tensors that are not weights (biases, norms); `other`: index and shape constants; `graph`:
    the rest of the file, which holds nodes and names; `elements`: number of weights.
    """
    view = read(file)
    demand_sound(view)
    size = sum(path.stat().st_size for path in (view.file, *view.data_files))
    taken = {name: stored_bytes(tensor) for name, tensor in view.constants.items()}
    tensors = sum(taken.values())
    counted: set[str] = set()
    books = lookups(view)
    weights = [
        _codebook(view, books[name], counted, size)
        if name in books
        else _weight(view, name, nodes, counted, size)
        for name, nodes in _stored(view).items()
    ]
    rest = {name: tensor for name, tensor in view.constants.items() if name not in counted}
    floats = sum(stored_bytes(tensor) for tensor in rest.values() if tensor.data_type in FLOATS)
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


def _stored(view: View) -> dict[str, list[NodeProto]]:
    """Map each stored weight to its readers: DequantizeLinear nodes, or the operators that compute with its
    floats or codes.
    """
    weights: dict[str, list[NodeProto]] = {}
    decoders = {id(node) for node in weights_of(view)}
    for node in view.nodes:
        if id(node) in decoders or node.op_type in DECODERS:
            name = view.root(operand(node, DECODERS.get(node.op_type, (0,))[0]))
            if name in view.constants and len(view.constants[name].dims) > 1:
                weights.setdefault(name, []).append(node)
        elif node.op_type in READERS:
            for index in (0, 1):
                name = view.root(operand(node, index)) if operand(node, index) in view.fixed else ""
                tensor = view.constants.get(name)
                is_weight = tensor is not None and len(tensor.dims) > 1 and tensor.data_type in FLOATS
                if is_weight and (name not in weights or weights[name][0].op_type in READERS):
                    weights.setdefault(name, []).append(node)
    return weights


def _count(view: View, parts: Iterable[str], counted: set[str]) -> int:
    """Bytes of the stored tensors among `parts` that are not yet in `counted`; adds them to it."""
    fresh = {part for part in parts if part in view.constants} - counted
    counted |= fresh
    return sum(stored_bytes(view.constants[part]) for part in fresh)


def _weight(view: View, name: str, nodes: list[NodeProto], counted: set[str], size: int) -> Weight:
    """List a weight with its readers `nodes`; `size`: bytes of the file and its external data."""
    first, readers = nodes[0], nodes
    if first.op_type == DEQUANTIZE:
        readers = [reader for node in nodes for reader, _ in users_of(view, result(node), MOVES)]
    own = _count(view, [name, *(part for node in nodes for part in _parameters(view, node))], counted)
    stored, bits = _bits(view, first, name)
    return Weight(
        name=_short(name),
        readers=tuple(dict.fromkeys(node.op_type for node in readers)),
        shape=_shape(view, first, name),
        stored=stored,
        stored_bits=_packed(view, first, name) or BITS.get(type_word(view.constants[name].data_type), 0),
        information_bits=bits,
        granularity=_granularity(view, first),
        input=_input(view, readers),
        bytes=own,
        share=own / size,
    )


def _codebook(view: View, book: Lookup, counted: set[str], size: int) -> Weight:
    """List a codebook weight; `size`: bytes of the file and its external data."""
    own = _count(view, book.parts, counted)
    bits = BITS.get(_word(view, book.indices), 8) / book.block
    table = FLOATS.get(view.constants[book.table].data_type, _word(view, book.table).lower())
    return Weight(
        name=_short(book.indices),
        readers=book.readers,
        shape=book.shape,
        stored=f"{_word(view, book.indices).lower()} into {table}",
        stored_bits=int(bits) if bits == int(bits) else bits,
        information_bits=book.information_bits,
        granularity=f"vectors of {book.block}",
        input="" if book.readers == ("Gather",) else "float",
        bytes=own,
        share=own / size,
    )


def _parameters(view: View, node: NodeProto) -> Iterator[str]:
    """Names of scales, zero points and Clip bounds on the path from a stored weight to its reader `node`."""
    yield from (operand(node, index) for index in DECODERS.get(node.op_type, ())[1:])
    for before in _way(view, node) if node.op_type == DEQUANTIZE else ():
        if before.op_type in (DEQUANTIZE, QUANTIZE, "Clip"):
            yield from before.input[1:]


def _way(view: View, node: NodeProto | None) -> Iterator[NodeProto]:
    """DequantizeLinear and its predecessors along the first input, back to the stored tensor."""
    for _ in view.nodes:  # a malformed graph may have cycles
        if node is not None:
            view.steps.take()
            yield node
            name = operand(node, 0)
            node = None if name in view.constants else view.producers.get(name)


def _packed(view: View, node: NodeProto, name: str) -> int:
    """Bits of one code if ONNX Runtime's operator unpacks it from bytes, else 0."""
    is_packed = node.op_type in ("MatMulNBits", "GatherBlockQuantized")
    return attribute(node, "bits", 4) if is_packed and BITS.get(_word(view, name)) == 8 else 0


def _shape(view: View, node: NodeProto, name: str) -> tuple[int, ...]:
    """Logical shape of a weight; codes packed into bytes are unpacked."""
    *outer, last = view.constants[name].dims
    if node.op_type == "MatMulNBits":
        return attribute(node, "K", 0), attribute(node, "N", 0)
    return *outer, last * 8 // (_packed(view, node, name) or 8)


def _word(view: View, name: str) -> str:
    return type_word(view.constants[name].data_type)


def _short(name: str) -> str:
    return ENDINGS.sub("", name)


def _bits(view: View, node: NodeProto, name: str) -> tuple[str, float]:
    """Stored element type, and information bits."""
    kind = _word(view, name)
    if bits := _packed(view, node, name):
        return kind.lower(), bits
    if view.constants[name].data_type in FLOATS:
        rounded = code_type(view, node) if node.op_type == DEQUANTIZE else kind
        bounds = _bounds(view, node) if node.op_type == DEQUANTIZE else None
        return FLOATS[view.constants[name].data_type], bounds or BITS.get(rounded, BITS[kind])
    codes = view.values(name)
    if kind not in INTEGERS or not codes.size:
        return kind.lower(), BITS.get(kind, 0)
    return kind.lower(), _information(codes)


def _information(codes: np.ndarray) -> float:
    codes = codes.astype(np.int16)  # the types of four bits have no minimum
    levels = int(codes.max()) - int(codes.min()) + 1
    return math.log2(3) if levels == 3 else max((levels - 1).bit_length(), 1)


def _bounds(view: View, node: NodeProto) -> float | None:
    """Information bits of the codes behind a Clip in front of DequantizeLinear, None without a Clip."""
    for before in _way(view, node):
        if before.op_type == "Clip":
            ends = [view.values(operand(before, index)) for index in (1, 2)]
            known = all(end is not None and end.size == 1 and end.dtype != object for end in ends)
            return _information(np.array(ends)) if known else None
    return None


def _granularity(view: View, node: NodeProto) -> str:
    block = attribute(node, "block_size", 0)
    if node.op_type in READERS or block:
        return f"block {block}" if block else ""
    scale = view.shape(operand(node, DECODERS.get(node.op_type, (0, 1))[1]))
    if scale is None or not all(isinstance(length, int) for length in scale):
        return ""
    return "tensor" if math.prod(scale) == 1 else "channel"


def _input(view: View, readers: list[NodeProto]) -> str:
    """Code type of the other operand of `readers`; float if it has no codes."""
    kinds = set()
    for node in readers:
        if "Gather" in node.op_type or node.op_type not in (*READERS, *DECODERS):
            continue
        others = [name for name in node.input[:2] if name and name not in view.fixed]
        kinds.add(_code_word(view, others[0]) if others else "float")
    return " and ".join(sorted(kinds))


def _code_word(view: View, name: str) -> str:
    source, maker = dequantizer_of(view, name), view.producers.get(name)
    if maker is not None and maker.op_type == "DynamicQuantizeLinear":
        return "uint8"
    word = code_type(view, source) if source is not None else type_word(view.types.get(name, 0))
    return word.lower() if source is not None or word in INTEGERS else "float"


def summary(content: dict[str, Any]) -> str:
    """One-sentence summary of the totals of `contents`."""
    totals = content["totals"]
    bits = 8 * totals["weights"] / max(totals["elements"], 1)
    pairs = content["nodes"].get(QUANTIZE, 0)
    return (
        f"{totals['file']:,} bytes: weights {totals['weights']:,} ({bits:.2f} bits each, with scales), "
        f"other floats {totals['float']:,}, other tensors {totals['other']:,}, graph {totals['graph']:,}; "
        f"{pairs} QuantizeLinear nodes"
    )
