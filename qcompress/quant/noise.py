"""Quant-Noise (arXiv:2004.07320, section 4): each forward pass of training rounds a random part of a weight.

    J       blocks drawn with probability p, anew in each pass           (equation 4)
    psi(b)  = phi(b) for b in J, b otherwise                             (equations 5 and 6)
    y       = psi(W) x

phi is the quantizer around which the noise lies, with the quantizer's own gradient where it rounds and an
exact one elsewhere: with p = 1 this is quantization-aware training, with p = 0 training in float. Or phi is 0
(the paper's phi_proxy), and what is kept is scaled by 1 / (1 - p), so that the expected weight is the weight.
A parameter is never written to, evaluation rounds everything, and activations are never noised.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from qcompress.schema.quantizers import Noise

LEVELS = 2**16
"""Masks are drawn from 16 random bits: the share p is met to 1/65536, and 0 and 1 exactly."""


class QuantNoise:
    """Noise around the quantizer of one weight; it holds no state."""

    def __init__(self, options: Noise, block: int, channel_axis: int) -> None:
        """`block` consecutive input channels of an output channel are drawn together; `channel_axis` is the
        output channels'.
        """
        self.p, self.zero = options.p, options.form == "zero"
        self.block, self.axis = block, 1 - channel_axis

    def __call__(self, weight: Tensor, rounded: Callable[[], Tensor]) -> Tensor:
        """psi(weight), [in, out] or [out, in]; `rounded` gives phi(weight), and is called if it is needed."""
        if self.p == 0:
            return weight
        if self.p == 1:
            return rounded()
        drawn = self.draw(weight)
        if self.zero:
            return weight.masked_fill(drawn, 0.0) / (1 - self.p)
        return _Mixed.apply(rounded(), weight, drawn.to(weight.dtype))

    def draw(self, weight: Tensor) -> Tensor:
        """Which weights are rounded in this pass, bool, in the weight's shape; from torch's generator."""
        shape = list(weight.shape)
        shape[self.axis] //= self.block
        drawn = random_mask(tuple(shape), self.p, weight.device)
        return drawn if self.block == 1 else drawn.repeat_interleave(self.block, dim=self.axis)


def random_mask(shape: tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """A bool tensor of independent draws, true with probability p (to 1 / LEVELS), on `device`.

    On a CPU numpy's SFC64 makes the bits, seeded by torch's generator: torch's own serial generator would
    take longer than the update of a small layer.
    """
    limit = round(p * LEVELS)
    if device.type != "cpu":
        return torch.rand(shape, device=device) < p
    seed = int(torch.randint(2**62, ()))
    count = int(np.prod(shape))
    words = np.random.SFC64(seed).random_raw(-(-count // 4))
    return torch.from_numpy(words.view(np.uint16)[:count] < limit).view(shape)


class _Mixed(torch.autograd.Function):
    """`rounded` where `drawn` is 1, `weight` where it is 0, exactly, each with the gradient of its part. As
    arithmetic on floats it takes half the time of `torch.where`, which does not vectorise over masks.
    """

    @staticmethod
    def forward(ctx, rounded: Tensor, weight: Tensor, drawn: Tensor) -> Tensor:
        ctx.save_for_backward(drawn)
        return torch.lerp(weight, rounded, drawn)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        (drawn,) = ctx.saved_tensors
        of_rounded = upstream * drawn
        return of_rounded, upstream - of_rounded, None
