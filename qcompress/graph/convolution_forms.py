"""Forms of convolutions that ONNX Runtime computes on integers, with the same values, for targets without
TensorRT. `onnxruntime_forms.adapt` applies them.

On x86-64, ONNX Runtime 1.31 fuses a convolution of uint8 codes with one QuantizeLinear directly behind it, or
behind a Relu.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from qcompress.graph.join_matmuls import constant

PADDED = (
    ("DequantizeLinear", "QuantizeLinear", "Pad"),
    ("DequantizeLinear", "Clip", "QuantizeLinear", "Pad"),
    ("Pad", "DequantizeLinear", "QuantizeLinear"),
    ("Pad", "DequantizeLinear", "Clip", "QuantizeLinear"),
)
"""Operators in front of a convolution whose Pad `fold_pads` removes, backwards."""


def fold_pads(model: ir.Model) -> int:
    """Replace each Pad with zeros beside the Q/DQ pair of a convolution by padding of the convolution, in
    place; returns their number. A zero has the code 0, so that no value changes, and the convolution in front
    has a QuantizeLinear directly behind it. `Pad -> Q -> DQ -> Conv` and `Q -> DQ -> Pad -> Conv`, only axes
    of the image, and no other readers.
    """
    done = 0
    for conv in list(model.graph):
        chain = _pair_and_pad(conv) if conv.op_type == "Conv" else []
        pads = [node for node in chain if node.op_type == "Pad"]
        margins = _margins(pads[0]) if len(pads) == 1 else None
        is_automatic = "auto_pad" in conv.attributes and conv.attributes["auto_pad"].value != "NOTSET"
        if margins is None or is_automatic:
            continue
        own = conv.attributes["pads"].value if "pads" in conv.attributes else [0] * len(margins)
        total = [one + other for one, other in zip(own, margins, strict=True)]
        conv.attributes["pads"] = ir.AttrInt64s("pads", total)
        for node in chain:
            node.outputs[0].shape = None  # with the margins
        pads[0].outputs[0].replace_all_uses_with(pads[0].inputs[0])
        model.graph.remove(pads[0], safe=True)
        done += 1
    return done


def _pair_and_pad(conv: ir.Node) -> list[ir.Node]:
    """Pad, Q/DQ pair and Clip of codes in front of a convolution, backwards, if nothing else reads them and
    the zero points are 0; otherwise empty.
    """
    for ops in PADDED:
        nodes: list[ir.Node] = []
        node = conv.inputs[0].producer()
        for op in ops:
            if node is None or node.op_type != op or not _is_alone(node):
                break
            nodes.append(node)
            node = node.inputs[0].producer()
        if len(nodes) == len(ops):
            return nodes
    return []


def _is_alone(node: ir.Node) -> bool:
    """True if one node reads the output of a node, whose zero point, if it has one, is 0."""
    (value,) = node.outputs
    zero = node.inputs[2] if node.op_type.endswith("Linear") and len(node.inputs) > 2 else None
    is_zero = zero is None or (zero.const_value is not None and not zero.const_value.numpy().any())
    return is_zero and len(value.uses()) == 1 and not value.is_graph_output()


def _margins(pad: ir.Node) -> list[int] | None:
    """Padding of the image's axes, as Conv declares it; None for another Pad than one with zeros there."""
    mode = pad.attributes["mode"].value if "mode" in pad.attributes else "constant"
    parts = [None if part is None else part.const_value for part in pad.inputs[1:3]]
    is_known = len(pad.inputs) < 4 and all(part is not None for part in parts)
    if mode != "constant" or not is_known or (len(parts) > 1 and parts[1].numpy().any()):
        return None
    begin, end = np.split(parts[0].numpy(), 2)
    if begin[:2].any() or end[:2].any() or min(*begin, *end) < 0:
        return None
    return [int(one) for one in (*begin[2:], *end[2:])]


def pool_images(model: ir.Model) -> int:
    """Replace ReduceMean over the axes of an image by GlobalAveragePool, if Q/DQ pairs are in front and
    behind, in place; returns their number. ONNX Runtime sums the codes then; it has no integer kernel of
    ReduceMean. Both compute the same mean, in different orders of summation.
    """
    done = 0
    for mean in list(model.graph):
        if mean.op_type != "ReduceMean" or not _is_between_pairs(mean) or not _is_over_image(mean):
            continue
        pool = ir.node("GlobalAveragePool", [mean.inputs[0]], name=mean.name)
        old, new = mean.outputs[0], pool.outputs[0]
        new.name, new.type, new.shape = f"{old.name}/pooled", old.type, old.shape
        model.graph.insert_before(mean, pool)
        old.replace_all_uses_with(new)
        model.graph.remove(mean, safe=True)
        done += 1
    return done


def _is_between_pairs(node: ir.Node) -> bool:
    maker, users = node.inputs[0].producer(), [use.node for use in node.outputs[0].uses()]
    is_behind = maker is not None and maker.op_type == "DequantizeLinear"
    return is_behind and [user.op_type for user in users] == ["QuantizeLinear"]


def _is_over_image(mean: ir.Node) -> bool:
    """True if a ReduceMean keeps four axes, the last two with one value."""
    axes = mean.inputs[1].const_value if len(mean.inputs) > 1 and mean.inputs[1] is not None else None
    shape, keeps = mean.inputs[0].shape, mean.attributes.get("keepdims")
    if axes is None or shape is None or len(shape) != 4 or (keeps is not None and not keeps.value):
        return False
    return {int(axis) % 4 for axis in axes.numpy().reshape(-1)} == {2, 3}


def store_unsigned(model: ir.Model, nonnegative: Collection[str]) -> int:
    """Quantize values that are never negative to uint8 codes with zero point 0 and a Clip at the largest
    code, in place; returns the number of pairs. The codes stay the same numbers.

    On x86-64 ONNX Runtime fuses convolutions of uint8 only, and turns int8 pairs into uint8 itself where no
    Relu or Clip lies beside them. It removes a Relu in front of such a QuantizeLinear. A Clip at 6 that cuts
    above the largest code becomes a Relu. `nonnegative` as for `adapt`.
    """
    done = 0
    for quantize in list(model.graph):
        if quantize.op_type != "QuantizeLinear" or _pair_name(quantize) not in nonnegative:
            continue
        users = [use.node for use in quantize.outputs[0].uses()]
        clip = users[0] if [node.op_type for node in users] == ["Clip"] else None
        decoders = users if clip is None else [use.node for use in clip.outputs[0].uses()]
        if any(node.op_type != "DequantizeLinear" for node in decoders):
            continue
        top = 127 if clip is None else clip.inputs[2].const_value.numpy().item()
        _replace_clip(model, quantize, top)
        zero, high = (constant(model, f"uint8_{value}", np.array(value, np.uint8)) for value in (0, top))
        for node in (quantize, *decoders):
            node.replace_input_with(2, zero)
        if clip is None:
            clip = ir.node(
                "Clip",
                [quantize.outputs[0], zero, high],
                name=quantize.name.replace("/QuantizeLinear", "/Clip"),
            )
            clip.outputs[0].name = f"{clip.name}_output"
            model.graph.insert_after(quantize, clip)
            for node in decoders:
                node.replace_input_with(0, clip.outputs[0])
        clip.replace_input_with(1, zero)
        clip.replace_input_with(2, high)
        for node in (quantize, clip):
            node.outputs[0].dtype = ir.DataType.UINT8
        done += 1
    return done


def shift_shared(model: ir.Model) -> int:
    """Quantize values with more than one reader, one of them a convolution or its pooling, to uint8 codes
    with zero point 128 instead of int8 codes with 0, in place; returns the number of pairs. ONNX Runtime does
    the same itself where a pair has one reader. It merges the pairs of one value with equal scales.
    """
    done = 0
    for value in [node.outputs[0] for node in model.graph] + list(model.graph.inputs):
        pairs = [one for node, _ in value.uses() if (one := _plain_pair(node)) is not None]
        readers = [use.node for _, decoders in pairs for node in decoders for use in node.outputs[0].uses()]
        if len(readers) < 2 or all(node.op_type not in ("Conv", "GlobalAveragePool") for node in readers):
            continue
        zero = constant(model, "uint8_128", np.array(128, np.uint8))
        for quantize, decoders in pairs:
            for node in (quantize, *decoders):
                node.replace_input_with(2, zero)
            quantize.outputs[0].dtype = ir.DataType.UINT8
        done += len(pairs)
    return done


def _plain_pair(quantize: ir.Node) -> tuple[ir.Node, list[ir.Node]] | None:
    """QuantizeLinear to int8 codes with zero point 0 and the DequantizeLinear nodes that alone read them."""
    if quantize.op_type != "QuantizeLinear" or len(quantize.inputs) != 3 or "axis" in quantize.attributes:
        return None
    zero, decoders = quantize.inputs[2], [use.node for use in quantize.outputs[0].uses()]
    is_int8 = zero.dtype == ir.DataType.INT8 and zero.const_value is not None
    if not is_int8 or zero.const_value.numpy().any():
        return None
    if any(node.op_type != "DequantizeLinear" or len(node.inputs) != 3 for node in decoders):
        return None
    return quantize, decoders


def _pair_name(quantize: ir.Node) -> str:
    """Name of a Q/DQ pair: that of its layer's input or of its point."""
    return quantize.name.partition("/")[0]


def _replace_clip(model: ir.Model, quantize: ir.Node, top: int) -> None:
    """Replace a Clip in front of QuantizeLinear by Relu, if it cuts at 0 and not below the code `top`."""
    clip = quantize.inputs[0].producer()
    if clip is None or clip.op_type != "Clip" or len(clip.outputs[0].uses()) != 1:
        return
    ends = [value.const_value for value in (*clip.inputs[1:], quantize.inputs[1]) if value is not None]
    if len(ends) != 3 or any(end is None for end in ends):
        return
    low, high, scale = (np.float32(end.numpy().item()) for end in ends)
    if low == 0 and np.rint(high / scale) >= top:
        relu = ir.node("Relu", [clip.inputs[0]], name=clip.name)
        relu.outputs[0].name, relu.outputs[0].type = f"{clip.outputs[0].name}/relu", clip.outputs[0].type
        model.graph.insert_before(clip, relu)
        quantize.replace_input_with(0, relu.outputs[0])
        model.graph.remove(clip, safe=True)
