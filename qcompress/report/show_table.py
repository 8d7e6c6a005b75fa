"""The ladder and the verdict of a run, for `qcompress show`. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from qcompress.report.ladder import cost_of_static, engine_kernels, kernels, ladder, not_measured, ties
from qcompress.system.artifacts import read_object
from qcompress.system.printable import say, show

if TYPE_CHECKING:
    from qcompress.verdict.run_directory import LoadedRun


def summary(loaded: LoadedRun) -> dict[str, object]:
    """JSON document of a run."""
    return {
        "recipe": loaded.name,
        "path": str(loaded.path),
        "verdict": loaded.verdict,
        "parity": loaded.parity,
        "stages": loaded.manifest["stages"],
    }


def print_run(console: Console, loaded: LoadedRun) -> None:
    """Print the ladder, the cost of static ranges, the kernels of the layers, the verdict's reasons and the
    verdict, which is last.
    """
    console.print(ladder(loaded.parity))
    for line in [*cost_of_static(loaded.parity), *ties(loaded.parity)]:
        console.print(line, style="dim", soft_wrap=True)
    sizes = loaded.path / "sizes.json"
    known = kernels(read_object(sizes)) if sizes.is_file() else []
    for line in [*known, *engine_kernels(loaded.parity)]:
        console.print(show(line), style="dim", soft_wrap=True, markup=False, highlight=False)
    for reason in loaded.verdict["reasons"]:
        console.print(reason, soft_wrap=True)
    for line in not_measured(loaded.parity):
        console.print(f"not measured: {line}", style="dim", soft_wrap=True)
    rows = [row["stage"] for row in loaded.parity["rows"] if row["status"] != "measured"]
    notes = [f"not measured: {', '.join(rows)}"] if rows else []
    notes = ["all stages ran; a smoke run is not judged", *notes] if loaded.smoke else notes
    note = f"  ({'; '.join(notes)})" if notes else ""
    say(f"{loaded.verdict['verdict']}  {loaded.name}  {loaded.path}{note}")
