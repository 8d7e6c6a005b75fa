"""A decoder of its own for each matmul of a weight in blocks. TensorRT-RTX 1.7 ends with an internal error
where several matmuls read one DequantizeLinear of int4 blocks, as in a layer that is called more than once,
and makes one decoder of several with equal inputs.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompress.graph.join_matmuls import constant


def decode_apart(model: ir.Model) -> int:
    """Copy the decoder of a weight in blocks for each matmul but the first that reads it, in place; returns
    the number of copies. The codes stay shared; each copy has scales of its own.
    """
    copies = 0
    for decoder in list(model.graph):
        if decoder.op_type != "DequantizeLinear" or "block_size" not in decoder.attributes:
            continue
        readers = [use.node for use in decoder.outputs[0].uses()]
        codes, scale, *rest = decoder.inputs
        if scale.const_value is None or any(node.op_type != "MatMul" for node in readers):
            continue
        for place, node in enumerate(readers[1:], 2):
            copy = ir.node(
                "DequantizeLinear",
                [codes, constant(model, f"{scale.name}_{place}", scale.const_value.numpy()), *rest],
                attributes={name: one.value for name, one in decoder.attributes.items()},
                name=f"{decoder.name}_{place}",
            )
            copy.outputs[0].name, copy.outputs[0].dtype = f"{copy.name}_output", decoder.outputs[0].dtype
            model.graph.insert_after(decoder, copy)
            node.replace_input_with(1, copy.outputs[0])
            copies += 1
    return copies
