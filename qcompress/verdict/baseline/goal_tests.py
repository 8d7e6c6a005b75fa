"""Tests each goal against a baseline and makes its entry in gate.json. No torch."""

from __future__ import annotations

import math
from typing import Any

from qcompress.parity.sample_results import REFERENCE, Columns
from qcompress.schema.goals import RESOURCES, Gate, Goal, gain_too_large
from qcompress.tasks.slices import EVERY, MOST
from qcompress.verdict.baseline.snapshot import Snapshot
from qcompress.verdict.baseline.statistics import Loss, as_measured, loss_of


def judge_each(
    goals: Gate, baseline: Snapshot, candidate: Snapshot, anomalies: list[str], comparable: bool
) -> list[dict[str, Any]]:
    """Test each goal against the baseline and return the entries; anomalies are appended to `anomalies`. If
    the runs are not `comparable`, metrics are skipped and resources are still tested.
    """
    entries = []
    for name, goal in goals.regression.items():
        if name in RESOURCES:
            entries += _resource(name, goal, baseline, candidate, anomalies)
        elif comparable:
            entries += _metric(name, goal, baseline, candidate, anomalies)
    return entries


# Metrics ------------------------------------------------------------------------------------------


def _metric(
    name: str, goal: Goal, baseline: Snapshot, candidate: Snapshot, anomalies: list[str]
) -> list[dict[str, Any]]:
    """Entries of a goal on a metric: one, or one for each slice, the worst first. If the goal cannot be
    tested, no entry, and the reason is appended to `anomalies`.
    """
    path, _, slice_name = name.partition("@")
    section, _, metric = path.rpartition(".")
    if wrong := _unmeasured(name, path, section, baseline, candidate):
        anomalies.append(wrong)
        return []
    values = [side.metrics[path] for side in (baseline, candidate)]
    if gain_too_large(metric, values[1], values[0]):
        anomalies.append(
            f"{path} is {values[1]:.6g} against {values[0]:.6g} in the baseline: too good; look at both, and "
            "promote a new baseline if it is true"
        )
    sides = [side.columns(section) for side in (baseline, candidate)]
    if metric == "agreement" and any(columns.keys().isdisjoint((REFERENCE, "cosine")) for columns in sides):
        anomalies.append(
            f"{path}: the float model's answers are not there to agree with: measure the row float too"
        )
        return []
    try:
        if slice_name:
            return _slices(path, slice_name, goal, baseline, candidate, sides)
        loss = loss_of(metric, goal, *sides)
    except UnjudgedError as reason:
        anomalies.append(f"{name}: {reason}")
        return []
    except (KeyError, TypeError, ValueError) as error:
        anomalies.append(
            f"{name}: the per-sample results do not give it ({type(error).__name__}: {error}): measure both "
            "again"
        )
        return []
    if not math.isclose(loss.value, values[1], rel_tol=1e-6, abs_tol=1e-9):
        anomalies.append(
            f"{path} is {values[1]:.6g} in parity.json, and {loss.value:.6g} by the candidate's samples: "
            "measure it again (qcompress verify)"
        )
    return [_entry(name, goal, loss, len(next(iter(sides[0].values()))))]


def _unmeasured(name: str, path: str, section: str, baseline: Snapshot, candidate: Snapshot) -> str | None:
    """Reason why a metric is not a finite number in both runs; None if it is."""
    missing = [run.where for run in (baseline, candidate) if path not in run.metrics]
    if section not in baseline.samples or missing:
        where = ", ".join(missing) or baseline.where
        return f"{name} was not measured in {where}: measure it again, or drop the goal from the baseline's"
    for side, run in (("baseline", baseline), ("candidate", candidate)):
        if not math.isfinite(value := run.metrics[path]):
            return f"{path} of the {side} is {value}: `qcompress verify RUN --layers` shows where it begins"
    return None


class UnjudgedError(Exception):
    """A goal on slices cannot be tested; the message is the reason."""


def _slices(
    path: str, slice_name: str, goal: Goal, baseline: Snapshot, candidate: Snapshot, sides: list[Columns]
) -> list[dict[str, Any]]:
    section, _, metric = path.rpartition(".")
    column, _, wanted = slice_name.partition("=")
    places = _places(column, wanted, section, baseline, candidate)
    entries = []
    for value, chosen in places.items():
        few = [{key: [cells[place] for place in chosen] for key, cells in side.items()} for side in sides]
        entry = _entry(
            f"{path}@{column}={value}", goal, loss_of(metric, goal, *few, len(places)), len(chosen)
        )
        for side, number in (("baseline", entry["baseline"]), ("candidate", entry["value"])):
            if not math.isfinite(number):
                raise UnjudgedError(
                    f"{metric} of {value} is {number} in the {side}: {len(chosen)} samples do not define it; "
                    "judge another metric by slices"
                )
        entries.append(
            entry | ({"every": f"{path}@{slice_name}", "slices": len(places)} if wanted == EVERY else {})
        )
    return sorted(entries, key=lambda entry: -entry["loss"])


def _places(
    column: str, wanted: str, section: str, baseline: Snapshot, candidate: Snapshot
) -> dict[str, list[int]]:
    """Indices of the samples of each requested slice value. Slice columns are the baseline's: the candidate
    was measured on the same inputs and need not declare them.
    """
    baseline_slices = baseline.slices.get(section, {})
    candidate_cells = candidate.slices.get(section, {}).get(column)
    if (
        column in baseline_slices
        and candidate_cells is not None
        and candidate_cells != baseline_slices[column]
    ):
        raise UnjudgedError(
            f"the samples have other values of {column} than the baseline's: promote a baseline with the new "
            "ones"
        )
    if column not in baseline_slices and column not in baseline.samples[section]:
        kept = ", ".join(sorted((*baseline_slices, *baseline.known[section]))) or "none"
        raise UnjudgedError(
            f"the baseline keeps no column {column} of {section}, only {kept}: write `slices: [{column}]`, "
            "measure it again and promote it"
        )
    if column in baseline_slices:
        named: list[tuple[str | None, ...]] = [(cell,) for cell in baseline_slices[column]]
    else:
        labels = baseline.task.get("labels") if column == "label" else None
        named = [_names(cell, labels) for cell in baseline.samples[section][column]]
    by_value: dict[str, list[int]] = {}
    for place, names in enumerate(named):
        value = names[0] if wanted == EVERY else wanted
        if value is not None and value in names:
            by_value.setdefault(value, []).append(place)
    if not by_value:
        present = sorted({names[0] for names in named} - {None})[:12]
        raise UnjudgedError(
            f"no sample of the baseline has {column}={wanted}: name one of {', '.join(present)}"
        )
    if len(by_value) > MOST:
        raise UnjudgedError(
            f"{column} has {len(by_value)} values, and `{EVERY}` stands for at most {MOST}: name single "
            "values"
        )
    return dict(sorted(by_value.items()))


def _names(cell: Any, labels: list[str] | None) -> tuple[str, ...]:
    """Names by which a goal may refer to a cell: a label's name and its number."""
    named = labels and isinstance(cell, int) and 0 <= cell < len(labels)
    return (labels[cell], str(cell)) if named else (str(cell),)


# Resources ----------------------------------------------------------------------------------------


def _resource(
    name: str, goal: Goal, baseline: Snapshot, candidate: Snapshot, anomalies: list[str]
) -> list[dict[str, Any]]:
    on_device = name in ("latency_ms", "device_memory_bytes")
    missing = [run.where for run in (baseline, candidate) if name not in run.resources]
    if missing:
        fix = (
            "import the device's measurement (qcompress verify RUN --engine engine.json)"
            if on_device
            else "let that run build and export again"
        )
        anomalies.append(f"{name} was not measured in {', '.join(missing)}: {fix}, or drop the goal")
        return []
    if on_device and baseline.device != candidate.device:
        anomalies.append(
            f"{name} was measured on {candidate.device}, and the baseline's on {baseline.device}: measure "
            "both on one device"
        )
        return []
    return [_entry(name, goal, as_measured(goal, baseline.resources[name], candidate.resources[name]), None)]


def _entry(name: str, goal: Goal, loss: Loss, samples: int | None) -> dict[str, Any]:
    return {
        "metric": name,
        "goal": goal.model_dump(by_alias=True, exclude_none=True),
        "value": loss.value,
        "baseline": loss.baseline,
        "loss": loss.loss,
        "allowed": loss.allowed,
        "interval": list(loss.interval) if loss.interval else None,
        "detectable": loss.detectable,
        "samples": samples,
        "test": loss.test,
        "p_value": loss.p_value,
        "outcome": loss.outcome,
        "passed": loss.outcome == "pass",
    }
