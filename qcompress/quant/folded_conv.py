"""A convolution after folding: int8 codes in its own layout, batch norm in the scales and the bias.

In the graph it is DequantizeLinear (axis 0, the output channels) -> Conv, and a Q/DQ pair in front, which is
what TensorRT and ONNX Runtime read as an int8 convolution. The bias is float: TensorRT dequantizes no int32.
A weight that is looked up has no scale for each channel, and takes no batch norm in, which becomes a gain.

Shapes: codes [out, in / groups, height, width], scale [out], input [batch, in, height, width].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qcompress.quant.affine import Grid
from qcompress.quant.conv import Geometry, convolve
from qcompress.quant.folded import FoldedWeight, Rounding, multiplies_integers
from qcompress.quant.folded_codebook import FoldedCodebook


class FoldedKernel(FoldedWeight):
    """Codes and scales of a convolution's weight."""

    def __init__(self, codes: Tensor, scale: Tensor, stored_bits: int) -> None:
        super().__init__(codes, scale, Grid(0), stored_bits)

    def decoded(self, zero_point: bool = True) -> Tensor:
        """codes * scale in the scale's type. While exporting: one DequantizeLinear node."""
        if torch.onnx.is_in_onnx_export():
            return super().decoded(zero_point)
        return self.codes.to(self.scale.dtype) * self.scale.view(-1, 1, 1, 1)


class FoldedConv(nn.Module):
    """y = conv(Q(x), decode(codes)) + b. With `integer`, the same sums as an int8 convolution makes them."""

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
        """An exact sum of integer products, which fp64 holds, times both scales."""
        total = convolve(self.input.codes(x).double(), self.weight.codes.double(), None, self.geometry)
        factor = (self.input.scale.float() * self.weight.scale.float()).view(-1, 1, 1)
        y = (total.float() * factor).to(x.dtype)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)
