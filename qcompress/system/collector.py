"""Python's garbage collector, paused while many objects are made that stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Context without automatic collections of cycles, for imports and for reading a graph: both allocate
    hundreds of thousands of objects that stay, and the collector would visit them again and again.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def only_new() -> Iterator[None]:
    """Context in which collections skip the objects that exist at its start, such as those of the libraries.
    Does nothing if the caller has frozen objects, which the end of the context would release.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
