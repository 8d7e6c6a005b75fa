"""Verdict of `gate --baseline`: a candidate against a baseline, by the baseline's goals. No torch.

    anomalous     the runs are not comparable, the candidate's measurement is not valid, or the candidate's
                  recipe changes the goals
    regression    a goal is refuted: the lower bound of the loss is beyond its limit; or the candidate breaks
                  a goal of the baseline on its own ladder (parity, recovery)
    inconclusive  a goal is neither confirmed nor refuted by the samples
    accept        every goal is confirmed

The first that applies counts: a broken measurement proves nothing, and one refuted goal is enough. The
document, gate.json, is verdict.json with additional keys (`decide`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from qcompress.errors import UsageError
from qcompress.schema.goals import Gate
from qcompress.verdict.baseline.goal_tests import judge_each
from qcompress.verdict.baseline.snapshot import Snapshot
from qcompress.verdict.baseline.statistics import ALPHA, POWER
from qcompress.verdict.judge import judge

FEW = 30
"""Number of samples below which a bootstrap is unreliable; the verdict then has a note."""


def decide(baseline: Snapshot, candidate: Snapshot, goals: Gate | None = None) -> dict[str, Any]:
    """Compare a candidate with a baseline and return gate.json: verdict.json's keys, and the
    following ones.

        against       paths of baseline and candidate, their recipes, and the row that was compared
        on_inconclusive, level, power
        notes         remarks that affect no goal

    Each goal against the baseline also has `outcome` (pass, fail, inconclusive), `loss` and `allowed` in the
    goal's unit, `interval` of the loss, `detectable` (the smallest loss that these samples would have shown
    80 times in 100), `samples`, `test` and `p_value`. A goal on every value of a column has one entry for
    each value, the worst first, with `every`, the goal's name, and `slices`, their number.

    `goals` replace the baseline's; without them a candidate whose recipe states other goals is anomalous.
    Raises UsageError if the baseline has no goals for a later run.
    """
    judged = goals or baseline.goals
    if not judged.regression:
        raise UsageError(
            lacking(baseline), fix=f"{BEGIN}, or name a file with --goals:\n{suggestion(baseline)}"
        )
    anomalies = list(_other_goals(baseline, candidate, goals))
    anomalies += [
        f"{what}: let that run build and measure again" for what in (*candidate.broken, *baseline.broken)
    ]
    incomparable = _incomparable(baseline, candidate)
    anomalies += incomparable
    own_verdict = judge(candidate.parity, judged, list(baseline.require), baseline.compute,
                float_trains=baseline.float_trains, served=candidate.served)  # fmt: skip
    entries = judge_each(judged, baseline, candidate, anomalies, comparable=not incomparable)
    own_anomalous = own_verdict["verdict"] == "anomalous"
    anomalies += own_verdict["reasons"] if own_anomalous else []
    broken = [] if own_anomalous else own_verdict["reasons"]
    reasons = [*dict.fromkeys(anomalies), *broken]
    reasons += [_spell(entry) for entry in entries if entry["outcome"] != "pass"]
    return {
        "verdict": _word(bool(anomalies), bool(broken), {entry["outcome"] for entry in entries}),
        "goals": [*entries, *own_verdict["goals"]],
        "reasons": reasons,
        "not_measured": own_verdict["not_measured"],
        "against": {
            "baseline": baseline.where,
            "candidate": candidate.where,
            "recipes": [baseline.recipe, candidate.recipe],
            "row": baseline.row,
        },
        "on_inconclusive": judged.on_inconclusive,
        "level": 1 - ALPHA,
        "power": POWER,
        "notes": _notes(baseline, candidate, entries),
    }


def _word(anomalous: bool, broken: bool, outcomes: set[str]) -> str:
    """Verdict from the kinds of problems: the most severe one."""
    if anomalous:
        return "anomalous"
    if broken or "fail" in outcomes:
        return "regression"
    return "inconclusive" if "inconclusive" in outcomes else "accept"


BEGIN = "add this to the recipe, run it again (what is finished is reused), and promote that run"


def lacking(baseline: Snapshot) -> str:
    """Message for a baseline without regression goals."""
    message = f"{baseline.where} states no goal for a later run (`gate.regression`)"
    return message + ("; its goals of `recovery` are a start" if baseline.goals.recovery else "")


def suggestion(baseline: Snapshot) -> str:
    """Recipe fragment with regression goals: those of `recovery`; without any, 1 % of each set's main metric,
    rounded up to one digit.
    """
    lines = ["    gate:", "      regression:"]
    for metric, goal in baseline.goals.recovery.items():
        limits = goal.model_dump(by_alias=True, exclude_none=True)
        limits_text = ", ".join(f"{key}: {value:g}" for key, value in limits.items())
        lines.append(f"        {metric}: {{{limits_text}}}")
    if baseline.goals.recovery:
        return "\n".join(lines)
    for name, metrics in baseline.parity.get("main", {}).items():
        degradation = abs(baseline.metrics.get(f"{name}.{metrics[0]}", 1.0)) / 100
        power = 10.0 ** math.floor(math.log10(max(degradation, 1e-6)))
        limit = math.ceil(degradation / power - 1e-9) * power
        lines.append(f"        {name}.{metrics[0]}: {{max-degradation: {limit:g}}}")
    return "\n".join(lines)


# Comparability ------------------------------------------------------------------------------------


def _other_goals(baseline: Snapshot, candidate: Snapshot, goals: Gate | None) -> Iterator[str]:
    if goals is not None:
        return
    ours, theirs = (side.goals.model_dump(by_alias=True, exclude_none=True) for side in (baseline, candidate))
    changed = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
    if baseline.require != candidate.require:
        changed.append("verify.require")
    if changed:
        yield (
            f"the candidate's recipe states other goals than the baseline ({', '.join(changed)}): "
            "promote a baseline with the new ones, or name them with --goals"
        )


def _incomparable(baseline: Snapshot, candidate: Snapshot) -> list[str]:
    """Reasons why the two runs were not measured on the same samples and inputs."""
    reasons = []
    ours, theirs = baseline.parity.get("inputs", {}), candidate.parity.get("inputs", {})
    for name in baseline.samples:
        if name not in candidate.samples:
            reasons.append(
                f"evaluation set {name} was not measured: measure the candidate on the baseline's sets"
            )
            continue
        before, after = baseline.samples[name], candidate.samples[name]
        counts = [len(next(iter(columns.values()))) for columns in (before, after)]
        if counts[0] != counts[1]:
            reasons.append(
                f"{name}: {counts[1]} samples, and the baseline has {counts[0]}: measure both on the same "
                "data, with the same `verify.samples`"
            )
        elif any(before.get(known) != after.get(known) for known in baseline.known[name]):
            reasons.append(
                f"{name}: the samples have other labels than the baseline's: measure the baseline again on "
                "these data, and promote it"
            )
        elif not ours.get(name) or ours.get(name) != theirs.get(name):
            reasons.append(
                f"{name}: the model's inputs are not those of the baseline: measure both on the same data, "
                "with the same tokenizer and `task.context`"
            )
    for file in sorted(baseline.readers.keys() | candidate.readers.keys()):
        if baseline.readers.get(file) != candidate.readers.get(file):
            which = "exists on one side only" if not all(
                file in side.readers for side in (baseline, candidate)
            ) else "differs"  # fmt: skip
            reasons.append(
                f"another tokenizer or preprocessor: {file} {which}: take the baseline's, or promote a "
                "baseline with the new one"
            )
    return reasons


# Messages -----------------------------------------------------------------------------------------


def _spell(entry: dict[str, Any]) -> str:
    goal = ", ".join(f"{name} {value:g}" for name, value in entry["goal"].items())
    text = f"{entry['metric']} is {entry['value']:.6g} against {entry['baseline']:.6g} ({goal})"
    if entry["interval"] is not None:
        low, high = entry["interval"]
        text += f": a loss of {entry['loss']:.3g}, between {low:.3g} and {high:.3g}"
    if entry["outcome"] == "inconclusive":
        text += "; the samples cannot tell"
        if entry["detectable"] is not None:
            text += f", they show a loss of {entry['detectable']:.2g} 80 times in 100"
    return text


def _notes(baseline: Snapshot, candidate: Snapshot, entries: list[dict[str, Any]]) -> list[str]:
    notes = []
    names = sorted(baseline.versions.keys() & candidate.versions.keys())
    changed = [f"{name} {baseline.versions[name]} -> {candidate.versions[name]}" for name in names
               if baseline.versions[name] != candidate.versions[name]]  # fmt: skip
    if changed:
        notes.append(f"other versions: {', '.join(changed)}")
    few = sorted(
        {entry["metric"] for entry in entries if entry["test"] == "bootstrap" and entry["samples"] < FEW}
    )
    if few:
        notes.append(f"fewer than {FEW} samples, of which a bootstrap knows little: {', '.join(few)}")
    for name in dict.fromkeys(entry["every"] for entry in entries if "every" in entry):
        slices = [entry for entry in entries if entry.get("every") == name]
        notes.append(
            f"{name}: {len(slices)} slices, the worst {slices[0]['metric'].partition('=')[2]} with a loss of "
            f"{slices[0]['loss']:.3g}; the 5 % of a lower bound are shared by all"
        )
    if any(entry["metric"] == "latency_ms" for entry in entries):
        notes.append(_about_latency(baseline.latency, candidate.latency))
    if baseline.recipe != candidate.recipe:
        notes.append(f"the recipes have different names: {baseline.recipe}, {candidate.recipe}")
    return notes


def _about_latency(before: dict[str, float] | None, after: dict[str, float] | None) -> str:
    """Note on the spread of latency. The comparison of medians has no interval, because variation between
    runs (clocks, other load) was not measured.
    """
    note = "latency_ms is compared as it was measured, a median without an interval"
    if not all(side and side.keys() >= {"median", "p99", "least", "runs"} for side in (before, after)):
        return note
    spreads = [
        f"{side['least']:.4g} to {side['p99']:.4g} ms (least and 99th percentile of {side['runs']:.0f} runs)"
        for side in (before, after)
    ]
    note += f"; single runs took {spreads[0]} in the baseline and {spreads[1]} in the candidate"
    if before["least"] <= after["median"] <= before["p99"]:
        note += ", and the candidate's median lies within the baseline's spread: measure again to be sure"
    return note
