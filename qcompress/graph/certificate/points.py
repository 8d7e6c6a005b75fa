"""The certificate of points: Q/DQ pairs in front of attention matmuls and residual additions. No torch.

Operands have no names in the graph and are identified by structure. Before each Softmax is the matmul of
query and key, and after it the matmul of probabilities and value. Before each LayerNormalization behind a
block is the Add of branch and skip. In a convolutional net each Add of two non-constant values is a residual
addition. The graph and the points have the order of the forward pass.
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
"""Operators between the matmuls and the Softmax: scale, mask, casts, Q/DQ, and the guard of fully masked
rows.
"""


def certify_all(
    file: Path, folded: Path, plan: tuple[LayerPlan, ...], points: tuple[PointPlan, ...]
) -> dict[str, Any]:
    """Make the certificate of layers and points. `complete` is True only if all of them passed; `files` holds
    the digests of the graph and of its external data.
    """
    certificate = certify(file, folded, plan)
    graph = Graph.read(file)
    with safe_open(folded / "folded.safetensors", framework="np") as tensors:
        values = _values(graph, points)
        checked = [_certify_point(graph, tensors, item, values.get(item.name)) for item in points]
    wanted = sum(item.activations is not None for item in points)
    passed = all(point["passed"] for point in checked)
    return {
        **certificate,
        "files": graph_digests(file),
        "points": checked,
        "expected_points": wanted,
        "complete": certificate["complete"] and passed,
    }


def _certify_point(graph: Graph, tensors: Any, item: PointPlan, value: str | None) -> dict[str, Any]:
    """Compare the Q/DQ pair at a point with the folded scale; `value`: input of the operation, or None if
    the operation is missing.
    """
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
    """Map each point to the value that its operation reads; a kind with another number of operands is left
    out.
    """
    by_kind = {kind: [item.name for item in points if item.point.kind == kind] for kind in KINDS}
    operands: dict[str, str] = {}
    for kind, places in KINDS.items():
        values = places(graph)
        if len(values) == len(by_kind[kind]):
            operands |= dict(zip(by_kind[kind], values, strict=True))
    return operands


def point_inputs(graph: Graph, points: tuple[PointPlan, ...]) -> dict[str, tuple[str, str, bool]]:
    """Map each quantized point to the name of its float value, the name of the codes that its matmul decodes,
    and True if a Transpose lies between the two, as for a cached key.
    """
    values = _values(graph, points)
    pairs = {item.name: _pair(graph, values.get(item.name, "")) for item in rounded(points)}
    return {
        name: (pair.quantize.input[0], pair.dequantize.input[0], _is_moved(graph, pair.dequantize.input[0]))
        for name, pair in pairs.items()
        if pair
    }


def _pair(graph: Graph, value: str) -> Pair | None:
    """Q/DQ pair that produces a value. With a key-value cache, Concat appends the codes to those of earlier
    tokens (a graph input), and Transpose follows for keys.
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
    """True if Transpose produces the codes."""
    node = graph.producer.get(codes)
    return node is not None and node.op_type == "Transpose"


def _attention_operands(graph: Graph) -> list[str]:
    """Query, key, probabilities and value of each attention, in the order of the graph."""
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
    """Matmul whose output becomes a value through operators of PASSING, None without one."""
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
    """Matmul whose first operand a value becomes through operators of PASSING, None without one."""
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
    """Branch and skip of each residual addition. The first LayerNorm follows the embeddings and is skipped.
    Without LayerNorms, each Add of two activations is a residual addition.
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
