"""Initial scales: absolute maximum, percentile, least squares, or LSQ's formula.

An initial scale is returned as a *ratio* to max|x| / qmax, so that it can follow a tensor that changes: the
scale of a rescaled weight is again ratio * max|w| / qmax.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompress.quant.affine import Grid

TINY = 1e-8
"""Smallest initial scale: an all-zero channel must not get scale 0, which TensorRT refuses."""

QUANTILE_LIMIT = 2**24
"""Largest number of values that torch.quantile accepts."""

SHRINKS = (*(1 - step / 100 for step in range(80)), *(0.2 * 0.85**step for step in range(26)))
"""Candidates of the least-squares search, as ratios to max|x| / qmax: 1 to 0.21 in steps of 0.01, then down
to 0.0034 by factors, for few codes and heavy tails.
"""


@dataclass(frozen=True)
class Statistics:
    """Calibration statistics of a layer's input.

    largest, mean: max|x| and mean|x| of each channel, [channels]. rows: a sample of whole token vectors,
    [rows, channels], evenly spread over the calibration data, for percentiles and least squares.
    """

    largest: Tensor
    mean: Tensor
    rows: Tensor

    def rescaled(self, scale: Tensor) -> Statistics:
        """Statistics after multiplication of every channel by `scale` [channels]."""
        return replace(self, largest=self.largest * scale, mean=self.mean * scale, rows=self.rows * scale)


def weight_ratio(weight: Tensor, grid: Grid, bounds: tuple[int, int], rule: str, percentile: float) -> Tensor:
    """Ratio of the initial scale to max|w| / qmax, in the scale's shape."""
    largest = grid.largest(weight).clamp_min(TINY)
    if rule == "absmax":
        return torch.ones_like(largest)
    if rule == "lsq":
        return (2 * grid.mean(weight.abs()) * bounds[1] ** 0.5 / largest).clamp_min(TINY)
    rows = _rows_of(weight, grid)
    if rule == "percentile":
        ratio = _percentile(rows.abs(), percentile) / rows.abs().amax(1).clamp_min(TINY)
        return ratio.clamp_min(1e-3).reshape(largest.shape)
    return _least_squares(rows, bounds).reshape(largest.shape)


def activation_ratio(seen: Statistics, bounds: tuple[int, int], rule: str, percentile: float) -> Tensor:
    """Ratio of the initial scale to max|x| / qmax, []."""
    largest = seen.largest.max().clamp_min(TINY)
    if rule == "absmax":
        return torch.ones_like(largest)
    if rule == "lsq":
        return (2 * seen.mean.mean() * bounds[1] ** 0.5 / largest).clamp_min(TINY)
    rows = seen.rows.reshape(1, -1)
    if rule == "percentile":
        kept = _kth(rows.abs(), percentile)[0]
        return (kept / largest).clamp(1e-3, 1.0)
    sample = rows.abs().amax(1).clamp_min(TINY)[0]
    return (_least_squares(rows, bounds)[0] * sample / largest).clamp(1e-3, 1.0)


def start_scale(largest: Tensor, ratio: Tensor, bounds: tuple[int, int]) -> Tensor:
    """Initial scale ratio * largest / qmax, never zero."""
    return (ratio * largest / bounds[1]).clamp_min(TINY)


def _rows_of(weight: Tensor, grid: Grid) -> Tensor:
    """Reshape a weight to [scales, weights per scale], scales in the order of the flattened scale tensor."""
    if grid.granularity == "tensor":
        return weight.reshape(1, -1)
    divided = grid.divide(weight)
    shared = grid.axis + 1 if grid.block is not None else 1 - grid.channel_axis
    return divided.movedim(shared, -1).flatten(0, -2)


def _percentile(rows: Tensor, percentile: float) -> Tensor:
    """Percentile of each row, [rows]: interpolated where torch supports the size, else one of the values."""
    if rows.shape[1] > QUANTILE_LIMIT:
        return _kth(rows, percentile)
    return torch.quantile(rows, percentile / 100, dim=1)


def _kth(rows: Tensor, percentile: float) -> Tensor:
    """Smallest value of each row that at least `percentile` percent of the values do not exceed, [rows]."""
    k = max(1, round(rows.shape[1] * percentile / 100))
    return rows.kthvalue(min(k, rows.shape[1]), dim=1).values


def _least_squares(rows: Tensor, bounds: tuple[int, int]) -> Tensor:
    """Ratio to max|x| / qmax with the least squared rounding error, for each row, [rows]."""
    base = rows.abs().amax(1).clamp_min(TINY) / bounds[1]
    best = torch.full_like(base, torch.inf)
    ratio = torch.ones_like(base)
    for candidate in SHRINKS:
        scale = (base * candidate)[:, None]
        rounded = torch.div(rows, scale).round_().clamp_(*bounds).mul_(scale)
        error = rounded.sub_(rows).square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        ratio = torch.where(better, candidate, ratio)
    return ratio
