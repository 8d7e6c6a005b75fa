"""Entry point of the `qcompress` command; `python -m qcompress` is the same."""

import shlex
import sys

from qcompress.system.stopping import Stoppable, resume_with


def main() -> None:
    """Run a command. Signals are heard before anything else is imported."""
    with Stoppable():
        if sys.argv[1:2] == ["run"]:
            resume_with(shlex.join(["qcompress", *sys.argv[1:]]))
        from qcompress.cli.main import main as run

        run()


if __name__ == "__main__":
    main()
