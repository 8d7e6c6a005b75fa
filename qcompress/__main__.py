"""Entry point of the `qcompress` command and of `python -m qcompress`."""

import atexit
import gc
import os
import shlex
import sys

from qcompress.system.stopping import Stoppable, resume_with

BRIEF = ("--help", "check", "list", "show")
"""Commands that end before garbage counts: collections, the last one at exit, would only search the imported
modules.
"""

COMPLETION = "_QCOMPRESS_COMPLETE"
"""Variable that a shell sets to ask for completions."""


def main() -> None:
    """Run a command. Signal handlers are installed before other modules are imported."""
    with Stoppable():
        if sys.argv[1:2] and sys.argv[1] in BRIEF or COMPLETION in os.environ:
            gc.disable()
            atexit.register(gc.freeze)
        if sys.argv[1:2] == ["run"]:
            resume_with(shlex.join(["qcompress", *sys.argv[1:]]))
        from qcompress.cli.main import main as run

        run()


if __name__ == "__main__":
    main()
