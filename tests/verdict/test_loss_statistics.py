"""The statistics of a gate: hand-worked numbers, an oracle by brute force, and simulation of both errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats
from sklearn import metrics

from qcompress.schema.goals import Goal
from qcompress.verdict.baseline.statistics import (
    ALPHA,
    Loss,
    as_measured,
    loss_of,
    mcnemar_exact,
    share_detectable,
    share_interval,
    tango_score,
)
from qcompress.verdict.replicates import REPLICATES, draw_counts


def goal(**limits: float) -> Goal:
    return Goal.model_validate({name.replace("_", "-"): value for name, value in limits.items()})


def classified(right: np.ndarray) -> dict[str, list[Any]]:
    """Answers to samples of label 1; the losses make no two models the same."""
    return {"label": [1] * len(right), "prediction": [int(one) for one in right]}


def perplexities(nll: np.ndarray) -> dict[str, list[Any]]:
    return {"nll": nll.tolist(), "tokens": [10] * len(nll), "correct": [1] * len(nll)}


# McNemar and Tango --------------------------------------------------------------------------------


@pytest.mark.parametrize(("lost", "won"), [(8, 1), (0, 0), (5, 5), (1, 8), (30, 14)])
def test_mcnemars_p_is_the_sum_of_the_binomial_tail(lost: int, won: int) -> None:
    changed = lost + won
    tail = sum(math.comb(changed, wrong) for wrong in range(lost, changed + 1)) / 2**changed
    assert mcnemar_exact(lost, won) == pytest.approx(tail, rel=1e-12)


def by_likelihood(lost: int, won: int, samples: int, loss: float) -> float:
    """Tango's z from the definition: the variance at the most likely share that is won, found numerically."""
    same = samples - lost - won

    def minus(share: float) -> float:
        parts = ((lost, share + loss), (won, share), (same, 1 - loss - 2 * share))
        return -sum(count * math.log(part) for count, part in parts if count)

    low, high = max(0.0, -loss), (1 - loss) / 2
    optimum = optimize.minimize_scalar(minus, bounds=(low + 1e-12, high - 1e-12), method="bounded",
                                     options={"xatol": 1e-13})  # fmt: skip
    return (lost - won - samples * loss) / math.sqrt(samples * (2 * optimum.x + loss * (1 - loss)))


@pytest.mark.parametrize(("lost", "won", "samples"), [(12, 2, 50), (20, 25, 400), (3, 1, 1000), (7, 0, 90)])
@pytest.mark.parametrize("loss", [-0.02, 0.0, 0.03, 0.2])
def test_tangos_score_is_that_of_the_constrained_likelihood(
    lost: int, won: int, samples: int, loss: float
) -> None:
    expected = by_likelihood(lost, won, samples, loss)
    assert tango_score(lost, won, samples, loss) == pytest.approx(expected, rel=2e-4, abs=1e-4)


def test_the_bounds_of_a_published_table() -> None:
    """36, 12, 2, 0 of 50 (Newcombe 1998, table of examples): at 95 % the score interval is 0.057 to 0.340; at
    5 % a side it lies inside.
    """
    low, high = share_interval(12, 2, 50)
    assert 0.057 < low < 0.2 < high < 0.340
    for limit, side in ((low, 1), (high, -1)):
        assert tango_score(12, 2, 50, limit) == pytest.approx(side * stats.norm.ppf(0.95), abs=1e-8)


def test_a_bound_is_beyond_0_only_where_the_exact_test_agrees() -> None:
    for changed in range(1, 40):
        for lost in range(changed + 1):
            low, high = share_interval(lost, changed - lost, 500)
            assert (low > 0) <= (mcnemar_exact(lost, changed - lost) <= ALPHA)
            assert (high < 0) <= (mcnemar_exact(changed - lost, lost) <= ALPHA)
            assert low <= (2 * lost - changed) / 500 <= high


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (500, 0), (0, 500), (250, 250)])
def test_the_bounds_of_extreme_tables_are_in_order(lost: int, won: int) -> None:
    low, high = share_interval(lost, won, 500)
    assert -1 <= low <= (lost - won) / 500 <= high <= 1 and low < high


@pytest.mark.parametrize("truth", [0.0, 0.02, 0.05])
def test_each_bound_is_crossed_by_at_most_5_of_100(truth: float) -> None:
    """400 samples of which 10 % change: how often the true loss lies beyond either bound."""
    random = np.random.default_rng(5)
    shares = [0.05 + truth / 2, 0.05 - truth / 2, 0.9]
    tables = random.multinomial(400, shares, size=2000)
    bounds = np.array([share_interval(int(lost), int(won), 400) for lost, won, _ in tables])
    beyond = (bounds[:, 0] > truth).mean(), (bounds[:, 1] < truth).mean()
    assert max(beyond) <= 0.062  # 5 % and 2.5 standard errors of a share of 2000
    assert min(beyond) > 0.01  # and not so wide as to say nothing


def test_the_detectable_loss_of_an_accuracy_is_seen_80_times_in_100() -> None:
    detectable_loss = share_detectable(60, 40, 1000)
    random = np.random.default_rng(6)
    tables = random.multinomial(
        1000, [0.05 + detectable_loss / 2, 0.05 - detectable_loss / 2, 0.9], size=2000
    )
    seen = [mcnemar_exact(int(lost), int(won)) <= ALPHA for lost, won, _ in tables]
    assert 0.74 < np.mean(seen) < 0.83  # the exact test is a little below its nominal level


# One loss -----------------------------------------------------------------------------------------


def test_the_unit_of_each_goal() -> None:
    before, after = perplexities(np.full(40, 30.0)), perplexities(np.full(40, 30.5))
    base, value = math.exp(3.0), math.exp(3.05)
    cases = {
        "max_degradation": (value - base, 0.5),
        "percent_max_degradation": (100 * (value / base - 1), 5.0),
        "min_recovery": (1 - base / value, 1 - 0.9),
        "threshold": (value - 21.0, 0.0),
    }
    limits = {"max_degradation": 0.5, "percent_max_degradation": 5.0, "min_recovery": 0.9, "threshold": 21.0}
    for name, (loss, allowed) in cases.items():
        measured = loss_of("perplexity", goal(**{name: limits[name]}), before, after)
        assert measured.loss == pytest.approx(loss) and measured.allowed == pytest.approx(allowed), name
        assert (measured.test == "none") == (name == "threshold"), name
    rise = classified(np.arange(100) < 80), classified(np.arange(100) < 76)
    measured = loss_of("accuracy", goal(percent_max_degradation=10.0), *rise)
    assert measured.loss == pytest.approx(5.0) and measured.test == "mcnemar"
    low, high = share_interval(4, 0, 100)
    assert measured.interval == pytest.approx((low / 0.008, high / 0.008))


def test_less_is_better_of_what_has_no_samples() -> None:
    assert as_measured(goal(percent_max_degradation=5), 100.0, 104.0).outcome == "pass"
    assert as_measured(goal(percent_max_degradation=5), 100.0, 106.0).outcome == "fail"
    assert as_measured(goal(threshold=90.0), 100.0, 91.0).outcome == "fail"
    assert as_measured(goal(max_degradation=5), 100.0, math.nan).outcome == "fail"


@pytest.mark.parametrize(
    ("interval", "outcome"),
    [((-0.1, 0.4), "pass"), ((0.1, 0.5), "pass"), ((0.4, 0.6), "inconclusive"), ((0.51, 0.7), "fail"),
     ((math.nan, math.nan), "fail"), ((-math.inf, math.inf), "inconclusive")],
)  # fmt: skip
def test_the_outcome_follows_from_the_bounds(interval: tuple[float, float], outcome: str) -> None:
    assert Loss(1.0, 1.0, 0.45, 0.5, interval, None, "bootstrap").outcome == outcome


def test_a_share_of_nothing_is_no_number_and_fails() -> None:
    loss = loss_of(
        "accuracy", goal(percent_max_degradation=5), classified(np.zeros(9)), classified(np.ones(9))
    )
    assert loss.outcome == "fail"


def test_the_same_results_are_no_loss_at_all() -> None:
    columns = classified(np.arange(50) < 30)
    loss = loss_of("accuracy", goal(max_degradation=0.0), columns, dict(columns))
    assert (loss.test, loss.interval, loss.outcome) == ("identical", (0.0, 0.0), "pass")


def test_a_bootstrap_interval_is_that_of_the_mean() -> None:
    """Small differences of log-likelihoods: the loss is base * the mean difference of a token."""
    random = np.random.default_rng(8)
    nll = random.normal(30, 3, 300)
    apart = random.normal(0.05, 0.4, 300)
    loss = loss_of("perplexity", goal(max_degradation=1.0), perplexities(nll), perplexities(nll + apart))
    scale = loss.baseline / 10
    error = apart.std(ddof=1) / math.sqrt(300) * scale
    expected = [apart.mean() * scale + side * stats.norm.ppf(0.95) * error for side in (-1, 1)]
    assert loss.interval == pytest.approx(expected, abs=0.15 * error)
    assert loss.detectable == pytest.approx((1.645 + 0.842) * error, rel=0.05)


def losses(values: np.ndarray) -> dict[str, list[Any]]:
    return {"loss": values.tolist()}


def test_the_bounds_of_few_samples_are_students() -> None:
    random = np.random.default_rng(9)
    for samples in (6, 12):
        before = random.normal(2.0, 1.0, samples)
        apart = stats.norm.ppf((np.arange(samples) + 0.5) / samples)  # as normal as so few can be
        loss = loss_of("cross_entropy", goal(max_degradation=1.0), losses(before), losses(before + apart))
        error = apart.std(ddof=1) / math.sqrt(samples)
        half = stats.t.ppf(0.95, samples - 1) * error
        assert loss.interval == pytest.approx((-half, half), abs=0.06 * half)
        assert loss.detectable == pytest.approx(half + 0.842 * error, rel=0.02)


@pytest.mark.slow
def test_6_samples_raise_as_few_false_alarms_as_many_do() -> None:
    """Percentiles alone raise 8 in 100."""
    random, alarms = np.random.default_rng(10), 0
    for _ in range(2000):
        before = random.normal(2.0, 1.0, 6)
        pair = losses(before), losses(before + random.normal(0, 0.3, 6))
        alarms += loss_of("cross_entropy", goal(max_degradation=0.0), *pair).outcome == "fail"
    assert 0.02 < alarms / 2000 <= 0.062


def test_one_sample_says_nothing() -> None:
    loss = loss_of("cross_entropy", goal(max_degradation=1.0), losses(np.ones(1)), losses(np.ones(1) * 1.1))
    assert loss.outcome == "inconclusive" and loss.interval == (-math.inf, math.inf)


# False alarms -------------------------------------------------------------------------------------


def swapped(one: dict[str, list[Any]], other: dict[str, list[Any]], random: np.random.Generator) -> Any:
    """The pair with the results of some samples exchanged: neither is better."""
    chosen = random.random(len(next(iter(one.values())))) < 0.5
    pairs = {
        name: [pair[::-1] if swap else pair for pair, swap in zip(
            zip(one[name], other[name], strict=True), chosen, strict=True)]
        for name in one
    }  # fmt: skip
    return [
        {name: [pair[side] for pair in exchanged] for name, exchanged in pairs.items()} for side in (0, 1)
    ]


def pair_of(metric: str, samples: int) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Two runs whose results differ as those of two trainings do."""
    random = np.random.default_rng(11)
    if metric == "perplexity":
        nll = random.gamma(9, 3.5, samples)
        return tuple(perplexities(nll + random.normal(0, 0.6, samples)) for _ in range(2))
    if metric == "spearman":
        label = random.integers(0, 11, samples) / 2
        return tuple(
            {"label": label.tolist(), "prediction": (label + random.normal(0, 1.5, samples)).tolist()}
            for _ in range(2)
        )
    label = (random.random(samples) < 0.4).astype(int)
    return tuple(
        {
            "label": label.tolist(),
            "prediction": np.where(random.random(samples) < 0.15, 1 - label, label).tolist(),
        }
        for _ in range(2)
    )


@pytest.mark.parametrize(
    "metric",
    [
        "accuracy",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("perplexity", "f1", "mcc", "spearman")),
    ],
)
def test_2000_comparisons_without_a_difference_raise_at_most_6_2_percent_false_alarms(metric: str) -> None:
    """5 % and two and a half standard errors of a share of 2000; of 16,000 perplexities it was 5.07 %."""
    random = np.random.default_rng(21)
    pair = pair_of(metric, 300)
    alarms = sum(
        loss_of(metric, goal(max_degradation=0.0), *swapped(*pair, random)).outcome == "fail"
        for _ in range(2000)
    )
    print(f"{metric}: {100 * alarms / 2000:.1f} % false alarms of 2000")
    assert 0.02 < alarms / 2000 <= 0.062


@pytest.mark.parametrize(("samples", "least", "most"), [(500, 0.1, 0.4), (5000, 0.8, 1.0)])
def test_the_power_at_one_point_is_printed(samples: int, least: float, most: float) -> None:
    """A true loss of one point of accuracy where 6 % of the samples change."""
    random = np.random.default_rng(14)
    tables = random.multinomial(samples, [0.035, 0.025, 0.94], size=2000)
    power = np.mean([share_interval(int(lost), int(won), samples)[0] > 0 for lost, won, _ in tables])
    print(f"{samples} samples: a loss of 1 point is seen {100 * power:.0f} times in 100")
    assert least < power <= most


# Replicates that only the gate uses ---------------------------------------------------------------


def repeated(values: list[Any], row: np.ndarray) -> list[Any]:
    return [value for value, times in zip(values, row.astype(int), strict=True) for _ in range(times)]


@pytest.mark.parametrize("average", ["macro", "micro"])
@pytest.mark.parametrize("several", [False, True])
def test_f1_of_drawn_samples_is_scikit_learns(average: str, several: bool) -> None:
    random = np.random.default_rng(15)
    shape = (60, 3) if several else (60,)
    label, answer = (random.integers(0, 2 if several else 4, shape).tolist() for _ in range(2))
    counts = draw_counts(60, 20, task=0)
    if not several:
        label[0] = answer[0] = 4
        assert 0 < (counts[:, 0] == 0).sum() < 20  # some draws have no sample of this label
    replicates = REPLICATES[f"f1_{average}"]({"label": label, "prediction": answer}, counts)
    for draw, row in enumerate(counts):
        truth, given = repeated(label, row), repeated(answer, row)
        expected = metrics.f1_score(truth, given, average=average, zero_division=0.0)
        assert replicates[draw] == pytest.approx(expected, rel=1e-9)


def test_sequences_are_drawn_as_wholes() -> None:
    random = np.random.default_rng(16)
    label = [random.integers(0, 3, length).tolist() for length in (3, 5, 2, 8)]
    answer = [[one if random.random() < 0.7 else 0 for one in sequence] for sequence in label]
    columns = {"label": label, "prediction": answer, "reference": label, "positions": label}
    counts = draw_counts(4, 20, task=0)
    for name in ("token_accuracy", "agreement"):
        for draw, row in enumerate(counts):
            words = list(zip(sum(repeated(label, row), []), sum(repeated(answer, row), []), strict=True))
            expected = sum(one == other for one, other in words) / len(words)
            assert REPLICATES[name](columns, counts)[draw] == pytest.approx(expected)
    spans = {"spans_right": [1, 0, 2, 1], "spans_total": [2, 3, 5, 4]}
    assert REPLICATES["span_f1"](spans, np.array([[1, 1, 1, 1], [0, 2, 0, 0]])).tolist() == [8 / 14, 0.0]


def test_agreement_of_answers_and_of_numbers() -> None:
    once = np.ones((1, 4))
    answers = {"prediction": [1, 0, 2, 2], "reference": [1, 1, 2, 2]}
    assert REPLICATES["agreement"](answers, once)[0] == 0.75
    numbers = {"prediction": [1.0, 2.0, 3.0, 5.0], "reference": [1.0, 2.5, 3.0, 4.0]}
    expected = stats.pearsonr(numbers["prediction"], numbers["reference"]).statistic
    assert REPLICATES["agreement"](numbers, once)[0] == pytest.approx(expected)
