"""Sections of the parity ladder (metrics and distances of every row) and of the recovery against float."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from qcompress.errors import QcompressError
from qcompress.report.html import charts
from qcompress.report.html.evidence import Evidence
from qcompress.report.html.figures import Figure, computed
from qcompress.report.html.parts import Cell, Chart, Section, Table, table
from qcompress.report.ladder import (
    BESIDE,
    HELD,
    cost_of_static,
    engine_kernels,
    kernels,
    order_metrics,
    ties,
)
from qcompress.schema.goals import METRICS, Goal
from qcompress.verdict.baseline.statistics import Loss, loss_of
from qcompress.verdict.measured import Measured, measured

NO_LOSS = Goal.model_validate({"percent-max-degradation": 0})
"""Goal used as the unit of a loss: percent of the reference."""

LOSS = ("reference", "value", "loss %", "at least", "at most", "how")
"""Columns of a loss after the metric's name."""

SURE = (
    "A loss is in percent of the reference, positive where the metric is worse. Each of its bounds is "
    "crossed by chance in 5 of 100 comparisons: paired, sample by sample."
)


def main_metrics(run: Evidence) -> list[str]:
    """Main metrics of every evaluation set, in the recipe's order."""
    report = run.parity.content
    first = order_metrics(report["rows"], report.get("sets", []), report.get("main", {}))
    main = report.get("main", {})
    names = []
    for metric in first:
        name = metric.rpartition(".")[0]
        names += [f"{name}.{short}" for short in main[name]] if name in main else [metric]
    return list(dict.fromkeys(names))


def last_measured(run: Evidence) -> int | None:
    """Index of the last measured row; None if no row was measured."""
    places = [place for place, _ in _measured_rows(run)]
    return places[-1] if places else None


def ladder(run: Evidence) -> Section:
    """Section with one line for each row and for its extra measurements."""
    report, metrics = run.parity.content, main_metrics(run)
    rows = [_line(run, label, path, entry, metrics) for label, path, entry in _lines(report)]
    distance_columns = ("compared with", "max |d| / range", "mean |d| / range", "SNR dB", "same top 1")
    columns = ("row", *metrics, *distance_columns, "status")
    lines = [
        f"{label}: {entry['status']}: {entry.get('reason')}"
        for label, _, entry in _lines(report)
        if entry.get("status", "measured") != "measured"
    ]
    lines += [*cost_of_static(report), *ties(report)]
    sizes = run.optional("sizes.json")
    lines += kernels(sizes.content) if sizes is not None else []
    lines += engine_kernels(report)
    unforced = (row for row in report["rows"] if not row.get("held"))
    flipped = next((row["flipped"] for row in unforced if row.get("flipped")), None)
    if isinstance(flipped, dict):
        lines.append(
            "folding flipped codes: " + ", ".join(f"{key} {value}" for key, value in flipped.items())
        )
    drawn = _drawn(run, metrics)
    return Section(
        "ladder",
        "Ladder",
        ("Each row is compared with the row that is named in it.", *lines),
        tables=(table("Rows", columns, rows), _all_metrics(run)),
        charts=(drawn,) if drawn else (),
    )


def _lines(report: dict[str, Any]) -> Iterator[tuple[str, tuple[str | int, ...], dict[str, Any]]]:
    for place, row in enumerate(report["rows"]):
        yield row["stage"], ("rows", place), row
        if row.get("held"):
            yield f"{row['stage']}, {HELD}", ("rows", place, "held"), row["held"]
        for name in BESIDE:
            if row.get(name):
                yield f"{row['stage']}, {name}", ("rows", place, name), row[name]
        for name, beside in row.get("providers", {}).items():
            yield f"{row['stage']} on {name}", ("rows", place, "providers", name), beside


def _line(
    run: Evidence, label: str, path: tuple[str | int, ...], entry: dict[str, Any], metrics: list[str]
) -> list[Cell]:
    status = entry.get("status", "measured")
    if status != "measured":
        return [label, *["-"] * (len(metrics) + 5), status]
    known = entry.get("metrics", {})
    values = [run.parity.figure(*path, "metrics", name) if name in known else "-" for name in metrics]
    distance = entry.get("distance")
    if distance is None:
        return [label, *values, *["-"] * 5, status]
    distance_path = (*path, "distance")
    scale = (*distance_path, "range")
    return [
        label,
        *values,
        distance["to"],
        run.parity.share((*distance_path, "max_abs"), scale),
        run.parity.share((*distance_path, "mean_abs"), scale),
        run.parity.figure(*distance_path, "snr_db"),
        run.parity.figure(*distance_path, "top1_agreement"),
        status,
    ]


def _measured_rows(run: Evidence) -> list[tuple[int, dict[str, Any]]]:
    rows = enumerate(run.parity.content["rows"])
    return [(place, row) for place, row in rows if row["status"] == "measured"]


def _all_metrics(run: Evidence) -> Table:
    rows = _measured_rows(run)
    names = list(dict.fromkeys(name for _, row in rows for name in row["metrics"]))
    return table(
        "Every metric of every row",
        ("metric", *(row["stage"] for _, row in rows)),
        [[name, *(run.parity.figure("rows", place, "metrics", name) for place, _ in rows)] for name in names],
        folded=True,
    )


def _drawn(run: Evidence, metrics: list[str]) -> Chart | None:
    rows = _measured_rows(run)
    series = []
    for name in metrics:
        points = [(row["stage"], row["metrics"][name]) for _, row in rows if name in row["metrics"]]
        points = [(stage, value) for stage, value in points if math.isfinite(value)]
        if points:
            series.append(charts.Series(name, *zip(*points, strict=True)))
    if not series:
        return None
    title = "Main metrics by row"
    columns = ("row", *metrics)
    figures = [
        [row["stage"], *(run.parity.figure("rows", place, "metrics", name) for name in metrics)]
        for place, row in rows
    ]
    return Chart(charts.lines("chart-ladder", title, series), table(title, columns, figures, folded=True))


# Recovery -----------------------------------------------------------------------------------------


def recovery(run: Evidence) -> Section:
    """Section on the loss of the last measured row against the float model."""
    place = last_measured(run)
    stages = [row["stage"] for row in run.parity.content["rows"]]
    title = "Recovery against float"
    floats = next((at for at, row in _measured_rows(run) if row["stage"] == "float"), None)
    if place is None or floats is None or place == floats:
        return Section("recovery", title, ("Float and a row after it were not both measured.",))
    stage = stages[place]
    samples = _samples(run, "float"), _samples(run, stage)
    lines = [f"The row {stage} against float. {SURE}"]
    if isinstance(samples[0], str) or isinstance(samples[1], str):
        why = next(why for why in samples if isinstance(why, str))
        return Section("recovery", title, (f"No per-sample results, so no intervals: {why}",))
    rows, drawn = [], []
    for name in main_metrics(run):
        lost = loss(name, *samples)
        ends = [run.parity.figure("rows", at, "metrics", name) for at in (floats, place)]
        rows.append([name, *ends, *loss_cells(lost)])
        drawn.append((name, lost))
    tables = (table("Loss against float", ("metric", *LOSS), rows),)
    chart = loss_chart("chart-recovery", f"Loss of {stage} against float, percent", drawn)
    return Section("recovery", title, tuple(lines), tables=tables, charts=(chart,) if chart else ())


def _samples(run: Evidence, stage: str) -> Measured | str:
    if not (run.loaded.path / "samples.json.gz").is_file():
        return "samples.json.gz is missing"
    try:
        return measured(run.loaded, stage)
    except QcompressError as error:
        return str(error)


def loss(metric: str, reference: Measured, candidate: Measured) -> Loss | str:
    """Loss in a metric on samples common to both measurements, or the reason why there is none."""
    name, _, short = metric.rpartition(".")
    if name not in reference.samples or name not in candidate.samples:
        return "no per-sample results"
    if reference.identity(name) != candidate.identity(name):
        return "measured on other samples"
    if short not in METRICS:
        return "no bootstrap for this metric"
    try:
        lost = loss_of(short, NO_LOSS, reference.columns(name), candidate.columns(name))
    except KeyError:
        return "the per-sample results do not give it"
    for item, value in ((reference, lost.baseline), (candidate, lost.value)):
        if not math.isclose(item.metrics[metric], value, rel_tol=1e-4, abs_tol=1e-6):
            return "the per-sample results do not give it"
    return lost


def loss_cells(lost: Loss | str) -> list[Cell]:
    """Table cells of a loss: value, bounds and name of the test."""
    if isinstance(lost, str):
        return ["-", "-", "-", lost]
    low, high = lost.interval or (None, None)
    figures: list[Figure] = [computed(value, "signed") for value in (lost.loss, low, high)]
    return [*figures, lost.test]


def loss_chart(anchor: str, title: str, losses: list[tuple[str, Loss | str]]) -> Chart | None:
    """Chart of losses with finite intervals; None if there are none."""
    drawn = [
        (name, (item.loss, *item.interval))
        for name, item in losses
        if isinstance(item, Loss) and item.interval and all(map(math.isfinite, (item.loss, *item.interval)))
    ]
    if not drawn:
        return None
    drawing = charts.intervals(
        anchor, title, [name for name, _ in drawn], [numbers for _, numbers in drawn], "loss, percent"
    )
    rows = [[name, *(computed(number, "signed") for number in numbers)] for name, numbers in drawn]
    return Chart(drawing, table(title, ("metric", "loss %", "at least", "at most"), rows, folded=True))
