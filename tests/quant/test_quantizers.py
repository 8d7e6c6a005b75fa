"""The two quantizers while they train: what moves, what stays positive, what a checkpoint needs."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from qcompress.quant.affine import Grid, fake_quantize
from qcompress.quant.quantizers import (
    ACTIVATION_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    FrozenActivation,
    FrozenWeight,
)
from qcompress.quant.ranges import Statistics
from qcompress.quant.rescaling import ChannelScale
from qcompress.schema.axes import AXES
from qcompress.schema.quantizers import Lsq, MinMax, Quantizers

OPTIONS = {"minmax": MinMax, "lsq": Lsq}
INT8, INT4 = (-128, 127), (-8, 7)
GRIDS = [Grid(axis, block) for axis, block in itertools.product((0, 1), (None, 32))]
GRIDS.append(Grid(1, None, "tensor"))
SHAPE = torch.Size((64, 96))


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_quantizer(
    name: str, grid: Grid = GRIDS[0], bounds: tuple[int, int] = INT4, **options
) -> nn.Module:
    return WEIGHT_QUANTIZERS[name](OPTIONS[name](**options), grid, bounds, SHAPE)


def statistics(x: Tensor) -> Statistics:
    return Statistics(largest=x.abs().amax(0), mean=x.abs().mean(0), rows=x)


def activation_quantizer(name: str, channels: int = 16, **options) -> nn.Module:
    return ACTIVATION_QUANTIZERS[name](OPTIONS[name](**options), INT8, channels)


def test_every_quantizer_of_the_axis_has_a_class_for_each_role_that_a_recipe_may_give_it() -> None:
    names = {options.model_fields["name"].default for options in AXES["quantizer"]}
    names.remove("codebook")  # chosen by a weight's format, whatever serves the integers beside it
    assert names == set(WEIGHT_QUANTIZERS) | set(ACTIVATION_QUANTIZERS)
    for role, table in (("weights", WEIGHT_QUANTIZERS), ("activations", ACTIVATION_QUANTIZERS)):
        refused = 0
        for name in names:
            try:
                Quantizers.model_validate({role: name})
            except ValidationError:
                refused += 1
                assert name not in table
            else:
                assert name in table
        assert refused == len(names) - len(table) >= 1
    assert set(WEIGHT_QUANTIZERS) & set(ACTIVATION_QUANTIZERS) == set(OPTIONS)


# Weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["absmax", "percentile", "mse"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_minmax_follows_a_weight_that_moves(grid: Grid, how: str) -> None:
    """What `init` chooses is a ratio to max|w|: three times the weight has three times the scale."""
    quantizer = weight_quantizer("minmax", grid, range=how, percentile=98.0)
    weight = random(SHAPE)
    quantizer.init(weight)
    before = quantizer.scale_of(weight)
    torch.testing.assert_close(quantizer.scale_of(3 * weight), 3 * before, rtol=1e-6, atol=0)
    torch.testing.assert_close(quantizer(3 * weight), 3 * quantizer(weight), rtol=1e-6, atol=1e-6)
    if how == "absmax":
        torch.testing.assert_close(before, grid.largest(weight) / 7, rtol=0, atol=0)


def test_minmax_passes_the_gradient_of_its_scale_on_to_the_weight() -> None:
    """With range absmax nothing is clipped but the largest weight itself, which carries the scale."""
    quantizer = weight_quantizer("minmax", Grid(0))
    weight = random(SHAPE).requires_grad_()
    quantizer.init(weight.detach())
    quantizer(weight).sum().backward()
    peak = weight.detach().abs().argmax(1)
    others = torch.ones(SHAPE).scatter(1, peak[:, None], 0).bool()
    assert torch.equal(weight.grad[others], torch.ones(int(others.sum())))
    assert (weight.grad[~others] != 1).float().mean() > 0.9


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_lsq_keeps_its_scale_when_the_weight_moves(grid: Grid) -> None:
    quantizer = weight_quantizer("lsq", grid)
    weight = random(SHAPE)
    quantizer.init(weight)
    scale = quantizer.scale_of(weight).detach()
    assert torch.equal(quantizer.scale_of(3 * weight).detach(), scale)
    aligned = grid.align(scale)
    expected = grid.join(fake_quantize(grid.divide(3 * weight), aligned, INT4))
    assert torch.equal(quantizer(3 * weight).detach(), expected)


@pytest.mark.parametrize(("bounds", "grid"), [(INT4, Grid(1, 32)), (INT8, Grid(0))], ids=str)
def test_the_gradient_of_a_learned_weight_scale_has_the_slope_of_the_paper(
    bounds: tuple[int, int], grid: Grid
) -> None:
    """LSQ section 2.2: 1 / sqrt(weights that share the scale * qmax); the ratio gets start times that."""
    quantizer = weight_quantizer("lsq", grid, bounds)
    weight, upstream = random(SHAPE), random(SHAPE, 1)
    quantizer.init(weight)
    quantizer(weight).backward(upstream)
    shared = SHAPE.numel() // quantizer.scale_of(weight).numel()
    scale = quantizer.scale_of(weight).detach().requires_grad_()
    plain = grid.join(fake_quantize(grid.divide(weight), grid.align(scale), bounds))
    plain.backward(upstream)
    expected = scale.grad * scale.detach() / (shared * bounds[1]) ** 0.5
    torch.testing.assert_close(quantizer.ratio.grad, expected, rtol=1e-5, atol=1e-7)


def test_lsq_with_one_scale_for_16_weights_worked_by_hand() -> None:
    """Codes -2 to 1. mean|w| is 1/2, so the scale starts at 2 * 1/2 / sqrt(1) = 1, and the slope is 1/4.

    -10.25 = 2 * (0 - 0.25) + 3 * (-1 + 0.75), of what is rounded, + 5 * 1 + 7 * -2, of what is clipped.
    """
    first = [0.25, -0.75, 1.5, -2.5]
    weight = torch.tensor([first, [0.25] * 4, [-0.25] * 4, [0.25] * 4]).requires_grad_()
    quantizer = WEIGHT_QUANTIZERS["lsq"](Lsq(init="lsq"), Grid(1, None, "tensor"), (-2, 1), weight.shape)
    quantizer.init(weight.detach())
    assert quantizer.scale_of(weight).item() == 1.0
    rounded = quantizer(weight)
    assert rounded.tolist() == [[0.0, -1.0, 1.0, -2.0], [0.0] * 4, [0.0] * 4, [0.0] * 4]
    (rounded[0] * torch.tensor([2.0, 3.0, 5.0, 7.0])).sum().backward()
    assert weight.grad.tolist() == [[2.0, 3.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4, [0.0] * 4]
    assert quantizer.ratio.grad.item() == -10.25 / 4


@pytest.mark.parametrize("lr", [0.1, 3.0])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_learned_scale_stays_positive_however_large_the_learning_rate(grid: Grid, lr: float) -> None:
    quantizer = weight_quantizer("lsq", grid, floor=0.01)
    weight, target = random(SHAPE), random(SHAPE, 1)
    quantizer.init(weight)
    start = quantizer.scale_of(weight).detach().clone()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=lr)
    lowest = torch.inf
    for _ in range(50):
        (quantizer(weight) - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        lowest = min(lowest, float(quantizer.ratio.detach().min()))
        quantizer.advance()
        scale = quantizer.scale_of(weight).detach()
        assert (scale > 0).all() and (scale >= 0.01 * start * (1 - 1e-6)).all() and scale.isfinite().all()
    if lr == 3.0:
        assert lowest < 0  # without the projection it would have failed


def test_advance_projects_to_the_floor_and_changes_nothing_above_it() -> None:
    quantizer = weight_quantizer("lsq", floor=0.25)
    with torch.no_grad():
        quantizer.ratio.copy_(torch.linspace(-1, 2, quantizer.ratio.numel()).view_as(quantizer.ratio))
    before = quantizer.ratio.detach().clone()
    quantizer.advance()
    assert torch.equal(quantizer.ratio.detach(), torch.where(before < 0.25, torch.tensor(0.25), before))
    assert (before < 0.25).any() and (before > 0.25).any()


# Activations -----------------------------------------------------------------------------------------


def rescaling(channels: int = 16, seed: int = 9) -> ChannelScale:
    scale = ChannelScale(channels, bound=100.0)
    with torch.no_grad():
        scale.theta.copy_(0.7 * random((channels,), seed))
    return scale


@pytest.mark.parametrize("how", ["absmax", "percentile", "mse"])
@pytest.mark.parametrize("name", OPTIONS)
def test_init_sees_the_rescaled_activation(name: str, how: str) -> None:
    """The same as a quantizer without rescaling that was shown x * a."""
    x, scale = random((300, 16)), rescaling()
    key = "range" if name == "minmax" else "init"
    ours, plain = (activation_quantizer(name, **{key: how, "percentile": 98.0}) for _ in range(2))
    ours.rescale = scale
    ours.init(statistics(x))
    plain.init(statistics(x * scale().detach()))
    torch.testing.assert_close(ours.scale_of().detach(), plain.scale_of().detach(), rtol=1e-5, atol=0)


def test_a_minmax_activation_follows_its_rescaling_and_a_learned_one_does_not() -> None:
    x, scale = random((300, 16)), rescaling()
    found = {}
    for name in OPTIONS:
        quantizer = activation_quantizer(name)
        quantizer.rescale = scale
        quantizer.init(statistics(x))
        before = quantizer.scale_of().detach().clone()
        with torch.no_grad():
            scale.theta.add_(torch.log(torch.tensor(2.0)))
        found[name] = float(quantizer.scale_of().detach() / before)
        with torch.no_grad():
            scale.theta.sub_(torch.log(torch.tensor(2.0)))
    assert found == {"minmax": pytest.approx(2.0, rel=1e-6), "lsq": 1.0}


def test_a_minmax_activation_passes_a_gradient_to_the_rescaling_of_its_largest_channel() -> None:
    quantizer, scale = activation_quantizer("minmax"), rescaling()
    quantizer.rescale = scale
    x = random((300, 16))
    quantizer.init(statistics(x))
    quantizer(x * scale().detach()).square().sum().backward()
    largest = int((x.abs().amax(0) * scale().detach()).argmax())
    assert scale.theta.grad.nonzero().flatten().tolist() == [largest]


def test_the_slope_of_a_learned_activation_counts_features() -> None:
    """LSQ section 2.2: 1 / sqrt(features * qmax), not the count of tokens."""
    quantizer = activation_quantizer("lsq", channels=16)
    x, upstream = random((50, 16)), random((50, 16), 1)
    quantizer.init(statistics(x))
    quantizer(x).backward(upstream)
    scale = quantizer.scale_of().detach().requires_grad_()
    fake_quantize(x, scale, INT8).backward(upstream)
    expected = scale.grad * scale.detach() / (16 * 127) ** 0.5
    torch.testing.assert_close(quantizer.ratio.grad, expected, rtol=1e-5, atol=1e-7)


# Checkpoints and the end of training -----------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_a_state_dict_is_all_that_a_quantizer_is(name: str) -> None:
    """A resumed run loads it into a new quantizer that was never initialised."""
    weight, x = random(SHAPE), random((100, 16))
    key = "range" if name == "minmax" else "init"
    trained = weight_quantizer(name, Grid(1, 32), **{key: "mse"})
    trained.init(weight)
    seen = activation_quantizer(name, **{key: "mse"})
    seen.init(statistics(x))
    if name == "lsq":
        with torch.no_grad():
            trained.ratio.mul_(torch.rand_like(trained.ratio) + 0.5)
            seen.ratio.mul_(1.7)
    fresh = weight_quantizer(name, Grid(1, 32), **{key: "mse"})
    assert not torch.equal(fresh(weight), trained(weight))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(weight), trained(weight))
    fresh_seen = activation_quantizer(name, **{key: "mse"})
    fresh_seen.load_state_dict(seen.state_dict())
    assert torch.equal(fresh_seen(x), seen(x))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_frozen_quantizer_rounds_as_the_one_it_came_from(name: str) -> None:
    weight, x = random(SHAPE), random((100, 16))
    for grid in GRIDS:
        trained = weight_quantizer(name, grid)
        trained.init(weight)
        frozen = FrozenWeight(trained.scale_of(weight).detach(), grid, INT4)
        assert torch.equal(frozen(weight), trained(weight))
        assert not list(frozen.parameters())
    seen = activation_quantizer(name)
    seen.init(statistics(x))
    assert torch.equal(FrozenActivation(seen.scale_of().detach(), INT8)(x), seen(x))
