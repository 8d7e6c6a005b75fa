"""Signals that ask a command to stop: Ctrl-C, SIGTERM and SIGHUP. Imported first: standard library only.

The first one raises `Stopped` where the command is at work: files are closed, trackers are told, locks are
released, and the exit code is 128 + the signal's number (130, 143, 129). Slurm and Kubernetes send SIGTERM
and, some 30 s later, SIGKILL. A second one ends the process at once, with the same line and exit code.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import suppress
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

GRACE_S = 10.0
"""Time for what others do at the end of a command that was stopped, such as a tracker that uploads."""


class Stopped(KeyboardInterrupt):  # noqa: N818 (not an error)
    """A signal asked the process to stop. A KeyboardInterrupt, which libraries let pass."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _State:
    """Of this process."""

    first: int | None = None
    """The first signal that came."""
    resume: str = ""
    told: bool = False
    leaving: bool = False
    """The command is over, and the interpreter shuts down."""


_state = _State()


class Stoppable:
    """Inside, signals end the process as this module says. Signals that the parent process has switched off
    (`nohup`, a job in the background) stay so.
    """

    def __enter__(self) -> None:
        atexit.register(_leave)  # registered first, called last
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)

    def __exit__(self, *error: object) -> None:
        """After a signal the exit code is its own, whatever exception a library has made of it."""
        _state.leaving = True
        if _state.first is None:
            return
        for number in SIGNALS:  # the interpreter would put the system's own handlers back, and die of them
            signal.signal(number, signal.SIG_IGN)
        tell()
        sys.exit(exit_code())


def resume_with(command: str) -> None:
    """State the command that goes on after an interruption."""
    _state.resume, _state.told = command, False


def exit_code() -> int:
    """128 + the number of the first signal; that of Ctrl-C where Python's own handler took it."""
    return 128 + (_state.first or signal.SIGINT)


def tell(at_once: bool = False) -> None:
    """Say on stderr, once, that the command was interrupted, and how to go on. `at_once`: past the buffers
    and locks, for a signal may come while stderr is written.
    """
    if _state.told:
        return
    _state.told = True
    how = f" by {signal.Signals(_state.first).name}" if _state.first not in (None, signal.SIGINT) else ""
    line = f"\ninterrupted{how}" + (f"; continue with:\n  {_state.resume}" if _state.resume else "")
    with suppress(OSError):
        if at_once:
            os.write(2, f"{line}\n".encode())
        else:
            print(line, file=sys.stderr, flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    if _state.first is None and not _state.leaving:
        _state.first = number
        raise Stopped(number)
    if _state.first is not None:
        tell(at_once=True)
    os._exit(128 + (_state.first or number))


def _leave() -> None:
    """Ignore signals from here on: the interpreter restores the system's handlers while it shuts down, and a
    finished command would end by the signal and not with its exit code.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_IGN)
