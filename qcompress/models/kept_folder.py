"""Folder in which discovered structures and made checkpoints are kept."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "QCOMPRESS_STRUCTURES"
"""Environment variable: folder of kept structures."""


def cache_folder() -> Path:
    """Folder of kept structures: the variable `FOLDER`, or a folder in the user's cache."""
    if named := os.environ.get(FOLDER):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcompress" / "structures"
