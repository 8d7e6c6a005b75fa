"""Joins the quantized matmuls that read one input, so that ONNX Runtime computes one product.

Query, key and value read one tensor with one scale, and so do gate and up. As separate matmuls they share one
Q/DQ pair, which keeps ONNX Runtime from computing any of them with integers; joined they are one integer
matmul, which is also wider. `graph/joined.py` has the names and the way back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from qcompress.graph.joined import BETWEEN, joined_name


class Product(NamedTuple):
    """A matmul with a decoded weight."""

    layer: str
    decoder: ir.Node
    matmul: ir.Node
    bias: ir.Node | None
    """Add of the bias, if the matmul's output goes nowhere else."""

    @property
    def form(self) -> tuple[object, ...]:
        """Properties that joined weights share; a bias joins only a bias."""
        codes, scale, *zero = self.decoder.inputs
        attributes = {name: item.value for name, item in self.decoder.attributes.items()}
        return (
            self.layer.rpartition(".")[0], self.bias is None, codes.dtype, codes.shape[0], scale.dtype,
            len(scale.shape), len(zero), attributes.get("axis", 1), attributes.get("block_size", 0),
        )  # fmt: skip

    @property
    def output(self) -> ir.Value:
        """Output of the layer."""
        return (self.matmul if self.bias is None else self.bias).outputs[0]


def join_matmuls(model: ir.Model) -> list[str]:
    """Join the matmuls of layers with one parent, one input value and one form of weight, in place. Returns
    the joined names. The initializers of the separate weights stay, unread.

    A weight that several matmuls read, as in models whose blocks share weights, is joined if each of them
    joins it with the same others.
    """
    groups: dict[tuple[object, ...], list[Product]] = {}
    for node in model.graph:
        product = _product(node)
        if product is not None:
            groups.setdefault((node.inputs[0], *product.form), []).append(product)
    together = [group for group in groups.values() if len(group) > 1 and _apart(group)]
    uses = Counter(tuple(one.layer for one in group) for group in together)
    made: dict[tuple[str, ...], list[ir.Node]] = {}
    for group in together:
        key = tuple(one.layer for one in group)
        if key in made or all(len(one.decoder.outputs[0].uses()) == uses[key] for one in group):
            made.setdefault(key, []).append(_join(model, group, made.get(key, [])))
    return [joined_name(layers) for layers in made]


def _product(node: ir.Node) -> Product | None:
    """The matmul of a layer whose weight DequantizeLinear decodes from initializers, None for other nodes."""
    decoder = node.inputs[1].producer() if node.op_type == "MatMul" else None
    if decoder is None or decoder.op_type != "DequantizeLinear":
        return None
    codes = decoder.inputs[0]
    layer, _, part = (codes.name or "").rpartition(".weight.")
    axis = decoder.attributes["axis"].value if "axis" in decoder.attributes else 1
    blocked = "block_size" in decoder.attributes
    is_stored = all(value is not None and value.is_initializer() for value in decoder.inputs)
    is_own = len(codes.uses()) == 1 and BETWEEN not in layer
    if not (part and is_stored and is_own and len(codes.shape) == 2 and axis == (0 if blocked else 1)):
        return None
    return Product(layer, decoder, node, _bias(node))


def _bias(matmul: ir.Node) -> ir.Node | None:
    """Add of an initializer [out] behind a matmul, None if there is none or the product is read elsewhere."""
    users = matmul.outputs[0].uses()
    if len(users) != 1 or matmul.outputs[0].is_graph_output() or users[0].node.op_type != "Add":
        return None
    add = users[0].node
    other = add.inputs[1 - users[0].idx]
    is_vector = other is not None and other.is_initializer() and len(other.shape) == 1
    return add if is_vector else None


def _apart(group: Sequence[Product]) -> bool:
    """True if no layer occurs twice in the group and no output of a layer is one of the graph."""
    names = [one.layer for one in group]
    return len(set(names)) == len(names) and not any(one.output.is_graph_output() for one in group)


def _join(model: ir.Model, group: Sequence[Product], earlier: Sequence[ir.Node]) -> ir.Node:
    """Replace the matmuls of a group by one; `earlier`: matmuls of the same joined weight. Returns the
    new one.
    """
    name, first = joined_name([one.layer for one in group]), group[0].matmul
    ending = f"_{len(earlier) + 1}" if earlier else ""
    if earlier:
        decoder = earlier[0].inputs[1].producer()
    else:
        decoder = _joined_decoder(model, name, group)
        model.graph.insert_before(first, decoder)
    matmul = ir.node("MatMul", [first.inputs[0], decoder.outputs[0]], name=f"{name}/MatMul{ending}")
    nodes = [matmul]
    outputs = [one.output for one in group]
    if group[0].bias is not None:
        biases = [next(value for value in one.bias.inputs if value.is_initializer()) for one in group]
        joined = _initializer(model, f"{name}.bias", biases)
        nodes.append(ir.node("Add", [matmul.outputs[0], joined], name=f"{name}/Add{ending}"))
    widths = np.array([one.decoder.inputs[0].shape[1] for one in group], np.int64)
    sizes = constant(model, f"{name}.columns", widths)
    split = ir.node(
        "Split", [nodes[-1].outputs[0], sizes], attributes={"axis": -1}, num_outputs=len(group),
        name=f"{name}/Split{ending}",
    )  # fmt: skip
    for node in nodes:
        value = node.outputs[0]
        value.name, value.dtype = f"{node.name}_output", decoder.inputs[1].dtype
        if outputs[0].shape is not None:
            value.shape = ir.Shape([*outputs[0].shape[:-1], int(widths.sum())])
    model.graph.insert_before(first, [*nodes, split])
    for value, new in zip(outputs, split.outputs, strict=True):
        replace_value(value, new)
    old = [node for one in group for node in (one.bias, one.matmul) if node is not None]
    model.graph.remove(old, safe=True)
    decoders = {one.decoder for one in group if not one.decoder.outputs[0].uses()}
    model.graph.remove(sorted(decoders, key=lambda node: node.name), safe=True)
    return matmul


def _joined_decoder(model: ir.Model, name: str, group: Sequence[Product]) -> ir.Node:
    """DequantizeLinear of the joined weight, with its initializers."""
    first = group[0].decoder
    parts = ("codes", "scale", "zero")[: len(first.inputs)]
    inputs = [
        _initializer(model, f"{name}.weight.{part}", [one.decoder.inputs[place] for one in group])
        for place, part in enumerate(parts)
    ]
    decoder = ir.node(
        "DequantizeLinear", inputs, attributes=first.attributes, name=f"{name}.weight/DequantizeLinear"
    )
    output = decoder.outputs[0]
    output.name, output.dtype, output.shape = f"{decoder.name}_output", inputs[1].dtype, inputs[0].shape
    return decoder


def _initializer(model: ir.Model, name: str, values: Sequence[ir.Value]) -> ir.Value:
    """Initializer with the columns of several, one with that name if it exists."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    array = np.concatenate([value.const_value.numpy() for value in values], axis=-1)
    return constant(model, name, array, values[0].dtype)


def constant(model: ir.Model, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """Initializer of an array, one with that name if it exists."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = ir.Tensor(array, dtype=dtype, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    model.graph.initializers[name] = value
    return value


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let `new` have the name, type, shape and readers of `old`."""
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.name = f"{old.name}/replaced"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
