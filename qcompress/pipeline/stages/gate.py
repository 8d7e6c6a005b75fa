"""Stage `gate`: ParityReport, goals -> Verdict. Judges; measures nothing. No torch.

Reads parity.json and the recipe's goals. Writes verdict.json, and junit.xml for a CI server.

    accept       every goal holds
    regression   a parity or a recovery goal is broken; for a target that           exit 3
                 ONNX Runtime serves, of the deployed row too
    unjudged     a smoke run: the line ran, and nothing is judged                    exit 0
    anomalous    the measurement itself cannot be trusted: a number that is not     exit 4
                 finite, logits that are all equal, a required row or metric that
                 is missing, a float model below its own floor, a gain too large
                 to be true

Anomalous outranks regression: a broken measurement proves nothing about the model. Comparisons are written so
that NaN fails them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.errors import IncomparableError, QcompressError
from qcompress.schema.goals import (
    DEPLOYED_FARTHEST,
    DEPLOYED_ROUNDINGS,
    PARITY,
    Gate,
    ParityGoal,
    gain_too_large,
    lower_is_better,
    worst_value,
)
from qcompress.schema.recipe import Recipe
from qcompress.schema.targets import find_target
from qcompress.system.artifacts import read_json, write_json, write_text
from qcompress.verdict.junit import junit

if TYPE_CHECKING:
    from qcompress.verdict.run_directory import LoadedRun

EXIT_CODES = {"accept": 0, "unjudged": 0, "regression": 3, "anomalous": 4, "inconclusive": 3}

SMOKE = "a smoke run: the line runs here; two blocks and little data say nothing about the model"

FLIPPED = 1e-4
"""Largest share of codes that folding batch norms may change: values on a tie, whose sum comes out another
way."""

TIES = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.0}
"""Largest share of a place's codes that may differ from the same codes before it, all on ties. Of 114 graphs
(recipes/matrix) the largest was 4e-5 in fp32 and 1e-2 in fp16; a norm that is 0.2 % off makes 5e-2 there."""

FOLDED_NORMS = ParityGoal(mean_abs=2e-3, top1_agreement=0.99)
"""The limits of the folded row where batch norms were folded or scales raised: its flips are what is judged,
and this is what follows from them. ResNet-20 on CIFAR-10, W8A8: mean_abs 4e-4."""

FLIPS_AGAIN = 4
"""How many times as far as the onnx row the deployed row may lie, where flips on ties move both."""

BEFORE = {"folded": "trained", "onnx": "folded", "engine": "onnx"}
"""Rows that those limits are about. Where the row before was not measured, the distance is to an earlier one
and says what compression did, which is a matter of recovery.
"""


@dataclass
class _Judgement:
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

    def take(self, other: _Judgement) -> None:
        """Add another judgement to this one; an anomaly that both have is said once."""
        self.goals += other.goals
        self.anomalies += [text for text in other.anomalies if text not in self.anomalies]
        self.regressions += other.regressions

    def as_deployed(self, judged: bool) -> dict[str, Any]:
        """The section `deployed` of verdict.json; `judged`: it decides the verdict."""
        reasons = self.reasons
        return {"judged": judged, "passed": not reasons, "goals": self.goals, "reasons": reasons}


def gate(parity: Path, recipe: Recipe, out: Path, smoke: bool = False) -> None:
    """Judge the measurement in `parity` (parity.json) and write verdict.json and junit.xml to `out`."""
    write_verdict(out, verdict_of(read_json(parity), recipe, smoke), recipe.name)


def verdict_of(report: dict[str, Any], recipe: Recipe, smoke: bool = False) -> dict[str, Any]:
    """The verdict on a parity report by the recipe's goals; a `smoke` run is not judged."""
    if smoke:
        missing = [row["stage"] for row in report["rows"] if row["status"] != "measured"]
        return {
            "verdict": "unjudged", "goals": [], "reasons": [SMOKE], "deployed": None, "not_measured": missing,
        }  # fmt: skip
    return judge(
        report,
        recipe.gate,
        recipe.verify.require,
        recipe.format.compute,
        float_trains=recipe.trains_float,
        served=served_by_onnxruntime(recipe),
    )


def judged(run: LoadedRun) -> dict[str, Any]:
    """The verdict of a run. One of `accept` is made anew from parity.json; raises IncomparableError where
    that gives another one.
    """
    if run.verdict["verdict"] != "accept":
        return run.verdict
    verdict = verdict_of(run.parity, run.recipe, run.smoke)
    if verdict["verdict"] != "accept":
        raise IncomparableError(
            f"{run.path / 'verdict.json'} says accept, and parity.json makes it {verdict['verdict']}: "
            f"{'; '.join(verdict['reasons'])}",
            fix=f"judge it again: qcompress gate --candidate {run.path}",
        )
    return verdict


def served_by_onnxruntime(recipe: Recipe) -> bool:
    """Whether the recipe's target runs the ONNX file itself, in ONNX Runtime's default session."""
    return find_target(recipe.build.target).backend is None


def write_verdict(out: Path, verdict: dict[str, Any], name: str) -> None:
    """A verdict in the two forms in which it lies in a run directory; `name` is the recipe's."""
    write_json(out / "verdict.json", verdict)
    write_text(out / "junit.xml", junit(verdict, name))


def judge(
    report: dict[str, Any],
    goals: Gate,
    require: list[str],
    compute: str,
    *,
    float_trains: bool = False,
    served: bool = False,
) -> dict[str, Any]:
    """The verdict on a parity report, as it stands in verdict.json.

    `float_trains`: nothing is quantized, so the float row is the model before training, and no gain over it
    is too large to be true. `served`: ONNX Runtime's default session serves the target, so the `deployed`
    row decides too.
    """
    rows = {row["stage"]: row for row in report["rows"]}
    judgement = _Judgement()
    _require(rows, require, judgement)
    measured = [row for row in report["rows"] if row["status"] == "measured"]
    if not measured:
        judgement.anomalies.append("no row was measured")
    reference = rows.get("float", {}).get("metrics") or {}
    _all_sound(measured, reference, judgement)
    _float_floor(reference, goals, judgement)
    if measured and measured[-1]["stage"] != "float":
        if not float_trains:
            _implausible(measured[-1], reference, judgement)
        _recovery(measured[-1], reference, goals, judgement)
    elif goals.recovery:
        judgement.anomalies.append("recovery goals are set, and no row after float was measured")
    flipped = rows.get("folded", {}).get("flipped")
    if flipped:
        _flips(rows["folded"], flipped, judgement)
    _distances(rows, measured, goals, compute, judgement)
    deployed = _deployed(rows.get("onnx", {}), reference, goals, compute)
    decides = served or "deployed" in goals.parity
    if decides and deployed is not None:
        judgement.take(deployed)
    _unmeasured(rows, goals, require, decides and deployed is None, judgement)
    verdict = "anomalous" if judgement.anomalies else "regression" if judgement.regressions else "accept"
    return {
        "verdict": verdict,
        "goals": judgement.goals,
        "reasons": judgement.reasons,
        "deployed": None if deployed is None else deployed.as_deployed(decides),
        "not_measured": [row["stage"] for row in report["rows"] if row["status"] != "measured"],
    }


def _all_sound(measured: list[dict[str, Any]], reference: dict[str, float], judgement: _Judgement) -> None:
    """Metrics of every measured row, and of what was measured beside it."""
    for row in measured:
        _sound(row["stage"], row["metrics"], reference, judgement)
        if row.get("deployed"):
            _sound(f"{row['stage']} (deployed)", row["deployed"]["metrics"], reference, judgement)
        for name, beside in row.get("providers", {}).items():
            if beside["status"] == "measured":
                _sound(f"{row['stage']} ({name})", beside["metrics"], reference, judgement)


def _distances(
    rows: dict[str, Any], measured: list[dict[str, Any]], goals: Gate, compute: str, judgement: _Judgement
) -> None:
    """The distance of every measured row to the row before it, by its default limits or the recipe's."""
    defaults = PARITY[compute] | ({"folded": FOLDED_NORMS} if _may_flip(rows.get("folded", {})) else {})
    held = rows.get("onnx", {}).get("held")
    if held is not None:
        _held(held, None if "onnx" in goals.parity else defaults["onnx"], TIES[compute], judgement)
    for row in measured:
        # what flips at ties make of the graph they make of its engine
        if row["stage"] in ("onnx", "engine") and held is not None and row["stage"] not in goals.parity:
            _finite(row, judgement)
            continue
        close = (row.get("distance") or {}).get("to") == BEFORE.get(row["stage"])
        default = defaults.get(row["stage"]) if close else None
        limits = goals.parity.get(row["stage"], default)
        if limits is not None:
            _parity(row, limits, judgement)


def _may_flip(folded: dict[str, Any]) -> bool:
    """Whether fold changed numbers, so that codes on a tie may round another way in the folded row."""
    return bool(folded.get("flipped") or folded.get("raised"))


def _deployed(
    onnx: dict[str, Any], reference: dict[str, float], goals: Gate, compute: str
) -> _Judgement | None:
    """Recovery and parity of ONNX Runtime's default session; None where it was not measured."""
    beside = onnx.get("deployed")
    if onnx.get("status") != "measured" or not beside:
        return None
    row, judgement = {"stage": "deployed", **beside}, _Judgement()
    _all_sound([row], reference, judgement)
    _recovery(row, reference, goals, judgement)
    limits = goals.parity.get("deployed") or _deployed_limits(onnx, compute)
    if limits is not None:
        _parity(row, limits, judgement)
    return judgement


def _deployed_limits(onnx: dict[str, Any], compute: str) -> ParityGoal | None:
    """Default limits of the deployed row; None where its distance is to a model before compression.

    Flips on ties move the deployed row as far as they move the onnx row: a few times the distance of the
    onnx row is allowed where that is more than the default, up to `DEPLOYED_FARTHEST`.
    """
    deployed, distance = onnx["deployed"], onnx.get("distance") or {}
    default = PARITY[compute].get("deployed")
    to = (deployed.get("distance") or {}).get("to")
    if default is None or to not in ("folded-integer", "folded", "onnx"):
        return None
    implied = {"folded": ["float-inputs"], "onnx": ["integer-sums"]}.get(to, [])
    roundings = {*deployed.get("roundings", ()), *implied}
    limits = [default, *(DEPLOYED_ROUNDINGS[name] for name in roundings)]
    means, agreements = [one.mean_abs for one in limits], [one.top1_agreement for one in limits]
    scale = distance.get("range") or math.nan
    if distance.get("to") == "folded" and scale > 0:
        agreement = distance.get("top1_agreement")
        means.append(min(FLIPS_AGAIN * distance["mean_abs"] / scale, DEPLOYED_FARTHEST.mean_abs))
        if agreement is not None:
            agreements.append(max(1 - FLIPS_AGAIN * (1 - agreement), DEPLOYED_FARTHEST.top1_agreement))
    known = [mean for mean in means if math.isfinite(mean)]
    return ParityGoal(mean_abs=max(known), top1_agreement=min(filter(math.isfinite, agreements)))


def _unmeasured(
    rows: dict[str, Any], goals: Gate, require: list[str], deployed_lacks: bool, judgement: _Judgement
) -> None:
    """Rows that must be judged and were not measured."""
    for stage, limits in goals.parity.items():
        if limits == ParityGoal() or stage == "deployed":
            continue
        if rows.get(stage, {}).get("status") != "measured" and stage not in require:
            judgement.anomalies.append(f"parity.{stage} has limits, and the row was not measured")
    if deployed_lacks and ("deployed" in goals.parity or rows.get("onnx", {}).get("status") == "measured"):
        judgement.anomalies.append(
            "the deployed row, ONNX Runtime's default session, is judged, and it was not measured"
        )


def _require(rows: dict[str, Any], require: list[str], judgement: _Judgement) -> None:
    for stage in require:
        row = rows.get(stage)
        if row is None or row["status"] != "measured":
            why = row["reason"] if row else "it is missing from the report"
            judgement.anomalies.append(f"required row {stage} was not measured: {why}")


def _sound(row: str, metrics: dict[str, float], reference: dict[str, float], judgement: _Judgement) -> None:
    """Every metric of float is there, and every metric is a number."""
    broken = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    judgement.anomalies += [f"{row}: {name} is {value}" for name, value in broken.items()]
    judgement.anomalies += [f"{row}: {name} was not measured" for name in reference if name not in metrics]


def _float_floor(reference: dict[str, float], goals: Gate, judgement: _Judgement) -> None:
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


def _implausible(row: dict[str, Any], reference: dict[str, float], judgement: _Judgement) -> None:
    for metric, value in row["metrics"].items():
        if metric in reference and gain_too_large(metric, value, reference[metric]):
            judgement.anomalies.append(
                f"{row['stage']}: {metric} is {value:.6g} against {reference[metric]:.6g} in float: too good"
            )


def _recovery(row: dict[str, Any], reference: dict[str, float], goals: Gate, judgement: _Judgement) -> None:
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


def _flips(row: dict[str, Any], flipped: dict[str, int], judgement: _Judgement) -> None:
    if not flipped["codes"]:
        return  # no activation is rounded, so nothing can flip
    share = flipped["flipped"] / flipped["codes"]
    _judge_distance(row, "flipped", share, FLIPPED, share <= FLIPPED, judgement)


def _held(held: dict[str, Any], limits: ParityGoal | None, share: float, judgement: _Judgement) -> None:
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
        _parity(row, limits, judgement)


def _finite(row: dict[str, Any], judgement: _Judgement) -> None:
    """A distance that is not judged must be a number all the same."""
    for name in ("max_abs", "mean_abs"):
        if math.isnan((row.get("distance") or {}).get(name, math.nan)):
            judgement.anomalies.append(f"{row['stage']}: {name} is not a number")


def _parity(row: dict[str, Any], limits: ParityGoal, judgement: _Judgement) -> None:
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
    row: dict[str, Any], name: str, value: float, limit: float, passed: bool, judgement: _Judgement
) -> None:
    stage, to = row["stage"], (row.get("distance") or {}).get("to")
    if math.isnan(value):
        judgement.anomalies.append(f"{stage}: {name} to {to} is not a number")
    text = f"{stage}: {name} to {to} is {value:.6g}, the limit is {limit:g}"
    judgement.add(f"parity.{stage}.{name}", {name: limit}, value, None, passed, text)


def _spell(goal: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in goal.items())


def exit_code(verdict: str, on_inconclusive: str = "fail") -> int:
    """Exit code of a verdict; an inconclusive one (`gate --baseline` alone) passes where the goals say so."""
    if verdict == "inconclusive" and on_inconclusive == "pass":
        return 0
    try:
        return EXIT_CODES[verdict]
    except KeyError:
        raise QcompressError(f"unknown verdict {verdict!r}") from None
