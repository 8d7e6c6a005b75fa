"""A forward pass writes to no parameter and to no buffer, in training mode and in evaluation mode.

Observers are hooks of the calibration and not quantizers: they collect statistics outside of the model.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qcompress.quant.affine import Grid
from qcompress.quant.codebook import CodebookWeight, FrozenCodebook
from qcompress.quant.dynamic import DynamicActivation
from qcompress.quant.layers import QuantizedEmbedding, QuantizedLinear, refresh
from qcompress.quant.noise import QuantNoise
from qcompress.quant.quantizers import (
    ACTIVATION_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    FrozenActivation,
    FrozenWeight,
    LsqActivation,
    LsqWeight,
    MinMaxActivation,
    MinMaxWeight,
)
from qcompress.quant.ranges import Statistics
from qcompress.quant.ternary import TernaryWeight
from qcompress.schema.formats import CodebookFormat
from qcompress.schema.quantizers import Codebook, Dynamic, Lsq, MinMax, Noise, Ternary

OUT, IN, BLOCK, CENTROIDS = 24, 32, 8, 6
SHAPE, GRID, CODES = torch.Size((OUT, IN)), Grid(0), (-8, 7)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def book(estimates: bool) -> CodebookWeight:
    form = CodebookFormat(block=BLOCK, centroids=CENTROIDS)
    return CodebookWeight(Codebook(renew=2), form, 0, SHAPE, estimates)


WEIGHTS: dict[str, Callable[[], nn.Module]] = {
    "minmax": lambda: MinMaxWeight(MinMax(), GRID, CODES, SHAPE),
    "minmax, renewed": lambda: MinMaxWeight(MinMax(range="mse", renew=2), GRID, CODES, SHAPE),
    "lsq": lambda: LsqWeight(Lsq(), GRID, CODES, SHAPE),
    "ternary": lambda: TernaryWeight(Ternary(), GRID, (-1, 1), SHAPE),
    "codebook": lambda: book(estimates=False),
    "codebook, estimated": lambda: book(estimates=True),
    "frozen": lambda: FrozenWeight(torch.full((OUT,), 0.1), GRID, CODES),
    "frozen codebook": lambda: FrozenCodebook(
        torch.zeros(OUT, IN // BLOCK, dtype=torch.uint8), draw(CENTROIDS, BLOCK), None, 0
    ),
}

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "minmax": lambda: MinMaxActivation(MinMax(), CODES, IN),
    "lsq": lambda: LsqActivation(Lsq(), CODES, IN),
    "dynamic": lambda: DynamicActivation(Dynamic(), CODES, IN),
    "frozen": lambda: FrozenActivation(torch.tensor(0.1), CODES),
}


DUE = {
    "minmax, renewed": ("ratio", "renewed"),
    "codebook, estimated": ("centroids", "assignments", "estimated"),
}
"""Buffers that `refresh` renews."""


def test_every_quantizer_is_there() -> None:
    made = {type(make()) for make in (*WEIGHTS.values(), *ACTIVATIONS.values())}
    assert made >= {*WEIGHT_QUANTIZERS.values(), *ACTIVATION_QUANTIZERS.values(), CodebookWeight}


def assert_two_passes_write_nothing(model: nn.Module, x: Tensor) -> None:
    """Two passes in each mode; the first ones have gradients."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for training in (True, False):
        model.train(training)
        for number in range(2):
            with torch.set_grad_enabled(number == 0):
                model(x)
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, before[name]), f"{name}, training {training}, pass {number + 1}"


@pytest.mark.parametrize("noisy", [False, True], ids=["calm", "noisy"])
@pytest.mark.parametrize("table", [False, True], ids=["linear", "embedding"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_weight_quantizer_writes_in_refresh_and_advance_alone(kind: str, table: bool, noisy: bool) -> None:
    """Its ranges and codebooks are due again when the passes begin."""
    quantizer, weight = WEIGHTS[kind](), nn.Parameter(draw(*SHAPE))
    layer = (
        QuantizedEmbedding(weight, quantizer) if table else QuantizedLinear(weight, None, 0, quantizer, None)
    )
    layer.noise = QuantNoise(Noise(p=0.5), BLOCK, 0) if noisy else None
    if not kind.startswith(("codebook", "frozen")):
        quantizer.init(weight.detach())
    refresh([layer])
    for _ in range(3):
        getattr(quantizer, "advance", lambda: None)()
    with torch.no_grad():
        weight[:, 0] *= 5
    x = torch.tensor([[3, 3, 11], [0, 7, 3]]) if table else draw(4, IN, seed=1)
    assert_two_passes_write_nothing(layer, x)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.train()
    refresh([layer])
    changed = {name for name, tensor in layer.state_dict().items() if not torch.equal(tensor, before[name])}
    due = {
        "minmax, renewed": {"ratio", "renewed"},
        "codebook, estimated": {"centroids", "assignments", "estimated"},
    }
    assert changed == {f"weight_quantizer.{name}" for name in due.get(kind, ())}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_activation_quantizer_writes_nothing(kind: str) -> None:
    quantizer = ACTIVATIONS[kind]()
    rows = draw(50, IN)
    if kind != "frozen":
        quantizer.init(Statistics(rows.abs().amax(0), rows.abs().mean(0), rows))
    assert_two_passes_write_nothing(quantizer, draw(4, IN, seed=1))
