"""Loss of one run against another on the same samples, with its interval and its smallest
detectable value.

Everything here is about a *loss*: how much worse the candidate is, positive when it is worse, in the unit of
its goal. A loss has an interval of two one-sided bounds, each exceeded with a chance of at most 5 %. So a
goal is confirmed where the upper bound keeps it, refuted where the lower bound breaks it, and open between:
of candidates as good as their baseline at most 5 % are called worse than a limit of 0, and of candidates
just beyond the limit at most 5 % pass.

Accuracies of single answers (right or wrong a sample): McNemar's exact test (McNemar 1947) widened, for
limits other than 0, to Tango's score interval (Statistics in Medicine 17, 1998, 891-908). Everything else: a
paired bootstrap over samples, both runs on the same draws, expanded for few samples.

Shapes: samples [n]; counts and replicates [draws, n] and [draws].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize, stats

from qcompress.schema.goals import METRICS, Goal
from qcompress.verdict.replicates import REPLICATES, draw_counts

ALPHA = 0.05
"""Chance of each one-sided error."""

POWER = 0.8
"""Chance of seeing the smallest detectable loss."""

DRAWS = 10_000
"""Bootstrap replicates: the 5 % quantile then has a standard error of 0.2 % of level."""

CHUNK = 2**22
"""Largest number of counts in memory."""

RIGHT: dict[str, Callable[[Mapping[str, list[Any]]], np.ndarray]] = {
    "accuracy": lambda columns: _equal(columns["label"], columns["prediction"]),
    "top5_accuracy": lambda columns: np.array([rank < 5 for rank in columns["rank"]]),
    "agreement": lambda columns: _equal(columns["reference"], columns["prediction"]),
}
"""Metrics that are a share of samples: function from columns to bool [n], true for each correct sample."""


@dataclass(frozen=True)
class Loss:
    """Loss of a candidate against its baseline, in the unit of the goal."""

    value: float
    """Metric of the candidate."""
    baseline: float
    loss: float
    allowed: float
    interval: tuple[float, float] | None
    """Lower and upper bound, each exceeded with a chance of 5 % (the lower one of a slice among several: of 5
    % for all of them together); None if the value is compared without statistics.
    """
    detectable: float | None
    """Smallest true loss that would be detected, beyond a limit of 0, 80 times in 100."""
    test: str
    """`mcnemar`, `bootstrap`, `identical` (all results are equal) or `none` (compared without statistics)."""
    p_value: float | None = None
    """One-sided p of the hypothesis that the candidate is not worse; for McNemar's test only."""

    @property
    def outcome(self) -> str:
        """`pass`, `fail` or `inconclusive`; NaN fails."""
        low, high = self.interval or (self.loss, self.loss)
        if high <= self.allowed:
            return "pass"
        return "inconclusive" if low <= self.allowed else "fail"


def loss_of(metric: str, goal: Goal, baseline: Mapping[str, list[Any]], candidate: Mapping[str, list[Any]],
            among: int = 1) -> Loss:  # fmt: skip
    """Loss in a metric on samples that both runs were measured on.

    `among` is the number of slices that one goal covers: a lower bound is exceeded with a chance of 5 % /
    `among`, so that with no slice worse, one is called worse with a chance of at most 5 % (Bonferroni). The
    upper bound is not corrected: every slice keeps a limit if each one is shown to keep it (Berger 1982).

    `metric` is a name of `goals.METRICS`; the columns are per-sample results and sample data by name. Both
    have the same samples in the same order.
    """
    lower, once = METRICS[metric] == "lower", np.ones((1, _samples(baseline)))
    base, value = (float(REPLICATES[metric](columns, once)[0]) for columns in (baseline, candidate))
    loss, allowed = _loss(goal, base, value, lower)
    unjudged = Loss(value, base, float(loss), allowed, None, None, "none")
    if goal.threshold is not None:
        return unjudged
    if baseline == candidate:  # equal answers with equal losses: equal models on these samples
        return replace(unjudged, interval=(unjudged.loss, unjudged.loss), test="identical")
    if metric in RIGHT and _single(baseline):
        return _mcnemar(unjudged, goal, RIGHT[metric](baseline), RIGHT[metric](candidate), ALPHA / among)
    return _bootstrap(unjudged, metric, goal, baseline, candidate, lower, ALPHA / among)


def as_measured(goal: Goal, baseline: float, value: float) -> Loss:
    """Loss in a number without samples, such as a size; less is better."""
    loss, allowed = _loss(goal, baseline, value, lower=True)
    return Loss(value, baseline, float(loss), allowed, None, None, "none")


def _loss(goal: Goal, base: Any, value: Any, lower: bool) -> tuple[Any, float]:
    """Loss in the unit of the goal, of numbers or arrays, and the largest allowed loss."""
    difference = value - base if lower else base - value
    if goal.max_degradation is not None:
        return difference, goal.max_degradation
    with np.errstate(divide="ignore", invalid="ignore"):
        if goal.percent_max_degradation is not None:
            return 100 * np.divide(difference, np.abs(base)), goal.percent_max_degradation
        if goal.min_recovery is not None:
            kept = np.divide(base, value) if lower else np.divide(value, base)
            return 1 - kept, 1 - goal.min_recovery
    assert goal.threshold is not None
    return (value - goal.threshold if lower else goal.threshold - value), 0.0


# Shares of correct samples ------------------------------------------------------------------------


def _single(columns: Mapping[str, list[Any]]) -> bool:
    """True if a sample is right or wrong as a whole. Agreement of numbers is a correlation, of sequences a
    share of words, of embeddings a cosine.
    """
    if "positions" in columns or "cosine" in columns:
        return False
    return not isinstance(columns["prediction"][0], float)


def _equal(first: list[Any], second: list[Any]) -> np.ndarray:
    return np.array([one == other for one, other in zip(first, second, strict=True)])


def _mcnemar(measured_loss: Loss, goal: Goal, before: np.ndarray, after: np.ndarray, chance: float) -> Loss:
    """Loss of a share with its bounds; a relative goal takes the baseline's accuracy as exact."""
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    low, high = share_interval(lost, won, len(before), chance)
    unit = 1.0
    if goal.max_degradation is None:
        unit = (100.0 if goal.percent_max_degradation is not None else 1.0) / (
            measured_loss.baseline or math.nan
        )
    return Loss(
        measured_loss.value,
        measured_loss.baseline,
        measured_loss.loss,
        measured_loss.allowed,
        (low * unit, high * unit),
        share_detectable(lost, won, len(before), chance) * unit,
        "mcnemar",
        mcnemar_exact(lost, won),
    )


def mcnemar_exact(lost: int, won: int) -> float:
    """One-sided exact p of "not worse": P(Binomial(lost + won, 1/2) >= lost). 1 if nothing changed.

    >>> mcnemar_exact(8, 1)  # (9 + 1) / 512
    0.01953125
    """
    return float(stats.binom.sf(lost - 1, lost + won, 0.5))


def share_interval(lost: int, won: int, samples: int, chance: float = ALPHA) -> tuple[float, float]:
    """Bounds of (lost - won) / samples, the lower one exceeded with chance `chance`, the upper one with 5 %:
    the wider of Tango's score interval and McNemar's exact test of the sign, so that a bound is beyond 0 only
    if that test agrees.
    """
    low, high = _tango(lost, won, samples, 1, chance), _tango(lost, won, samples, -1, ALPHA)
    if mcnemar_exact(lost, won) > chance:
        low = min(low, 0.0)
    if mcnemar_exact(won, lost) > ALPHA:
        high = max(high, 0.0)
    return low, high


def _tango(lost: int, won: int, samples: int, side: int, chance: float) -> float:
    """Loss at which the score statistic equals `side` times the normal quantile; 1 gives the lower bound."""
    limit = side * stats.norm.ppf(1 - chance)
    if lost == won == 0:  # the statistic's variance is that of the loss alone: +-z^2 / (n + z^2)
        return -side * limit**2 / (samples + limit**2)
    edge = 1 - 1e-12
    if side > 0 and tango_score(lost, won, samples, -edge) < limit:
        return -1.0
    if side < 0 and tango_score(lost, won, samples, edge) > limit:
        return 1.0
    return float(
        optimize.brentq(lambda loss: tango_score(lost, won, samples, loss) - limit, -edge, edge, xtol=1e-12)
    )


def tango_score(lost: int, won: int, samples: int, loss: float) -> float:
    """Tango's z at an assumed loss: (lost - won - n d) / sqrt(n (2 q + d (1 - d))), where q is the maximum
    likelihood estimate, given d, of the share that the candidate wins (his equations 5 to 8 with our names).
    """
    a = 2 * samples
    b = -lost - won + (2 * samples - lost + won) * loss
    c = -won * loss * (1 - loss)
    root = max(b * b - 4 * a * c, 0.0)
    wins = (math.sqrt(root) - b) / (2 * a)
    variance = samples * (2 * wins + loss * (1 - loss))
    difference = lost - won - samples * loss
    return (
        difference / math.sqrt(variance)
        if variance > 0
        else math.copysign(math.inf, difference)
        if difference
        else 0.0
    )


def share_detectable(lost: int, won: int, samples: int, chance: float = ALPHA) -> float:
    """Loss that McNemar's test detects with a chance of 80 %, at the observed share of changed samples
    (Connor 1987): d sqrt(n) = z(1 - chance) sqrt(s) + z(0.8) sqrt(s - d^2). Assumes at least one changed
    sample: without a change the share is small, not 0.
    """
    share = max(lost + won, 1) / samples
    high, power = stats.norm.ppf(1 - chance), stats.norm.ppf(POWER)

    def lacking(loss: float) -> float:
        return loss * math.sqrt(samples) - high * math.sqrt(share) - power * math.sqrt(share - loss**2)

    most = math.sqrt(share) * (1 - 1e-12)
    if lacking(most) < 0:  # not even if every changed sample were lost
        return math.nan if most < 1e-300 else float(high * math.sqrt(share / samples))
    return float(optimize.brentq(lacking, 0.0, most))


# Bootstrap ----------------------------------------------------------------------------------------


def _bootstrap(
    measured_loss: Loss, metric: str, goal: Goal, baseline: Mapping[str, list[Any]],
    candidate: Mapping[str, list[Any]], lower: bool, chance: float,
) -> Loss:  # fmt: skip
    samples = _samples(baseline)
    drawn: list[list[np.ndarray]] = [[], []]
    for counts in _counts(samples):
        for place, columns in enumerate((baseline, candidate)):
            drawn[place].append(REPLICATES[metric](columns, counts))
    before, after = (np.concatenate(parts) for parts in drawn)
    losses, _ = _loss(goal, before, after, lower)
    losses = losses[np.isfinite(losses)]
    if samples < 2 or len(losses) < 0.99 * DRAWS:  # the metric is undefined in many draws
        return replace(measured_loss, interval=(-math.inf, math.inf), test="bootstrap")
    # percentiles of a bootstrap are those of a variance with n in place of n - 1
    deviations = (losses - measured_loss.loss) * math.sqrt(samples / (samples - 1))
    low, high = (
        measured_loss.loss + _expanded(level, samples) * float(np.quantile(deviations, side))
        for level, side in ((chance, chance), (ALPHA, 1 - ALPHA))
    )
    seen = (_expanded(chance, samples) * stats.norm.ppf(1 - chance) + stats.norm.ppf(POWER)) * float(
        np.std(deviations)
    )
    return Loss(
        measured_loss.value,
        measured_loss.baseline,
        measured_loss.loss,
        measured_loss.allowed,
        (low, high),
        seen,
        "bootstrap",
    )


def _expanded(chance: float, samples: int) -> float:
    """Factor by which a bound must be wider than a bootstrap percentile, which ignores that the variance of
    few samples is estimated: Student's quantile over the normal one (the expanded percentile interval of
    Hesterberg, The American Statistician 69, 2015, 371-386).
    """
    return float(stats.t.ppf(1 - chance, samples - 1) / stats.norm.ppf(1 - chance))


def _counts(samples: int) -> Iterator[np.ndarray]:
    """Bootstrap counts in chunks that fit into memory; identical for both runs and for every metric."""
    each = max(1, min(DRAWS, CHUNK // samples))
    if each == DRAWS:
        yield _all_at_once(samples)
        return
    for start in range(0, DRAWS, each):
        yield draw_counts(samples, min(each, DRAWS - start), start)


@functools.lru_cache(maxsize=4)
def _all_at_once(samples: int) -> np.ndarray:
    return draw_counts(samples, DRAWS, 0)


def _samples(columns: Mapping[str, list[Any]]) -> int:
    return len(next(iter(columns.values())))
