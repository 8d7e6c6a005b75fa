"""Layers after folding: int8 codes, scales in the compute type, nothing that trains.

In torch they compute what ONNX's QuantizeLinear and DequantizeLinear say; while exporting they *are* those
nodes. The weight is stored [in, out] whatever the checkpoint's orientation (the form that TensorRT and ONNX
Runtime fuse), tables are stored [rows, width].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.quant.affine import Grid, to_codes
from qcompress.quant.layers import matmul

INT8 = (-128, 127)

EXACT = 1024
"""Products of two int8 codes whose sum fp32 holds without rounding: 2**24 / 2**14."""


class Rounding(nn.Module):
    """QuantizeLinear and DequantizeLinear of an activation: int8, scale [], zero point 0. Narrower bounds are
    a Clip of the codes between the two.
    """

    def __init__(self, scale: Tensor, bounds: tuple[int, int] = INT8) -> None:
        super().__init__()
        self.bounds = bounds
        self.register_buffer("scale", scale)
        for name, value in (("zero", 0), ("low", bounds[0]), ("high", bounds[1])):
            self.register_buffer(name, torch.tensor(value, dtype=torch.int8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            return self.decoded(self.coded(x))
        # division in fp32 also for fp16 tensors: that is how ONNX Runtime's kernel divides
        q = torch.div(x.float(), self.scale.float()).round_().clamp_(*self.bounds)
        return q.to(x.dtype) * self.scale

    def codes(self, x: Tensor) -> Tensor:
        """The integers of x, int8."""
        return to_codes(x, self.scale, self.bounds)

    def coded(self, x: Tensor) -> Tensor:
        """The same; while exporting, the first of the two nodes, and the Clip."""
        if not torch.onnx.is_in_onnx_export():
            return self.codes(x)
        codes = onnx_node("QuantizeLinear", (x, self.scale, self.zero), torch.int8, x.shape)
        if self.bounds == INT8:
            return codes
        return onnx_node("Clip", (codes, self.low, self.high), torch.int8, x.shape)

    def decoded(self, codes: Tensor) -> Tensor:
        """What codes stand for, in the type of the scale; while exporting, the second of the two nodes."""
        if not torch.onnx.is_in_onnx_export():
            return codes.to(self.scale.dtype) * self.scale
        return onnx_node("DequantizeLinear", (codes, self.scale, self.zero), self.scale.dtype, codes.shape)


class FoldedWeight(nn.Module):
    """Codes and scales of one tensor, decoded when read.

    codes: int8, [in, out] or a table [rows, width]. scale: [out] (axis 1), [rows] (axis 0), or [in // block,
    out] (axis 0, blocked).
    """

    def __init__(self, codes: Tensor, scale: Tensor, grid: Grid, stored_bits: int) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(scale.shape, dtype=torch.int8), persistent=False)
        self.grid, self.stored_bits = grid, stored_bits

    def decoded(self, zero_point: bool = True) -> Tensor:
        """codes * scale in the scale's type. While exporting: one DequantizeLinear node."""
        if not torch.onnx.is_in_onnx_export():
            grid = self.grid
            return grid.join(grid.divide(self.codes).to(self.scale.dtype) * grid.align(self.scale))
        block = self.grid.block
        attributes = {"axis": self.grid.axis} | ({"block_size": block} if block else {})
        # ONNX Runtime fuses an int8 matmul only with a zero point, and int4 weights only without
        inputs = (self.codes, self.scale)
        if zero_point and self.stored_bits == 8:
            inputs = (*inputs, self.zero)
        return onnx_node("DequantizeLinear", inputs, self.scale.dtype, self.codes.shape, attributes)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of a table."""
        # decode, then look up: TensorRT refuses an int8 constant that Gather reads
        return F.embedding(ids, self.decoded(zero_point=False))


class FoldedLinear(nn.Module):
    """y = Q(x) @ decode(codes) + b. With `integer`, the same product as an int8 GEMM makes it."""

    def __init__(
        self, weight: FoldedWeight, bias: Tensor | None, input: Rounding | None, integer: bool = False
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("bias", bias)
        self.input = input
        self.integer = integer and multiplies_integers(weight, input)

    def forward(self, x: Tensor) -> Tensor:
        if self.integer:
            y = integer_matmul(self.input, x, self.weight.codes, self.weight.scale)
            return y if self.bias is None else y + self.bias
        x = x if self.input is None else self.input(x)
        return matmul(x, self.weight.decoded(), self.bias, channel_axis=1)


class FoldedEmbedding(nn.Module):
    """Rows of a decoded table."""

    def __init__(self, weight: FoldedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight.rows(ids)


class FoldedTiedHead(nn.Module):
    """Logits from the table of an embedding, which is stored once."""

    def __init__(self, weight: FoldedWeight, input: Rounding | None, integer: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.input = input
        self.integer = integer and multiplies_integers(weight, input)

    def forward(self, x: Tensor) -> Tensor:
        if self.integer:
            return integer_matmul(self.input, x, self.weight.codes.t(), self.weight.scale)
        x = x if self.input is None else self.input(x)
        # no zero point: with one, ONNX Runtime moves the transpose before it and then refuses its types
        return matmul(x, self.weight.decoded(zero_point=False), None, channel_axis=0)


def multiplies_integers(weight: FoldedWeight, input: Rounding | None) -> bool:
    """Whether runtimes multiply these as integers: no blocks, and no Clip of narrower codes on the way."""
    whole = isinstance(weight, FoldedWeight) and weight.grid.block is None
    return whole and input is not None and input.bounds == INT8


def integer_matmul(rounding: Rounding, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """What an int8 GEMM computes: an exact sum of integer products, times both scales.

    codes [in, out], scale [out]. The sum is exact: of 1024 products it is at most 2**24, which fp32 holds,
    and fp64 adds these up.
    """
    pieces = zip(rounding.codes(x).float().split(EXACT, -1), codes.split(EXACT), strict=True)
    total = sum((a @ b.float()).double() for a, b in pieces)
    return (total.float() * (rounding.scale.float() * scale.float())).to(x.dtype)


def onnx_node(
    op: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, shape: torch.Size, attributes=None, version=21
) -> Tensor:
    """One ONNX node, while exporting; `version` is the opset of its domain."""
    return torch.onnx.ops.symbolic(op, inputs, attributes or {}, dtype=dtype, shape=shape, version=version)
