"""Ternary weight quantizer: Ternary Weight Networks (TWN, arXiv:1605.04711, section 2.2).

    D  = 0.7 * mean|w|           over the weights that share a scale
    a  = mean of |w| over |w| > D
    w^ = a * sign(w) where |w| > D, and 0 elsewhere

As in TernaryBERT (arXiv:2009.12812) and Teacher Intervention (arXiv:2302.11812), w is first clamped to [-2.5,
2.5], the gradient passes straight through inside and is 0 outside, and neither D nor a is differentiated. The
granularity is the format's: those methods use the whole tensor for a linear layer, and a row for the word
embeddings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompress.quant.affine import Grid, straight_through, to_ternary
from qcompress.quant.ranges import TINY
from qcompress.quant.weight_quantizer import CodedWeight
from qcompress.schema.quantizers import Ternary


class TernaryWeight(CodedWeight):
    """Weight quantizer with threshold and scale of the current weight; it has no parameters and no
    buffers.
    """

    def __init__(self, options: Ternary, grid: Grid, bounds: tuple[int, int], shape: torch.Size) -> None:
        super().__init__()
        self.options, self.grid, self.bounds = options, grid, bounds

    def init(self, weight: Tensor) -> None:
        """No-op."""

    def threshold_of(self, weight: Tensor) -> Tensor:
        """Threshold for this weight, in the grid's shape."""
        return self._measure(weight)[0]

    def scale_of(self, weight: Tensor) -> Tensor:
        """Scale for this weight, in the grid's shape; `TINY` for weights that are all 0."""
        return self._measure(weight)[1]

    def forward(self, weight: Tensor) -> Tensor:
        threshold, scale = (self.grid.align(values) for values in self._measure(weight))
        return self.grid.join(_Ternary.apply(self.grid.divide(weight), scale, threshold, self.options.clip))

    def of_rows(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Quantized rows; see `CodedWeight.of_rows`."""
        return self(F.embedding(rows, weight))  # without state, a row is quantized as in its table

    def advance(self) -> None:
        """No-op."""

    @torch.no_grad()
    def _measure(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        grid, magnitude = self.grid, weight.abs().clamp_(max=self.options.clip)
        threshold = self.options.threshold * grid.mean(magnitude)
        kept = grid.join(grid.divide(magnitude) > grid.align(threshold)).to(weight.dtype)
        count = grid.sum(kept)
        # a row of zeros has count 0, and 0 / 0 would be NaN
        scale = grid.sum(kept.mul_(magnitude)) / count.clamp_min(1)
        return threshold, scale.clamp_min(TINY)


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, threshold: Tensor, clip: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.clip = clip
        return to_ternary(x, threshold).to(x.dtype) * scale

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return straight_through(upstream, x, ctx.clip), None, None, None
