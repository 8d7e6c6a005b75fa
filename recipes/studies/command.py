"""What the commands of all studies share: one process, where the data and the runs are, errors in words."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcompress.errors import QcompressError, UsageError
from qcompress.system.distributed import announced
from qcompress.system.stopping import exit_code


@contextmanager
def command() -> Iterator[None]:
    """Run a study in one process; what goes wrong is a line and its exit code."""
    try:
        if announced() > 1:
            raise UsageError(
                f"a study runs in one process, and this is one of {announced()}",
                fix="start it without torchrun",
            )
        yield
    except QcompressError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(exit_code()) from None


def data_and_work(folder: Path, data: Path | None, out: Path) -> tuple[Path, Path]:
    """The data's directory, and the study's own one for its runs, made if need be."""
    known = os.environ.get("QCOMPRESS_ASSETS")
    found = data or (Path(known) if known else None)
    if found is None or not found.is_dir():
        raise UsageError("the data of this study is not here", fix="set QCOMPRESS_ASSETS, or --data")
    work = (out / folder.name).resolve()
    work.mkdir(parents=True, exist_ok=True)
    return found.resolve(), work
