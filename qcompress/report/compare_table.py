"""Terminal tables of `qcompress compare`; they fit into 80 columns."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console

from qcompress.report.ladder import spell
from qcompress.system.printable import show
from qcompress.system.screen import Cells


def print_comparison(console: Console, comparison: dict[str, Any]) -> None:
    """Print scores, costs and differences of the arms, then the findings as sentences."""
    console.print(*title(comparison), sep="\n", soft_wrap=True)
    console.print(scores(comparison))
    console.print(costs(comparison))
    if comparison["differences"]:
        console.print(differences(comparison))
    lines = [finding(comparison, item) for item in comparison["differences"]]
    lines += [f"note: {note}" for note in comparison["notes"]]
    if lines:
        console.print(*lines, sep="\n", soft_wrap=True)


def title(comparison: dict[str, Any]) -> list[str]:
    """Lines above the tables: row, direction of the metric, and samples of each task."""
    measured = [
        f"{task['task']}: {task['metric']} of {task['samples']} samples" for task in comparison["tasks"]
    ]
    return [f"row {comparison['row']}, {comparison['better']} is better", *measured]


def scores(comparison: dict[str, Any]) -> Cells:
    """Table of each arm's metric by task; with several tasks a pooled line as well."""
    table = _table("arm")
    several = len(comparison["tasks"]) > 1
    if several:
        table.add_column("task", no_wrap=True)
    for column in ("seeds", "mean", "sd", "min", "max"):
        table.add_column(column, justify="right", no_wrap=True)
    for arm in comparison["arms"]:
        lines = [(task["task"], task) for task in arm["tasks"]]
        if several and arm["pooled"]:
            lines.append(("all", arm["pooled"]))
        for place, (task, item) in enumerate(lines):
            cells = [arm["arm"] if place == 0 else "", *([task] if several else [])]
            cells += [str(len(item["seeds"])), *(spell(item[key]) for key in ("mean",))]
            cells += [
                "-" if item["sd"] is None else f"{item['sd']:.2g}",
                spell(item["min"]),
                spell(item["max"]),
            ]
            table.add_row(*cells, end_section=place == len(lines) - 1 and several)
    return table


def costs(comparison: dict[str, Any]) -> Cells:
    """Table of the mean training cost of one run of each arm."""
    table = _table("arm")
    blocks = any(task["block_updates"] for arm in comparison["arms"] for task in arm["tasks"])
    columns = [
        "updates",
        *(["updates\nof a block"] if blocks else []),
        "passes\n(fwd + bwd)",
        "training\nseconds",
    ]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for arm in comparison["arms"]:
        keys = ("updates", *(("block_updates",) if blocks else ()), "passes", "seconds")
        means = [sum(task[key] for task in arm["tasks"]) / len(arm["tasks"]) for key in keys]
        table.add_row(arm["arm"], *(f"{mean:.0f}" if mean >= 100 else f"{mean:.4g}" for mean in means))
    return table


def differences(comparison: dict[str, Any]) -> Cells:
    """Table of each arm's difference from the baseline arm."""
    level = f"{100 * comparison['level']:.0f} % interval"
    table = _table(f"against\n{show(comparison['baseline'])}")
    for column in ("pairs", "difference", f"{level}\npaired t", f"{level}\nbootstrap", "could have\nseen"):
        table.add_column(column, justify="right", no_wrap=True)
    for item in comparison["differences"]:
        table.add_row(
            item["arm"],
            str(len(item["pairs"])),
            f"{item['mean']:+.3g}",
            interval(item["t_interval"]),
            interval(item["bootstrap_interval"]),
            "-" if item["detectable"] is None else f"{item['detectable']:.2g}",
        )
    return table


def interval(limits: list[float] | tuple[float, float] | None) -> str:
    """Format both limits with their signs; a dash without an interval.

    >>> interval((-0.01234, 0.5))
    '-0.0123 +0.5'
    """
    return "-" if limits is None else " ".join(f"{limit:+.3g}" for limit in limits)


def finding(comparison: dict[str, Any], item: dict[str, Any]) -> str:
    """Sentence on one difference. An arm is better or worse only if 0 lies outside both intervals."""
    arm, baseline = item["arm"], comparison["baseline"]
    limits = [limits for limits in (item["t_interval"], item["bootstrap_interval"]) if limits is not None]
    if item["t_interval"] is None:
        return f"{arm}: one pair has no spread, so no interval: run more seeds"
    if all(low > 0 for low, _ in limits) or all(high < 0 for _, high in limits):
        good = (item["mean"] > 0) == (comparison["better"] == "higher")
        return f"{arm}: {'better' if good else 'worse'} than {baseline} by {abs(item['mean']):.3g}"
    return (
        f"{arm}: no difference from {baseline} seen; one of {item['detectable']:.2g} would have been, "
        f"{100 * comparison['power']:.0f} times in 100"
    )


def _table(first: str) -> Cells:
    table = Cells(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), pad_edge=False)
    table.add_column(first, overflow="fold")
    return table
