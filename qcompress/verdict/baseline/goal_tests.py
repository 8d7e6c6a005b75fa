"""Each goal against a baseline, with the entry that it has in gate.json. No torch."""

from __future__ import annotations

import math
from typing import Any

from qcompress.parity.sample_results import REFERENCE, Columns
from qcompress.schema.goals import RESOURCES, Gate, Goal, gain_too_large
from qcompress.tasks.slices import EVERY, MOST
from qcompress.verdict.baseline.snapshot import Standing
from qcompress.verdict.baseline.statistics import Loss, as_measured, loss_of


def judge_each(
    goals: Gate, baseline: Standing, candidate: Standing, anomalies: list[str], comparable: bool
) -> list[dict[str, Any]]:
    """Each goal against the baseline; what makes one anomalous is added to `anomalies`. Metrics of runs that
    are not `comparable` are left out, and what they take is not.
    """
    found = []
    for name, goal in goals.regression.items():
        if name in RESOURCES:
            found += _resource(name, goal, baseline, candidate, anomalies)
        elif comparable:
            found += _metric(name, goal, baseline, candidate, anomalies)
    return found


# Metrics ------------------------------------------------------------------------------------------


def _metric(
    name: str, goal: Goal, baseline: Standing, candidate: Standing, anomalies: list[str]
) -> list[dict[str, Any]]:
    """The goal's entries: one, or one for each slice, the worst first; none where it cannot be judged, and
    the reason is among the anomalies.
    """
    path, _, part = name.partition("@")
    section, _, metric = path.rpartition(".")
    if wrong := _unmeasured(name, path, section, baseline, candidate):
        anomalies.append(wrong)
        return []
    values = [one.metrics[path] for one in (baseline, candidate)]
    if gain_too_large(metric, values[1], values[0]):
        anomalies.append(
            f"{path} is {values[1]:.6g} against {values[0]:.6g} in the baseline: too good; look at both, and "
            "promote a new baseline if it is true"
        )
    sides = [one.columns(section) for one in (baseline, candidate)]
    if metric == "agreement" and any(REFERENCE not in columns for columns in sides):
        anomalies.append(
            f"{path}: the float model's answers are not there to agree with: measure the row float too"
        )
        return []
    try:
        if part:
            return _slices(path, part, goal, baseline, candidate, sides)
        found = loss_of(metric, goal, *sides)
    except UnjudgedError as reason:
        anomalies.append(f"{name}: {reason}")
        return []
    except (KeyError, TypeError, ValueError) as error:
        anomalies.append(
            f"{name}: the per-sample results do not give it ({type(error).__name__}: {error}): measure both "
            "again"
        )
        return []
    if not math.isclose(found.value, values[1], rel_tol=1e-6, abs_tol=1e-9):
        anomalies.append(
            f"{path} is {values[1]:.6g} in parity.json, and {found.value:.6g} by the candidate's samples: "
            "measure it again (qcompress verify)"
        )
    return [_entry(name, goal, found, len(next(iter(sides[0].values()))))]


def _unmeasured(name: str, path: str, section: str, baseline: Standing, candidate: Standing) -> str | None:
    """Why a metric is no number in both runs."""
    missing = [one.where for one in (baseline, candidate) if path not in one.metrics]
    if section not in baseline.samples or missing:
        where = ", ".join(missing) or baseline.where
        return f"{name} was not measured in {where}: measure it again, or drop the goal from the baseline's"
    for side, one in (("baseline", baseline), ("candidate", candidate)):
        if not math.isfinite(value := one.metrics[path]):
            return f"{path} of the {side} is {value}: `qcompress verify RUN --layers` shows where it begins"
    return None


class UnjudgedError(Exception):
    """Why a goal on a part of a set cannot be judged."""


def _slices(
    path: str, part: str, goal: Goal, baseline: Standing, candidate: Standing, sides: list[Columns]
) -> list[dict[str, Any]]:
    section, _, metric = path.rpartition(".")
    column, _, wanted = part.partition("=")
    places = _places(column, wanted, section, baseline, candidate)
    found = []
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
        found.append(entry | ({"every": f"{path}@{part}", "slices": len(places)} if wanted == EVERY else {}))
    return sorted(found, key=lambda entry: -entry["loss"])


def _places(
    column: str, wanted: str, section: str, baseline: Standing, candidate: Standing
) -> dict[str, list[int]]:
    """Places of the samples of each value that is wanted. A user's columns are the baseline's: the candidate
    was measured on the same inputs, and need not keep them.
    """
    own = baseline.slices.get(section, {})
    theirs = candidate.slices.get(section, {}).get(column)
    if column in own and theirs is not None and theirs != own[column]:
        raise UnjudgedError(
            f"the samples have other values of {column} than the baseline's: promote a baseline with the new "
            "ones"
        )
    if column not in own and column not in baseline.samples[section]:
        kept = ", ".join(sorted((*own, *baseline.known[section]))) or "none"
        raise UnjudgedError(
            f"the baseline keeps no column {column} of {section}, only {kept}: write `slices: [{column}]`, "
            "measure it again and promote it"
        )
    if column in own:
        named: list[tuple[str | None, ...]] = [(cell,) for cell in own[column]]
    else:
        labels = baseline.task.get("labels") if column == "label" else None
        named = [_names(cell, labels) for cell in baseline.samples[section][column]]
    found: dict[str, list[int]] = {}
    for place, names in enumerate(named):
        value = names[0] if wanted == EVERY else wanted
        if value is not None and value in names:
            found.setdefault(value, []).append(place)
    if not found:
        there = sorted({names[0] for names in named} - {None})[:12]
        raise UnjudgedError(
            f"no sample of the baseline has {column}={wanted}: name one of {', '.join(there)}"
        )
    if len(found) > MOST:
        raise UnjudgedError(
            f"{column} has {len(found)} values, and `{EVERY}` stands for at most {MOST}: name some"
        )
    return dict(sorted(found.items()))


def _names(cell: Any, labels: list[str] | None) -> tuple[str, ...]:
    """What a goal may call a cell: a label by its name or its number."""
    named = labels and isinstance(cell, int) and 0 <= cell < len(labels)
    return (labels[cell], str(cell)) if named else (str(cell),)


# Resources ----------------------------------------------------------------------------------------


def _resource(
    name: str, goal: Goal, baseline: Standing, candidate: Standing, anomalies: list[str]
) -> list[dict[str, Any]]:
    on_device = name in ("latency_ms", "device_memory_bytes")
    missing = [one.where for one in (baseline, candidate) if name not in one.resources]
    if missing:
        fix = (
            "take in what the device measured (qcompress verify RUN --engine engine.json)"
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


def _entry(name: str, goal: Goal, found: Loss, samples: int | None) -> dict[str, Any]:
    return {
        "metric": name,
        "goal": goal.model_dump(by_alias=True, exclude_none=True),
        "value": found.value,
        "baseline": found.baseline,
        "loss": found.loss,
        "allowed": found.allowed,
        "interval": list(found.interval) if found.interval else None,
        "detectable": found.detectable,
        "samples": samples,
        "test": found.test,
        "p_value": found.p_value,
        "outcome": found.outcome,
        "passed": found.outcome == "pass",
    }
