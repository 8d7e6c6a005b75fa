"""Starting scales, against their formulas written again in numpy and double precision."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qcompress.quant.affine import Grid, fake_quantize
from qcompress.quant.ranges import (
    TINY,
    Statistics,
    activation_ratio,
    start_scale,
    weight_ratio,
)

HOWS = ("absmax", "percentile", "mse", "lsq")
BOUNDS = {"int8": (-128, 127), "int4": (-8, 7), "int3": (-4, 3), "int2": (-2, 1)}
GRIDS = [Grid(axis, block) for axis, block in itertools.product((0, 1), (None, 32))]
GRIDS += [Grid(axis, None, "tensor") for axis in (0, 1)]


def weight_like(seed: int = 0, shape: tuple[int, int] = (64, 96)) -> Tensor:
    """Normal values with a few large ones, so that the ways of choosing a range differ."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random)
    return torch.where(torch.rand(shape, generator=random) < 0.01, 5 * weight, weight)


def groups_of(weight: Tensor, grid: Grid) -> list[np.ndarray]:
    """The weights of each scale, in the order of the flattened scale tensor."""
    values = weight.double().numpy()
    if grid.granularity == "tensor":
        return [values.ravel()]
    if grid.block is None:
        return [values.take(index, grid.channel_axis) for index in range(values.shape[grid.channel_axis])]
    axis = 1 - grid.channel_axis
    blocks = np.split(values, values.shape[axis] // grid.block, axis)
    if axis == 0:
        return [block[:, column] for block in blocks for column in range(values.shape[1])]
    return [block[row] for row in range(values.shape[0]) for block in blocks]


def squared_error(values: np.ndarray, scale: float, bounds: tuple[int, int]) -> float:
    return float(((np.clip(np.rint(values / scale), *bounds) * scale - values) ** 2).sum())


def oracle(values: np.ndarray, bounds: tuple[int, int], how: str, percentile: float) -> float:
    """The starting scale of the values that share it."""
    magnitude = np.abs(values).ravel()
    if how == "lsq":
        return 2 * magnitude.mean() / math.sqrt(bounds[1])
    if how == "percentile":
        return np.percentile(magnitude, percentile) / bounds[1]
    absmax = magnitude.max() / bounds[1]
    if how == "absmax":
        return absmax
    candidates = [absmax * (100 - step) / 100 for step in range(80)]
    candidates += [absmax * 0.2 * 0.85**step for step in range(26)]
    return min(candidates, key=lambda scale: squared_error(values, scale, bounds))


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("how", HOWS)
def test_the_starting_scale_of_a_weight_is_its_formula(how: str, grid: Grid, bounds: tuple[int, int]) -> None:
    weight = weight_like()
    ratio = weight_ratio(weight, grid, bounds, how, percentile=97.0)
    assert tuple(ratio.shape) == grid.scale_shape(weight.shape)
    scale = start_scale(grid.largest(weight), ratio, bounds)
    expected = np.array([oracle(values, bounds, how, 97.0) for values in groups_of(weight, grid)])
    assert len(expected) == scale.numel()
    if how == "mse":  # two candidates may have nearly the same error, so compare what they were chosen by
        ours, best = (
            [squared_error(v, float(s), bounds) for v, s in zip(groups_of(weight, grid), scales, strict=True)]
            for scales in (scale.double().flatten(), expected)
        )
        np.testing.assert_allclose(ours, best, rtol=1e-4)
        assert float((ratio < 1).float().mean()) > (0.1 if bounds == (-128, 127) else 0.3)
    else:
        rtol = 2e-5 if how == "percentile" else 2e-6  # torch interpolates between two values in fp32
        np.testing.assert_allclose(scale.double().numpy().ravel(), expected, rtol=rtol)


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_least_squares_is_never_worse_than_the_absolute_maximum(grid: Grid, bounds: tuple[int, int]) -> None:
    better = 0
    for seed in range(5):
        weight = weight_like(seed)
        errors = {}
        for how in ("absmax", "mse"):
            scale = start_scale(grid.largest(weight), weight_ratio(weight, grid, bounds, how, 99.0), bounds)
            rounded = grid.join(fake_quantize(grid.divide(weight), grid.align(scale), bounds))
            errors[how] = grid.mean((rounded - weight).double().square())
        assert (errors["mse"] <= errors["absmax"] * (1 + 1e-5)).all()
        better += int((errors["mse"] < 0.99 * errors["absmax"]).sum())
    assert better > (20 if grid.granularity == "channel" else 2)  # of 5 scales in all


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_channel_of_zeros_gets_a_tiny_scale_and_not_zero(grid: Grid, how: str) -> None:
    weight = weight_like()
    weight.select(grid.channel_axis, 3).zero_()
    if grid.granularity == "tensor":
        weight.zero_()
    ratio = weight_ratio(weight, grid, (-8, 7), how, 99.0)
    scale = start_scale(grid.largest(weight), ratio, (-8, 7))
    if grid.granularity == "tensor":
        assert float(scale) == pytest.approx(TINY)
        return
    channel_of_scale = 0 if grid.block is None else grid.channel_axis
    zero = scale.select(channel_of_scale, 3)
    torch.testing.assert_close(zero, torch.full_like(zero, TINY))
    assert (scale > 0).all() and scale.isfinite().all()
    assert float(scale.select(channel_of_scale, 4).min()) > 1e-3


# Activations -----------------------------------------------------------------------------------------


def seen_of(x: Tensor) -> Statistics:
    return Statistics(largest=x.abs().amax(0), mean=x.abs().mean(0), rows=x)


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("how", HOWS)
def test_the_starting_scale_of_an_activation_is_its_formula(how: str, bounds: tuple[int, int]) -> None:
    x = weight_like(3, (400, 24))
    seen = seen_of(x)
    scale = start_scale(seen.largest.max(), activation_ratio(seen, bounds, how, 99.0), bounds)
    assert scale.shape == ()
    values = x.double().numpy()
    if how == "percentile":  # no interpolation: one of the magnitudes itself, at most one rank away
        order = np.sort(np.abs(values).ravel())
        rank = round(order.size * 0.99)
        assert order[rank - 2] <= float(scale) * bounds[1] * (1 + 1e-6)
        assert float(scale) * bounds[1] <= order[rank] * (1 + 1e-6)
    elif how == "mse":
        best = squared_error(values, oracle(values, bounds, how, 99.0), bounds)
        np.testing.assert_allclose(squared_error(values, float(scale), bounds), best, rtol=1e-4)
    else:
        np.testing.assert_allclose(float(scale), oracle(values, bounds, how, 99.0), rtol=2e-6)


@pytest.mark.parametrize("how", HOWS)
def test_rows_that_miss_the_largest_value_do_not_bend_the_scale(how: str) -> None:
    """Only some rows are kept, while `largest` saw all: the ratio is to the latter."""
    x = weight_like(3, (4000, 24)).clamp(-4, 4)
    whole, kept = seen_of(x), seen_of(x[7::8])
    outlier = Statistics(largest=whole.largest.clone(), mean=whole.mean, rows=kept.rows)
    outlier.largest[2] = 100.0
    bounds = (-8, 7)
    plain, bent = (
        start_scale(s.largest.max(), activation_ratio(s, bounds, how, 99.0), bounds) for s in (kept, outlier)
    )
    if how == "absmax":
        assert float(bent) == pytest.approx(100 / 7)
    else:
        assert float(bent) == pytest.approx(float(plain), rel=0.02)


def test_statistics_of_rescaled_channels_are_those_of_the_rescaled_activation() -> None:
    x = weight_like(5, (200, 16))
    scale = torch.randn(16, generator=torch.Generator().manual_seed(6)).mul(0.7).exp()
    ours, direct = seen_of(x).rescaled(scale), seen_of(x * scale)
    for name in ("largest", "mean", "rows"):
        torch.testing.assert_close(getattr(ours, name), getattr(direct, name), rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", HOWS)
def test_an_activation_that_is_always_zero_gets_a_tiny_scale(how: str) -> None:
    seen = seen_of(torch.zeros(50, 8))
    scale = start_scale(seen.largest.max(), activation_ratio(seen, (-128, 127), how, 99.0), (-128, 127))
    assert 0 < float(scale) <= TINY and torch.isfinite(scale)


def test_the_percentile_of_a_whole_table_is_found_where_torch_quantile_gives_up() -> None:
    """A word table of BERT has 23 million weights under one scale."""
    table = torch.rand(2**13, 2**11 + 8, generator=torch.Generator().manual_seed(0))
    ratio = weight_ratio(table, Grid(0, None, "tensor"), (-128, 127), "percentile", 75.0)
    assert ratio.shape == () and float(ratio) == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("how", ["percentile", "mse"])
def test_a_range_is_found_in_more_values_than_torch_quantile_takes(how: str) -> None:
    rows = torch.rand(2**13, 2**11 + 8, generator=torch.Generator().manual_seed(0))  # just over 2**24 values
    seen = Statistics(largest=torch.ones(rows.shape[1]), mean=rows.mean(0), rows=rows)
    if how == "mse":
        seen = Statistics(largest=seen.largest, mean=seen.mean, rows=rows[:64])
    ratio = activation_ratio(seen, (-128, 127), how, 75.0)
    assert float(ratio) == pytest.approx(0.75 if how == "percentile" else 1.0, abs=0.02)
