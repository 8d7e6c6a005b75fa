"""Steps along the edges of an ONNX graph, and comparison of stored tensors. No torch.

The functions are given a `View` of the graph; `graph/view.py` reads it from a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from onnx import NodeProto

    from qcompress.graph.view import View

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
DOMAINS = ("", "ai.onnx")
RUNTIME = "com.microsoft"
"""Operator domain of ONNX Runtime."""
CODER_DOMAINS = (*DOMAINS, RUNTIME)
"""Domains of QuantizeLinear and DequantizeLinear."""

MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten")
"""Operators that move the elements of a tensor without changing their values."""


def is_standard(op: str, domain: str) -> bool:
    """True for a standard ONNX operator. QuantizeLinear and DequantizeLinear of ONNX Runtime's domain, which
    it writes for types that an opset lacks, are included: TensorRT reads them too.
    """
    return domain in (CODER_DOMAINS if op in (QUANTIZE, DEQUANTIZE) else DOMAINS)


def is_a(node: NodeProto | None, *ops: str) -> bool:
    """True if a node is one of these standard ONNX operators; False without a node."""
    return node is not None and node.op_type in ops and is_standard(node.op_type, node.domain)


def operand(node: NodeProto, index: int) -> str:
    """Name of a node's input, empty if it has none at `index`."""
    return node.input[index] if index < len(node.input) else ""


def result(node: NodeProto) -> str:
    """Name of a node's first output, empty without outputs."""
    return node.output[0] if node.output else ""


def attribute(node: NodeProto, name: str, default: int) -> int:
    """Value of an integer attribute of a node."""
    return next((item.i for item in node.attribute if item.name == name), default)


def readers_of(view: View, name: str, *ops: str) -> list[NodeProto]:
    """Nodes of these standard operators that read a tensor, once per input that does."""
    return [node for node in view.readers.get(name, []) if is_a(node, *ops)]


def users_of(view: View, name: str, through: tuple[str, ...]) -> Iterator[tuple[NodeProto, str]]:
    """Nodes that read a tensor, directly or through operators of `through`, each with the value it reads."""
    queue, seen = [name], {name}
    while queue:
        value = queue.pop()
        for node in view.readers.get(value, []):
            view.steps.take()
            if node.op_type in through:
                fresh = set(node.output) - seen
                queue += fresh
                seen |= fresh
            else:
                yield node, value


def way_to(view: View, node: NodeProto | None) -> Iterator[NodeProto]:
    """A node and those before it along the first input, back to the stored tensor or the graph's input."""
    for _ in view.nodes:  # a malformed graph may have cycles
        if node is not None:
            view.steps.take()
            yield node
            name = operand(node, 0)
            node = None if name in view.constants else view.producers.get(name)


class Pair(NamedTuple):
    """The Q/DQ nodes that quantize a tensor."""

    quantize: NodeProto
    dequantize: NodeProto
    clip: NodeProto | None
    """Clip between the two nodes, for bounds narrower than the codes' type."""


def pair_of(view: View, decoder: NodeProto | None, *, cached: bool = False) -> Pair | None:
    """Q/DQ pair of a DequantizeLinear, None for another node or without a QuantizeLinear in front of it. Only
    Clip may lie between the two.

    With `cached`, Concat may append the codes to those of earlier tokens, which are a graph input, and a
    Transpose may follow, as for the keys of a key-value cache, and a repeat of heads (`before_repeat`).
    """
    if not is_a(decoder, DEQUANTIZE):
        return None
    codes = operand(decoder, 0)
    node = view.producers.get(before_repeat(view, codes) if cached else codes)
    if cached and is_a(node, "Transpose"):
        node = view.producers.get(operand(node, 0))
    if cached and is_a(node, "Concat"):
        past = [name for name in node.input if name not in view.producers]
        from_input = len(past) == 1 and past[0] not in view.constants
        node = view.producers.get(node.input[-1]) if from_input else None
    clip = node if is_a(node, "Clip") else None
    quantize = node if clip is None else view.producers.get(operand(clip, 0))
    return Pair(quantize, decoder, clip) if is_a(quantize, QUANTIZE) else None


REPEATING = ("Unsqueeze", "Expand", "Reshape")
"""Operators that repeat key and value heads for the query heads that share them, in their order."""


def before_repeat(view: View, value: str) -> str:
    """Key or value heads before they are repeated (grouped-query attention); other values unchanged."""
    name, repeats = value, False
    node = view.producers.get(name)
    while is_a(node, *REPEATING):
        repeats = repeats or is_a(node, "Expand")
        name = operand(node, 0)
        node = view.producers.get(name)
    return name if repeats else value


class Lookup(NamedTuple):
    """Rows of a table that are looked up as codes and decoded behind the Gather, in one of three forms.

    - one fp32 scale for a row: Gather(codes), Gather(scale) -> Cast(codes) * Unsqueeze(scale)
    - blocks, one of them for a row in fp16: Gather(codes), Gather(scale) -> DequantizeLinear
    - blocks of int4: GatherBlockQuantized(codes, scale)
    """

    codes: str
    """Stored codes, [rows, width]."""
    scale: str
    """Stored scales, [rows] or [rows, width / block]; empty if they are not looked up with the same ids."""
    decoder: NodeProto
    """Node whose output are the decoded rows: Mul, DequantizeLinear or GatherBlockQuantized."""

    @property
    def block(self) -> int:
        """Attribute `block_size`, 0 for Cast and Mul."""
        return attribute(self.decoder, "block_size", 0)


def lookup_of(view: View, node: NodeProto | None) -> Lookup | None:
    """Lookup that ends in a node, None for other nodes."""
    if node is None or len(node.input) < 2:
        return None
    if node.op_type == "GatherBlockQuantized" and node.domain == RUNTIME:
        axes = attribute(node, "gather_axis", 0), attribute(node, "quantize_axis", 1)
        is_plain = axes == (0, 1) and not operand(node, 3)
        return Lookup(operand(node, 0), operand(node, 2) if is_plain else "", node)
    if is_a(node, "Mul"):
        ways = [(view.producers.get(operand(node, i)), operand(node, 1 - i)) for i in (0, 1)]
        cast, other = next(((one, name) for one, name in ways if is_a(one, "Cast")), (None, ""))
        return _gathered(view, node, operand(cast, 0), other) if cast is not None else None
    is_plain = is_a(node, DEQUANTIZE) and attribute(node, "axis", 1) == -1
    return _gathered(view, node, operand(node, 0), operand(node, 1)) if is_plain else None


def _gathered(view: View, node: NodeProto, codes: str, scale: str) -> Lookup | None:
    """Lookup of gathered codes [..., width] and of scales, None if the codes are not rows of a constant."""
    rows, scales = view.producers.get(codes), view.producers.get(scale)
    if is_a(scales, "Unsqueeze"):
        scales = view.producers.get(operand(scales, 0))
    if not (is_a(rows, "Gather") and operand(rows, 0) in view.constants and attribute(rows, "axis", 0) == 0):
        return None
    is_together = is_a(scales, "Gather") and operand(scales, 1) == operand(rows, 1)
    is_together = is_together and attribute(scales, "axis", 0) == 0
    return Lookup(operand(rows, 0), operand(scales, 0) if is_together else "", node)


def lookups_of(view: View, codes: str) -> list[Lookup]:
    """All lookups of rows of a stored tensor."""
    ends = [node for node in view.readers.get(codes, []) if node.op_type == "GatherBlockQuantized"]
    for gather in readers_of(view, codes, "Gather"):
        for node in readers_of(view, result(gather), DEQUANTIZE, "Cast"):
            ends += readers_of(view, result(node), "Mul") if node.op_type == "Cast" else [node]
    return [lookup for node in ends if (lookup := lookup_of(view, node)) and lookup.codes == codes]


def decoders_of(view: View, codes: str) -> list[NodeProto]:
    """DequantizeLinear nodes that decode a stored tensor as a whole, directly or behind a Transpose of it."""
    turned = [result(node) for node in readers_of(view, codes, "Transpose")]
    return [node for name in (codes, *turned) for node in readers_of(view, name, DEQUANTIZE)]


def matmuls(view: View, value: str) -> list[tuple[NodeProto, str]]:
    """Matmuls and convolutions that read a value directly or after Transpose, with their input's name."""
    users = users_of(view, value, ("Transpose",))
    return [(node, name) for node, name in users if is_a(node, "MatMul", "Gemm", "Conv")]


def zero_is_zero(view: View, node: NodeProto) -> bool:
    """True if the zero point of a Q or DQ node is absent or all zeros."""
    if not operand(node, 2):
        return True
    zero = view.initializer(operand(node, 2))
    return zero is not None and not np.any(zero.astype(np.float64))  # a cast to int8 would make 256 a 0


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """True if two arrays have equal shapes, types and bits."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def first_difference(actual: np.ndarray, expected: np.ndarray, what: str) -> str:
    """Describe the first difference between two unequal arrays; `what` names them in the sentence."""
    if actual.shape != expected.shape:
        return f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    where = np.argwhere(actual != expected)
    place = tuple(int(index) for index in where[0])
    return f"{what}: {len(where)} differ, first at {list(place)}: {actual[place]}, expected {expected[place]}"
