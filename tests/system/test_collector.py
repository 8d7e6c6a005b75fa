"""Pauses of Python's garbage collector end with the context, and a caller's settings are kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from qcompress.system.collector import only_new, paused


class Cycle:
    """An object that only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


def test_automatic_collections_are_off_in_the_context_and_on_after_an_error() -> None:
    assert gc.isenabled()
    with pytest.raises(ImportError), paused():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_a_collector_that_the_caller_turned_off_stays_off() -> None:
    gc.disable()
    try:
        with paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.fixture
def unfrozen() -> Iterator[None]:
    """The test session freezes its objects (conftest.py); the test starts without frozen ones."""
    were_frozen = gc.get_freeze_count()
    gc.unfreeze()
    yield
    gc.unfreeze()
    if were_frozen:
        gc.freeze()


@pytest.mark.usefixtures("unfrozen")
def test_new_cycles_are_freed_and_older_objects_are_collected_again_after_the_context() -> None:
    old = Cycle()
    reference = weakref.ref(old)
    with only_new():
        assert gc.get_freeze_count() > 0
        new = weakref.ref(Cycle())
        del old
        gc.collect()
        assert new() is None and reference() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert reference() is None


@pytest.mark.usefixtures("unfrozen")
def test_objects_that_the_caller_froze_stay_frozen() -> None:
    gc.freeze()
    with only_new():
        pass
    assert gc.get_freeze_count() > 0
