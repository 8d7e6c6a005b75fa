"""The certificate's part about points: Q/DQ pairs in front of attention matmuls and residual additions. No
torch.

The graph has no name for an operand, so each is found by its place. Every Softmax has the matmul of query and
key before it and the matmul of probabilities and value after it; every LayerNormalization behind a block adds
branch and skip in front of it; a convolutional net has no other Add of two values that are no constants. All
come in the order of the forward pass, which is that of the points.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx import NodeProto
from safetensors import safe_open

from qcompress.graph.certificate.edges import Graph, Pair, bounds_fit, pair_of, same, zero_is_zero
from qcompress.graph.certificate.layers import certify
from qcompress.models.architecture import OPERANDS
from qcompress.models.plan import LayerPlan, PointPlan, rounded
from qcompress.system.artifacts import graph_digests

PASSING = ("Add", "Mul", "Div", "Cast", "Where", "QuantizeLinear", "Clip", "DequantizeLinear", "IsNaN")
"""Between the matmuls and the Softmax: scaling, mask, types, rounding, and the guard of fully masked rows."""


def certify_all(
    file: Path, folded: Path, plan: tuple[LayerPlan, ...], points: tuple[PointPlan, ...]
) -> dict[str, Any]:
    """The certificate of layers and points; `complete` only if every one of both passed. `files` has the
    digests of the graph and of its external data.
    """
    found = certify(file, folded, plan)
    graph = Graph.read(file)
    with safe_open(folded / "folded.safetensors", framework="np") as tensors:
        values = _values(graph, points)
        checked = [_certify_point(graph, tensors, item, values.get(item.name)) for item in points]
    wanted = sum(item.activations is not None for item in points)
    passed = all(point["passed"] for point in checked)
    return {
        **found,
        "files": graph_digests(file),
        "points": checked,
        "expected_points": wanted,
        "complete": found["complete"] and passed,
    }


def _certify_point(graph: Graph, tensors: Any, item: PointPlan, value: str | None) -> dict[str, Any]:
    """Hold what flows into an operation at a point against the folded scale of that point."""
    reasons: list[str] = []
    pair = _pair(graph, value or "")
    wanted = item.activations is not None
    if value is None and wanted:
        reasons.append("its place in the graph was not found")
    elif wanted != (pair is not None):
        reasons.append(
            f"{int(pair is not None)} Q/DQ pairs in front of the operation, {int(wanted)} expected"
        )
    elif wanted:
        reference = tensors.get_tensor(f"{item.name}.scale")
        if not bounds_fit(graph, pair.clip, item.activations.bounds):
            reasons.append("the bounds of its codes differ")
        for node in (pair.quantize, pair.dequantize):
            scale = graph.array(node.input[1])
            if scale is None or not same(scale, reference.astype(scale.dtype)):
                reasons.append(f"{node.op_type}: the scale differs")
            if not zero_is_zero(graph, node):
                reasons.append(f"{node.op_type}: the zero point is not 0")
    return {"name": item.name, "rounded": wanted, "passed": not reasons, "reasons": reasons}


def _values(graph: Graph, points: tuple[PointPlan, ...]) -> dict[str, str]:
    """Point -> name of the value that its operation reads; nothing where the counts do not agree."""
    by_kind = {kind: [item.name for item in points if item.point.kind == kind] for kind in KINDS}
    found: dict[str, str] = {}
    for kind, places in KINDS.items():
        values = places(graph)
        if len(values) == len(by_kind[kind]):
            found |= dict(zip(by_kind[kind], values, strict=True))
    return found


def point_inputs(graph: Graph, points: tuple[PointPlan, ...]) -> dict[str, tuple[str, str, bool]]:
    """Point that rounds -> names of the float value that it rounds and of the codes that its matmul decodes,
    and whether the last two axes are swapped between the two, as those of a cached key are.
    """
    values = _values(graph, points)
    pairs = {item.name: _pair(graph, values.get(item.name, "")) for item in rounded(points)}
    return {
        name: (pair.quantize.input[0], pair.dequantize.input[0], _is_moved(graph, pair.dequantize.input[0]))
        for name, pair in pairs.items()
        if pair
    }


def _pair(graph: Graph, value: str) -> Pair | None:
    """The nodes that round a value; codes in a key-value cache are appended to those of earlier tokens, an
    input of the graph, and keys are transposed after that.
    """
    decoder = graph.producer.get(value)
    if decoder is None or decoder.op_type != "DequantizeLinear":
        return None
    node = graph.producer.get(decoder.input[0])
    if node is not None and node.op_type == "Transpose":
        node = graph.producer.get(node.input[0])
    if node is not None and node.op_type == "Concat":
        past = [name for name in node.input if name not in graph.producer]
        cached = len(past) == 1 and past[0] not in graph.initializers
        node = graph.producer.get(node.input[-1]) if cached else None
    return pair_of(graph, node, decoder)


def _is_moved(graph: Graph, codes: str) -> bool:
    node = graph.producer.get(codes)
    return node is not None and node.op_type == "Transpose"


def _attention_operands(graph: Graph) -> list[str]:
    """Query, key, probabilities and value of each attention, one after another."""
    operands: list[str] = []
    for node in graph.nodes:
        if node.op_type != "Softmax":
            continue
        before = _before(graph, node.input[0])
        after = _after(graph, node.output[0])
        if before is None or after is None:
            return []
        operands += [*before.input[:2], *after.input[:2]]
    assert len(operands) % len(OPERANDS) == 0
    return operands


def _before(graph: Graph, value: str) -> NodeProto | None:
    """The matmul that a value comes out of, through operations on each element."""
    seen: set[str] = set()
    queue = [value]
    while queue:
        node = graph.producer.get(queue.pop(0))
        if node is None or node.output[0] in seen:
            continue
        seen.add(node.output[0])
        if node.op_type == "MatMul":
            return node
        if node.op_type in PASSING:
            queue += node.input
    return None


def _after(graph: Graph, value: str) -> NodeProto | None:
    """The matmul whose first operand a value becomes, through operations on each element."""
    seen: set[str] = set()
    queue = [value]
    while queue:
        name = queue.pop(0)
        for node in graph.readers.get(name, []):
            if node.op_type == "MatMul" and node.input[0] == name:
                return node
            if node.op_type in PASSING and node.output[0] not in seen:
                seen.add(node.output[0])
                queue.append(node.output[0])
    return None


def _addition_inputs(graph: Graph) -> list[str]:
    """Branch and skip of each residual addition; the first norm stands behind the tables and adds none. In a
    net without LayerNorms every addition of two activations is one.
    """
    norms = [node for node in graph.nodes if node.op_type == "LayerNormalization"]
    if not norms:
        adds = [node for node in graph.nodes if node.op_type == "Add"]
        inner = [node for node in adds if not any(name in graph.initializers for name in node.input)]
        return [name for node in inner for name in node.input]
    additions = [graph.producer.get(node.input[0]) for node in norms[1:]]
    if any(node is None or node.op_type != "Add" for node in additions):
        return []
    return [name for node in additions for name in node.input[:2]]


KINDS = {"attention": _attention_operands, "residual": _addition_inputs}
