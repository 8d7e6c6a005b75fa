"""Terminal table of `qcompress gate`: the candidate against its baseline. No torch."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.text import Text

from qcompress.report.compare_table import interval
from qcompress.system.printable import say, show
from qcompress.system.screen import Cells


def print_gate(console: Console, verdict: dict[str, Any]) -> None:
    """Print one row for each goal against the baseline, then notes, reasons and, last, the verdict."""
    table = Cells(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), pad_edge=False)
    table.add_column("goal", overflow="fold")
    for column in ("baseline", "candidate", "loss", "bounds\n(5 % each)", "could have\nseen", "samples"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    for goal in verdict["goals"]:
        if "outcome" not in goal:
            continue
        limit = ", ".join(f"{name} {value:g}" for name, value in goal["goal"].items())
        table.add_row(
            Text(f"{show(goal['metric'])}\n{show(limit)}"),
            f"{goal['baseline']:.5g}",
            f"{goal['value']:.5g}",
            f"{goal['loss']:+.3g}",
            interval(goal["interval"]),
            "-" if goal["detectable"] is None else f"{goal['detectable']:.2g}",
            "-" if goal["samples"] is None else str(goal["samples"]),
            goal["outcome"],
        )
    against = verdict["against"]
    console.print(f"{against['candidate']} against {against['baseline']}, row {against['row']}")
    console.print(table)
    for note in verdict["notes"]:
        console.print(f"note: {note}", style="dim", soft_wrap=True)
    for reason in verdict["reasons"]:
        console.print(reason, soft_wrap=True)
    say(f"{verdict['verdict']}  {against['recipes'][1]}  {against['candidate']}")
