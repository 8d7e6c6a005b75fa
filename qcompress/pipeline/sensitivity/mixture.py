"""Which format each layer gets: the least cost within a budget of bytes, or the fewest bytes within a cost.

A choice for each layer, its cost and its bytes: the multiple-choice knapsack problem. Costs are taken to add
up, which is a model (`study.py` measures the mixture that comes out); the choice itself is exact, by integer
programming with HiGHS (`scipy.optimize.milp`). No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qcompress.errors import UsageError
from qcompress.pipeline.sensitivity.candidates import Form

BYTES = ("bytes", "try a smaller format")
DIVERGENCE = ("of divergence", "try a format with more bits")
"""What a budget is of, and what helps beside raising it."""


@dataclass(frozen=True)
class Choice:
    """One format of one layer."""

    cost: float
    bytes: int
    form: Form = None


def affordable(least: float, budget: float, word: str, fix: str) -> None:
    """Raises UsageError where the least there is costs more than the budget."""
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
    """The format of each layer: the least total cost at no more than `max_bytes`, or the fewest bytes at no
    more than `max_cost`; of equals, the smaller or the cheaper one. Raises UsageError where nothing fits.

    >>> layers = {"a": {"int8": Choice(1.0, 8), "int4": Choice(3.0, 4)},
    ...           "b": {"int8": Choice(1.0, 8), "int4": Choice(9.0, 4)}}
    >>> choose(layers, max_bytes=12), choose(layers, max_cost=10.5)
    ({'a': 'int4', 'b': 'int8'}, {'a': 'int4', 'b': 'int8'})
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # scipy takes most of a second

    if (max_bytes is None) == (max_cost is None):
        raise UsageError("a mixture has one budget", fix="name the bytes or the cost that it may have")
    names = [(layer, form) for layer, forms in layers.items() for form in forms]
    costs = np.array([layers[layer][form].cost for layer, form in names])
    sizes = np.array([layers[layer][form].bytes for layer, form in names], float)
    one_each = np.array([[float(layer == owner) for owner, _ in names] for layer in layers])
    wanted, spent, budget = (costs, sizes, max_bytes) if max_bytes is not None else (sizes, costs, max_cost)
    least = sum(spent[one > 0].min() for one in one_each)
    bound = BYTES if max_bytes is not None else DIVERGENCE
    affordable(least, budget, *bound)
    most = [float(np.abs(values).max()) or 1.0 for values in (wanted, spent)]
    # bytes are small integers in units of their common divisor: within a budget then means within it exactly
    unit = float(np.gcd.reduce(sizes.astype(int)) or 1) if max_bytes is not None else most[1]
    found = milp(
        # a millionth of what is spent decides between equals
        wanted / most[0] + 1e-6 * spent / most[1],
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(spent[None] / unit, -np.inf, budget / unit),
        ],
        bounds=Bounds(0, 1),
        integrality=np.ones(len(names)),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise UsageError(f"no mixture was found: {found.message}")
    return {layer: form for (layer, form), taken in zip(names, found.x, strict=True) if taken > 0.5}
