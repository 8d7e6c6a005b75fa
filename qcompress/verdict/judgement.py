"""Checks of one measured row against goals and limits; each adds goals, anomalies and regressions to a
`Judgement`. Comparisons are written so that NaN fails them. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from qcompress.schema.goals import Gate, ParityGoal, gain_too_large, lower_is_better, worst_value

FLIPPED = 1e-4
"""Largest share of codes that folding batch norms may change: values on a tie, whose sum comes out another
way."""


@dataclass
class Judgement:
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
        """Everything that is wrong, anomalies first."""
        return self.anomalies + self.regressions

    def take(self, other: Judgement) -> None:
        """Add another judgement to this one; an anomaly that both have is said once."""
        self.goals += other.goals
        self.anomalies += [text for text in other.anomalies if text not in self.anomalies]
        self.regressions += other.regressions

    def as_deployed(self, judged: bool) -> dict[str, Any]:
        """The section `deployed` of verdict.json; `judged`: it decides the verdict."""
        reasons = self.reasons
        return {"judged": judged, "passed": not reasons, "goals": self.goals, "reasons": reasons}


def _sound(row: str, metrics: dict[str, float], reference: dict[str, float], judgement: Judgement) -> None:
    """Every metric of float is there, and every metric is a number."""
    broken = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    judgement.anomalies += [f"{row}: {name} is {value}" for name, value in broken.items()]
    judgement.anomalies += [f"{row}: {name} was not measured" for name in reference if name not in metrics]


def check_metrics(measured: list[dict[str, Any]], reference: dict[str, float], judgement: Judgement) -> None:
    """Metrics of every measured row, and of what was measured beside it."""
    for row in measured:
        _sound(row["stage"], row["metrics"], reference, judgement)
        if row.get("deployed"):
            _sound(f"{row['stage']} (deployed)", row["deployed"]["metrics"], reference, judgement)
        for name, beside in row.get("providers", {}).items():
            if beside["status"] == "measured":
                _sound(f"{row['stage']} ({name})", beside["metrics"], reference, judgement)


def check_float_floor(reference: dict[str, float], goals: Gate, judgement: Judgement) -> None:
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
    for metric, value in row["metrics"].items():
        if metric in reference and gain_too_large(metric, value, reference[metric]):
            judgement.anomalies.append(
                f"{row['stage']}: {metric} is {value:.6g} against {reference[metric]:.6g} in float: too good"
            )


def check_recovery(
    row: dict[str, Any], reference: dict[str, float], goals: Gate, judgement: Judgement
) -> None:
    metrics = row["metrics"]
    for metric, goal in goals.recovery.items():
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
    if not flipped["codes"]:
        return  # no activation is rounded, so nothing can flip
    share = flipped["flipped"] / flipped["codes"]
    _judge_distance(row, "flipped", share, FLIPPED, share <= FLIPPED, judgement)


def check_forced_codes(
    held: dict[str, Any], limits: ParityGoal | None, share: float, judgement: Judgement
) -> None:
    """The graph from its own codes: no code without an excuse, no more ties than chance makes, and logits
    that agree. `limits` are None where the recipe has some of its own for the onnx row: these are about the
    graph as it runs, and no limit excuses a defect.
    """
    row = {"stage": "onnx.held", "distance": held["distance"]}
    count, where = held["unexplained"], held["first_unexplained"]
    text = (
        f"onnx.held: {count} of {held['codes']} codes differ by more than a tie of rounding, first at {where}"
    )
    judgement.add("parity.onnx.held.unexplained", {"unexplained": 0}, count, None, count == 0, text)
    found = held["largest_share"]
    most = f"more than {100 * share:g} %"
    text = f"onnx.held: {100 * found:.3g} % of the codes at {held['at']} differ on ties, {most}"
    judgement.add("parity.onnx.held.ties", {"ties": share}, found, None, found <= share, text)
    if limits is not None:
        check_parity(row, limits, judgement)


def check_finite(row: dict[str, Any], judgement: Judgement) -> None:
    """A distance that is not judged must be a number all the same."""
    for name in ("max_abs", "mean_abs"):
        if math.isnan((row.get("distance") or {}).get(name, math.nan)):
            judgement.anomalies.append(f"{row['stage']}: {name} is not a number")


def check_parity(row: dict[str, Any], limits: ParityGoal, judgement: Judgement) -> None:
    """Distances to the row before, max_abs and mean_abs as fractions of the logits' range."""
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
