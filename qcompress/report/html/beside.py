"""The page that a run writes at its end. What becomes of it changes nothing about the run: it is made by a
process of its own, whose failure, whatever it is, is one line.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("jinja2", "matplotlib")

TIMEOUT_S = 300.0
"""A page takes seconds; ten thousand draws of a large evaluation set take longer."""


def write_beside(folder: Path, say: Callable[[str], None]) -> None:
    """Write report.html into a finished run, or say why there is none."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        say(f"no report.html: it needs {' and '.join(missing)}")
        return
    command = [sys.executable, "-m", "qcompress", "report", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        say(f"no report.html: it took more than {TIMEOUT_S:.0f} s; qcompress report {folder}")
        return
    except OSError as error:
        say(f"no report.html: {error}")
        return
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        error = [line for line in lines if line.startswith("error: ")] or lines[-1:]
        say(f"no report.html: {error[0] if error else f'exit code {done.returncode}'}")
