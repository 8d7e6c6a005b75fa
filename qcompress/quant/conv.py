"""Convolution with fake-quantized weight and input, for training.

The weight keeps its shape, [out, in / groups, height, width]; its quantizer receives it as [out, in / groups
* height * width] with the output channels first, so that it shares grids and quantizers with linear layers.
Before a batch norm the quantizer receives sign(gamma) * weight (`quant/batchnorm.py` gives the reason).
Padding is 0, which every symmetric quantizer preserves.

Shapes: input [batch, in, height, width], one scale for all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.quant.batchnorm import signs_of
from qcompress.quant.layers import QuantizedWeight


@dataclass(frozen=True)
class Geometry:
    """Kernel size, stride, padding and dilation of a convolution as (height, width), and its groups."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, module: nn.Conv2d) -> Geometry:
        """Read the geometry of a stock convolution, with `padding="same"` as numbers.

        Raises ModelError for padding that is not zeros, or not equal on both sides.
        """
        padding = module.padding
        if module.padding_mode != "zeros":
            raise ModelError(
                f"a convolution pads with {module.padding_mode}, and only padding with zeros is supported",
                fix="name another checkpoint, or keep the layer float",
            )
        if padding == "valid":
            padding = (0, 0)
        elif padding == "same":
            total = [
                size * (kernel - 1) for size, kernel in zip(module.dilation, module.kernel_size, strict=True)
            ]
            if any(size % 2 for size in total):
                raise ModelError(
                    f'`padding="same"` of a kernel {list(module.kernel_size)} is not equal on both sides',
                    fix="keep the layer float",
                )
            padding = (total[0] // 2, total[1] // 2)
        return cls(
            tuple(module.kernel_size), tuple(module.stride), tuple(padding), tuple(module.dilation),
            module.groups,
        )  # fmt: skip


class Geometric:
    """Attributes of nn.Conv2d that the module around a convolution reads, such as MobileNetV2's, which pads
    the input itself.
    """

    geometry: Geometry
    weight: Any

    @property
    def in_channels(self) -> int:
        """Number of input channels."""
        return self.weight.shape[1] * self.geometry.groups

    @property
    def out_channels(self) -> int:
        """Number of output channels."""
        return self.weight.shape[0]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.geometry.groups

    @property
    def padding(self) -> tuple[int, int]:
        """Vertical and horizontal padding."""
        return self.geometry.padding

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Height and width of the kernel."""
        return self.geometry.kernel

    @property
    def stride(self) -> tuple[int, int]:
        """Vertical and horizontal stride."""
        return self.geometry.stride

    @property
    def dilation(self) -> tuple[int, int]:
        """Vertical and horizontal dilation."""
        return self.geometry.dilation


class QuantizedConv(Geometric, QuantizedWeight):
    """y = conv(Q(x), Q(w)) + b. A gain before a batch norm multiplies the norm's output."""

    def __init__(
        self,
        module: nn.Conv2d,
        norm: nn.Module | None,
        weight_quantizer: nn.Module | None,
        input_quantizer: nn.Module | None,
    ) -> None:
        super().__init__(module.weight, weight_quantizer, channel_axis=0)
        self.bias = module.bias
        self.geometry = Geometry.of(module)
        self.input_quantizer = input_quantizer
        # a tuple, so that the batch norm is registered once, under its own name
        self._norm = (norm,)

    @property
    def norm(self) -> nn.Module | None:
        """The batch norm that reads this convolution and will be folded into it."""
        return self._norm[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        return convolve(x, self.quantized_weight(), self.rescaled_bias(), self.geometry)

    def rescaled_weight(self) -> Tensor:
        """The deployed weight before rounding; see `QuantizedWeight`."""
        weight = self.weight
        if self.rescale is not None:
            scale = self.rescale().view(self.geometry.groups, -1)  # the channels that each group reads
            weight = weight / scale.repeat_interleave(len(weight) // len(scale), 0)[:, :, None, None]
        if self.gain is not None and self.norm is None:
            weight = weight * self.gain().view(-1, 1, 1, 1)
        return weight

    def rescaled_bias(self) -> Tensor | None:
        """The deployed bias, [out], without a gain behind a batch norm."""
        return self.bias if self.norm is not None else super().rescaled_bias()

    def largest_of_inputs(self) -> Tensor:
        """Largest |w| that reads each input channel, [in], without rescalings."""
        return self.weight.abs().unflatten(0, (self.geometry.groups, -1)).amax((1, 3, 4)).flatten()

    def coded_weight(self) -> Tensor:
        """The weight in its deployed form, [out, in / groups * height * width]."""
        return self._turned(self.rescaled_weight()).flatten(1)

    def codes(self) -> tuple[Tensor, Tensor]:
        """Codes of sign(gamma) * weight (int8, the weight's shape), and their scale."""
        codes, scale = super().codes()
        return codes.view(self.weight.shape), scale

    def _round(self, weight: Tensor) -> Tensor:
        rounded = super()._round(self._turned(weight).flatten(1))
        return self._turned(rounded.view(weight.shape))

    def _turned(self, weight: Tensor) -> Tensor:
        signs = signs_of(self.norm, weight)
        return weight if signs is None else weight * signs

    def _depends_on(self) -> tuple[Tensor, ...]:
        gamma = getattr(self.norm, "weight", None)
        return (*super()._depends_on(), *(() if gamma is None else (gamma,)))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """conv(x, weight) + bias. Every form of a convolution calls this function."""
    return F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
