"""Forms of a graph that ONNX Runtime computes faster, with the same values but for masked scores. `export`
uses them for targets without TensorRT, which refuses a Gather of int8 codes and needs none of the other
forms; its plan of MiniLM with joined matmuls is 0.6 % larger (W8A8; W4A16: 3 %).

The figures are those of ONNX Runtime 1.31 on x86-64 with AVX512-VNNI, one thread.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from qcompress.encodings.walk import RUNTIME
from qcompress.graph.convolution_forms import (
    fold_pads,
    pool_images,
    shift_shared,
    store_unsigned,
)
from qcompress.graph.join_matmuls import constant, join_matmuls, replace_value
from qcompress.graph.repeated_heads import repeat_codes

LEAST_BLOCK = 16
"""Smallest block size of GatherBlockQuantized; the others are its multiples by powers of two."""


def look_up_codes(model: ir.Model) -> list[str]:
    """Look up the codes and scales of a quantized table and decode the rows, instead of decoding the table in
    each run, in place. Returns the names of the tables.

        DequantizeLinear(codes, scale) -> Gather        before
        Gather(codes), Gather(scale) -> Cast(codes) * scale     int8, an fp32 scale for each row
        Gather(codes), Gather(scale) -> DequantizeLinear        int8 in blocks, fp16
        GatherBlockQuantized(codes, scale)                      int4 in blocks: Gather takes no int4

    A row has the same values in each form. Tables of int4 or int2 codes with other blocks are left as they
    are.
    """
    done: list[str] = []
    for gather in list(model.graph):
        table = gather.inputs[0] if gather.op_type == "Gather" and gather.inputs else None
        decoder = table.producer() if table is not None and _axis(gather, 0) == 0 else None
        if decoder is None or decoder.op_type != "DequantizeLinear" or len(decoder.inputs) != 2:
            continue
        codes, scale = decoder.inputs
        layer, _, part = codes.name.rpartition(".weight.")
        blocked = "block_size" in decoder.attributes
        is_by_row = _axis(decoder, 1) == (1 if blocked else 0)
        if part != "codes" or not (codes.is_initializer() and scale.is_initializer() and is_by_row):
            continue
        if codes.dtype in (ir.DataType.INT8, ir.DataType.UINT8):
            nodes = _gathered(model, layer, gather, decoder)
        elif codes.dtype == ir.DataType.INT4 and blocked and _is_power(decoder):
            nodes = [_block_gather(model, layer, gather, decoder)]
        else:
            continue
        model.graph.insert_before(gather, nodes)
        replace_value(gather.outputs[0], nodes[-1].outputs[0])
        model.graph.remove(gather, safe=True)
        if not decoder.outputs[0].uses():
            model.graph.remove(decoder, safe=True)
        done.append(layer)
    return done


def _axis(node: ir.Node, default: int) -> int:
    return node.attributes["axis"].value if "axis" in node.attributes else default


def _is_power(decoder: ir.Node) -> bool:
    """True if GatherBlockQuantized has the block size of a decoder."""
    block = decoder.attributes["block_size"].value
    return block >= LEAST_BLOCK and block & (block - 1) == 0


def _gathered(model: ir.Model, layer: str, gather: ir.Node, decoder: ir.Node) -> list[ir.Node]:
    """Gather of codes and of scales, and the nodes that decode the rows, the last of which yields them."""
    (codes, scale), ids = decoder.inputs, gather.inputs[1]
    name = f"{layer}.weight.rows"
    rows = ir.node("Gather", [codes, ids], attributes={"axis": 0}, name=f"{name}/Gather")
    scales = ir.node("Gather", [scale, ids], attributes={"axis": 0}, name=f"{name}.scale/Gather")
    nodes, values = [rows, scales], scales
    if "block_size" not in decoder.attributes:
        last = constant(model, "last_axis", np.array([-1], np.int64))
        values = ir.node("Unsqueeze", [scales.outputs[0], last], name=f"{name}.scale/Unsqueeze")
        nodes.append(values)
    if len(nodes) == 3 and scale.dtype == ir.DataType.FLOAT:
        to = {"to": scale.dtype}
        cast = ir.node("Cast", [rows.outputs[0]], attributes=to, name=f"{name}/Cast")
        inputs = [cast.outputs[0], values.outputs[0]]
        nodes += [cast, ir.node("Mul", inputs, name=f"{name}/Mul")]
    else:
        block = (
            decoder.attributes["block_size"].value if "block_size" in decoder.attributes else codes.shape[1]
        )
        inputs, attributes = [rows.outputs[0], values.outputs[0]], {"axis": -1, "block_size": block}
        operator = "DequantizeLinear"
        nodes.append(ir.node(operator, inputs, attributes=attributes, name=f"{name}/{operator}"))
    for node in nodes:
        node.outputs[0].name = f"{node.name}_output"
        node.outputs[0].dtype = codes.dtype if node is rows else scale.dtype
    return nodes


def _block_gather(model: ir.Model, layer: str, gather: ir.Node, decoder: ir.Node) -> ir.Node:
    """GatherBlockQuantized of int4 rows, an operator of ONNX Runtime."""
    codes, scale = decoder.inputs
    model.opset_imports.setdefault(RUNTIME, 1)
    attributes = {
        "gather_axis": 0, "quantize_axis": 1, "block_size": decoder.attributes["block_size"].value
    }  # fmt: skip
    name = f"{layer}.weight.rows/GatherBlockQuantized"
    inputs = [codes, gather.inputs[1], scale]
    return ir.node("GatherBlockQuantized", inputs, attributes=attributes, domain=RUNTIME, name=name)


def turn_codes(model: ir.Model) -> int:
    """Transpose the codes of a tied head instead of its decoded weight, if the input is not quantized, in
    place; returns the number of heads. ONNX Runtime transposes constant codes once and multiplies with
    MatMulNBits; otherwise it decodes the table in each run (56 of 80 ms for a token of GPT-2's 124 M shape).
    """
    done = 0
    for matmul in list(model.graph):
        turn = matmul.inputs[1].producer() if matmul.op_type == "MatMul" else None
        decoder = turn.inputs[0].producer() if turn is not None and turn.op_type == "Transpose" else None
        x = matmul.inputs[0].producer() if decoder is not None else None
        if not _decodes_int8(decoder) or _decodes_int8(x) or not decoder.inputs[0].is_initializer():
            continue
        if len(decoder.outputs[0].uses()) != 1 or len(turn.outputs[0].uses()) != 1 or _axis(decoder, 1) != 0:
            continue
        codes, scale = decoder.inputs[:2]
        first = ir.node("Transpose", [codes], attributes={"perm": [1, 0]}, name=f"{decoder.name}/Transpose")
        first.outputs[0].name, first.outputs[0].dtype = f"{first.name}_output", codes.dtype
        # MatMulNBits takes parameters that no other node reads, and the rows read the scale
        owner = codes.name.removesuffix(".codes")
        own_scale = constant(model, f"{owner}.head_scale", scale.const_value.numpy())
        zero = constant(model, f"{owner}.head_zero", np.zeros(scale.shape, np.int8))
        inputs = [first.outputs[0], own_scale, zero]
        name = f"{decoder.name}/turned"
        second = ir.node("DequantizeLinear", inputs, attributes={"axis": 1}, name=name)
        model.graph.insert_before(turn, [first, second])
        replace_value(turn.outputs[0], second.outputs[0])
        model.graph.remove([turn, decoder], safe=True)
        done += 1
    return done


def adapt(model: ir.Model, nonnegative: Collection[str]) -> None:
    """Apply all forms to a graph, in place. `nonnegative`: Q/DQ pairs, by the names of
    their nodes without the operator, of values that are never negative.
    """
    join_matmuls(model)
    look_up_codes(model)
    turn_codes(model)
    repeat_codes(model)
    keep_three_axes(model)
    lighten_products(model)
    fold_pads(model)
    pool_images(model)
    store_unsigned(model, nonnegative)
    shift_shared(model)
    raise_masked_scores(model)
    forget_shapes(model)
    drop_unused(model)


def keep_three_axes(model: ir.Model) -> int:
    """Give the input of a matmul of two quantized matrices a third axis, in place; returns the number of
    matmuls. ONNX Runtime turns a product of two axes and its bias into Gemm, for which it has no integer
    kernel with float outputs.
    """
    done = 0
    for add in list(model.graph):
        matmul = _product_of_matrices(add)
        if matmul is None:
            continue
        pair = _pair_of(matmul)
        quantize = pair[0]
        first = constant(model, "first_axis", np.array([0], np.int64))
        x, y = quantize.inputs[0], add.outputs[0]
        before = ir.node("Unsqueeze", [x, first], name=f"{quantize.name}/Unsqueeze")
        before.outputs[0].name, before.outputs[0].type = f"{before.name}_output", x.type
        model.graph.insert_before(quantize, before)
        quantize.replace_input_with(0, before.outputs[0])
        behind = ir.node("Squeeze", [y, first], name=f"{add.name}/Squeeze")
        model.graph.insert_after(add, behind)
        replace_value(y, behind.outputs[0])
        behind.replace_input_with(0, y)
        for node in (*pair, matmul, add):
            node.outputs[0].shape = None  # of two axes
        done += 1
    return done


def _product_of_matrices(add: ir.Node) -> ir.Node | None:
    """The MatMul in front of an Add, if both have two axes and codes are multiplied; None otherwise."""
    if add.op_type != "Add":
        return None
    for value in add.inputs:
        matmul = value.producer() if value is not None else None
        if matmul is None or matmul.op_type != "MatMul" or len(value.uses()) != 1:
            continue
        x, w = (operand.producer() for operand in matmul.inputs)
        if any(node is None or node.op_type != "DequantizeLinear" for node in (x, w)):
            continue
        has_two = matmul.inputs[0].shape is not None and len(matmul.inputs[0].shape) == 2
        if has_two and _pair_of(matmul) and w.inputs[0].dtype == ir.DataType.INT8:
            return matmul
    return None


def _pair_of(matmul: ir.Node) -> list[ir.Node]:
    """Nodes from QuantizeLinear to DequantizeLinear in front of a matmul; empty if other nodes read them."""
    nodes, node = [], matmul.inputs[0].producer()
    while node is not None and len(node.outputs[0].uses()) == 1:
        nodes.insert(0, node)
        if node.op_type == "QuantizeLinear":
            return nodes
        node = node.inputs[0].producer() if node.op_type in ("DequantizeLinear", "Clip") else None
    return []


def lighten_products(model: ir.Model) -> None:
    """Make the matmuls of int8 codes cheaper, in place; the values stay the same.

    A weight's zero points, all 0, are dropped: with one for each channel the kernel corrects for each of them
    (6 % of a matmul). A bias gets a second axis, [1, out]: with one axis it is fused into BiasGelu, which
    takes 1.6 times as long as Add and Gelu.
    """
    for matmul in model.graph:
        weight = matmul.inputs[1].producer() if matmul.op_type == "MatMul" else None
        x = matmul.inputs[0].producer() if weight is not None else None
        if not (_decodes_int8(weight) and _decodes_int8(x) and weight.inputs[0].is_initializer()):
            continue
        if len(weight.inputs) == 3:
            weight.resize_inputs(2)
        for add, place in matmul.outputs[0].uses():
            bias = add.inputs[1 - place] if add.op_type == "Add" else None
            if bias is not None and bias.is_initializer() and len(bias.shape) == 1 and len(bias.uses()) == 1:
                tensor = ir.Tensor(bias.const_value.numpy()[None], dtype=bias.dtype, name=bias.name)
                bias.const_value, bias.shape = tensor, tensor.shape


def _decodes_int8(node: ir.Node | None) -> bool:
    """True for a DequantizeLinear of int8 codes without blocks."""
    is_decoder = node is not None and node.op_type == "DequantizeLinear"
    return is_decoder and node.inputs[0].dtype == ir.DataType.INT8 and "block_size" not in node.attributes


FLOOR = 50.0
"""Largest distance of a score from the maximum of its row. exp(-50) = 2e-22 lies below the rounding error of
a row's sum in fp32, and products of it with values stay normal numbers, which those of exp(-85) do not.
"""


def raise_masked_scores(model: ir.Model) -> int:
    """Raise scores that lie more than FLOOR below the largest one of their row to that distance, in front of
    each fp32 Softmax of masked scores, in place; returns their number.

    Masked scores lie 3e38 below. ONNX Runtime's exponential passes through denormal numbers there, and the
    Softmax takes 8 times as long. A probability of 2e-22 in place of 0 changes no sum of fp32 numbers. The
    subtraction has no axis of length 1 behind it, where it takes 9 times as long.
    """
    done = 0
    for softmax in list(model.graph):
        scores = softmax.inputs[0] if softmax.op_type == "Softmax" else None
        mask = scores.producer() if scores is not None and scores.dtype == ir.DataType.FLOAT else None
        if mask is None or mask.op_type not in ("Add", "Where") or _axis(softmax, -1) != -1:
            continue
        last = constant(model, "last_axis", np.array([-1], np.int64))
        floor = constant(model, "score_floor", np.array(FLOOR, np.float32))
        name = softmax.name
        top = ir.node("ReduceMax", [scores, last], attributes={"keepdims": 0}, name=f"{name}/ReduceMax")
        least = ir.node("Sub", [top.outputs[0], floor], name=f"{name}/Sub")
        column = ir.node("Unsqueeze", [least.outputs[0], last], name=f"{name}/Unsqueeze")
        raised = ir.node("Max", [scores, column.outputs[0]], name=f"{name}/Max")
        for node in (top, least, column, raised):
            node.outputs[0].name, node.outputs[0].dtype = f"{node.name}_output", scores.dtype
        model.graph.insert_before(softmax, [top, least, column, raised])
        softmax.replace_input_with(0, raised.outputs[0])
        done += 1
    return done


def forget_shapes(model: ir.Model) -> None:
    """Remove the declared shapes of values inside the graph, in place. Where both addends are declared with
    one shape, ONNX Runtime fuses Add and LayerNormalization to SkipLayerNormalization, which takes five times
    as long as the two (1.31, x86-64).
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None


def drop_unused(model: ir.Model) -> None:
    """Remove initializers that no node reads any more, in place: ONNX Runtime warns of each of them."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
