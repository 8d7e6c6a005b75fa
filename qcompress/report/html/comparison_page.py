"""The page about several runs: metrics, loss against the first run, bytes and cost."""

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
    """Sections of the page; the first run is the reference of the losses."""
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
    """Main metrics of all runs, in the float row and in the last measured row."""
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
    metrics = table("Main metrics, of float and of the last row", ("run", "row", *names), rows)
    return Section("metrics", "Metrics", tables=(metrics,))


def _losses(runs: Sequence[Evidence]) -> Section:
    title, first = "Against the first run", _read(runs[0])
    if isinstance(first, str):
        return Section("losses", title, (f"{runs[0].name}: {first}",))
    rows, drawn, lines = [], [], [f"The last measured row of each run against that of {runs[0].name}. {SURE}"]
    for run in runs[1:]:
        candidate = _read(run)
        if isinstance(candidate, str):
            lines.append(f"{run.name}: {candidate}")
            continue
        for name in main_metrics(run):
            if name not in first.metrics or name not in candidate.metrics:
                lines.append(f"{run.name}: {name} was not measured in both")
                continue
            difference = loss(name, first, candidate)
            ends = [
                side.parity.figure("rows", last_measured(side), "metrics", name) for side in (runs[0], run)
            ]
            rows.append([run.name, name, *ends, *loss_cells(difference)])
            drawn.append((f"{run.name}\n{name}", difference))
    tables = (table(title, ("run", "metric", *LOSS), rows),) if rows else ()
    chart = _chart(drawn)
    return Section("losses", title, tuple(lines), tables=tables, charts=(chart,) if chart else ())


def _chart(drawn: list[tuple[str, Loss | str]]) -> Chart | None:
    return loss_chart("chart-losses", "Loss against the first run, percent", drawn)


def _read(run: Evidence) -> Measured | str:
    if not (run.loaded.path / "samples.json.gz").is_file():
        return "samples.json.gz is missing, so no intervals"
    try:
        return measured(run.loaded, _stage(run))
    except QcompressError as error:
        return str(error)


def _sizes(runs: Sequence[Evidence]) -> Section:
    rows: list[list[Cell]] = []
    lines, names, stored = [], [], []
    for run in runs:
        run_sizes, build = run.optional("sizes.json"), run.optional("engine/build.json")
        if run_sizes is None:
            lines.append(f"{run.name}: sizes.json is missing.")
            continue
        figures = [run_sizes.figure(key, unit="bytes") for key in FILES]
        plan = build.figure("plan", "bytes", unit="bytes") if build else "-"
        rows.append([run.name, *figures, plan])
        names.append(run.name)
        stored.append((run_sizes.at("file_bytes") or 0) / 2**20)
    if not rows:
        return Section("sizes", "Sizes", tuple(lines))
    title = "Sizes"
    size_table = table(title, ("run", *FILES.values(), "engine"), rows)
    drawing = charts.bars("chart-sizes", title, names, (charts.Bars("MiB of model.onnx", stored),))
    return Section("sizes", title, tuple(lines), charts=(Chart(drawing, size_table),))


def _cost(runs: Sequence[Evidence]) -> Section:
    rows: list[list[Cell]] = []
    for run in runs:
        stages = [name for name in STAGES if name in run.manifest.content["stages"]]
        rows += [
            [
                run.name,
                name,
                run.manifest.figure("stages", name, "seconds", unit="s"),
                run.manifest.figure("stages", name, "peak_mib", unit="MiB"),
            ]
            for name in stages
        ]
    cost_table = table("Time and memory", ("run", "stage", "time", "peak memory"), rows)
    return Section("cost", "Time and memory", tables=(cost_table,))
