"""Conversion of operators in a half-precision graph to fp32: Cast before and behind, parameters in fp32.

Sums of squares (norms) and of exponentials (softmax) overflow or lose precision in fp16. All other operators,
mainly matmuls, stay in the compute type.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompress.errors import ExportError

OPERATORS = {"norm": "LayerNormalization", "softmax": "Softmax"}
"""ONNX operators by their names in `export.keep_fp32`."""

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def require_operators(model: ir.Model, kinds: Collection[str]) -> None:
    """Raise ExportError for a kind without half-precision operators: keeping it would have no effect."""
    there = {node.op_type for node in model.graph if any(one and one.dtype in HALVES for one in node.inputs)}
    for kind in kinds:
        if OPERATORS[kind] not in there:
            near = difflib.get_close_matches(OPERATORS[kind], there, n=1, cutoff=0.6)
            has = f"it has {near[0]}" if near else f"it has {', '.join(sorted(there)) or 'none'}"
            raise ExportError(
                f"export.keep_fp32: {kind}: the graph has no {OPERATORS[kind]} in half precision ({has})",
                fix=f"drop {kind} from `export.keep_fp32`",
            )


def keep_fp32(model: ir.Model, kinds: Collection[str], parameters: Mapping[str, np.ndarray]) -> int:
    """Convert all half-precision operators of these kinds to fp32; returns their number.

    `parameters`: fp32 values of the model's float tensors, by initializer name. A norm's scale and bias get
    these values and not their half-precision ones.
    """
    wanted = {OPERATORS[kind] for kind in kinds}
    nodes = [node for node in model.graph if node.op_type in wanted and node.inputs[0].dtype in HALVES]
    for node in nodes:
        half = node.inputs[0].dtype
        before = _cast(node.inputs[0], ir.DataType.FLOAT, f"{node.inputs[0].name}/fp32")
        model.graph.insert_before(node, before)
        node.replace_input_with(0, before.outputs[0])
        for place, value in list(enumerate(node.inputs))[1:]:
            if value is not None and value.dtype in HALVES:
                node.replace_input_with(place, _widened(model, value, nodes, parameters))
        _narrow_again(model, node, half)
    return len(nodes)


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    """Build a Cast of `value` whose output is called `name`."""
    node = ir.node("Cast", [value], attributes={"to": to}, name=f"{name}/Cast")
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, to, value.shape
    return node


def _widened(
    model: ir.Model, value: ir.Value, nodes: Sequence[ir.Node], parameters: Mapping[str, np.ndarray]
) -> ir.Value:
    """Return a parameter as fp32. It is converted in place, or copied if other nodes than `nodes` read it,
    since the exporter stores equal tensors once.
    """
    array = parameters.get(value.name, value.const_value.numpy()).astype(np.float32)
    wide, name = value, value.name
    if any(user not in nodes for user, _ in value.uses()):
        name = f"{value.name}/fp32"
        if name in model.graph.initializers:
            return model.graph.initializers[name]
        wide = ir.Value(name=name, shape=value.shape)
    wide.const_value, wide.dtype = ir.Tensor(array, name=name), ir.DataType.FLOAT
    model.graph.initializers[name] = wide
    return wide


def _narrow_again(model: ir.Model, node: ir.Node, half: ir.DataType) -> None:
    """Insert a Cast to `half` behind a node; the Cast's output gets the name of the node's output."""
    output = node.outputs[0]
    name, output.name, output.dtype = output.name, f"{output.name}/fp32", ir.DataType.FLOAT
    users = list(output.uses())
    behind = _cast(output, half, name)
    model.graph.insert_after(node, behind)
    for user, place in users:
        user.replace_input_with(place, behind.outputs[0])
    for place, value in enumerate(model.graph.outputs):
        if value is output:
            model.graph.outputs[place] = behind.outputs[0]
