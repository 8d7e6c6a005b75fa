"""Folded layers: int8 codes and scales in the compute type, without trainable parameters.

In torch they compute the results that ONNX defines for QuantizeLinear and DequantizeLinear; during export
they emit those nodes. A weight is stored [in, out] for every orientation of the checkpoint, since TensorRT
and ONNX Runtime fuse this layout. Tables are stored [rows, width].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.quant.affine import Grid, to_codes
from qcompress.quant.layers import TableSize, matmul
from qcompress.quant.stock_forward import StockForward

INT8 = (-128, 127)

EXACT = 1024
"""Number of products of two int8 codes whose sum is exact in fp32: 2**24 / 2**14."""


class Rounding(nn.Module):
    """QuantizeLinear and DequantizeLinear of an activation: int8, scale [], zero point 0. Bounds narrower
    than int8 add a Clip of the codes between the two nodes.
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
        # division in fp32 for fp16 tensors too, as in ONNX Runtime's kernel
        q = torch.div(x.float(), self.scale.float()).round_().clamp_(*self.bounds)
        return q.to(x.dtype) * self.scale

    def codes(self, x: Tensor) -> Tensor:
        """Quantize x to int8 codes."""
        return to_codes(x, self.scale, self.bounds)

    def coded(self, x: Tensor) -> Tensor:
        """Quantize x to int8 codes; during export emit QuantizeLinear, and Clip for narrower bounds."""
        if not torch.onnx.is_in_onnx_export():
            return self.codes(x)
        codes = onnx_node("QuantizeLinear", (x, self.scale, self.zero), torch.int8, x.shape)
        if self.bounds == INT8:
            return codes
        return onnx_node("Clip", (codes, self.low, self.high), torch.int8, x.shape)

    def decoded(self, codes: Tensor) -> Tensor:
        """Decode codes to the type of the scale; during export emit DequantizeLinear."""
        if not torch.onnx.is_in_onnx_export():
            return codes.to(self.scale.dtype) * self.scale
        return onnx_node("DequantizeLinear", (codes, self.scale, self.zero), self.scale.dtype, codes.shape)


class FoldedWeight(nn.Module):
    """Codes and scales of one weight, decoded at each use.

    codes: int8 [in, out], or [rows, width] for a table.
    scale: [out] (axis 1), [rows] (axis 0), or [in // block, out] (axis 0, blocked).
    """

    def __init__(self, codes: Tensor, scale: Tensor, grid: Grid, stored_bits: int) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(scale.shape, dtype=torch.int8), persistent=False)
        self.grid, self.stored_bits = grid, stored_bits

    @property
    def shape(self) -> torch.Size:
        """Shape of the decoded weight."""
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of the decoded weight; stock code casts a layer's input to it."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """Device of the codes."""
        return self.codes.device

    def decoded(self, zero_point: bool = True) -> Tensor:
        """codes * scale in the type of the scale; during export emit one DequantizeLinear."""
        if not torch.onnx.is_in_onnx_export():
            grid = self.grid
            return grid.join(grid.divide(self.codes).to(self.scale.dtype) * grid.align(self.scale))
        block = self.grid.block
        attributes = {"axis": self.grid.axis} | ({"block_size": block} if block else {})
        # ONNX Runtime fuses int8 matmuls only with a zero point, and int4 matmuls only without one
        inputs = (self.codes, self.scale)
        if zero_point and self.stored_bits == 8:
            inputs = (*inputs, self.zero)
        return onnx_node("DequantizeLinear", inputs, self.scale.dtype, self.codes.shape, attributes)

    def rows(self, ids: Tensor) -> Tensor:
        """Look up rows of an embedding table."""
        # decode before Gather: TensorRT refuses Gather from an int8 constant
        return F.embedding(ids, self.decoded(zero_point=False))


class FoldedLinear(nn.Module):
    """y = Q(x) @ decode(codes) + b; with `integer`, the product is computed like an int8 GEMM."""

    def __init__(
        self, weight: FoldedWeight, bias: Tensor | None, input: Rounding | None, integer: bool = False
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("bias", bias)
        self.input = input
        self.integer = integer and multiplies_integers(weight, input)

    @property
    def in_features(self) -> int:
        """Number of inputs, as nn.Linear has it."""
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        """Number of outputs, as nn.Linear has it."""
        return self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.integer:
            y = integer_matmul(self.input, x, self.weight.codes, self.weight.scale)
            return y if self.bias is None else y + self.bias
        x = x if self.input is None else self.input(x)
        return matmul(x, self.weight.decoded(), self.bias, channel_axis=1)


class FoldedEmbedding(TableSize, nn.Module):
    """Embedding with a folded table."""

    def __init__(self, weight: FoldedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight.rows(ids)


class FoldedStockEmbedding(TableSize, StockForward):
    """Embedding whose class computes more than a lookup: the stock forward, with the decoded table."""

    def __init__(self, weight: FoldedWeight, stock: nn.Embedding) -> None:
        super().__init__()
        self.weight = weight
        self.hold(stock)

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        return self.run_stock({"weight": self.weight.decoded(zero_point=False)}, *arguments, **named)


class FoldedTiedHead(nn.Module):
    """Output head that shares the table of the embedding; the table is stored once, `bias` [rows] is its
    own.
    """

    def __init__(
        self, weight: FoldedWeight, input: Rounding | None, integer: bool = False, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("bias", bias)
        self.input = input
        self.integer = integer and multiplies_integers(weight, input)

    @property
    def in_features(self) -> int:
        """Number of inputs, as nn.Linear has it."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Number of outputs, as nn.Linear has it."""
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.integer:
            y = integer_matmul(self.input, x, self.weight.codes.t(), self.weight.scale)
            return y if self.bias is None else y + self.bias
        x = x if self.input is None else self.input(x)
        # no zero point: with one, ONNX Runtime moves the Transpose before DequantizeLinear and refuses its
        # types
        return matmul(x, self.weight.decoded(zero_point=False), self.bias, channel_axis=0)


def multiplies_integers(weight: FoldedWeight, input: Rounding | None) -> bool:
    """True if runtimes multiply weight and input as integers: no blocks, and an int8 input without a Clip."""
    whole = isinstance(weight, FoldedWeight) and weight.grid.block is None
    return whole and input is not None and input.bounds == INT8


def integer_matmul(rounding: Rounding, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Compute the result of an int8 GEMM: an exact sum of integer products, times both scales.

    codes [in, out], scale [out]. The sum is exact: fp32 holds the sum of 1024 products, at most 2**24, and
    fp64 adds these partial sums.
    """
    pieces = zip(rounding.codes(x).float().split(EXACT, -1), codes.split(EXACT), strict=True)
    total = sum((a @ b.float()).double() for a, b in pieces)
    return (total.float() * (rounding.scale.float() * scale.float())).to(x.dtype)


def onnx_node(
    op: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, shape: torch.Size, attributes=None, version=21
) -> Tensor:
    """Emit one ONNX node during export; `version` is the opset of its domain."""
    return torch.onnx.ops.symbolic(op, inputs, attributes or {}, dtype=dtype, shape=shape, version=version)
