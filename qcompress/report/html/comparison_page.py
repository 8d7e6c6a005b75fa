"""Several runs beside each other: the same metrics, what each lost against the first, bytes and cost."""

from __future__ import annotations

from collections.abc import Sequence

from qcompress.errors import QcompressError
from qcompress.report.html import charts
from qcompress.report.html.evidence import Evidence
from qcompress.report.html.ladder_section import (
    LOSS,
    SURE,
    last_measured,
    loss,
    loss_cells,
    loss_chart,
    main_metrics,
)
from qcompress.report.html.parts import Cell, Chart, Section, table
from qcompress.report.html.size_section import FILES
from qcompress.report.ladder import not_measured
from qcompress.schema.recipe import STAGES
from qcompress.verdict.baseline.statistics import Loss
from qcompress.verdict.measured import Measured, measured


def sections(runs: Sequence[Evidence]) -> list[Section]:
    """What the page says; the first run is the reference of the losses."""
    return [_verdicts(runs), _metrics(runs), _losses(runs), _sizes(runs), _cost(runs)]


def _stage(run: Evidence) -> str:
    place = last_measured(run)
    return "-" if place is None else run.parity.content["rows"][place]["stage"]


def _verdicts(runs: Sequence[Evidence]) -> Section:
    rows: list[list[Cell]] = [
        [
            run.name,
            run.verdict.content["verdict"],
            run.manifest.figure("seed"),
            _stage(run),
            "; ".join(not_measured(run.parity.content)) or "-",
        ]
        for run in runs
    ]
    columns = ("run", "verdict", "seed", "last measured row", "not measured")
    reasons = tuple(f"{run.name}: {reason}" for run in runs for reason in run.verdict.content["reasons"])
    return Section("verdict", "Verdicts", (), reasons, (table("Runs", columns, rows),))


def _metrics(runs: Sequence[Evidence]) -> Section:
    """Every main metric that any of them has, of float and of the last measured row."""
    names = list(dict.fromkeys(name for run in runs for name in main_metrics(run)))
    rows: list[list[Cell]] = []
    for run in runs:
        last = last_measured(run)
        for place, row in enumerate(run.parity.content["rows"]):
            if row["status"] == "measured" and (row["stage"] == "float" or place == last):
                figures = [
                    run.parity.figure("rows", place, "metrics", name) if name in row["metrics"] else "-"
                    for name in names
                ]
                rows.append([run.name, row["stage"], *figures])
    told = table("Main metrics, of float and of the last row", ("run", "row", *names), rows)
    return Section("metrics", "Metrics", tables=(told,))


def _losses(runs: Sequence[Evidence]) -> Section:
    title, first = "Against the first run", _read(runs[0])
    if isinstance(first, str):
        return Section("losses", title, (f"{runs[0].name}: {first}",))
    rows, drawn, lines = [], [], [f"The last measured row of each run against that of {runs[0].name}. {SURE}"]
    for run in runs[1:]:
        found = _read(run)
        if isinstance(found, str):
            lines.append(f"{run.name}: {found}")
            continue
        for name in main_metrics(run):
            if name not in first.metrics or name not in found.metrics:
                lines.append(f"{run.name}: {name} was not measured in both")
                continue
            apart = loss(name, first, found)
            ends = [
                side.parity.figure("rows", last_measured(side), "metrics", name) for side in (runs[0], run)
            ]
            rows.append([run.name, name, *ends, *loss_cells(apart)])
            drawn.append((f"{run.name}\n{name}", apart))
    tables = (table(title, ("run", "metric", *LOSS), rows),) if rows else ()
    chart = _chart(drawn)
    return Section("losses", title, tuple(lines), tables=tables, charts=(chart,) if chart else ())


def _chart(drawn: list[tuple[str, Loss | str]]) -> Chart | None:
    return loss_chart("chart-losses", "Loss against the first run, percent", drawn)


def _read(run: Evidence) -> Measured | str:
    if not (run.loaded.path / "samples.json.gz").is_file():
        return "samples.json.gz is missing, so there are no intervals"
    try:
        return measured(run.loaded, _stage(run))
    except QcompressError as error:
        return str(error)


def _sizes(runs: Sequence[Evidence]) -> Section:
    rows: list[list[Cell]] = []
    lines, names, stored = [], [], []
    for run in runs:
        found, build = run.optional("sizes.json"), run.optional("engine/build.json")
        if found is None:
            lines.append(f"{run.name}: sizes.json is missing.")
            continue
        figures = [found.figure(key, unit="bytes") for key in FILES]
        plan = build.figure("plan", "bytes", unit="bytes") if build else "-"
        rows.append([run.name, *figures, plan])
        names.append(run.name)
        stored.append((found.at("file_bytes") or 0) / 2**20)
    if not rows:
        return Section("sizes", "Sizes", tuple(lines))
    title = "Sizes"
    told = table(title, ("run", *FILES.values(), "engine"), rows)
    drawing = charts.bars("chart-sizes", title, names, (charts.Bars("MiB of model.onnx", stored),))
    return Section("sizes", title, tuple(lines), charts=(Chart(drawing, told),))


def _cost(runs: Sequence[Evidence]) -> Section:
    rows: list[list[Cell]] = []
    for run in runs:
        there = [name for name in STAGES if name in run.manifest.content["stages"]]
        rows += [
            [
                run.name,
                name,
                run.manifest.figure("stages", name, "seconds", unit="s"),
                run.manifest.figure("stages", name, "peak_mib", unit="MiB"),
            ]
            for name in there
        ]
    told = table("Time and memory", ("run", "stage", "time", "peak memory"), rows)
    return Section("cost", "Time and memory", tables=(told,))
