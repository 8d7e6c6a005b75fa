"""Conversion of codebook look-ups to ONNX nodes, after the last optimizer that could fold them.

    weight [in, out]   Cast -> Gather -> Transpose -> Reshape       indices [in / block, out]
    table, kernel      Cast -> Gather -> Reshape                    indices [rows, width / block]
    rows of a table    Cast -> Gather(ids) -> Gather -> Reshape

Indices are stored as uint8, because TensorRT treats an int8 constant as quantized values. Cast converts them
to int32, the narrowest type that Gather accepts.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompress.quant.folded_codebook import LOOKUP

DOMAIN, OPERATOR = LOOKUP.split("::")


def spell_out(model: ir.Model) -> int:
    """Replace every look-up node in place; returns the number of look-ups."""
    nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OPERATOR)]
    counts: dict[str, int] = {}
    for node in nodes:
        made = _nodes(model.graph, node)
        for one in made:  # an embedding table and its tied head are two look-ups of one table
            counts[one.name] = counts.get(one.name, 0) + 1
            one.name += "" if counts[one.name] == 1 else f"_{counts[one.name]}"
            one.outputs[0].name = one.name + "_output"
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], made, [node.outputs[0]], [made[-1].outputs[0]]
        )
    model.graph.opset_imports.pop(DOMAIN, None)
    model.opset_imports.pop(DOMAIN, None)
    return len(nodes)


def _nodes(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    indices, table, *ids = node.inputs
    name = indices.name.removesuffix(".assignments")
    made: list[ir.Node] = []

    def add(operator: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        one = ir.node(operator, inputs, attributes, name=f"{name}/{operator}")
        made.append(one)
        return one.outputs[0]

    value = add("Cast", indices, to=ir.DataType.INT32)
    if ids:
        value = add("Gather", value, ids[0], axis=0)
    value = add("Gather", table, value, axis=0)
    if ids:
        sizes = [0] * (len(node.outputs[0].shape) - 1) + [-1]
    else:
        if node.attributes["axis"].as_int() == 1:
            value = add("Transpose", value, perm=[0, 2, 1])
        sizes = [int(size) for size in node.outputs[0].shape]
    add("Reshape", value, _constant(graph, f"{name}.{'rows' if ids else 'shape'}", sizes))
    return made


def _constant(graph: ir.Graph, name: str, sizes: list[int]) -> ir.Value:
    """A shape as an initializer, shared by all look-ups of one table."""
    if name not in graph.initializers:
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(sizes)]))
        value.const_value = ir.tensor(sizes, dtype=ir.DataType.INT64, name=name)
        graph.register_initializer(value)
    return graph.initializers[name]
