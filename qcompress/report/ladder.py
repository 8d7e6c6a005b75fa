"""The parity ladder as a terminal table."""

from __future__ import annotations

import math
from typing import Any

from rich import box
from rich.text import Text

from qcompress.system.printable import show
from qcompress.system.screen import Cells

BESIDE = ("dynamic", "deployed")
"""Extra measurements of a row: key in the row and label in the ladder."""

HELD = "same codes"
"""Label of the `held` measurement of the rows folded and onnx."""

OWN = {"folded": "trained model's", "onnx": "graph's own"}
"""Origin of the forced codes of a row."""


def ladder(report: dict[str, Any]) -> Cells:
    """Table with one line for each row of parity.json: main metrics of each set, distance to the compared
    row. Extra measurements follow their row: `dynamic` after trained; `deployed` and, on a machine with a
    GPU, ONNX Runtime's GPU providers after onnx.

    The table fits into 80 columns; the other metrics are in parity.json.
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
            metrics_beside = beside.get("metrics", {})
            values = (spell(metrics_beside[metric]) if metric in metrics_beside else "" for metric in metrics)
            table.add_row(f"  {name}", *values, *_far(beside["distance"]), style="dim")
    return table


def _beside(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Extra measurements of a row with their labels."""
    measurements = [(HELD, row["held"])] if row.get("held") else []
    measurements += [(name, row[name]) for name in BESIDE if row.get(name)]
    return measurements + [(f"on {name}", beside) for name, beside in row.get("providers", {}).items()]


def cost_of_static(report: dict[str, Any]) -> list[str]:
    """One line on the change of the main metrics due to static in place of dynamic ranges: trained - dynamic,
    signed. Empty list without a dynamic row.
    """
    metrics = order_metrics(report["rows"], report.get("sets", []), report.get("main", {}))
    for row in report["rows"]:
        if row.get("dynamic"):
            static, dynamic = row["metrics"], row["dynamic"]["metrics"]
            cost = [f"{name} {static[name] - dynamic[name]:+.3g}" for name in metrics if name in dynamic]
            return [f"static ranges in place of dynamic ones: {', '.join(cost)} ({row['stage']} - dynamic)"]
    return []


def ties(report: dict[str, Any]) -> list[str]:
    """A line for each row measured from forced codes: how many of the codes differ."""
    return [
        f"from the {OWN[row['stage']]} codes: {held['differ']} of {held['codes']:,} differ, "
        f"{held['unexplained']} of them by more than a tie of rounding"
        for row in report["rows"]
        if (held := row.get("held"))
    ]


def kernels(sizes: Any) -> list[str]:
    """Lines on the kernels of the quantized layers in ONNX Runtime, from sizes.json: the counts, then one
    line for each reason why layers do not run on integers. Empty without quantized layers, and for a file of
    an older version.
    """
    runtimes = sizes.get("kernels") if isinstance(sizes, dict) else None
    answer = runtimes.get("onnxruntime") if isinstance(runtimes, dict) else None
    if not isinstance(answer, dict):
        return []
    if not answer.get("read"):
        return [f"kernels in ONNX Runtime: not known: {answer.get('reason')}"]
    layers = answer["layers"]
    if not layers:
        return []
    parts = [f"{answer['integer']} of {answer['products']} quantized layers run as integer kernels"]
    if answer["weight_only"]:
        parts.append(f"{answer['weight_only']} as weight-only kernels")
    if answer["tables"]:
        parts.append(f"{answer['codes']} of {answer['tables']} tables are looked up as codes")
    parts.append(f"{answer['decoded_bytes']:,} bytes of weights are decoded in each run")
    if answer["constant_bytes"]:
        parts.append(f"{answer['constant_bytes']:,} bytes are held as floats")
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        if layer["reason"]:
            by_reason.setdefault(layer["reason"], []).append(layer)
    lines = [f"in ONNX Runtime {answer['version']} on {answer['machine']}: {', '.join(parts)}"]
    for reason, group in by_reason.items():
        size = sum(layer["decoded_bytes"] for layer in group)
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        lines.append(f"  {group[0]['name']}{more}: {reason}" + (f" ({size:,} bytes)" if size else ""))
    return lines


def engine_kernels(report: dict[str, Any]) -> list[str]:
    """One line on the layers of the measured engine that read integers, from its inspector. Empty list if no
    engine was measured, or on a device with an older probe kit.
    """
    lines = []
    for row in report["rows"]:
        measured_on = row.get("measured_on")
        answer = measured_on.get("kernels") if isinstance(measured_on, dict) else None
        if not isinstance(answer, dict):
            continue
        if isinstance(answer.get("integer"), int):
            lines.append(f"in the engine: {answer['integer']} of {answer.get('layers')} layers read integers")
        else:
            lines.append(f"kernels of the engine: not known: {answer.get('reason')}")
    return lines


def order_metrics(rows: list[dict[str, Any]], sets: list[str], main: dict[str, list[str]]) -> list[str]:
    """Main metrics of each evaluation set, in the recipe's order (JSON objects are sorted by name).

    With several sets the first main metric of each; where `main` has no entry for a set, the first metric
    measured on it.
    """
    by_set: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] == "measured":
            for metric in row["metrics"]:
                section = metric.rpartition(".")[0]
                if not sets or section in sets:  # sharpness is a metric of no set
                    by_set.setdefault(section, [metric])
    for name in by_set.keys() & main.keys():
        by_set[name] = [f"{name}.{metric}" for metric in main[name]]
    order = {name: place for place, name in enumerate(sets)}
    names = sorted(by_set, key=lambda name: order.get(name, len(order)))
    return [metric for name in names for metric in (by_set[name] if len(names) == 1 else by_set[name][:1])]


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
    """Format a number with five digits; a dash for None."""
    return "-" if value is None else f"{value:.5g}"


def not_measured(report: dict[str, Any]) -> list[str]:
    """`row: reason` for every row that was not measured."""
    return [f"{row['stage']}: {row['reason']}" for row in report["rows"] if row["status"] != "measured"]
