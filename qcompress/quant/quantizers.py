"""Quantizers `minmax` and `lsq`, for weights and for activations, and the tables of all quantizers.

Life of a quantizer: `init` (an initial scale from a weight or from statistics), calls during training, and
`advance` after each update. The trained artifact keeps a weight quantizer's scale and, for ternary codes, its
threshold, and an activation quantizer's scale; the frozen forms below hold nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.quant.affine import Grid, fake_quantize, to_ternary
from qcompress.quant.dynamic import DynamicActivation
from qcompress.quant.learned_scale import LearnedScale
from qcompress.quant.ranges import Statistics, activation_ratio, start_scale, weight_ratio
from qcompress.quant.ternary import TernaryWeight
from qcompress.quant.weight_quantizer import CodedWeight
from qcompress.schema.quantizers import Lsq, MinMax

ChannelScale = Callable[[], Tensor]
"""Returns the current rescaling of an activation's channels, [channels]."""


class Quantizer(Protocol):
    """Differentiable rounding of one tensor during training, an nn.Module.

    Constructed with (options, grid, bounds, shape) for a weight, which also needs the methods of
    `CodedWeight`, and with (options, bounds, channels) for an activation. A quantizer with parameters
    declares the role of each in `parameter_roles`, by its name in `named_parameters()`.
    """

    def init(self, seen: Tensor | Statistics) -> None:
        """Choose the initial scale, from the weight itself or from an activation's calibration statistics."""

    def __call__(self, x: Tensor) -> Tensor:
        """Round x to the grid, differentiably; writes to no parameter and to no buffer."""

    def advance(self) -> None:
        """Restore the scale's valid range; called after each update."""

    def scale_of(self, *weight: Tensor) -> Tensor:
        """Scale to deploy; called when training has ended."""


class MinMaxWeight(CodedWeight):
    """Weight quantizer whose scale follows the current weight, also when training or an adapter changes it.

    `percentile` and `mse` choose a ratio to max|w| once, in `init`; the ratio is kept while max|w| moves.
    """

    def __init__(self, options: MinMax, grid: Grid, bounds: tuple[int, int], shape: torch.Size) -> None:
        super().__init__()
        self.options, self.grid, self.bounds = options, grid, bounds
        self.register_buffer("ratio", torch.ones(grid.scale_shape(shape)))
        if options.renew is not None:
            self.register_buffer("age", torch.tensor(0))
            self.register_buffer("renewed", torch.tensor(0))

    @torch.no_grad()
    def init(self, weight: Tensor) -> None:
        """Choose the ratio for this weight."""
        options = self.options
        self.ratio.copy_(weight_ratio(weight, self.grid, self.bounds, options.range, options.percentile))

    def scale_of(self, weight: Tensor) -> Tensor:
        """Scale for this weight, in the grid's shape; differentiable in the weight."""
        return start_scale(self.grid.largest(weight), self.ratio, self.bounds)

    def forward(self, weight: Tensor) -> Tensor:
        scale = self.grid.align(self.scale_of(weight))
        return self.grid.join(fake_quantize(self.grid.divide(weight), scale, self.bounds))

    def of_rows(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Quantized rows; see `CodedWeight.of_rows`."""
        selected = F.embedding(rows, weight)
        scale = start_scale(self.grid.largest(selected), self.ratio[rows], self.bounds)
        return fake_quantize(selected, self.grid.align(scale), self.bounds)

    @torch.no_grad()
    def refresh(self, weight: Callable[[], Tensor]) -> None:
        """Choose the ratio again every `renew` updates."""
        every = self.options.renew
        if every is not None and int(self.age) // every > int(self.renewed):
            self.init(weight())
            self.renewed.fill_(int(self.age) // every)

    def advance(self) -> None:
        """Count updates, if ranges are chosen again during training."""
        if self.options.renew is not None:
            self.age += 1


class LsqWeight(LearnedScale, CodedWeight):
    """Learned scale of a weight (LSQ, arXiv:1902.08153, section 2)."""

    def __init__(self, options: Lsq, grid: Grid, bounds: tuple[int, int], shape: torch.Size) -> None:
        super().__init__()
        self.options, self.grid, self.bounds = options, grid, bounds
        self.make_scale(grid.scale_shape(shape), options.floor)
        shared = shape.numel() / self.start.numel()
        self.slope = 1 / (shared * bounds[1]) ** 0.5

    @torch.no_grad()
    def init(self, weight: Tensor) -> None:
        """Initialize the scale from this weight."""
        options = self.options
        ratio = weight_ratio(weight, self.grid, self.bounds, options.init, options.percentile)
        self.start_at(start_scale(self.grid.largest(weight), ratio, self.bounds))

    def scale_of(self, weight: Tensor) -> Tensor:
        """The learned scale, in the grid's shape, independent of the weight."""
        return self.learned_scale()

    def forward(self, weight: Tensor) -> Tensor:
        scale = self.grid.align(self.scale_of(weight))
        return self.grid.join(fake_quantize(self.grid.divide(weight), scale, self.bounds, self.slope))

    def of_rows(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Quantized rows; see `CodedWeight.of_rows`."""
        scale = self.grid.align(self.unit[rows] * self.ratio[rows])
        return fake_quantize(F.embedding(rows, weight), scale, self.bounds, self.slope)


class MinMaxActivation(nn.Module):
    """Activation quantizer with a static scale from calibration, which follows the rescaling of its
    channels.
    """

    def __init__(self, options: MinMax, bounds: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.options, self.bounds = options, bounds
        self.rescale: ChannelScale | None = None
        self.register_buffer("ratio", torch.ones(()))
        self.register_buffer("largest", torch.ones(channels))

    @torch.no_grad()
    def init(self, seen: Statistics) -> None:
        """Initialize the scale from statistics of the activation without rescaling."""
        scaled = seen.rescaled(self.rescale()) if self.rescale else seen
        options = self.options
        self.ratio.copy_(activation_ratio(scaled, self.bounds, options.range, options.percentile))
        self.largest.copy_(seen.largest)

    def scale_of(self) -> Tensor:
        """The scale, []."""
        largest = self.largest * self.rescale() if self.rescale else self.largest
        return start_scale(largest.max(), self.ratio, self.bounds)

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale_of(), self.bounds)

    def advance(self) -> None:
        """No-op."""


class LsqActivation(LearnedScale):
    """Activation quantizer with a learned scale; the gradient's slope counts features as in LSQ section
    2.2.
    """

    def __init__(self, options: Lsq, bounds: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.options, self.bounds = options, bounds
        self.rescale: ChannelScale | None = None
        self.make_scale((), options.floor)
        self.slope = 1 / (channels * bounds[1]) ** 0.5

    @torch.no_grad()
    def init(self, seen: Statistics) -> None:
        """Initialize the scale from statistics of the activation without rescaling."""
        scaled = seen.rescaled(self.rescale()) if self.rescale else seen
        options = self.options
        ratio = activation_ratio(scaled, self.bounds, options.init, options.percentile)
        self.start_at(start_scale(scaled.largest.max(), ratio, self.bounds))

    def scale_of(self) -> Tensor:
        """The learned scale, []."""
        return self.learned_scale()

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale_of(), self.bounds, self.slope)


class FrozenWeight(CodedWeight):
    """Weight quantizer after training: its scale and, for ternary codes, its threshold."""

    def __init__(
        self, scale: Tensor, grid: Grid, bounds: tuple[int, int], threshold: Tensor | None = None
    ) -> None:
        super().__init__()
        self.grid, self.bounds = grid, bounds
        self.register_buffer("scale", scale)
        self.register_buffer("threshold", threshold)

    def scale_of(self, weight: Tensor) -> Tensor:
        """The scale, in the grid's shape."""
        return self.scale

    def threshold_of(self, weight: Tensor) -> Tensor | None:
        """The threshold, in the grid's shape."""
        return self.threshold

    def forward(self, weight: Tensor) -> Tensor:
        grid, scale = self.grid, self.grid.align(self.scale)
        if self.threshold is None:
            return grid.join(fake_quantize(grid.divide(weight), scale, self.bounds))
        codes = to_ternary(grid.divide(weight), grid.align(self.threshold))
        return grid.join(codes.to(scale.dtype) * scale)


class FrozenActivation(nn.Module):
    """Activation quantizer after training: its scale, []."""

    def __init__(self, scale: Tensor, bounds: tuple[int, int]) -> None:
        super().__init__()
        self.bounds = bounds
        self.register_buffer("scale", scale)

    def scale_of(self) -> Tensor:
        """The scale, []."""
        return self.scale

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale, self.bounds)


WEIGHT_QUANTIZERS: dict[str, type[Quantizer]] = {
    "minmax": MinMaxWeight,
    "lsq": LsqWeight,
    "ternary": TernaryWeight,
}
ACTIVATION_QUANTIZERS: dict[str, type[Quantizer]] = {
    "minmax": MinMaxActivation,
    "lsq": LsqActivation,
    "dynamic": DynamicActivation,
}
