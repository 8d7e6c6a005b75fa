"""Terminal table of the weights that an ONNX file stores."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console

from qcompress.graph.inspect import summary
from qcompress.system.screen import Cells


def print_contents(console: Console, contents: dict[str, Any]) -> None:
    """Print one row for each weight, then the totals."""
    table = Cells(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), pad_edge=False)
    table.add_column("weight", overflow="fold")
    table.add_column("shape", no_wrap=True)
    for column in ("stored", "bits of\ninformation"):
        table.add_column(column, no_wrap=True, justify="right" if column.startswith("bits") else "left")
    for column in ("scales", "input", "read by"):
        table.add_column(column, no_wrap=True)
    for column in ("bytes", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for weight in contents["weights"]:
        table.add_row(
            weight["name"],
            " x ".join(map(str, weight["shape"])),
            weight["stored"],
            f"{weight['information_bits']:.3g}",
            weight["granularity"] or "-",
            weight["input"] or "-",
            ", ".join(weight["readers"]),
            f"{weight['bytes']:,}",
            f"{weight['share']:.1%}",
        )
    console.print(table)
    console.print(summary(contents), soft_wrap=True)
