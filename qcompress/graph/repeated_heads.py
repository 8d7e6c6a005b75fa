"""Key and value heads that several query heads share (grouped-query attention), in the form that ONNX Runtime
computes. No torch.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompress.encodings.walk import REPEATING


def repeat_codes(model: ir.Model) -> int:
    """Repeat the int8 codes of shared heads instead of the decoded values, in place; returns the number of
    repeats. The values are the same, and DequantizeLinear lies directly in front of the matmul.

        Q -> DQ -> Unsqueeze -> Expand -> Reshape -> MatMul     before
        Q -> Unsqueeze -> Expand -> Reshape -> DQ -> MatMul     after

    ONNX Runtime 1.31 moves pairs over an Unsqueeze by itself, and refuses the graph that it then has made
    ("output_dtype INT8 does not match y_zero_point type UINT8").
    """
    done = 0
    for first in list(model.graph):
        chain = _repeats(first)
        decoder = first.inputs[0].producer() if chain else None
        if decoder is None or decoder.op_type != "DequantizeLinear" or decoder.inputs[0].is_initializer():
            continue
        codes, last = decoder.inputs[0], chain[-1].outputs[0]
        others = [use for use in decoder.outputs[0].uses() if use.node is not first]
        is_read = decoder.outputs[0].is_graph_output() or last.is_graph_output()
        if is_read or any(use.node.op_type != "Shape" for use in others):
            continue
        for use in decoder.outputs[0].uses():
            use.node.replace_input_with(use.idx, codes)
        for node in chain:
            node.outputs[0].type = codes.type
        attributes = {name: item.value for name, item in decoder.attributes.items()}
        behind = ir.node("DequantizeLinear", decoder.inputs, attributes=attributes, name=decoder.name)
        behind.outputs[0].name, behind.outputs[0].type = f"{decoder.name}/repeated", decoder.outputs[0].type
        for use in list(last.uses()):
            use.node.replace_input_with(use.idx, behind.outputs[0])
        behind.replace_input_with(0, last)
        model.graph.insert_after(chain[-1], behind)
        model.graph.remove(decoder, safe=True)
        done += 1
    return done


def _repeats(first: ir.Node) -> list[ir.Node]:
    """The three operators from an Unsqueeze on, if nothing else reads the values between them."""
    chain = [first]
    for op, node in zip(REPEATING, chain, strict=False):
        if node.op_type != op:
            return []
        if op == REPEATING[-1]:
            return chain
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or uses[0].idx != 0:
            return []
        chain.append(uses[0].node)
    return []
