"""Ternary weights against the formula in double precision, and their gradient against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qcompress.quant.affine import Grid
from qcompress.quant.quantizers import FrozenWeight, TernaryWeight
from qcompress.quant.ranges import TINY
from qcompress.schema.quantizers import Ternary

TERNARY = (-1, 1)
GRIDS = {
    "channel, [in, out]": Grid(1),
    "channel, [out, in]": Grid(0),
    "tensor, [in, out]": Grid(1, None, "tensor"),
    "tensor, [out, in]": Grid(0, None, "tensor"),
    "block, [in, out]": Grid(1, 32),
    "block, [out, in]": Grid(0, 32),
}
SHAPE = (64, 96)


def weight_like(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Normal weights of a different size in each row and column; some are beyond the clip."""
    random = torch.Generator().manual_seed(seed)
    spread = torch.rand(shape[0], 1, generator=random) + torch.rand(1, shape[1], generator=random) + 0.2
    return torch.randn(shape, generator=random) * spread


def quantizer(grid: Grid = GRIDS["channel, [out, in]"], **options: float) -> TernaryWeight:
    return TernaryWeight(Ternary(**options), grid, TERNARY, torch.Size(SHAPE))


def by_hand(weight: Tensor, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes and their scale for every weight, and its threshold, from the definition in double precision."""
    values = np.clip(weight.double().numpy(), -2.5, 2.5)
    owner = np.zeros(values.shape, int)
    for row, column in np.ndindex(*values.shape):
        out, into = (column, row) if grid.channel_axis == 1 else (row, column)
        owner[row, column] = 0 if grid.granularity == "tensor" else out * 1000 + into // (grid.block or 1000)
    codes, scales, thresholds = np.zeros(values.shape), np.zeros(values.shape), np.zeros(values.shape)
    for one in np.unique(owner):
        mine = owner == one
        threshold = 0.7 * np.abs(values[mine]).mean()
        kept = mine & (np.abs(values) > threshold)
        codes[kept] = np.sign(values[kept])
        scales[mine], thresholds[mine] = np.abs(values[kept]).mean(), threshold
    return codes, scales, thresholds


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_codes_and_scales_are_those_of_the_paper(grid: Grid) -> None:
    for seed in range(5):
        weight = weight_like(seed)
        assert (weight.abs() > 2.5).float().mean() > 0.02
        ours = quantizer(grid)
        codes, scales, thresholds = by_hand(weight, grid)
        found, scale = ours.codes_of(weight)
        np.testing.assert_array_equal(found.numpy(), codes)
        assert tuple(scale.shape) == grid.scale_shape(weight.shape)
        np.testing.assert_allclose(ours(weight).numpy(), codes * scales, rtol=1e-6)
        spread = grid.join(grid.divide(torch.ones(SHAPE)) * grid.align(ours.threshold_of(weight)))
        np.testing.assert_allclose(spread.numpy(), thresholds, rtol=1e-6)


def test_a_row_worked_by_hand_is_not_what_rounding_would_give() -> None:
    """mean 1.0625, so the threshold is 0.74375 and a = 8.5 / 4 = 2.125. 1 is above the threshold, and 1 / a =
    0.47 would round to 0.
    """
    weight = torch.tensor([[1.0, -2.5, 2.5, 3.5, 0.0, 0.0, 0.0, 0.0]])
    codes, scale = quantizer().codes_of(weight)
    assert codes.tolist() == [[1, -1, 1, 1, 0, 0, 0, 0]]
    assert float(scale) == 2.125 and float(quantizer().threshold_of(weight)) == pytest.approx(0.74375)
    assert torch.div(weight, scale[:, None]).round()[0, 0] == 0


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_a_weight_that_is_frozen_has_the_bits_that_were_trained(grid: Grid) -> None:
    """Value, codes and scale; the artifact holds the threshold, so nothing is measured a second time."""
    for seed in range(20):
        weight, ours = weight_like(seed), quantizer(grid)
        frozen = FrozenWeight(ours.scale_of(weight), grid, TERNARY, ours.threshold_of(weight))
        assert torch.equal(frozen(weight), ours(weight))
        for one, other in zip(frozen.codes_of(weight), ours.codes_of(weight), strict=True):
            assert torch.equal(one, other)
        codes, scale = frozen.codes_of(weight)
        decoded = grid.join(grid.divide(codes.float()) * grid.align(scale))
        assert torch.equal(decoded, ours(weight))
        assert set(codes.unique().tolist()) == {-1, 0, 1} and codes.dtype == torch.int8


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_gradient_passes_straight_through_inside_the_clip_and_nowhere_else(grid: Grid) -> None:
    """As autograd has it for w + (w^ - w).detach() with the clip in front: nothing reaches D or a."""
    weight, upstream = weight_like(3), weight_like(4)
    weight[0, :5] = torch.tensor([2.5, -2.5, 2.4999, -2.4999, 0.0])
    ours, composed = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    quantizer(grid)(ours).backward(upstream)
    inside = torch.where(composed.abs() < 2.5, composed, composed.detach())
    (inside + (quantizer(grid)(weight) - inside).detach()).backward(upstream)
    assert torch.equal(ours.grad, composed.grad)
    assert (ours.grad[0, :5] != 0).tolist() == [False, False, True, True, True]
    assert 0.02 < (ours.grad == 0).float().mean() < 0.2


def test_a_gaussian_weight_has_three_values_a_row_and_42_percent_zeros() -> None:
    """P(|z| < 0.7 * sqrt(2 / pi)) = 0.4235 for a normal z far inside the clip."""
    weight = 0.05 * torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    for grid in (Grid(0), Grid(0, None, "tensor")):
        rounded = quantizer(grid)(weight)
        assert all(len(row.unique()) <= 3 for row in rounded)
        assert float((rounded == 0).float().mean()) == pytest.approx(0.4235, abs=0.005)
        assert (quantizer(grid).scale_of(weight) > 0).all()
    assert len(quantizer(Grid(0, None, "tensor"))(weight).unique()) == 3


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_weights_that_are_all_zero_stay_zero_and_have_a_positive_scale(grid: Grid) -> None:
    weight = weight_like().requires_grad_()
    with torch.no_grad():
        weight.select(grid.channel_axis, 3).zero_()
    ours = quantizer(grid)
    rounded = ours(weight)
    rounded.sum().backward()
    assert rounded.isfinite().all() and weight.grad.isfinite().all()
    assert (rounded.select(grid.channel_axis, 3) == 0).all()
    zero = ours.scale_of(torch.zeros(SHAPE))
    assert (zero == TINY).all() and torch.equal(ours(torch.zeros(SHAPE)), torch.zeros(SHAPE))


def test_options_move_the_threshold_and_the_clip() -> None:
    weight = weight_like()
    zeros = [float((quantizer(threshold=t)(weight) == 0).float().mean()) for t in (0.3, 0.7, 0.95)]
    assert zeros == sorted(zeros) and zeros[0] < 0.3 < 0.5 < zeros[2]
    moved = weight.clone().requires_grad_()
    quantizer(clip=0.5)(moved).sum().backward()
    assert torch.equal(moved.grad != 0, weight.abs() < 0.5)
    assert float(quantizer(clip=0.5).scale_of(weight).max()) <= 0.5


def test_nothing_is_learned_and_nothing_is_stored() -> None:
    ours, weight = quantizer(), weight_like()
    before = ours(weight)
    ours.init(5 * weight)
    ours.advance()
    assert torch.equal(ours(weight), before)
    assert not ours.state_dict() and not list(ours.parameters())
