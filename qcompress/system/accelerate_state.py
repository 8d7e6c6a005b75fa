"""Process-wide state of accelerate, which a run must leave to its caller.

accelerate keeps the settings of every `Accelerator` of a process in three shared dictionaries, and refuses a
second Accelerator with another precision or device. It has no public way to save them; `_shared_state` is
private, and nothing else here reads it. Checked with accelerate 1.15.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def separate_accelerator(several: bool) -> Iterator[None]:
    """Context in which a new Accelerator may have other settings than the caller's, whose settings are
    restored afterwards. `several`: keep the group of processes that train together.
    """
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, GradientState

    classes = (
        (AcceleratorState, GradientState) if several else (AcceleratorState, GradientState, PartialState)
    )
    shared = [kind._shared_state for kind in classes]
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()  # in place: every Accelerator holds these dictionaries
    try:
        yield
    finally:
        for state, values in zip(shared, before, strict=True):
            state.clear()
            state.update(values)
