"""How a module of ours runs as a process of its own, where native code may die without taking us along."""

from __future__ import annotations

import os
import sys


def command(module: str, *arguments: str) -> list[str]:
    """The command line; start it in a folder of its own, or Python would import from the user's."""
    return [sys.executable, "-m", module, *arguments]


def environment() -> dict[str, str]:
    """Ours, with the places of Python's modules as absolute paths."""
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
