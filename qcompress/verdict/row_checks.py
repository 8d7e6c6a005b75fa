"""Checks of one measured row against goals and limits; each adds goals, anomalies and regressions to a
`Judgement`. Comparisons are written so that NaN fails them. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qcompress.schema.goals import Gate, ParityGoal, gain_too_large, lower_is_better, worst_value

FLIPPED = 1e-4
"""Largest share of codes that folding batch norms may change: values on a rounding tie whose sum differs."""


@dataclass
class Judgement:
    """Goals, anomalies and regressions collected by the checks."""

    goals: list[dict[str, Any]] = field(default_factory=list)
    anomalies: list[str] = field(default_factory=list)
    regressions: list[str] = field(default_factory=list)

    def add(
        self, metric: str, goal: dict[str, Any], value: float, baseline: float | None, passed: bool, text: str
    ) -> None:
        self.goals.append(
            {"metric": metric, "goal": goal, "value": value, "baseline": baseline, "interval": None,
             "passed": passed}
        )  # fmt: skip
        if not passed:
            self.regressions.append(text)

    @property
    def reasons(self) -> list[str]:
        """All problems, anomalies first."""
        return self.anomalies + self.regressions

    def take(self, addition: Judgement) -> None:
        """Add another judgement to this one; common anomalies are listed once."""
        self.goals += addition.goals
        self.anomalies += [text for text in addition.anomalies if text not in self.anomalies]
        self.regressions += addition.regressions

    def as_deployed(self, judged: bool) -> dict[str, Any]:
        """Section `deployed` of verdict.json; `judged`: the section decides the verdict."""
        reasons = self.reasons
        return {"judged": judged, "passed": not reasons, "goals": self.goals, "reasons": reasons}


def _sound(
    row: str, metrics: dict[str, float], reference: dict[str, float], judgement: Judgement,
    elsewhere: Sequence[str] = (),
) -> None:  # fmt: skip
    """Report metrics that are not finite, and metrics of float that are missing; `elsewhere`: those that only
    another machine can measure.
    """
    known = {*metrics, *elsewhere}
    broken = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    judgement.anomalies += [f"{row}: {name} is {value}" for name, value in broken.items()]
    judgement.anomalies += [f"{row}: {name} was not measured" for name in reference if name not in known]


def check_metrics(measured: list[dict[str, Any]], reference: dict[str, float], judgement: Judgement) -> None:
    """Check the metrics of every measured row and of its extra measurements."""
    for row in measured:
        _sound(row["stage"], row["metrics"], reference, judgement, row.get("elsewhere", ()))
        if row.get("deployed"):
            _sound(f"{row['stage']} (deployed)", row["deployed"]["metrics"], reference, judgement)
        for name, beside in row.get("providers", {}).items():
            if beside["status"] == "measured":
                _sound(f"{row['stage']} ({name})", beside["metrics"], reference, judgement)


def check_float_floor(reference: dict[str, float], goals: Gate, judgement: Judgement) -> None:
    """Check the float model's metrics against their floors; a break is an anomaly."""
    for metric, floor in goals.float_floor.items():
        value = reference.get(metric, math.nan)
        passed = value <= floor if lower_is_better(metric) else value >= floor
        judgement.goals.append(
            {"metric": f"float.{metric}", "goal": {"floor": floor}, "value": value, "baseline": None,
             "interval": None, "passed": passed}
        )  # fmt: skip
        if not passed:
            judgement.anomalies.append(
                f"float: {metric} is {value:.6g}, its floor is {floor:g}: no reference"
            )


def check_gain(row: dict[str, Any], reference: dict[str, float], judgement: Judgement) -> None:
    """Report metrics that are implausibly better than the float model's."""
    for metric, value in row["metrics"].items():
        if metric in reference and gain_too_large(metric, value, reference[metric]):
            judgement.anomalies.append(
                f"{row['stage']}: {metric} is {value:.6g} against {reference[metric]:.6g} in float: too good"
            )


def check_recovery(
    row: dict[str, Any], reference: dict[str, float], goals: Gate, judgement: Judgement
) -> None:
    """Check a row's metrics against the recovery goals."""
    metrics = row["metrics"]
    for metric, goal in goals.recovery.items():
        if metric in row.get("elsewhere", ()):
            continue
        if metric not in metrics or metric not in reference:
            judgement.anomalies.append(f"recovery.{metric}: not measured in both float and {row['stage']}")
            continue
        value, base = metrics[metric], reference[metric]
        limit = worst_value(metric, goal, base)
        passed = value <= limit if lower_is_better(metric) else value >= limit
        shown = goal.model_dump(by_alias=True, exclude_none=True)
        text = f"{row['stage']}: {metric} is {value:.6g}, the limit is {limit:.6g} ({_spell(shown)})"
        name = f"deployed.{metric}" if row["stage"] == "deployed" else metric
        judgement.add(name, shown, value, base, passed, text)


def check_flips(row: dict[str, Any], flipped: dict[str, int], judgement: Judgement) -> None:
    """Check the share of codes that folding batch norms changed."""
    if not flipped["codes"]:
        return  # no activation is rounded, so nothing can flip
    share = flipped["flipped"] / flipped["codes"]
    _judge_distance(row, "flipped", share, FLIPPED, share <= FLIPPED, judgement)


def check_forced_codes(
    stage: str, held: dict[str, Any], limits: ParityGoal | None, share: float, judgement: Judgement
) -> None:
    """Check a row measured from forced codes: no code differs by more than a rounding tie, ties are not more
    frequent than chance allows, and logits agree. `limits` is None if the recipe states limits for the row:
    these are about the model as it runs, and no limit excuses a defect.
    """
    name = f"{stage}.held"
    count, where = held["unexplained"], held["first_unexplained"]
    text = f"{name}: {count} of {held['codes']} codes differ by more than a tie of rounding, first at {where}"
    judgement.add(f"parity.{name}.unexplained", {"unexplained": 0}, count, None, count == 0, text)
    largest = held["largest_share"]
    most = f"more than {100 * share:g} %"
    text = f"{name}: {100 * largest:.3g} % of the codes at {held['at']} differ on ties, {most}"
    judgement.add(f"parity.{name}.ties", {"ties": share}, largest, None, largest <= share, text)
    check_held_distance(stage, held, limits, judgement)


def check_held_distance(
    stage: str, held: dict[str, Any], limits: ParityGoal | None, judgement: Judgement
) -> None:
    """Check the logits of a row measured from forced codes; `limits` as in `check_forced_codes`."""
    if limits is not None:
        check_parity({"stage": f"{stage}.held", "distance": held["distance"]}, limits, judgement)


def check_finite(row: dict[str, Any], judgement: Judgement) -> None:
    """Report a distance that is not a number, for a row whose distance is not judged."""
    for name in ("max_abs", "mean_abs"):
        if math.isnan((row.get("distance") or {}).get(name, math.nan)):
            judgement.anomalies.append(f"{row['stage']}: {name} is not a number")


def check_parity(row: dict[str, Any], limits: ParityGoal, judgement: Judgement) -> None:
    """Check distances to the row before; max_abs and mean_abs as fractions of the logits' range."""
    distance = row.get("distance") or {}
    scale = distance.get("range", math.nan)
    if scale == 0:  # two dead models agree in everything
        judgement.anomalies.append(f"{row['stage']}: all logits of {distance.get('to')} are equal")
    for name in ("max_abs", "mean_abs"):
        limit = getattr(limits, name)
        if limit is None:
            continue
        value = distance.get(name, math.nan) / scale if scale > 0 else math.nan
        _judge_distance(row, name, value, limit, value <= limit, judgement)
    without = (
        "top1_agreement" in distance and distance["top1_agreement"] is None
    )  # a regression has one logit
    if limits.top1_agreement is not None and not without:
        value = distance.get("top1_agreement", math.nan)
        _judge_distance(
            row, "top1_agreement", value, limits.top1_agreement, value >= limits.top1_agreement, judgement
        )


def _judge_distance(
    row: dict[str, Any], name: str, value: float, limit: float, passed: bool, judgement: Judgement
) -> None:
    stage, to = row["stage"], (row.get("distance") or {}).get("to")
    if math.isnan(value):
        judgement.anomalies.append(f"{stage}: {name} to {to} is not a number")
    text = f"{stage}: {name} to {to} is {value:.6g}, the limit is {limit:g}"
    judgement.add(f"parity.{stage}.{name}", {name: limit}, value, None, passed, text)


def _spell(goal: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in goal.items())
