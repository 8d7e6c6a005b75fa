"""Printing and error handling of all commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qcompress.errors import QcompressError, package_missing
from qcompress.system import stopping, strict_json
from qcompress.system.printable import flushed, guarded, json_text, say

if TYPE_CHECKING:
    from qcompress.system.screen import Screen

LOG_COLUMNS = 200
"""Width of output to a file or a pipe."""


@contextmanager
def errors(resume: str = "") -> Iterator[None]:
    """Context of a command: prints an error for users and exits with its exit code."""
    stopping.resume_with(resume)
    with guarded(), _exit_on_error(resume):
        yield


@contextmanager
def _exit_on_error(resume: str) -> Iterator[None]:
    from qcompress.system.memory import AllocationError, Allocations
    from qcompress.system.places import place_errors

    try:
        with _packages(), Allocations("this command"), place_errors(), flushed():
            yield
    except QcompressError as error:
        say(f"error: {error}", stderr=True)
        if resume and isinstance(error, AllocationError):
            say(f"continue with:\n  {resume}", stderr=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        stopping.tell()
        raise typer.Exit(stopping.exit_code()) from None


@contextmanager
def _packages() -> Iterator[None]:
    """Raise MachineError if a command imports a package that is not installed."""
    try:
        yield
    except ImportError as error:
        raise package_missing(error, "this command") from None


def report_run(folder: Path, verdict: str, as_json: bool) -> None:
    """Print a run from disk and exit with its verdict's exit code."""
    from qcompress.report.show_table import print_run, summary
    from qcompress.verdict.judge import exit_code
    from qcompress.verdict.run_directory import load

    refresh_report(folder)
    loaded = load(folder)
    if as_json:
        print_json(summary(loaded))
    else:
        print_run(console(), loaded)
    raise typer.Exit(exit_code(verdict))


def refresh_report(folder: Path) -> None:
    """Rewrite the run's report.html, if it has one, after the run has changed."""
    if (folder / "report.html").is_file():
        from qcompress.report.html.subprocess_writer import write_beside

        write_beside(folder, lambda line: say(line, stderr=True))


def console() -> Screen:
    """Console on stdout; unless it is a terminal, wide enough for all digits of a table."""
    from qcompress.system.screen import Screen

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Screen(width=None if known else LOG_COLUMNS)


def print_json(value: object) -> None:
    print(json_text(strict_json.dumps(value, indent=2, sort_keys=True)))
