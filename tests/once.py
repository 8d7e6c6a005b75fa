"""Folders that the workers of pytest-xdist share: made by the first that asks, read by all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def shared_root(factory: pytest.TempPathFactory) -> Path:
    """The folder of this test session; with xdist it is the parent of each worker's own."""
    own = factory.getbasetemp()
    return own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Make a folder that does not exist yet. Other workers wait for it; after an error the next one tries."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = folder.with_name(f".{folder.name}.done")
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            done.touch()
    return folder
