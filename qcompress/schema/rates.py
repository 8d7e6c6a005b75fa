"""Learning rates of a recipe: the peak of each role, and the schedule over the updates. No torch."""

from __future__ import annotations

import math

from qcompress.schema.recipe import LEARNING_RATES, Train


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
