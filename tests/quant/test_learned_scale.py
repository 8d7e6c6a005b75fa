"""One update of a learned scale, held against a scale stored as itself with LSQ's gradient in plain autograd.

The oracle is written from the paper (arXiv:1902.08153, equations 1 to 3 and section 2.2) and shares no code
with the package. `python tests/quant/test_learned_scale.py` prints the movements.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompress.quant.affine import Grid
from qcompress.quant.learned_scale import PARAMETRIZATIONS, LearnedScale
from qcompress.quant.quantizers import LsqActivation, LsqWeight
from qcompress.quant.ranges import Statistics
from qcompress.schema.quantizers import Lsq

SHAPE, BLOCK = torch.Size((16, 32)), 8
BOUNDS = (-8, 7)
PLACES = ("per tensor", "per channel", "per block", "activation")
MAGNITUDES = (0.02, 1.0, 30.0)
UPDATES = 5


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(magnitude: float) -> Tensor:
    """Values of which some are clipped."""
    x = magnitude * random(SHAPE, 0)
    return torch.where(random(SHAPE, 1).abs() > 2.2, 6 * x, x)


def quantizer_of(place: str, x: Tensor, optimizer: str, init: str = "mse") -> LearnedScale:
    options = Lsq(init=init)
    if place == "activation":
        quantizer = LsqActivation(options, BOUNDS, SHAPE[1])
        seen: Tensor | Statistics = Statistics(x.abs().amax(0), x.abs().mean(0), x)
    else:
        grid = {
            "per tensor": Grid(0, granularity="tensor"),
            "per channel": Grid(0),
            "per block": Grid(0, BLOCK),
        }[place]
        quantizer, seen = LsqWeight(options, grid, BOUNDS, SHAPE), x
    quantizer.parametrization = PARAMETRIZATIONS[optimizer]
    quantizer.init(seen)
    return quantizer


def scale_of(quantizer: LearnedScale, x: Tensor) -> Tensor:
    is_weight = isinstance(quantizer, LsqWeight)
    return (quantizer.scale_of(x) if is_weight else quantizer.scale_of()).detach().clone()


def paper(place: str, x: Tensor, scale: Tensor) -> Tensor:
    """LSQ's fake quantization of x [16, 32] by autograd alone; `scale` is the parameter itself."""
    count = {"per tensor": SHAPE.numel(), "per channel": SHAPE[1], "per block": BLOCK, "activation": SHAPE[1]}
    slope = 1 / (count[place] * BOUNDS[1]) ** 0.5
    grouped = x.reshape(SHAPE[0], -1, BLOCK) if place == "per block" else x
    s = scale.unsqueeze(-1) if place in ("per channel", "per block") else scale
    s = s * slope + (s - s * slope).detach()
    quotient = grouped / s
    inside = (quotient > BOUNDS[0]) & (quotient < BOUNDS[1])  # equation 3: a value on a bound is clipped
    v = torch.where(inside, quotient, quotient.clamp(*BOUNDS).detach())
    rounded = v + (v.round() - v).detach()
    return (rounded * s).reshape(SHAPE)


def loss(y: Tensor, target: Tensor) -> Tensor:
    return ((y - target) ** 2).sum()


SGD = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "sgd with momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "sgd with heavy ball": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.5),
}


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SGD)
def test_sgd_moves_a_scale_as_the_paper_does(name: str, place: str, magnitude: float) -> None:
    start, ours, theirs = after_sgd(name, place, magnitude)
    assert float((theirs / start - 1).abs().max()) > 1e-3, "the scale has to move, or nothing is compared"
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def after_sgd(name: str, place: str, magnitude: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scales at the start and after some updates: the package's, and those stored as themselves."""
    x, target = inputs(magnitude), magnitude * random(SHAPE, 2)
    ours = quantizer_of(place, x, "sgd")
    start = scale_of(ours, x)
    theirs = nn.Parameter(start.clone())
    lr = 0.02 * float(start.mean()) / (magnitude * SHAPE.numel() ** 0.5)  # scales move by some percent
    optimizers = SGD[name](ours.parameters(), lr), SGD[name]([theirs], lr)
    for _ in range(UPDATES):
        for optimizer, y in zip(optimizers, (ours(x), paper(place, x, theirs)), strict=True):
            optimizer.zero_grad()
            loss(y, target).backward()
            optimizer.step()
    return start, scale_of(ours, x), theirs.detach()


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("place", PLACES)
def test_adamw_moves_a_scale_by_a_share_of_its_start(place: str, magnitude: float) -> None:
    """As a scale stored as itself would move with the learning rate lr * start, and eps in its units."""
    lr = 1e-2
    start, ours, theirs = after_adamw(place, magnitude, lr)
    assert 0.2 * lr < float((theirs / start - 1).abs().max()) < 1.01 * UPDATES * lr
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def after_adamw(place: str, magnitude: float, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `after_sgd`, with Adam (arXiv:1412.6980, algorithm 1) written out in double precision."""
    x, target = inputs(magnitude), magnitude * random(SHAPE, 2)
    ours = quantizer_of(place, x, "adamw")
    start = scale_of(ours, x)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=lr, weight_decay=0.0)
    theirs = start.double()
    first, second = torch.zeros_like(theirs), torch.zeros_like(theirs)
    for step in range(1, UPDATES + 1):
        optimizer.zero_grad()
        loss(ours(x), target).backward()
        optimizer.step()
        single = theirs.detach().float().requires_grad_()  # the first value on a bound is so in fp32 alone
        (gradient,) = torch.autograd.grad(loss(paper(place, x, single), target), single)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean, spread = first / (1 - 0.9**step), (second / (1 - 0.999**step)).sqrt()
        theirs -= lr * start * mean / (spread + 1e-8 / start)
    return start, scale_of(ours, x), theirs.float()


@pytest.mark.parametrize("optimizer", PARAMETRIZATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_the_parametrization_changes_neither_the_start_nor_the_floor(place: str, optimizer: str) -> None:
    x = inputs(0.1)
    quantizer = quantizer_of(place, x, optimizer)
    start = scale_of(quantizer, x)
    assert torch.equal(start, scale_of(quantizer_of(place, x, "adamw"), x))
    assert not bool(quantizer.movement().any())
    with torch.no_grad():
        quantizer.ratio.fill_(-1.0)
    quantizer.advance()
    torch.testing.assert_close(scale_of(quantizer, x), quantizer.floor * start, rtol=1e-6, atol=0)
    assert float((quantizer.movement() - (1 - quantizer.floor)).abs().max()) < 1e-6


@pytest.mark.parametrize("place", PLACES)
def test_the_default_start_has_a_smaller_error_than_the_start_of_the_paper(place: str) -> None:
    x = inputs(0.3)
    errors = {}
    for init in ("mse", "lsq"):
        quantizer = quantizer_of(place, x, "adamw", init)
        errors[init] = float((quantizer(x).detach() - x).square().sum())
    assert Lsq().init == "mse"
    assert errors["mse"] < 0.9 * errors["lsq"]


def print_movements() -> None:
    """Largest movement of a scale after some updates, here and as the paper has it, and their difference."""
    print(f"{'optimizer':20} {'scales':12} {'magnitude':>9} {'here':>10} {'paper':>10} {'difference':>11}")
    for name in (*SGD, "adamw"):
        for place in PLACES:
            for magnitude in MAGNITUDES:
                parts = (place, magnitude, 1e-2) if name == "adamw" else (name, place, magnitude)
                start, ours, theirs = after_adamw(*parts) if name == "adamw" else after_sgd(*parts)
                moves = [float((scale / start - 1).abs().max()) for scale in (ours, theirs)]
                difference = float((ours / theirs - 1).abs().max())
                row = f"{name:20} {place:12} {magnitude:9g} {moves[0]:10.4%} {moves[1]:10.4%}"
                print(f"{row} {difference:11.1e}")


if __name__ == "__main__":
    print_movements()
