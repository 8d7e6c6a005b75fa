"""Summary of runs of one recipe with different seeds: mean and spread."""

from __future__ import annotations

import statistics
from typing import Any

from rich import box
from rich.text import Text

from qcompress.report.ladder import BESIDE, order_metrics, spell
from qcompress.system.printable import show
from qcompress.system.screen import Cells

SEVERITY = ("accept", "unjudged", "inconclusive", "regression", "anomalous")
"""Verdicts from best to worst."""


def summarise(recipe: str, runs: dict[int, tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Build seeds.json from each seed's parity.json and verdict.json.

    {"recipe", "verdict": the worst, "verdicts": {seed: verdict}, "sets", "main" (as in parity.json), "rows":
    [{"stage", "status", "metrics": {name: {"mean", "sd", "values"}}}]}. sd is the sample standard deviation
    (n - 1), None for one seed. Only rows that every seed measured are included; `dynamic` and `deployed` of a
    row have `metrics` of that form too.
    """
    verdicts = {str(seed): verdict["verdict"] for seed, (_, verdict) in runs.items()}
    reports = [parity for parity, _ in runs.values()]
    rows = []
    for stage in [row["stage"] for row in reports[0]["rows"]]:
        seed_rows = [next(row for row in report["rows"] if row["stage"] == stage) for report in reports]
        if all(row["status"] == "measured" for row in seed_rows):
            beside = {
                name: {"metrics": _spreads([row[name]["metrics"] for row in seed_rows])}
                for name in BESIDE
                if all(row.get(name) for row in seed_rows)
            }
            metrics = _spreads([row["metrics"] for row in seed_rows])
            rows.append({"stage": stage, "status": "measured", "metrics": metrics, **beside})
    return {
        "recipe": recipe,
        "verdict": max(verdicts.values(), key=SEVERITY.index),
        "verdicts": verdicts,
        "rows": rows,
        "sets": reports[0].get("sets", []),
        "main": reports[0].get("main", {}),
    }


def _spreads(metrics: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Mean and deviation of each metric that every seed has."""
    names = [name for name in metrics[0] if all(name in seed_metrics for seed_metrics in metrics)]
    return {name: _spread([seed_metrics[name] for seed_metrics in metrics]) for name in names}


def _spread(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "values": values}


def seeds_table(summary: dict[str, Any]) -> Cells:
    """Table of mean and standard deviation of each set's main metric, one line for each row and extra
    measurement.
    """
    metrics = order_metrics(summary["rows"], summary["sets"], summary["main"])
    table = Cells(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), pad_edge=False)
    table.add_column("row", no_wrap=True)
    for metric in metrics:
        table.add_column(Text(show(metric).replace(".", "\n")), justify="right", no_wrap=True)
    for row in summary["rows"]:
        table.add_row(row["stage"], *(_shown(row["metrics"].get(name)) for name in metrics))
        for name in BESIDE:
            if name in row:
                values = (_shown(row[name]["metrics"].get(metric)) for metric in metrics)
                table.add_row(f"  {name}", *values, style="dim")
    return table


def _shown(value: dict[str, Any] | None) -> str:
    if value is None or value["sd"] is None:
        return spell(value and value["mean"])
    return f"{spell(value['mean'])} ± {value['sd']:.2g}"
