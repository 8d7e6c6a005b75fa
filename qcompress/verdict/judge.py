"""Verdict on a parity report by the recipe's goals. No torch; measures nothing.

    accept       every goal holds
    regression   a parity or a recovery goal is broken; for a target that           exit 3
                 ONNX Runtime serves, of the deployed row too
    unjudged     a smoke run: all stages ran, and nothing is judged                  exit 0
    anomalous    the measurement is not valid: a number that is not finite,         exit 4
                 logits that are all equal, a required row or metric that is
                 missing, a float model below its own floor, a gain too large
                 to be true

Anomalous outranks regression: a broken measurement proves nothing about the model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.errors import IncomparableError, QcompressError
from qcompress.schema.goals import DEPLOYED_FARTHEST, DEPLOYED_ROUNDINGS, PARITY, Gate, ParityGoal
from qcompress.schema.recipe import Recipe
from qcompress.schema.targets import find_target
from qcompress.system.artifacts import write_json, write_text
from qcompress.verdict.junit import junit
from qcompress.verdict.row_checks import (
    Judgement,
    check_finite,
    check_flips,
    check_float_floor,
    check_forced_codes,
    check_gain,
    check_held_distance,
    check_metrics,
    check_parity,
    check_recovery,
)

if TYPE_CHECKING:
    from qcompress.verdict.run_directory import LoadedRun

EXIT_CODES = {"accept": 0, "unjudged": 0, "regression": 3, "anomalous": 4, "inconclusive": 3}


SMOKE = "a smoke run: all stages run here; two blocks and little data say nothing about the model"


TIES = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.0}
"""Largest share of a quantization point's codes that may differ while the codes before it are equal, all on
rounding ties. Of 114 graphs (recipes/matrix) the largest was 4e-5 in fp32 and 1e-2 in fp16; a norm that is
0.2 % off makes 5e-2 there.
"""


FOLDED_NORMS = ParityGoal(mean_abs=2e-3, top1_agreement=0.99)
"""Limits of the folded row after batch norms were folded or scales raised, where it was not compared from the
trained model's codes. ResNet-20 on CIFAR-10, W8A8: mean_abs 4e-4.
"""


FLIPS_AGAIN = 4
"""Largest distance of the deployed row in multiples of the onnx row's, if flips on rounding ties
move both.
"""


BEFORE = {"folded": "trained", "onnx": "folded", "engine": "onnx"}
"""The row to which each default limit measures the distance. If that row was not measured, the distance is to
an earlier one and shows the loss by compression, which the recovery goals judge.
"""


def verdict_of(report: dict[str, Any], recipe: Recipe, smoke: bool = False) -> dict[str, Any]:
    """Judge a parity report by the recipe's goals; a `smoke` run is not judged."""
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
    """Verdict of a finished run. An `accept` is recomputed from parity.json; raises IncomparableError if the
    recomputed verdict differs.
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
    """True if the recipe's target runs the ONNX file in ONNX Runtime's default session."""
    return find_target(recipe.build.target).backend is None


def write_verdict(out: Path, verdict: dict[str, Any], name: str) -> None:
    """Write a verdict as verdict.json and junit.xml; `name` is the recipe's name."""
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
    """Judge a parity report; returns the content of verdict.json.

    `float_trains`: nothing is quantized, so the float row is the model before training, and no gain over it
    is too large to be true. `served`: ONNX Runtime's default session serves the target, so the `deployed`
    row decides too.
    """
    rows = {row["stage"]: row for row in report["rows"]}
    judgement = Judgement()
    _require(rows, require, judgement)
    measured = [row for row in report["rows"] if row["status"] == "measured"]
    if not measured:
        judgement.anomalies.append("no row was measured")
    reference = rows.get("float", {}).get("metrics") or {}
    check_metrics(measured, reference, judgement)
    check_float_floor(reference, goals, judgement)
    if measured and measured[-1]["stage"] != "float":
        if not float_trains:
            check_gain(measured[-1], reference, judgement)
        check_recovery(measured[-1], reference, goals, judgement)
    elif goals.recovery:
        judgement.anomalies.append("recovery goals are set, and no row after float was measured")
    flipped = rows.get("folded", {}).get("flipped")
    if flipped:
        check_flips(rows["folded"], flipped, judgement)
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


def _distances(
    rows: dict[str, Any], measured: list[dict[str, Any]], goals: Gate, compute: str, judgement: Judgement
) -> None:
    """Check the distance of every measured row to the row before it, by default limits or the recipe's."""
    defaults = PARITY[compute] | ({"folded": FOLDED_NORMS} if _may_flip(rows.get("folded", {})) else {})
    held = {stage: rows[stage]["held"] for stage in ("folded", "onnx") if rows.get(stage, {}).get("held")}
    for stage, measurement in held.items():
        limits = None if stage in goals.parity else defaults["onnx"]
        if rows[stage].get("raised"):  # a raised scale moves codes by more than a tie
            check_held_distance(stage, measurement, limits, judgement)
        else:
            check_forced_codes(stage, measurement, limits, TIES[compute], judgement)
    for row in measured:
        # flips on rounding ties move the engine row as they move the onnx row
        if {"engine": "onnx"}.get(row["stage"], row["stage"]) in held and row["stage"] not in goals.parity:
            check_finite(row, judgement)
            continue
        close = (row.get("distance") or {}).get("to") == BEFORE.get(row["stage"])
        default = defaults.get(row["stage"]) if close else None
        limits = goals.parity.get(row["stage"], default)
        if limits is not None:
            check_parity(row, limits, judgement)


def _may_flip(folded: dict[str, Any]) -> bool:
    """True if fold changed numbers, so that codes on rounding ties may differ in the folded row."""
    return bool(folded.get("flipped") or folded.get("raised"))


def _deployed(
    onnx: dict[str, Any], reference: dict[str, float], goals: Gate, compute: str
) -> Judgement | None:
    """Check recovery and parity of ONNX Runtime's default session; None if it was not measured."""
    beside = onnx.get("deployed")
    if onnx.get("status") != "measured" or not beside:
        return None
    row, judgement = {"stage": "deployed", **beside}, Judgement()
    check_metrics([row], reference, judgement)
    check_recovery(row, reference, goals, judgement)
    limits = goals.parity.get("deployed") or _deployed_limits(onnx, compute)
    if limits is not None:
        check_parity(row, limits, judgement)
    return judgement


def _deployed_limits(onnx: dict[str, Any], compute: str) -> ParityGoal | None:
    """Default limits of the deployed row; None if its distance is to a model before compression.

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
    means, agreements = [limit.mean_abs for limit in limits], [limit.top1_agreement for limit in limits]
    scale = distance.get("range") or math.nan
    if distance.get("to") == "folded" and scale > 0:
        agreement = distance.get("top1_agreement")
        means.append(min(FLIPS_AGAIN * distance["mean_abs"] / scale, DEPLOYED_FARTHEST.mean_abs))
        if agreement is not None:
            agreements.append(max(1 - FLIPS_AGAIN * (1 - agreement), DEPLOYED_FARTHEST.top1_agreement))
    known = [mean for mean in means if math.isfinite(mean)]
    return ParityGoal(mean_abs=max(known), top1_agreement=min(filter(math.isfinite, agreements)))


def _unmeasured(
    rows: dict[str, Any], goals: Gate, require: list[str], deployed_lacks: bool, judgement: Judgement
) -> None:
    """Report rows that must be judged and were not measured."""
    for stage, limits in goals.parity.items():
        if limits == ParityGoal() or stage == "deployed":
            continue
        if rows.get(stage, {}).get("status") != "measured" and stage not in require:
            judgement.anomalies.append(f"parity.{stage} has limits, and the row was not measured")
    if deployed_lacks and ("deployed" in goals.parity or rows.get("onnx", {}).get("status") == "measured"):
        judgement.anomalies.append(
            "the deployed row, ONNX Runtime's default session, is judged, and it was not measured"
        )


def _require(rows: dict[str, Any], require: list[str], judgement: Judgement) -> None:
    for stage in require:
        row = rows.get(stage)
        if row is None or row["status"] != "measured":
            why = row["reason"] if row else "it is missing from the report"
            judgement.anomalies.append(f"required row {stage} was not measured: {why}")


def exit_code(verdict: str, on_inconclusive: str = "fail") -> int:
    """Exit code of a verdict; `inconclusive` (from `gate --baseline` only) passes if the goals allow it."""
    if verdict == "inconclusive" and on_inconclusive == "pass":
        return 0
    try:
        return EXIT_CODES[verdict]
    except KeyError:
        raise QcompressError(f"unknown verdict {verdict!r}") from None
