"""One row of the parity table: a runner on the evaluation samples, and its distance from the previous row.

The logits that a distance needs lie on disk, in `logits-<row>.npy`: one model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompress.parity.distance import Distance, keep_logits
from qcompress.parity.runners import Runner
from qcompress.schema.recipe import Recipe
from qcompress.schema.tasks import Task
from qcompress.system.reporter import Reporter
from qcompress.tasks import TASKS

Results = dict[str, list[dict[str, Any]]]
"""Per-sample results by set."""


@dataclass(frozen=True)
class Samples:
    """Evaluation samples by set, and the number of samples of the first set that are compared logit by
    logit.
    """

    task: Task
    """The recipe's task, with the checkpoint's labels."""
    sets: dict[str, list[Any]]
    compared: int
    positions: int
    """Largest number of positions with logits in one sample."""
    slices: dict[str, dict[str, list[str | None]]] = field(default_factory=dict)
    """For sets with slices: the value of each sample, by column; None for a sample without one."""

    @property
    def first(self) -> str:
        return next(iter(self.sets))


@dataclass(frozen=True)
class Measured:
    """Measurement of one row: metrics, per-sample results by set, distance from the previous row."""

    metrics: dict[str, float]
    samples: Results
    distance: dict[str, object] | None


def measure_row(
    stage: str, runner: Runner, recipe: Recipe, samples: Samples, reference: Results | None,
    previous: str | None, out: Path, reporter: Reporter, keep: bool = True,
) -> Measured:  # fmt: skip
    """Run all samples; compare the first ones with the logits that the previous row left on disk.

    `reference`: the float row's results, against which agreement is measured; None for the float row itself.
    """
    task, size = TASKS[recipe.task.name], recipe.verify.batch_size
    distance = Distance(to=previous, ranked=samples.task.ranked) if previous else None
    results: Results = {}
    total = sum(-(-len(windows) // size) for windows in samples.sets.values())
    with reporter.bar(f"verify {stage}", total) as bar:
        for name, windows in samples.sets.items():
            measured: dict[int, dict[str, Any]] = {}
            compared = samples.compared if name == samples.first else 0
            for rows in batches(task, windows, size):
                batch = [windows[row] for row in rows]
                logits = runner(task.collate(batch))
                measured |= zip(rows, task.measure(batch, logits), strict=True)
                bar.advance(name)
                to_compare = {
                    row: task.compared(windows[row], row_logits)
                    for row, row_logits in zip(rows, logits, strict=True)
                    if row < compared
                }
                if distance is not None:
                    distance.add_kept(out / f"logits-{previous}.npy", to_compare)
                if keep:
                    shape = (samples.compared, samples.positions, logits.shape[-1])
                    keep_logits(out / f"logits-{stage}.npy", shape, to_compare)
            in_order = [measured[row] for row in range(len(windows))]
            results[name] = task.joined(in_order, reference.get(name) if reference else None)
    against = reference or (results if stage == "float" else {})
    metrics = {
        f"{name}.{metric}": value
        for name, by_sample in results.items()
        for metric, value in task.metrics(by_sample, samples.task, against.get(name)).items()
    }
    return Measured(metrics, results, distance.to_json() if distance else None)


def batches(task: Any, windows: list[Any], size: int) -> Iterator[list[int]]:
    """Sample indices of each batch, the longest samples first, so that a batch has little padding and an
    out-of-memory error comes at once. Samples of equal length stay in order.
    """
    order = sorted(range(len(windows)), key=lambda row: -task.length(windows[row]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
