"""The command `report`."""

from pathlib import Path
from typing import Annotated

import typer

from qcompress.cli.arguments import AsJson
from qcompress.cli.terminal import errors, print_json
from qcompress.system.printable import say


def report(
    runs: Annotated[list[str], typer.Argument(help="Runs or folders of seeds.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write; default: report.html in the run, of several runs here.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write report.html: one self-contained file about a run, or about several runs in comparison."""
    with errors():
        from qcompress import api

        file = api.report(runs, out)
        size = file.stat().st_size
        if as_json:
            print_json({"path": str(file), "bytes": size})
        else:
            say(f"{file}, {size / 1000:.0f} kB")
