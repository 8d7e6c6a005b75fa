"""Integers with scales, decoded by DequantizeLinear: int8, int4 and int2, per channel or in blocks.

    weight = codes * scale        codes int8 in folded.safetensors; int8, int4 or int2 in the file

Graphs for ONNX Runtime look up a table's rows as codes and decode these (`walk.Lookup`); TensorRT takes only
the decoded table in front of the Gather.

Narrow codes may be stored in a wider type (`container`). A codebook with `codebook: decode-int8` also uses
this encoding: each index is replaced by the int8 codes of its centroid, and all channels have equal scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompress.encodings.base import Certified, Stored, is_turned, level_bits, rows_of
from qcompress.encodings.walk import (
    DEQUANTIZE,
    MOVES,
    QUANTIZE,
    Lookup,
    attribute,
    decoders_of,
    first_difference,
    is_a,
    lookup_of,
    lookups_of,
    matmuls,
    operand,
    pair_of,
    readers_of,
    result,
    same,
    users_of,
    way_to,
    zero_is_zero,
)
from qcompress.errors import ContractError
from qcompress.schema.formats import AnyWeightFormat

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import NodeProto
    from torch import Tensor, dtype, nn

    from qcompress.graph.view import View
    from qcompress.models.architecture import Layer
    from qcompress.models.plan import LayerPlan
    from qcompress.quant.layers import QuantizedWeight


LOOKUPS = (DEQUANTIZE, "Mul", "GatherBlockQuantized")
"""Operators at the end of a lookup."""

INTEGERS = ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")
"""Types of integer codes."""


class IntegerQdq:
    """Encoding that stores integer codes and scales, decoded by DequantizeLinear."""

    name = "int-qdq"
    parts = ("codes", "scale")
    initializers = (*parts, "zero")

    def holds(self, form: AnyWeightFormat) -> bool:
        """True for integer formats and for codebook formats with `codebook: decode-int8`."""
        return form.integers

    def fold(self, layer: QuantizedWeight, item: LayerPlan) -> dict[str, Tensor]:
        """Return `codes` int8 and `scale` fp32 of shape [out], [rows], or [in / block, out]."""
        codes, scale = layer.codes()
        scale = layer.weight_quantizer.grid.spread(scale, codes.shape[layer.channel_axis])
        low, high = item.weights.bounds
        if int(codes.min()) < low or int(codes.max()) > high:
            raise ContractError(f"{item.name}: codes outside [{low}, {high}]")
        if is_turned(layer):
            codes, scale = codes.t(), scale if scale.dim() == 1 else scale.t()
        return {"codes": codes.contiguous(), "scale": scale.contiguous()}

    def decoder(self, parts: Mapping[str, Tensor | None], item: LayerPlan, compute: dtype) -> nn.Module:
        """Build a FoldedWeight, or a FoldedKernel for a convolution."""
        from qcompress.quant.affine import Grid
        from qcompress.quant.folded import FoldedWeight
        from qcompress.quant.folded_conv import FoldedKernel

        codes, scale = parts["codes"], parts["scale"].to(compute)
        if item.layer.kind == "conv":
            return FoldedKernel(codes, scale, item.weights.stored_bits)
        axis = 0 if item.layer.kind == "embedding" else 1
        return FoldedWeight(codes, scale, Grid(axis, item.block), item.weights.stored_bits)

    def pack(self, initializers: Mapping[str, ir.Value], owner: str, form: AnyWeightFormat) -> None:
        """Pack the codes to int4 or int2 if the format's container is that narrow."""
        import ml_dtypes
        import onnx_ir as ir

        if form.stored_bits == 8:
            return
        kinds = {4: (ml_dtypes.int4, ir.DataType.INT4), 2: (ml_dtypes.int2, ir.DataType.INT2)}
        value = initializers[f"{owner}.weight.codes"]
        kind, name = kinds[form.stored_bits]
        value.const_value = ir.Tensor(value.const_value.numpy().astype(kind), name=value.name)
        value.dtype = name

    def lower(self, model: ir.Model) -> None:
        """No change: the exporter writes DequantizeLinear directly."""

    def certify(self, view: View, tensors: Any, item: LayerPlan) -> Certified:
        """Compare codes, their type, scales, axis and block, and check the readers of the codes."""
        owner = item.layer.tied_to or item.name
        codes_name = f"{owner}.weight.codes"
        reasons: list[str] = []
        codes, wanted = view.initializer(codes_name), tensors.get_tensor(codes_name)
        codes_equal = codes is not None and same(codes.astype(np.int8), wanted)
        if codes is None:
            reasons.append(f"no initializer {codes_name}")
        elif not codes_equal:
            reasons.append(first_difference(codes.astype(np.int8), wanted, "codes"))
        else:
            stored = view.word(codes_name)
            if stored != f"INT{item.weights.stored_bits}":
                reasons.append(f"codes are stored as {stored}")
        decoders, lookups = decoders_of(view, codes_name), lookups_of(view, codes_name)
        reads = len(decoders) + len(lookups)
        if not reads or reads != len(view.readers[codes_name]) or _is_shared(view, codes_name):
            reasons.append("codes must be read by DequantizeLinear and by nothing else")
        scales = [(node, operand(node, 1)) for node in decoders]
        scales += [(lookup.decoder, lookup.scale) for lookup in lookups]
        wrong_scales = _wrong_scales(view, scales, tensors.get_tensor(f"{owner}.weight.scale"))
        reasons += wrong_scales + _wrong_layout(view, decoders, item) + _unread(view, decoders, lookups, item)
        reasons += _wrong_blocks(lookups, item)
        sources = [result(node) for node in decoders]
        return Certified(codes_equal, bool(reads) and not wrong_scales, sources, reasons)

    def sources(self, view: View, owner: str) -> list[str]:
        """Return the outputs of the DequantizeLinear nodes."""
        return [result(node) for node in decoders_of(view, f"{owner}.weight.codes")]

    def find(self, view: View) -> Iterator[Stored]:
        """Yield the constants behind DequantizeLinear, directly or computed from a stored tensor, and the
        tables whose rows are decoded behind a Gather.
        """
        for node in view.named(DEQUANTIZE):
            if operand(node, 0) in view.fixed:
                name = view.root(operand(node, 0))
                yield StoredIntegers(view, name, name, node)
        for node in view.nodes:
            lookup = lookup_of(view, node) if node.op_type in LOOKUPS else None
            if lookup and lookup.codes in view.constants and view.word(lookup.codes) in INTEGERS:
                yield StoredRows(view, lookup.codes, lookup.codes, node)

    def stored_bytes(self, layer: Layer, form: AnyWeightFormat, float_bytes: int) -> int:
        """Bytes of codes and scales. Zero points are not counted: layers of equal shape share them."""
        block = form.scale_block or layer.in_features
        return layer.weights * form.stored_bits // 8 + layer.weights // block * float_bytes


class StoredIntegers(Stored):
    """A constant that DequantizeLinear decodes."""

    integers = True

    @property
    def code_type(self) -> str:
        """Type that DequantizeLinear reads."""
        return self.view.word(operand(self.node, 0))

    @property
    def block(self) -> int:
        """Attribute `block_size`."""
        return attribute(self.node, "block_size", 0)

    @property
    def granularity(self) -> str:
        """`tensor`, `channel` or `block N`, from the shape of the scale."""
        if self.block:
            return f"block {self.block}"
        scale = self.view.shape(operand(self.node, 1))
        if scale is None or not all(isinstance(length, int) for length in scale):
            return ""
        return "tensor" if math.prod(scale) == 1 else "channel"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        return tuple(self.view.constants[self.name].dims)

    def parts(self) -> Iterator[str]:
        """Yield the stored tensor, and the scales, zero points and Clip bounds that decode it."""
        yield self.name
        for node in way_to(self.view, self.node):
            if node.op_type in (DEQUANTIZE, QUANTIZE, "Clip"):
                yield from node.input[1:]

    def readers(self) -> Iterator[NodeProto]:
        """Yield the nodes that read the output of DequantizeLinear."""
        return (node for node, _ in users_of(self.view, result(self.node), MOVES))

    def information_bits(self) -> float:
        """Bits of the range of the codes. For a weight that the graph quantizes: of the bounds of its Clip,
        else of the codes' type.
        """
        if not self.view.is_float(self.name):
            return code_bits(self.view, self.name)
        clip = next((node for node in way_to(self.view, self.node) if node.op_type == "Clip"), None)
        if clip is not None:
            ends = [self.view.values(operand(clip, index)) for index in (1, 2)]
            if all(end is not None and end.size == 1 and end.dtype != object for end in ends):
                return _range_bits(np.array(ends))
        return self.view.bits(operand(self.node, 0)) or self.view.bits(self.name)

    def decoded(self, most: int) -> Iterator[np.ndarray]:
        """Yield codes * scale; a weight behind a Clip or a Transpose is not decoded."""
        view, node = self.view, self.node
        pair = pair_of(view, node)
        first = node if pair is None else pair.quantize
        scale, stored = view.values(operand(node, 1)), view.values(self.name)
        is_direct = operand(first, 0) == self.name and (pair is None or pair.clip is None)
        zero = view.values(operand(node, 2)) if operand(node, 2) else np.zeros(1, np.int32)
        if not is_direct or stored is None or any(part is None or not part.size for part in (scale, zero)):
            return
        axis, rows = attribute(node, "axis", 1), rows_of(most, stored[:1].size)
        scale, zero = (_spread(part, stored.shape, axis, self.block)[:rows] for part in (scale, zero))
        stored = stored[:rows]
        if pair is not None:
            yield stored.astype(np.float32)
            stored = np.clip(np.rint(stored.astype(np.float32) / scale.astype(np.float32)) + zero, -128, 255)
        difference = stored.astype(np.float32) - zero.astype(np.float32)
        yield (difference.astype(scale.dtype) * scale).astype(np.float32)


class StoredRows(StoredIntegers):
    """A table whose rows are looked up as codes and decoded behind the Gather."""

    @property
    def _lookup(self) -> Lookup:
        return lookup_of(self.view, self.node)

    @property
    def code_type(self) -> str:
        """Type of the table."""
        return self.view.word(self.name)

    @property
    def block(self) -> int:
        """Attribute `block_size`, 0 for one scale per row."""
        block = self._lookup.block
        return 0 if block == self.shape[-1] else block

    @property
    def granularity(self) -> str:
        """`channel` (a row) or `block N`."""
        return f"block {self.block}" if self.block else "channel"

    def parts(self) -> Iterator[str]:
        """Yield the codes and the scales."""
        yield from filter(None, (self.name, self._lookup.scale))

    def readers(self) -> Iterator[NodeProto]:
        """Yield the Gather of the codes; GatherBlockQuantized decodes them itself."""
        yield from readers_of(self.view, self.name, "Gather")

    def information_bits(self) -> float:
        """Bits of the range of the codes."""
        return code_bits(self.view, self.name)

    def decoded(self, most: int) -> Iterator[np.ndarray]:
        """Yield codes * scale."""
        codes, scale = self.view.values(self.name), self.view.values(self._lookup.scale)
        if codes is None or scale is None or not scale.size:
            return
        rows = rows_of(most, codes[:1].size)
        spread = _spread(scale, codes.shape, 1 if scale.ndim == 2 else 0, self.block)[:rows]
        yield (codes[:rows].astype(spread.dtype) * spread).astype(np.float32)


def code_bits(view: View, name: str) -> float:
    """Information bits of the codes of an initializer: ceil(log2(max - min + 1)), log2(3) for three levels.
    Those of the type for other types than INTEGERS, and for an empty tensor.
    """
    if view.word(name) not in INTEGERS:
        return view.bits(name)
    codes = view.values(name)
    return _range_bits(codes) if codes.size else view.bits(name)


def _range_bits(codes: np.ndarray) -> float:
    codes = codes.astype(np.int16)  # the types of four bits have no minimum
    return level_bits(int(codes.max()) - int(codes.min()) + 1)


def _spread(part: np.ndarray, shape: tuple[int, ...], axis: int, block: int) -> np.ndarray:
    """Expand scales or zero points to one per element."""
    if part.size == 1:
        return np.broadcast_to(part.reshape([1] * len(shape)), shape)
    if block:
        return part.repeat(block, axis)
    sizes = [1] * len(shape)
    sizes[axis] = -1
    return np.broadcast_to(part.reshape(sizes), shape)


def _wrong_scales(view: View, decoders: list[tuple[NodeProto, str]], reference: np.ndarray) -> list[str]:
    """Reasons why scales or zero points are wrong; all decoders of a tied table are checked. `decoders`:
    nodes with the names of their stored scales.
    """
    reasons = []
    for node, name in decoders:
        scale = view.initializer(name)
        if scale is None:
            reasons.append(f"{node.name}: no initializer {name}")
        elif not same(scale, reference.astype(scale.dtype)):
            reasons.append(first_difference(scale, reference.astype(scale.dtype), "scale"))
        if is_a(node, DEQUANTIZE) and not zero_is_zero(view, node):
            reasons.append(f"{node.name}: the zero point is not 0")
    return reasons


def _is_shared(view: View, codes: str) -> bool:
    """True if gathered rows of the codes, or the transposed codes, have several readers, such as a copy."""
    gathers = readers_of(view, codes, "Gather", "Transpose")
    return any(len(view.readers.get(result(node), [])) != 1 for node in gathers)


def _unread(view: View, decoders: list[NodeProto], lookups: list[Lookup], item: LayerPlan) -> list[str]:
    """Reason why the decoded codes do not reach their layer, for example because it reads a float copy."""
    outputs = [result(node) for node in decoders]
    if item.layer.kind == "embedding":
        readers = [node for name in outputs for node in readers_of(view, name, "Gather")]
        read = bool(lookups) or any(operand(node, 0) in outputs for node in readers)
        return [] if read or not decoders else ["the decoded codes reach no Gather"]
    if not decoders:
        return ["the codes are looked up and reach no matmul"] if lookups else []
    wanted = "Conv" if item.layer.kind == "conv" else "MatMul"
    return [] if any(matmuls(view, name) for name in outputs) else [f"the decoded codes reach no {wanted}"]


def _wrong_blocks(lookups: list[Lookup], item: LayerPlan) -> list[str]:
    """Reasons why the block size of a lookup is wrong."""
    width = item.layer.shape[-1]
    block = item.block or width
    return [
        f"{lookup.decoder.name} has block {lookup.block}, expected {block}"
        for lookup in lookups
        if (lookup.block or width) != block
    ]


def _wrong_layout(view: View, decoders: list[NodeProto], item: LayerPlan) -> list[str]:
    """Reasons why the axis or the block size of a decoder is wrong."""
    tied_head = item.layer.kind == "head" and item.layer.tied_to is not None
    table = item.layer.kind in ("embedding", "conv") or tied_head
    channel_axis = 0 if table else 1
    axis = channel_axis if item.block is None else 1 - channel_axis
    reasons = []
    for node in decoders:
        values = {attribute.name: attribute.i for attribute in node.attribute}
        behind_transpose = is_a(view.producers.get(operand(node, 0)), "Transpose")
        wanted = 1 - axis if behind_transpose else axis
        if values.get("axis", 1) != wanted or values.get("block_size", 0) != (item.block or 0):
            reasons.append(f"{node.name} has {values}, expected axis {wanted}, block {item.block}")
    return reasons
