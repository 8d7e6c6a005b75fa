"""Upper estimate of how far a recipe's learning rates can move learned scales, for `check`. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from qcompress.schema.axes import PHASES
from qcompress.schema.method_options import Squat
from qcompress.schema.rates import peak_rates, rate_factor
from qcompress.schema.recipe import Recipe

SMALL_REACH = 0.3
"""Relative movement below which `check` prints the estimate."""


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
        """Sentence for users."""
        return (
            f"learned scales can move by about {100 * self.share:.2g} % at most: {self.updates} AdamW "
            f"updates with learning rates up to {self.rate:g}; raise train.lr.scale or the steps where the "
            "starting scales are far from the best ones"
        )


def scale_reach(recipe: Recipe) -> ScaleReach | None:
    """Estimate the movement of scales under AdamW, whose update is at most about the learning rate.

    None if no scale is learned, and under SGD, whose update is the rate times an unknown gradient.
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
        moving = _moving_steps(recipe, steps)
        peak = peak_rates(recipe.train, name)["scale"]
        share += peak * sum(rate_factor(recipe.train, step, steps) for step in moving)
        updates += len(moving)
        rate = max(rate, peak if moving else 0.0)
    return ScaleReach(share, updates, rate) if updates else None


def _moving_steps(recipe: Recipe, steps: int) -> range:
    """Updates of a phase that move scales: with SQuAT's alternation by iteration, every second one."""
    stepper = recipe.stepper
    turns = isinstance(stepper, Squat) and stepper.alternate == "iteration"
    return range(1, steps, 2) if turns else range(steps)
