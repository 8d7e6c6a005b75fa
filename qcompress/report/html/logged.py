"""How training went, as far as log.jsonl and the manifest say.

A run logs a line every ten seconds, such as `finetune: 24/60  loss 3.1339  2395 tokens/s  15 s left`. On a
terminal a bar takes their place, and the log has none.
"""

from __future__ import annotations

import math
import re
from typing import Any

from qcompress.report.html import charts
from qcompress.report.html.evidence import Evidence
from qcompress.report.html.figures import computed
from qcompress.report.html.parts import Chart, Section, Table, table

LINE = re.compile(r"(?P<phase>[^:]+): (?P<update>\d+)/\d+  (?:.*  )?loss (?P<loss>\S+)(?:  |$)")

NAMES = ("name", "block")
NUMBERS = ("steps", "passes", "before", "after", "last_loss")
"""What manifest.json may know of a phase."""


def training(run: Evidence) -> Section:
    """Loss curves, and what each phase did."""
    curves = _curves(run.log())
    lines = (
        ["The loss as it was logged, at most every ten seconds."]
        if curves
        else ["The log has too few losses (on a terminal none is logged), so there is no loss curve."]
    )
    lines.append("The log does not record learned scales, so there are no curves of them.")
    charted = (_chart(curves),) if curves else ()
    return Section("training", "Training", tuple(lines), tables=_phases(run), charts=charted)


def _curves(log: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """For each phase (update, loss) of the training that was logged last; one point makes no curve."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in log:
        said = LINE.match(str(line.get("text", "")))
        if said is None:
            continue
        try:
            loss = float(said["loss"])
        except ValueError:
            continue
        points, update = found.setdefault(said["phase"], []), int(said["update"])
        if points and update < points[-1][0]:  # a later training of the same recipe
            points.clear()
        if math.isfinite(loss):
            points.append((update, loss))
    return {phase: points for phase, points in found.items() if len(points) > 1}


def _chart(curves: dict[str, list[tuple[int, float]]]) -> Chart:
    title = "Loss by update"
    series = [
        charts.Series(phase, [update for update, _ in points], [loss for _, loss in points])
        for phase, points in curves.items()
    ]
    rows = [
        [phase, computed(update), computed(loss)]
        for phase, points in curves.items()
        for update, loss in points
    ]
    return Chart(
        charts.lines("chart-loss", title, series, "update"),
        table(title, ("phase", "update", "loss"), rows, folded=True),
    )


def _phases(run: Evidence) -> tuple[Table, ...]:
    phases = run.manifest.content.get("phases", [])
    if not phases:
        return ()
    rows = [
        [
            *(str(phase.get(key, "")) for key in NAMES),
            *(run.manifest.figure("phases", place, key) for key in NUMBERS),
        ]
        for place, phase in enumerate(phases)
    ]
    columns = (*NAMES, "steps", "passes", "error before", "error after", "last loss")
    return (table("Phases", columns, rows),)
