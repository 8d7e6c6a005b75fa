"""Entry point of the `qcompress` command and of `python -m qcompress`."""

import atexit
import gc
import os
import shlex
import sys
from contextlib import suppress

from qcompress.system.stopping import Stoppable, resume_with

BRIEF = ("--help", "check", "list", "show")
"""Commands that end before garbage counts: collections would only search the imported modules."""

COMPLETION = "_QCOMPRESS_COMPLETE"
"""Variable that a shell sets to ask for completions."""


def main() -> None:
    """Run a command, alone or in one of several processes."""
    atexit.register(end_at_once)  # registered first, called last
    try:
        command()
    except SystemExit as ended:
        _ended.append(ended.code)
        raise
    _ended.append(None)


_ended: list[object] = []
"""Exit code of the command, as SystemExit has it; empty after another exception."""


def end_at_once() -> None:
    """End one of several processes without the interpreter's own end: threads of a process group that were
    left behind abort about one launch in eight there (`terminate called without an active exception`), and
    the launcher reports a finished run as failed.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    code = _ended[0] if _ended else 1
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def command() -> None:
    """Run a command. Signal handlers are installed before other modules are imported. The collection at exit
    searches nothing: with torch's modules it takes a second.
    """
    atexit.register(gc.freeze)
    with Stoppable():
        if sys.argv[1:2] and sys.argv[1] in BRIEF or COMPLETION in os.environ:
            gc.disable()
        if sys.argv[1:2] == ["run"]:
            resume_with(shlex.join(["qcompress", *sys.argv[1:]]))
        from qcompress.cli.main import main as run

        run()


if __name__ == "__main__":
    main()
