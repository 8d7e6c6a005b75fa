"""The parity ladder as a table for the terminal."""

from __future__ import annotations

import math
from typing import Any

from rich import box
from rich.text import Text

from qcompress.system.printable import show
from qcompress.system.screen import Cells

BESIDE = ("dynamic", "deployed")
"""What else a row may have been measured as: its key in the row, and its line in the ladder."""

HELD = "same codes"
"""The line of `held` of the onnx row."""


def ladder(report: dict[str, Any]) -> Cells:
    """One line for each row of parity.json: the main metrics of each set, the distance to the row before.
    Below a row what was measured beside it: `dynamic` below trained; `deployed` and, on a machine with a GPU,
    ONNX Runtime's GPU providers below onnx.

    It fits into 80 columns; the other metrics are in parity.json.
    """
    rows = report["rows"]
    metrics = order_metrics(rows, report.get("sets", []), report.get("main", {}))
    table = Cells(
        box=box.SIMPLE_HEAD,
        header_style="bold",
        padding=(0, 1),
        pad_edge=False,
        caption="* as integer GEMMs" if any(row.get("deployed") for row in rows) else None,
        caption_justify="left",
    )
    table.add_column("row", no_wrap=True)
    for metric in metrics:
        table.add_column(Text(show(metric).replace(".", "\n")), justify="right")
    for column in ("compared\nwith", "max |d|\n/ range", "mean |d|\n/ range", "same\ntop 1"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row["status"] != "measured":
            table.add_row(row["stage"], row["status"], style="dim")
            continue
        values = (spell(row["metrics"].get(name)) for name in metrics)
        table.add_row(row["stage"], *values, *_far(row["distance"]))
        for name, beside in _beside(row):
            if beside.get("status") == "not-run":
                table.add_row(f"  {name}", "not-run", style="dim")
                continue
            found = beside.get("metrics", {})
            values = (spell(found[metric]) if metric in found else "" for metric in metrics)
            table.add_row(f"  {name}", *values, *_far(beside["distance"]), style="dim")
    return table


def _beside(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What was measured beside a row, by its name in the ladder."""
    found = [(HELD, row["held"])] if row.get("held") else []
    found += [(name, row[name]) for name in BESIDE if row.get(name)]
    return found + [(f"on {name}", beside) for name, beside in row.get("providers", {}).items()]


def cost_of_static(report: dict[str, Any]) -> list[str]:
    """One line on what static ranges in place of dynamic ones changed in the metrics that the ladder shows,
    with its sign: trained - dynamic. None where there were no dynamic ones.
    """
    metrics = order_metrics(report["rows"], report.get("sets", []), report.get("main", {}))
    for row in report["rows"]:
        if row.get("dynamic"):
            static, dynamic = row["metrics"], row["dynamic"]["metrics"]
            cost = [f"{name} {static[name] - dynamic[name]:+.3g}" for name in metrics if name in dynamic]
            return [f"static ranges in place of dynamic ones: {', '.join(cost)} ({row['stage']} - dynamic)"]
    return []


def ties(report: dict[str, Any]) -> list[str]:
    """One line on the codes of the graph that differ from the folded model's, where they were compared."""
    return [
        f"from the graph's own codes: {held['differ']} of {held['codes']:,} differ, "
        f"{held['unexplained']} of them by more than a tie of rounding"
        for row in report["rows"]
        if (held := row.get("held"))
    ]


def order_metrics(rows: list[dict[str, Any]], sets: list[str], main: dict[str, list[str]]) -> list[str]:
    """The main metrics of each evaluation set, in the recipe's order: JSON objects are sorted by name.

    Of several sets the first metric of each; where the main metrics are not known the first that there is.
    """
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] == "measured":
            for metric in row["metrics"]:
                section = metric.rpartition(".")[0]
                if not sets or section in sets:  # sharpness is a metric of no set
                    found.setdefault(section, [metric])
    for name in found.keys() & main.keys():
        found[name] = [f"{name}.{metric}" for metric in main[name]]
    order = {name: place for place, name in enumerate(sets)}
    names = sorted(found, key=lambda name: order.get(name, len(order)))
    return [metric for name in names for metric in (found[name] if len(names) == 1 else found[name][:1])]


def _far(distance: dict[str, Any] | None) -> tuple[str, ...]:
    if distance is None:
        return ("", "", "", "")
    scale = distance["range"] or math.nan
    return (
        {"folded-integer": "folded*"}.get(distance["to"], distance["to"]),
        f"{distance['max_abs'] / scale:.1e}" if distance["max_abs"] else "0",
        f"{distance['mean_abs'] / scale:.1e}" if distance["mean_abs"] else "0",
        "-" if distance["top1_agreement"] is None else f"{distance['top1_agreement']:.4f}",
    )


def spell(value: float | None) -> str:
    """Five digits, or a dash for a value that is not there."""
    return "-" if value is None else f"{value:.5g}"


def not_measured(report: dict[str, Any]) -> list[str]:
    """`row: why` of every row that was not measured."""
    return [f"{row['stage']}: {row['reason']}" for row in report["rows"] if row["status"] != "measured"]
