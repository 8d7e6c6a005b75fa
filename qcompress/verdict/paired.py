"""Statistics of paired comparisons: intervals and detectable differences. No torch.

A *pair* is one task and one seed that both arms were run on. Its difference is the arm's metric minus the
baseline's, so that effects of the seed on both (order of the data, calibration) cancel.

Shapes: differences [pairs]; replicates [seeds, draws], one row for each seed of one task.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy import integrate, optimize, stats

LEVEL = 0.95
"""Confidence of every interval."""

POWER = 0.8
"""Chance of seeing the smallest detectable difference."""

DRAWS = 1000
"""Bootstrap replicates."""


def t_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Paired t interval: mean -+ t(0.975, n - 1) * sd / sqrt(n) over the pairs; None for a single pair.

    The pairs are treated as draws from one population of tasks and seeds, so a method that helps one task and
    hurts another gets a wide interval. The interval contains the noise of the finite evaluation set only as
    far as the seeds show it, because every seed is measured on the same samples.

    >>> [round(limit, 4) for limit in t_interval([1.0, 2.0, 3.0])]
    [-0.4841, 4.4841]
    """
    if len(differences) < 2:
        return None
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(differences) - 1)) * _standard_error(differences)
    mean = math.fsum(differences) / len(differences)
    return mean - half, mean + half


def detectable(differences: Sequence[float]) -> float | None:
    """The smallest true difference that a two-sided paired t test at 5 % sees in 80 % of studies like this.

    With as many pairs and the spread that was observed: the d for which |T| exceeds t(0.975, n - 1) with
    probability 0.8, T noncentral t with n - 1 degrees of freedom around d * sqrt(n) / sd. None for a single
    pair, 0 where all pairs agree.

    >>> round(detectable([-1.0, 1.0] * 17), 3)  # 34 pairs: half a standard deviation
    0.502
    """
    if len(differences) < 2:
        return None
    return _seen(len(differences) - 1) * _standard_error(differences)


@functools.cache
def _seen(freedom: int) -> float:
    """Shift of a noncentral t that the test detects with probability `POWER`; cached, because tables ask
    often.
    """
    limit = stats.t.ppf((1 + LEVEL) / 2, freedom)
    highest = 3 + 2 * limit
    return optimize.brentq(lambda at: _power(at, limit, freedom) - POWER, 0, highest, xtol=1e-10)


def _power(shift: float, limit: float, freedom: int) -> float:
    """P(|T| > limit) for a noncentral t, T = (Z + shift) / u with u = sqrt(chi2 / freedom): the mean over u
    of P(|Z + shift| > limit * u). By quadrature: scipy's noncentral t gives NaN for 1 degree of freedom.
    """
    root = math.sqrt(freedom)

    def at(chi: float) -> float:
        width = limit * chi / root
        seen = stats.norm.cdf(shift - width) + stats.norm.cdf(-shift - width)
        return seen * stats.chi.pdf(chi, freedom)

    probability, _ = integrate.quad(at, 0, root + 12, limit=200, points=[root])  # sd of chi is below 1
    return probability


def bootstrap_interval(replicates: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """Hierarchical paired bootstrap: percentiles 2.5 and 97.5 of the mean difference over all pairs.

    `replicates`: for each task an array [seeds, draws] of differences, one draw of evaluation samples a
    column. A replicate keeps the tasks (the claim is about these), draws the seeds of each with replacement,
    and takes the same drawn samples for all seeds of a task and for both arms, since all were measured on
    them. So it has the noise of the evaluation set and of the seeds, and not of the choice of tasks. With few
    seeds it is too narrow: two seeds can only be drawn in three ways. None for a single pair.
    """
    if sum(len(task) for task in replicates) < 2:
        return None
    random = np.random.default_rng(20_260_101)
    means = []
    for task in replicates:
        seeds, draws = task.shape
        chosen = random.integers(seeds, size=(seeds, draws))
        means.append(np.take_along_axis(task, chosen, axis=0).mean(axis=0))
    weights = [len(task) for task in replicates]
    low, high = np.quantile(np.average(means, axis=0, weights=weights), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _standard_error(differences: Sequence[float]) -> float:
    return float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
