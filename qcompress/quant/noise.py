"""Quant-Noise (arXiv:2004.07320, section 4): each forward pass of training quantizes a random part of a
weight.

    J       blocks drawn with probability p, anew in each pass           (equation 4)
    psi(b)  = phi(b) for b in J, b otherwise                             (equations 5 and 6)
    y       = psi(W) x

phi is the wrapped quantizer, with its own gradient where it rounds and an exact gradient elsewhere: p = 1 is
quantization-aware training, p = 0 training in float. Alternatively phi is 0 (the paper's phi_proxy), and the
remaining weights are scaled by 1 / (1 - p), so that the expected weight is the weight. Parameters are never
written, evaluation quantizes everything, and activations have no noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcompress.schema.quantizers import Noise


class QuantNoise:
    """Noise around the quantizer of one weight; it has no state."""

    def __init__(self, options: Noise, block: int, channel_axis: int) -> None:
        """`block`: number of consecutive input channels of an output channel that are drawn together;
        `channel_axis`: axis of the output channels.
        """
        self.p, self.zero = options.p, options.form == "zero"
        self.block, self.axis = block, 1 - channel_axis

    @property
    def rounds(self) -> bool:
        """True if `__call__` may call its `rounded`."""
        return self.p == 1 or (self.p > 0 and not self.zero)

    def __call__(self, weight: Tensor, rounded: Callable[[], Tensor]) -> Tensor:
        """psi(weight), [in, out] or [out, in]; `rounded` computes phi(weight) and is called only if
        needed.
        """
        if self.p == 0:
            return weight
        if self.p == 1:
            return rounded()
        drawn = self.draw(weight)
        if self.zero:
            return weight.masked_fill(drawn, 0.0) / (1 - self.p)
        return torch.where(drawn, rounded(), weight)

    def draw(self, weight: Tensor) -> Tensor:
        """Draw the mask of weights that are quantized in this pass, bool, in the weight's shape; from
        torch's generator.
        """
        shape = list(weight.shape)
        shape[self.axis] //= self.block
        drawn = random_mask(tuple(shape), self.p, weight.device)
        return drawn if self.block == 1 else drawn.repeat_interleave(self.block, dim=self.axis)


def random_mask(shape: tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """A bool tensor of independent draws, true with probability p, on `device`; from torch's generator."""
    return torch.rand(shape, device=device) < p
