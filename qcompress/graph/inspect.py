"""Listing of the weights in an ONNX file of any origin: bits, granularity and bytes. No torch.

A *weight* is a constant that a matmul, a convolution or Gather reads: in one of the encodings, as floats, or
as codes that the operator decodes (ONNX Runtime's operators). Information bits of integer codes =
ceil(log2(max_code - min_code + 1)); three levels count as log2(3). For example, 2-bit codes in an int4 tensor
have 4 stored bits and 2 information bits. Each stored tensor is counted once: a tied table for its first
reader, a shared scale for its first layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnx import NodeProto

from qcompress.encodings import CODES
from qcompress.encodings.base import Stored
from qcompress.encodings.int_qdq import INTEGERS, code_bits
from qcompress.encodings.walk import QUANTIZE, attribute, operand
from qcompress.graph.lint.activations import MATMULS
from qcompress.graph.lint.soundness import demand_sound
from qcompress.graph.qdq import code_type, dequantizer_of
from qcompress.graph.tensors import stored_bytes, type_word
from qcompress.graph.view import FLOATS, View, read
from qcompress.graph.weights import stored_weights

ENDINGS = re.compile(rf"(\.({'|'.join(CODES)})|_quantized|(_DQ)?_[qQ]\d|_i4)$")
"""Suffixes that tools add to the name of a quantized weight: qcompress, ONNX Runtime's 8-bit and 4-bit
quantizers, nvidia-modelopt.
"""

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
    weights = [_weight(view, decodings, counted, size) for decodings in _stored(view).values()]
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


class ReadWeight(Stored):
    """A weight that `node` reads as it is stored: floats, or codes that the operator decodes."""

    integers = True

    @property
    def block(self) -> int:
        """Attribute `block_size` of the operator."""
        return attribute(self.node, "block_size", 0)

    @property
    def granularity(self) -> str:
        """`block N`, or `tensor` or `channel` from the shape of the scale; empty for floats."""
        if self.node.op_type in READERS or self.block:
            return f"block {self.block}" if self.block else ""
        scale = self.view.shape(operand(self.node, DECODERS[self.node.op_type][1]))
        if scale is None or not all(isinstance(length, int) for length in scale):
            return ""
        return "tensor" if math.prod(scale) == 1 else "channel"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor; codes packed into bytes are unpacked."""
        if self.node.op_type == "MatMulNBits":
            return attribute(self.node, "K", 0), attribute(self.node, "N", 0)
        *outer, last = self.view.constants[self.name].dims
        return *outer, last * 8 // (self._packed or 8)

    @property
    def stored_bits(self) -> float:
        """Bits per weight in the file, without scales."""
        return self._packed or super().stored_bits

    @property
    def _packed(self) -> int:
        """Bits of one code if ONNX Runtime's operator unpacks it from bytes, else 0."""
        is_packed = self.node.op_type in ("MatMulNBits", "GatherBlockQuantized")
        return attribute(self.node, "bits", 4) if is_packed and super().stored_bits == 8 else 0

    def parts(self) -> Iterator[str]:
        """Yield the stored tensor, and the operator's scales and zero points."""
        yield self.name
        yield from (operand(self.node, index) for index in DECODERS.get(self.node.op_type, ())[1:])

    def readers(self) -> Iterator[NodeProto]:
        """Yield the operator."""
        return iter([self.node])

    def information_bits(self) -> float:
        """Bits of the range of integer codes; those of the type for floats and packed codes."""
        return self._packed or code_bits(self.view, self.name)


def _stored(view: View) -> dict[str, list[Stored]]:
    """Map each stored tensor to its decodings, in the order of the graph."""
    encoded: dict[int, list[Stored]] = {}
    for weight in stored_weights(view):
        encoded.setdefault(id(weight.node), []).append(weight)
    weights: dict[str, list[Stored]] = {}
    for node in view.nodes:
        for weight in encoded.get(id(node)) or _read(view, node):
            tensor, first = view.constants.get(weight.source), weights.get(weight.source, [weight])[0]
            is_weight = tensor is not None and len(tensor.dims) > 1
            # floats that an encoding or an operator on codes read before are listed by that reader
            if is_weight and (_is_float(first) or not _is_float(weight)):
                weights.setdefault(weight.source, []).append(weight)
    return weights


def _is_float(weight: Stored) -> bool:
    """True for a weight that an operator reads as floats."""
    return isinstance(weight, ReadWeight) and weight.node.op_type in READERS


def _read(view: View, node: NodeProto) -> Iterator[Stored]:
    """Weights that a node reads as they are stored."""
    if node.op_type in DECODERS:
        name = view.root(operand(node, DECODERS[node.op_type][0]))
        yield ReadWeight(view, name, name, node)
    elif node.op_type in READERS:
        names = [view.root(name) for name in node.input[:2] if name in view.fixed]
        yield from (ReadWeight(view, name, name, node) for name in names if view.is_float(name))


def _weight(view: View, decodings: list[Stored], counted: set[str], size: int) -> Weight:
    """List a weight with all its decodings, as the first of them says; `counted`: tensors that were counted
    before; `size`: bytes of the file and its external data.
    """
    first = decodings[0]
    if isinstance(first, ReadWeight):
        readers = [decoding.node for decoding in decodings]
    else:
        readers = [reader for decoding in decodings for reader in decoding.readers()]
    words = tuple(dict.fromkeys(node.op_type for node in readers))
    fresh = {part for decoding in decodings for part in decoding.parts() if part in view.constants} - counted
    counted |= fresh
    own = sum(stored_bytes(view.constants[part]) for part in fresh)
    return Weight(
        name=ENDINGS.sub("", first.name),
        readers=words,
        shape=first.shape,
        stored=first.stored_as,
        stored_bits=first.stored_bits,
        information_bits=first.information_bits(),
        granularity=first.granularity,
        input=_input(view, readers) if first.integers else "" if words == ("Gather",) else "float",
        bytes=own,
        share=own / size,
    )


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
