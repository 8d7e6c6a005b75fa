"""Command line and environment of child processes, in which native code may crash without ending
the parent.
"""

from __future__ import annotations

import os
import sys


def command(module: str, *arguments: str) -> list[str]:
    """Command line of a module of this package. Start it in an empty folder: Python imports from the current
    one.
    """
    return [sys.executable, "-m", module, *arguments]


def environment() -> dict[str, str]:
    """Environment variables of this process, with absolute paths in PYTHONPATH."""
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
