"""Quant-Noise: what is drawn, what it becomes, whom the gradient reaches (arXiv:2004.07320, section 4)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompress.quant.affine import Grid, fake_quantize
from qcompress.quant.layers import QuantizedEmbedding, QuantizedLinear
from qcompress.quant.noise import QuantNoise, random_mask
from qcompress.quant.quantizers import LsqWeight, MinMaxWeight
from qcompress.schema.quantizers import Lsq, MinMax, Noise

OUT, IN = 24, 16
BOUNDS = (-8, 7)


def layer(noise: Noise | None, axis: int = 0, block: int = 1, kind: str = "minmax") -> QuantizedLinear:
    torch.manual_seed(0)
    shape = (OUT, IN) if axis == 0 else (IN, OUT)
    weight = nn.Parameter(torch.randn(shape))
    grid = Grid(axis)
    quantizer = {
        "minmax": lambda: MinMaxWeight(MinMax(), grid, BOUNDS, weight.shape),
        "lsq": lambda: LsqWeight(Lsq(), grid, BOUNDS, weight.shape),
    }[kind]()
    quantizer.init(weight.detach())
    made = QuantizedLinear(weight, nn.Parameter(torch.randn(OUT)), axis, quantizer, None)
    made.noise = noise and QuantNoise(noise, noise.block or block, axis)
    return made.train()


def inputs() -> Tensor:
    return torch.randn(7, IN, generator=torch.Generator().manual_seed(3))


def gradient(made: QuantizedLinear, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of a fixed loss with respect to the weight."""
    made.zero_grad()
    torch.manual_seed(seed)
    y = made(inputs())
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), made.weight.grad.clone()


@pytest.mark.parametrize("axis", [0, 1])
def test_without_noise_a_training_pass_is_the_float_layer_to_the_bit(axis: int) -> None:
    made = layer(Noise(p=0), axis)
    stock = nn.functional.linear(inputs(), made.weight if axis == 0 else made.weight.t()) + made.bias
    y, found = gradient(made)
    assert torch.equal(y, torch.matmul(inputs(), made.weight.t() if axis == 0 else made.weight) + made.bias)
    torch.testing.assert_close(y, stock)
    upstream = torch.linspace(-1, 1, y.numel()).view_as(y)
    expected = upstream.t() @ inputs()
    torch.testing.assert_close(found, expected if axis == 0 else expected.t())


@pytest.mark.parametrize("p", [0, 0.3, 1])
@pytest.mark.parametrize("form", ["round", "zero"])
def test_evaluation_rounds_everything_whatever_p_is(p: float, form: str) -> None:
    if (form, p) == ("zero", 1):
        return  # refused by the options
    noisy, plain = layer(Noise(p=p, form=form)).eval(), layer(None).eval()
    assert torch.equal(noisy(inputs()), plain(inputs()))
    with torch.no_grad():
        assert torch.equal(noisy(inputs()), plain(inputs()))


@pytest.mark.parametrize("kind", ["minmax", "lsq"])
def test_with_p_1_output_and_gradients_are_those_of_quantization_aware_training(kind: str) -> None:
    noisy, plain = layer(Noise(p=1), kind=kind), layer(None, kind=kind)
    (y, found), (expected, reference) = gradient(noisy), gradient(plain)
    assert torch.equal(y, expected) and torch.equal(found, reference)
    if kind == "lsq":
        assert torch.equal(noisy.weight_quantizer.ratio.grad, plain.weight_quantizer.ratio.grad)


def test_what_is_not_drawn_gets_the_float_gradient_and_what_is_drawn_the_quantizers() -> None:
    made = layer(Noise(p=0.4), kind="lsq")
    made.weight.data *= 3  # some of it is clipped, where LSQ's gradient is 0
    torch.manual_seed(5)
    drawn = made.noise.draw(made.weight)
    assert 0.2 < drawn.float().mean() < 0.6
    y, found = gradient(made)
    upstream = torch.linspace(-1, 1, y.numel()).view_as(y)
    exact = upstream.t() @ inputs()
    torch.testing.assert_close(found[~drawn], exact[~drawn])
    scale = made.weight_quantizer.scale_of(made.weight)[:, None]
    inside = (made.weight / scale > BOUNDS[0]) & (made.weight / scale < BOUNDS[1])
    assert (drawn & ~inside).sum() > 5
    torch.testing.assert_close(found[drawn & inside], exact[drawn & inside])
    assert not found[drawn & ~inside].any()
    rounded = fake_quantize(made.weight, scale, BOUNDS)
    torch.testing.assert_close(y, inputs() @ torch.where(drawn, rounded, made.weight).t() + made.bias)


@pytest.mark.parametrize(("axis", "block"), [(0, 1), (0, 4), (1, 4), (0, 16)])
@pytest.mark.parametrize("p", [0.05, 0.2, 0.5])
def test_the_share_that_is_drawn_is_p_and_a_block_is_drawn_whole(axis: int, block: int, p: float) -> None:
    noise = QuantNoise(Noise(p=p), block, axis)
    weight = torch.zeros((OUT, IN) if axis == 0 else (IN, OUT))
    torch.manual_seed(1)
    masks = torch.stack([noise.draw(weight) for _ in range(2000)])
    by_block = masks if axis == 0 else masks.transpose(1, 2)
    by_block = by_block.unflatten(2, (-1, block))
    assert torch.equal(by_block.all(3), by_block.any(3))
    count = by_block[..., 0].numel()
    share = by_block[..., 0].double().mean().item()
    assert abs(share - p) <= 3 * (p * (1 - p) / count) ** 0.5
    assert len({tuple(mask.flatten().tolist()) for mask in masks[:20]}) > 10
    each = by_block[..., 0].double().mean(0)  # no place is preferred
    assert (each - p).abs().max() < 5 * (p * (1 - p) / 2000) ** 0.5


def test_a_pass_that_is_repeated_with_the_same_seed_draws_the_same_mask() -> None:
    made = layer(Noise(p=0.5))
    outputs = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        outputs.append(made(inputs()))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_dropped_blocks_leave_the_expected_weight_as_it_is_and_the_parameter_untouched() -> None:
    made = layer(Noise(p=0.25, form="zero"), block=4)
    before = made.weight.detach().clone()
    torch.manual_seed(0)
    with torch.enable_grad():
        total = sum(made.quantized_weight().detach().double() for _ in range(4000))
    assert torch.equal(made.weight.detach(), before)
    spread = before.abs() * (0.25 / 0.75 / 4000) ** 0.5
    assert ((total / 4000 - before).abs() <= 5 * spread + 1e-6).all()
    values = made.quantized_weight().detach()
    kept = values != 0
    torch.testing.assert_close(values[kept], before[kept] / 0.75)
    assert torch.equal(kept.unflatten(1, (-1, 4)).all(2), kept.unflatten(1, (-1, 4)).any(2))


def test_fifty_passes_do_not_wear_the_weight_away() -> None:
    """The published hook writes the masked weight back: 99 % of it is 0 by then."""
    made = layer(Noise(p=0.1, form="zero"), block=4)
    before = made.weight.detach().clone()
    for _ in range(50):
        made(inputs()).sum().backward()
    assert torch.equal(made.weight.detach(), before)


def test_rows_of_a_table_are_drawn_as_the_table_is() -> None:
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(40, 8))
    quantizer = MinMaxWeight(MinMax(), Grid(0), BOUNDS, table.shape)
    quantizer.init(table.detach())
    made = QuantizedEmbedding(table, quantizer).train()
    made.noise = QuantNoise(Noise(p=0.5), 4, 0)
    ids = torch.tensor([[3, 7, 3, 11]])
    torch.manual_seed(2)
    found = made(ids)
    rounded = fake_quantize(table, quantizer.scale_of(table)[:, None], BOUNDS)
    is_rounded = (found == rounded[ids]).unflatten(-1, (-1, 4)).all(-1)
    is_float = (found == table[ids]).unflatten(-1, (-1, 4)).all(-1)
    assert (is_rounded ^ is_float).all() and is_rounded.any() and is_float.any()
    assert torch.equal(found[0, 0], found[0, 2])  # one row, one mask


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_four_bits_are_sixteen_levels_of_the_range_of_four_bits(granularity: str) -> None:
    """The published code measures the range of eight bits and clamps to four: an error of 385 %."""
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    quantizer = MinMaxWeight(MinMax(), Grid(0, granularity=granularity), BOUNDS, weight.shape)
    quantizer.init(weight)
    rounded = QuantNoise(Noise(p=1), 1, 0)(weight, lambda: quantizer(weight))
    error = (rounded - weight).norm() / weight.norm()
    assert error < 0.25
    codes = rounded / quantizer.grid.align(quantizer.scale_of(weight))
    assert len(codes.round().unique()) <= 16


def test_masks_of_no_and_of_full_share_are_exact() -> None:
    for p, expected in ((0.0, False), (1.0, True)):
        drawn = random_mask((1000, 70), p, torch.device("cpu"))
        assert drawn.shape == (1000, 70) and bool((drawn == expected).all())


def test_ranges_by_least_squares_are_chosen_again_every_so_many_updates() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    quantizer = MinMaxWeight(MinMax(range="mse", renew=2), Grid(0), BOUNDS, weight.shape)
    quantizer.init(weight)
    first = quantizer.ratio.clone()
    heavy = weight.clone()
    heavy[:, 0] = 12.0  # an outlier, which least squares clips
    ratios = []
    for _ in range(5):
        quantizer.refresh(lambda: heavy)
        quantizer.refresh(lambda: weight)  # a second pass of the same update, at another point
        ratios.append(quantizer.ratio.clone())
        quantizer.advance()
    fresh = MinMaxWeight(MinMax(range="mse"), Grid(0), BOUNDS, weight.shape)
    fresh.init(heavy)
    assert [torch.equal(ratio, first) for ratio in ratios] == [True, True, False, False, False]
    assert torch.equal(ratios[2], fresh.ratio) and not torch.equal(fresh.ratio, first)
    frozen = MinMaxWeight(MinMax(range="mse"), Grid(0), BOUNDS, weight.shape)
    assert set(frozen.state_dict()) == {"ratio"}
