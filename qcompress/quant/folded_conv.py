"""Folded convolution: int8 codes in kernel layout, batch norm folded into scales and bias.

The ONNX form is a Q/DQ pair on the input and DequantizeLinear (axis 0, the output channels) -> Conv; TensorRT
and ONNX Runtime run it as an int8 convolution. The bias is float, because TensorRT does not dequantize int32.
A codebook weight has no per-channel scale, so its batch norm becomes a per-channel gain.

Shapes: codes [out, in / groups, height, width], scale [out], input [batch, in, height, width].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qcompress.quant.affine import Grid
from qcompress.quant.conv import Geometric, Geometry, convolve
from qcompress.quant.folded import FoldedWeight, Rounding, multiplies_integers
from qcompress.quant.folded_codebook import FoldedCodebook


class FoldedKernel(FoldedWeight):
    """Codes and per-channel scales of a convolution kernel."""

    def __init__(self, codes: Tensor, scale: Tensor, stored_bits: int) -> None:
        super().__init__(codes, scale, Grid(0), stored_bits)

    def decoded(self, zero_point: bool = True) -> Tensor:
        """codes * scale in the type of the scale; during export emit one DequantizeLinear."""
        if torch.onnx.is_in_onnx_export():
            return super().decoded(zero_point)
        return self.codes.to(self.scale.dtype) * self.scale.view(-1, 1, 1, 1)


class FoldedConv(Geometric, nn.Module):
    """y = conv(Q(x), decode(codes)) + b; with `integer`, the sums are computed like an int8 convolution."""

    def __init__(
        self, weight: FoldedKernel | FoldedCodebook, bias: Tensor | None, input: Rounding | None,
        geometry: Geometry, integer: bool = False, gain: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = weight
        self.register_buffer("bias", bias)
        self.register_buffer("gain", gain)
        self.input = input
        self.geometry = geometry
        self.integer = integer and multiplies_integers(weight, input)

    def forward(self, x: Tensor) -> Tensor:
        if self.integer:
            return self._integer(x)
        x = x if self.input is None else self.input(x)
        if self.gain is None:
            return convolve(x, self.weight.decoded(), self.bias, self.geometry)
        y = convolve(x, self.weight.decoded(), None, self.geometry) * self.gain.view(-1, 1, 1)
        return y + self.bias.view(-1, 1, 1)

    def _integer(self, x: Tensor) -> Tensor:
        """Exact sum of integer products in fp64, times both scales."""
        total = convolve(self.input.codes(x).double(), self.weight.codes.double(), None, self.geometry)
        factor = (self.input.scale.float() * self.weight.scale.float()).view(-1, 1, 1)
        y = (total.float() * factor).to(x.dtype)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)
