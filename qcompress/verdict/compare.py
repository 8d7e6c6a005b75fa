"""Comparison of arms with a baseline: mean, spread, paired differences, detectable difference and cost. No
torch.

An *arm* is one way of compressing a model; its runs differ in their seed and, where it was tried on several,
in their task. Arms are aligned by (task, seed), and sample by sample: runs of one task that were measured on
other samples are refused, because their difference would be one of data.

The document (`compare`):

    row, metric per task, baseline, level, power, draws
    arms         for each arm: its runs, mean / sd / min / max of each task and over the tasks, its cost
    differences  for each other arm: the pairs, their mean, the interval of a paired t test over the pairs and
                 that of a bootstrap over seeds and samples (both in `paired.py`), and the smallest
                 difference that as many pairs of this spread would have shown with a chance of 80 %
    notes        remarks: seeds left out, other machines, other float models
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qcompress.errors import IncomparableError, UsageError
from qcompress.schema.goals import METRICS
from qcompress.verdict.measured import Measured
from qcompress.verdict.paired import DRAWS, LEVEL, POWER, bootstrap_interval, detectable, t_interval
from qcompress.verdict.replicates import REPLICATES, draw_counts


def compare(
    runs: Sequence[Measured], row: str, metric: str | None = None, baseline: str | None = None
) -> dict[str, Any]:
    """Compare the runs; returns the document described above. Raises IncomparableError, or UsageError for a
    wrong choice of runs.
    """
    arms = list(dict.fromkeys(run.arm for run in runs))
    if not arms:
        raise UsageError("there is nothing to compare", fix="name run directories or folders of seeds")
    baseline = baseline or arms[0]
    if baseline not in arms:
        raise UsageError(f"no arm is called {baseline!r}", fix=f"choose one of {', '.join(arms)}")
    cells = _cells(runs)
    tasks = list(dict.fromkeys(run.task for run in runs))
    _refuse_missing(cells, arms, tasks)
    chosen = {
        task: _same_samples([cells[cell] for cell in cells if cell[1] == task], metric) for task in tasks
    }
    better = {METRICS[short] for _, short in chosen.values()}
    if len(better) > 1:
        raise UsageError(
            "higher is better on one task and lower on another, so they cannot be pooled: "
            + ", ".join(f"{task}: {short}" for task, (_, short) in chosen.items()),
            fix="compare them task by task, or choose --metric",
        )
    values = {cell: _value(run, *chosen[run.task]) for cell, run in cells.items()}
    return {
        "row": row,
        "baseline": baseline,
        "better": better.pop(),
        "level": LEVEL,
        "power": POWER,
        "draws": DRAWS,
        "tasks": [
            {
                "task": task,
                "metric": ".".join(chosen[task]),
                "samples": len(next(run for run in runs if run.task == task).samples[chosen[task][0]]["ids"]),
            }
            for task in tasks
        ],
        "arms": [_arm(arm, tasks, cells, values) for arm in arms],
        "differences": _differences(arms, baseline, tasks, cells, values, chosen),
        "notes": _notes(arms, tasks, cells) + _without_bootstrap(cells, chosen),
    }


def _without_bootstrap(cells: dict[Cell, Measured], chosen: dict[str, tuple[str, str]]) -> list[str]:
    notes = []
    for task, (name, short) in chosen.items():
        runs = [run for run in cells.values() if run.task == task]
        if short not in REPLICATES:
            notes.append(f"{task}: {short} has no bootstrap interval")
        elif not all(_gives(run, name, short) for run in runs):
            notes.append(f"{task}: the per-sample results do not give {short}, so no bootstrap")
    return notes


Cell = tuple[str, str, int]
"""Arm, task, seed."""


def _cells(runs: Iterable[Measured]) -> dict[Cell, Measured]:
    cells: dict[Cell, Measured] = {}
    for run in runs:
        cell = (run.arm, run.task, run.seed)
        if cell in cells:
            raise UsageError(
                f"{cells[cell].where} and {run.where} are both seed {run.seed} of {run.arm} on {run.task}",
                fix="name one of them, or tell the arms apart: NAME=RUN",
            )
        for earlier in cells.values():
            if (earlier.arm, earlier.task) == (run.arm, run.task) and earlier.settings != run.settings:
                wrong = [key for key in run.settings if run.settings[key] != earlier.settings.get(key)]
                raise UsageError(
                    f"{earlier.where} and {run.where} are both {run.arm}, and differ in more than their "
                    f"seed: {', '.join(wrong)}",
                    fix="tell the arms apart: NAME=RUN",
                )
        cells[cell] = run
    return cells


def _refuse_missing(cells: dict[Cell, Measured], arms: list[str], tasks: list[str]) -> None:
    for arm in arms:
        missing = [task for task in tasks if not any(cell[:2] == (arm, task) for cell in cells)]
        if missing:
            raise IncomparableError(
                f"{arm} was not measured on {', '.join(missing)}, and another arm was",
                fix="name runs of every arm on the same tasks",
            )


def _same_samples(runs: list[Measured], metric: str | None) -> tuple[str, str]:
    """Evaluation set and metric of a task; raises IncomparableError unless all its runs have the same
    samples.
    """
    name, short = runs[0].split(metric)
    first = runs[0].identity(name)
    for run in runs[1:]:
        if run.split(metric) != (name, short):
            raise IncomparableError(f"{run.where} and {runs[0].where} measure other metrics on {run.task}")
        identity = run.identity(name)
        wrong = [key for key in first | identity if first.get(key) != identity.get(key)]
        if wrong:
            raise IncomparableError(
                f"{runs[0].where} and {run.where} were measured on other samples of {run.task}: "
                f"{len(first['ids'])} and {len(identity['ids'])} of them, which differ in {', '.join(wrong)}",
                fix="measure both on the same data, context and limits, with the same tokenizer",
            )
    return name, short


def _value(run: Measured, name: str, short: str) -> float:
    value = run.metrics[f"{name}.{short}"]
    if not math.isfinite(value):
        raise IncomparableError(f"{run.where}: {name}.{short} is {value}", fix="leave this run out")
    return value


def _arm(
    arm: str, tasks: list[str], cells: dict[Cell, Measured], values: dict[Cell, float]
) -> dict[str, Any]:
    """Mean and spread by task; pooled over tasks: the mean of each seed, so that sd is that of a study's
    result.
    """
    by_task = []
    for task in tasks:
        seeds = [cell[2] for cell in cells if cell[:2] == (arm, task)]
        entry = {"task": task, "seeds": seeds, **spread([values[arm, task, seed] for seed in seeds])}
        costs = [cells[arm, task, seed].cost for seed in seeds]
        for name in ("updates", "block_updates", "passes", "seconds"):
            entry[name] = statistics.fmean(getattr(cost, name) for cost in costs)
        by_task.append(entry)
    common = sorted(set.intersection(*(set(entry["seeds"]) for entry in by_task)))
    pooled = [statistics.fmean(values[arm, task, seed] for task in tasks) for seed in common]
    return {"arm": arm, "tasks": by_task, "pooled": {"seeds": common, **spread(pooled)} if pooled else None}


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (n - 1; None for one value), extremes and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "min": min(values), "max": max(values),
            "values": values}  # fmt: skip


def _differences(
    arms: list[str],
    baseline: str,
    tasks: list[str],
    cells: dict[Cell, Measured],
    values: dict[Cell, float],
    chosen: dict[str, tuple[str, str]],
) -> list[dict[str, Any]]:
    drawn = {} if len(arms) == 1 else _draw(tasks, cells, chosen)
    entries = []
    for arm in arms:
        pairs = [
            (task, seed)
            for task in tasks
            for other_arm, on, seed in cells
            if (other_arm, on) == (arm, task) and (baseline, task, seed) in cells
        ]
        if arm == baseline:
            continue
        if not pairs:
            raise IncomparableError(
                f"{arm} and {baseline} have no seed in common", fix="run both with the same --seeds"
            )
        differences = [values[arm, task, seed] - values[baseline, task, seed] for task, seed in pairs]
        complete = all((other_arm, *pair) in drawn for other_arm in (arm, baseline) for pair in pairs)
        replicates = [
            np.stack([drawn[arm, on, seed] - drawn[baseline, on, seed] for on, seed in pairs if on == task])
            for task in dict.fromkeys(task for task, _ in pairs)
            if complete
        ]
        entries.append(
            {
                "arm": arm,
                "pairs": [
                    {"task": task, "seed": seed, "difference": difference}
                    for (task, seed), difference in zip(pairs, differences, strict=True)
                ],
                "mean": statistics.fmean(differences),
                "sd": statistics.stdev(differences) if len(differences) > 1 else None,
                "t_interval": t_interval(differences),
                "bootstrap_interval": _finite(bootstrap_interval(replicates)),
                "detectable": detectable(differences),
            }
        )
    return entries


def _finite(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return interval if interval is not None and all(map(math.isfinite, interval)) else None


def _draw(
    tasks: list[str], cells: dict[Cell, Measured], chosen: dict[str, tuple[str, str]]
) -> dict[Cell, np.ndarray]:
    """Bootstrap replicates of the metric of every run on common draws, [draws] each."""
    drawn: dict[Cell, np.ndarray] = {}
    for number, task in enumerate(tasks):
        counts: dict[int, np.ndarray] = {}  # by number of samples; those of one task at a time are in memory
        for cell, run in cells.items():
            name, short = chosen[run.task]
            if run.task != task or short not in REPLICATES or not _gives(run, name, short):
                continue
            samples = len(run.samples[name]["ids"])
            if samples not in counts:
                counts[samples] = draw_counts(samples, DRAWS, number)
            drawn[cell] = REPLICATES[short](run.columns(name), counts[samples])
    return drawn


def _gives(run: Measured, name: str, short: str) -> bool:
    """True if the metric can be recomputed from the per-sample results. Those of a study have six digits and
    no predictions of the float model.
    """
    columns, once = run.columns(name), np.ones((1, len(run.samples[name]["ids"])))
    try:
        again = float(REPLICATES[short](columns, once)[0])
    except KeyError:
        return False
    return math.isclose(again, run.metrics[f"{name}.{short}"], rel_tol=1e-4, abs_tol=1e-6)


def _notes(arms: list[str], tasks: list[str], cells: dict[Cell, Measured]) -> list[str]:
    notes = []
    for task in tasks:
        by_arm = {arm: {cell[2] for cell in cells if cell[:2] == (arm, task)} for arm in arms}
        alone = set.union(*by_arm.values()) - set.intersection(*by_arm.values())
        if alone:
            seeds = ", ".join(map(str, sorted(alone)))
            notes.append(f"{task}: not every arm has seed {seeds}; a pair needs both")
        starts = {run.start for cell, run in cells.items() if cell[1] == task}
        if len(starts) > 1:
            notes.append(f"{task}: the runs start from {len(starts)} different float models")
    machines = sorted({run.machine for run in cells.values()})
    if len(machines) > 1:
        notes.append(f"seconds are from different machines: {'; '.join(machines)}")
    return notes
