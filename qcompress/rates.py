"""Learning rates of a recipe: the rate of every update, and how far a learned scale can move. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qcompress.axes import PHASES
from qcompress.schema import LEARNING_RATES, Recipe, Train

SMALL_REACH = 0.3
"""Relative movement below which `check` tells how far scales can move."""


@dataclass(frozen=True)
class ScaleReach:
    """Upper estimate of the movement of a learned scale.

    Attributes:
        share: largest relative change of a scale over the whole training.
        updates: updates that move a scale.
        rate: largest learning rate of the role `scale`.
    """

    share: float
    updates: int
    rate: float

    def note(self) -> str:
        """A line for a person."""
        return (
            f"learned scales can move by about {100 * self.share:.2g} % at most: {self.updates} AdamW "
            f"updates with learning rates up to {self.rate:g}; raise train.lr.scale or the steps where the "
            "starting scales are far from the best ones"
        )


def peak_rates(train: Train, phase: str) -> dict[str, float]:
    """Learning rate of each role at the peak of a phase's schedule."""
    options = train.phases.get(phase)
    return {**LEARNING_RATES, **train.lr, **(options.lr if options else {})}


def rate_factor(train: Train, step: int, steps: int) -> float:
    """Share of the peak rate at update `step` (from 0): linear warm-up, then the recipe's decay."""
    warmup = round(train.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    left = 1 - (step - warmup) / max(steps - warmup, 1)
    return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[train.decay]


def scale_reach(recipe: Recipe) -> ScaleReach | None:
    """How far the learning rates let a scale move under AdamW, whose update is about the rate at most.

    None where no scale is learned, and under SGD, whose update is the rate times an unknown gradient.
    """
    quantizers = recipe.quantizer
    names = {quantizers.weights.name, quantizers.activations.name, quantizers.embeddings.name}
    if recipe.trains_float or recipe.train.optimizer != "adamw" or "lsq" not in names:
        return None
    share, updates, rate = 0.0, 0, 0.0
    for name, defaults in PHASES[recipe.schedule.name].items():
        if "scale" not in defaults.roles:
            continue
        steps = recipe.train.phases[name].steps if name in recipe.train.phases else defaults.steps
        peak = peak_rates(recipe.train, name)["scale"]
        share += peak * sum(rate_factor(recipe.train, step, steps) for step in range(steps))
        updates += steps
        rate = max(rate, peak if steps else 0.0)
    return ScaleReach(share, updates, rate) if updates else None
