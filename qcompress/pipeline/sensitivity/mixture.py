"""Mixed-precision choice: a format for each layer with the least cost within a byte budget, or the fewest
bytes within a cost.

One choice for each layer, with a cost and bytes: the multiple-choice knapsack problem. Costs are assumed to
add up (`study.py` measures the resulting mixture); the choice itself is exact, by integer programming with
HiGHS (`scipy.optimize.milp`). No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qcompress.errors import UsageError
from qcompress.pipeline.sensitivity.candidates import Form

BYTES = ("bytes", "try a smaller format")
DIVERGENCE = ("of divergence", "try a format with more bits")
"""Unit of a budget, and an alternative to raising it."""


@dataclass(frozen=True)
class Choice:
    """One format of one layer."""

    cost: float
    bytes: int
    form: Form = None


def affordable(least: float, budget: float, word: str, fix: str) -> None:
    """Raise UsageError if even the least possible cost exceeds the budget."""
    if least > budget:
        raise UsageError(
            f"the least that these formats make possible is {least:.10g} {word}, the budget {budget:.10g}",
            fix=f"raise the budget, or {fix}",
        )


def choose(
    layers: Mapping[str, Mapping[str, Choice]],
    *,
    max_bytes: int | None = None,
    max_cost: float | None = None,
) -> dict[str, str]:
    """Choose the format of each layer: the least total cost within `max_bytes`, or the fewest bytes within
    `max_cost`; equal solutions are decided by the other quantity. Raises UsageError if no choice fits.

    >>> layers = {"a": {"int8": Choice(1.0, 8), "int4": Choice(3.0, 4)},
    ...           "b": {"int8": Choice(1.0, 8), "int4": Choice(9.0, 4)}}
    >>> choose(layers, max_bytes=12), choose(layers, max_cost=10.5)
    ({'a': 'int4', 'b': 'int8'}, {'a': 'int4', 'b': 'int8'})
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # a slow import

    if (max_bytes is None) == (max_cost is None):
        raise UsageError("a mixture has one budget", fix="name the bytes or the cost that it may have")
    names = [(layer, form) for layer, forms in layers.items() for form in forms]
    costs = np.array([layers[layer][form].cost for layer, form in names])
    sizes = np.array([layers[layer][form].bytes for layer, form in names], float)
    one_each = np.array([[float(layer == owner) for owner, _ in names] for layer in layers])
    wanted, spent, budget = (costs, sizes, max_bytes) if max_bytes is not None else (sizes, costs, max_cost)
    least = sum(spent[of_layer > 0].min() for of_layer in one_each)
    bound = BYTES if max_bytes is not None else DIVERGENCE
    affordable(least, budget, *bound)
    most = [float(np.abs(values).max()) or 1.0 for values in (wanted, spent)]
    # in units of their common divisor bytes are small integers, for which the solver's tolerance is exact
    unit = float(np.gcd.reduce(sizes.astype(int)) or 1) if max_bytes is not None else most[1]
    solution = milp(
        # a millionth of the spent quantity decides between equal solutions
        wanted / most[0] + 1e-6 * spent / most[1],
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(spent[None] / unit, -np.inf, budget / unit),
        ],
        bounds=Bounds(0, 1),
        integrality=np.ones(len(names)),
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        raise UsageError(f"the solver found no mixture: {solution.message}")
    return {layer: form for (layer, form), taken in zip(names, solution.x, strict=True) if taken > 0.5}
