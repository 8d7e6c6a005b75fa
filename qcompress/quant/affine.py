"""Uniform symmetric quantization: rounding, its gradient, and the layout of a weight's scales.

Source of the gradient: LSQ (arXiv:1902.08153), equations 1 to 3. With v = x / s and vbar = round(clip(v)):

    y       = s * vbar
    dy/dx   = 1 inside (qmin, qmax), 0 outside
    dy/ds   = vbar - v inside, vbar outside
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Layout of a weight's scales: per block, per channel, or one for the whole tensor.

    >>> grid = Grid(channel_axis=1, block=64)
    >>> grid.scale_shape(torch.Size([192, 576]))
    (3, 576)
    >>> Grid(channel_axis=0, block=None).scale_shape(torch.Size([10, 4]))
    (10,)
    >>> Grid(channel_axis=0, granularity="tensor").scale_shape(torch.Size([10, 4]))
    ()
    """

    channel_axis: int
    block: int | None = None
    granularity: Literal["channel", "tensor"] = "channel"

    @property
    def axis(self) -> int:
        """Axis of the DequantizeLinear node: the channel axis or, with blocks, the blocked axis."""
        return self.channel_axis if self.block is None else 1 - self.channel_axis

    @property
    def by_row(self) -> bool:
        """True if each row [0] of the weight has its own scale."""
        return self.channel_axis == 0 and self.block is None and self.granularity == "channel"

    def scale_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Shape of the scale of a weight with this shape."""
        if self.granularity == "tensor":
            return ()
        if self.block is None:
            return (shape[self.channel_axis],)
        return tuple(size // self.block if axis == self.axis else size for axis, size in enumerate(shape))

    def divide(self, weight: Tensor) -> Tensor:
        """Split the blocked axis of a weight in two, [in // block, block, out] for [in, out]."""
        if self.block is None:
            return weight
        return weight.unflatten(self.axis, (-1, self.block))

    def join(self, weight: Tensor) -> Tensor:
        """Inverse of `divide`."""
        return weight if self.block is None else weight.flatten(self.axis, self.axis + 1)

    def align(self, scale: Tensor) -> Tensor:
        """Reshape the scale to broadcast against `divide(weight)`."""
        if self.granularity == "tensor":
            return scale
        if self.block is not None:
            return scale.unsqueeze(self.axis + 1)
        return scale.unsqueeze(1 - self.channel_axis)

    def spread(self, scale: Tensor, channels: int) -> Tensor:
        """The deployed scale: a per-tensor scale is repeated for every channel."""
        return scale.expand(channels) if self.granularity == "tensor" else scale

    def largest(self, weight: Tensor) -> Tensor:
        """max|w| of the weights that share a scale, in the scale's shape."""
        return self.divide(weight).abs().amax(dim=self._shared)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of the values that share a scale, in the scale's shape; `values` has the weight's shape."""
        return self.divide(values).mean(dim=self._shared)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of the values that share a scale, in the scale's shape; `values` has the weight's shape."""
        return self.divide(values).sum(dim=self._shared)

    @property
    def _shared(self) -> tuple[int, ...]:
        """Axes of `divide(weight)` along which weights share a scale."""
        if self.granularity == "tensor":
            return (0, 1)
        return (self.axis + 1 if self.block is not None else 1 - self.channel_axis,)


def to_codes(x: Tensor, scale: Tensor, bounds: tuple[int, int]) -> Tensor:
    """Quantize x to int8 codes; `scale` broadcasts against x."""
    return (x.float() / scale.float()).round_().clamp_(*bounds).to(torch.int8)


def to_ternary(x: Tensor, threshold: Tensor) -> Tensor:
    """Codes -1, 0 and 1 as int8: the sign of x where |x| exceeds the threshold, which broadcasts against x.

    >>> to_ternary(torch.tensor([-2.0, -0.5, 0.5, 0.6]), torch.tensor(0.5)).tolist()
    [-1, 0, 0, 1]
    """
    return (x > threshold).to(torch.int8) - (x < -threshold).to(torch.int8)


def straight_through(upstream: Tensor, x: Tensor, clip: float) -> Tensor:
    """Gradient with respect to x, of x's shape: `upstream` where |x| < clip, and 0 elsewhere.

    >>> straight_through(torch.ones(4), torch.tensor([-3.0, -2.5, 2.4, 2.5]), 2.5)
    tensor([0., 0., 1., 0.])
    """
    compared = x.to(torch.promote_types(x.dtype, torch.float32))  # a clip has no exact value in bf16
    return upstream.masked_fill(compared.abs() >= clip, 0)


def fake_quantize(x: Tensor, scale: Tensor, bounds: tuple[int, int], slope: float = 1.0) -> Tensor:
    """Quantize x with `scale` and dequantize it; differentiable in x and in scale.

    `slope` multiplies the gradient of the scale (LSQ section 2.2: 1 / sqrt(features * qmax)).

    >>> fake_quantize(torch.tensor([0.5, 1.5, 9.0]), torch.tensor(1.0), (-8, 7))
    tensor([0., 2., 7.])
    """
    # x is in half precision under autocast, too coarse for the quotients and for the gradient of the scale
    return _FakeQuantize.apply(x.to(scale.dtype), scale, *bounds, slope).to(x.dtype)


class _FakeQuantize(torch.autograd.Function):
    """Equations 1 to 3 of LSQ; x on a bound counts as clipped."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, qmin: int, qmax: int, slope: float) -> Tensor:
        y = torch.div(x, scale).round_().clamp_(qmin, qmax).mul_(scale)
        ctx.save_for_backward(x, y, scale)
        ctx.bounds, ctx.slope = (qmin, qmax), slope
        return y

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale = ctx.saved_tensors
        qmin, qmax = ctx.bounds
        # 1.0 between the bounds and 0.0 elsewhere: on a CPU, floats in place cost half of a bool mask
        inside = torch.div(x, scale).sub_((qmin + qmax) / 2).abs_().lt_((qmax - qmin) / 2)
        scale_gradient = None
        if ctx.needs_input_grad[1]:
            error = torch.addcmul(y, inside, x, value=-1)  # scale * (vbar - v), and scale * vbar outside
            scale_gradient = _dot(upstream, error, scale.shape) * (ctx.slope / scale)
        return (inside.mul_(upstream) if ctx.needs_input_grad[0] else None), scale_gradient, None, None, None


def _dot(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """Sum of a * b over the elements that share a scale, in the scale's shape."""
    if shape.numel() == 1:
        return torch.dot(a.flatten(), b.flatten()).view(shape)
    return (a * b).sum_to_size(shape)
