"""Dynamic activation quantizer: the range of each tensor as it comes, until training has ended.

    s  = max|x| / 127 of x clamped to [-2.5, 2.5]
    x^ = s * round(x / s)

Source: TernaryBERT (arXiv:2009.12812) and the published code of Teacher Intervention (arXiv:2302.11812),
which deploy dynamic ranges. TensorRT takes static scales only, so a static quantizer replaces this one when
training has ended (`observer.make_static`); that step is ours. So is the code -128 for values below -2.5:
QuantizeLinear saturates there, the published code at -127.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qcompress.errors import ContractError
from qcompress.quant.affine import straight_through
from qcompress.quant.ranges import Statistics, start_scale
from qcompress.schema.quantizers import Dynamic


class DynamicActivation(nn.Module):
    """Activation quantizer with a scale [] computed from each tensor; it has no parameters and no buffers.

    The range covers the whole tensor, including padding, as in the published code. The gradient passes
    straight through inside the clip, is 0 outside, and the range is not differentiated.
    """

    def __init__(self, options: Dynamic, bounds: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.options, self.bounds = options, bounds
        self.rescale: Callable[[], Tensor] | None = None
        """Unused: the input is rescaled already."""

    def init(self, seen: Statistics) -> None:
        """No-op."""

    def scale_of(self) -> Tensor:
        """Raise ContractError: a dynamic range has no scale to deploy."""
        raise ContractError(
            "a dynamic activation has no scale to deploy",
            fix="call observer.make_static when training has ended, before the scales are written",
        )

    def scale_for(self, largest: Tensor) -> Tensor:
        """Scale [] for activations with the largest magnitude `largest` []: at most clip / 127."""
        limit = largest if self.options.clip is None else largest.clamp(max=self.options.clip)
        return start_scale(limit, torch.ones_like(limit), self.bounds)

    def forward(self, x: Tensor) -> Tensor:
        clip = self.options.clip
        with torch.no_grad():
            low, high = x.aminmax()
            largest = torch.maximum(-low, high)
            scale = self.scale_for(largest.float())
            # not on a GPU, where the comparison would wait for the device
            if clip is not None and not x.is_cuda and bool(largest < clip):
                clip = None
        return _RoundToRange.apply(x, scale, *self.bounds, clip)

    def advance(self) -> None:
        """No-op."""


class _RoundToRange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, qmin: int, qmax: int, clip: float | None) -> Tensor:
        ctx.clip = clip
        ctx.save_for_backward(*(() if clip is None else (x,)))
        # values beyond the clip are beyond the largest code as well: one clamp serves both
        y = torch.div(x.to(scale.dtype), scale).round_().clamp_(qmin, qmax).mul_(scale)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.clip is not None:
            (x,) = ctx.saved_tensors
            upstream = straight_through(upstream, x, ctx.clip)
        return upstream, None, None, None, None
