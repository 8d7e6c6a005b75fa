"""Entry point of the `qcompress` command and of `python -m qcompress`."""

import atexit
import gc
import os
import shlex
import sys

from qcompress.system.stopping import Stoppable, resume_with

BRIEF = ("--help", "check", "list", "show")
"""Commands that end before garbage counts: collections would only search the imported modules."""

COMPLETION = "_QCOMPRESS_COMPLETE"
"""Variable that a shell sets to ask for completions."""


def main() -> None:
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
