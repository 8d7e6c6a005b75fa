"""The certificate of points: Q/DQ pairs in front of attention matmuls, residual additions and products of
squeeze-and-excite. No torch.

Operands have no names in the graph and are identified by structure. Before each Softmax is the matmul of
query and key, and after it the matmul of probabilities and value. Before each LayerNormalization behind a
block is the Add of branch and skip. In a convolutional net each Add of two non-constant values is a residual
addition, and each Mul by the Sigmoid of a convolution is a product of squeeze-and-excite, unless it is swish,
which multiplies by the Sigmoid of the same value. The graph and the points have the order of the forward
pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx import NodeProto
from safetensors import safe_open

from qcompress.encodings.walk import before_repeat, is_a, operand, pair_of, readers_of, result
from qcompress.errors import ExportError
from qcompress.graph.certificate.edges import differences
from qcompress.graph.certificate.layers import certify_view
from qcompress.graph.view import View, read
from qcompress.models.plan import LayerPlan, PointPlan, rounded
from qcompress.system.artifacts import graph_digests

PASSING = (
    "Add", "Mul", "Div", "Tanh", "Cast", "Where", "QuantizeLinear", "Clip", "DequantizeLinear", "IsNaN",
    "Max",
)  # fmt: skip
"""Operators between the matmuls and the Softmax: scale, soft cap, mask, casts, Q/DQ, the guard of fully
masked rows, and the floor of masked scores.
"""


def certify_all(
    file: Path, folded: Path, plan: tuple[LayerPlan, ...], points: tuple[PointPlan, ...]
) -> dict[str, Any]:
    """Make the certificate of layers and points. `complete` is True only if all of them passed; `files` holds
    the digests of the graph and of its external data.
    """
    view = read(file, separated=True)
    certificate = certify_view(view, folded, plan)
    with safe_open(folded / "folded.safetensors", framework="np") as tensors:
        values = _values(view, points)
        checked = [_certify_point(view, tensors, item, values.get(item.name)) for item in points]
    wanted = sum(item.activations is not None for item in points)
    passed = all(point["passed"] for point in checked)
    return {
        **certificate,
        "files": graph_digests(file),
        "points": checked,
        "expected_points": wanted,
        "complete": certificate["complete"] and passed,
    }


def _certify_point(view: View, tensors: Any, item: PointPlan, value: str | None) -> dict[str, Any]:
    """Compare the Q/DQ pair at a point with the folded scale; `value`: input of the operation, or None if
    the operation is missing.
    """
    reasons: list[str] = []
    pair = pair_of(view, view.producers.get(value or ""), cached=True)
    wanted = item.activations is not None
    if value is None and wanted:
        reasons.append("its place in the graph was not found")
    elif wanted != (pair is not None):
        reasons.append(
            f"{int(pair is not None)} Q/DQ pairs in front of the operation, {int(wanted)} expected"
        )
    elif wanted:
        reference = tensors.get_tensor(f"{item.name}.scale")
        bounds = item.activations.bounds
        reasons += differences(view, pair, reference, bounds, item.point.nonnegative)
    return {"name": item.name, "rounded": wanted, "passed": not reasons, "reasons": reasons}


def _values(view: View, points: tuple[PointPlan, ...]) -> dict[str, str]:
    """Map each point to the value that its operation reads; a kind with another number of operands is left
    out.
    """
    by_kind = {kind: [item.name for item in points if item.point.kind == kind] for kind in KINDS}
    operands: dict[str, str] = {}
    for kind, places in KINDS.items():
        values = places(view)
        if len(values) == len(by_kind[kind]):
            operands |= dict(zip(by_kind[kind], values, strict=True))
    return operands


def point_inputs(view: View, points: tuple[PointPlan, ...]) -> dict[str, tuple[str, str, bool]]:
    """Map each quantized point to the name of its float value, the name of the codes that its matmul decodes
    (before heads are repeated), and True if a Transpose lies between the two, as for a cached key.
    """
    values = _values(view, points)
    pairs = {
        item.name: pair_of(view, view.producers.get(values.get(item.name, "")), cached=True)
        for item in rounded(points)
    }
    return {
        name: (operand(pair.quantize, 0), codes, is_a(view.producers.get(codes), "Transpose"))
        for name, pair in pairs.items()
        if pair and (codes := before_repeat(view, operand(pair.dequantize, 0)))
    }


def _attention_operands(view: View) -> list[str]:
    """Query, key, probabilities and value of each attention, in the order of the graph. Raises ExportError
    for a matmul without a second input.
    """
    operands: list[str] = []
    for node in view.named("Softmax"):
        before, after = _before(view, operand(node, 0)), _after(view, result(node))
        if before is None or after is None:
            return []
        if min(len(before.input), len(after.input)) < 2:
            raise ExportError(
                f"{view.file}: a matmul beside {node.name or node.op_type} has one input",
                fix="export the model again",
            )
        operands += [*before.input[:2], *after.input[:2]]
    return [before_repeat(view, name) for name in operands]


def _before(view: View, value: str) -> NodeProto | None:
    """Matmul whose output becomes a value through operators of PASSING, None without one."""
    seen: set[str] = set()
    queue = [value]
    while queue:
        node = view.producers.get(queue.pop(0))
        if node is None or result(node) in seen:
            continue
        seen.add(result(node))
        if is_a(node, "MatMul"):
            return node
        if is_a(node, *PASSING):
            queue += node.input
    return None


def _after(view: View, value: str) -> NodeProto | None:
    """Matmul whose first operand a value becomes through operators of PASSING, None without one."""
    seen: set[str] = set()
    queue = [value]
    while queue:
        name = queue.pop(0)
        for node in readers_of(view, name, "MatMul", *PASSING):
            if node.op_type == "MatMul":
                if operand(node, 0) == name:
                    return node
            elif result(node) not in seen:
                seen.add(result(node))
                queue.append(result(node))
    return None


def _addition_inputs(view: View) -> list[str]:
    """Branch and skip of each residual addition, and both operands of each squeeze-and-excite product, in
    the order of the graph. The first LayerNorm follows the embeddings and is skipped. Without LayerNorms,
    each Add of two values that are not initializers is a residual addition.
    """
    norms = list(view.named("LayerNormalization"))
    if not norms:
        made = {name for name in view.constants if name not in view.producers}
        inner: list[str] = []
        for node in view.named("Add", "Mul"):
            if is_a(node, "Mul"):
                inner += _excited(view, node)
            elif not made.intersection(node.input):
                inner += node.input
        return inner
    additions = [view.producers.get(operand(node, 0)) for node in norms[1:]]
    if not all(is_a(node, "Add") for node in additions):
        return []
    return [name for node in additions for name in node.input[:2]]


def _excited(view: View, node: NodeProto) -> list[str]:
    """Operands of a Mul, the gate last, if the gate is the Sigmoid of a convolution of another value than the
    other operand; empty for other nodes.
    """
    for place, name in enumerate(node.input[:2]):
        gate, other = view.producers.get(name), operand(node, 1 - place)
        if pair := pair_of(view, gate):
            gate = view.producers.get(operand(pair.quantize, 0))
        before = view.producers.get(operand(gate, 0)) if is_a(gate, "Sigmoid") else None
        if is_a(before, "Conv") and result(before) != other:
            return [other, name]
    return []


KINDS = {"attention": _attention_operands, "residual": _addition_inputs}
