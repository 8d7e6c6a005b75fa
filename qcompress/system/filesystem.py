"""Operating system functions for `workspace.py`: durable writes, peak memory, worded errors. No
torch.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qcompress.errors import MachineError, UsageError
from qcompress.system.locks import UNSUPPORTED

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

BLOCK = 1 << 20

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def machine_errors(path: Path) -> Iterator[None]:
    """Context that words OSErrors which only the machine's owner can fix; other errors are raised unchanged.

    `path` is named if the error has no file name. For a failing copy or rename the destination is named: its
    disk is the full one.
    """
    try:
        yield
    except OSError as error:
        named = error.filename if error.filename2 is None else error.filename2
        place = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else path
        if error.errno in _FULL:
            free_mib = shutil.disk_usage(existing(place)).free / 2**20
            raise MachineError(
                f"{place}: {error.strerror} ({free_mib:.0f} MiB free)",
                fix="free some space or choose a larger disk with --out and --cache, then run again: what is "
                "finished stays, and interrupted stages resume",
            ) from error
        if error.errno in _FORBIDDEN:
            raise MachineError(
                f"{place}: {error.strerror}",
                fix="give this user access to it, or choose other folders with --out and --cache",
            ) from error
        raise


@contextmanager
def writes_to(path: Path) -> Iterator[None]:
    """Context that adds the file name `path` to an OSError without one, as raised by writes to open files."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def existing(path: Path) -> Path:
    """The path itself, or its nearest existing parent folder."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def make_folder(path: Path) -> None:
    """Make a folder named by the user, and its parents."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(
            f"{path} cannot be made: a file is where a folder should be ({error.filename})",
            fix="choose another --out or --cache",
        ) from error


def allocate(path: Path, size: int) -> None:
    """Allocate a file's blocks on the disk: writing to a mapped page without blocks is a SIGBUS on a full
    disk. On failure the file is removed, and the OSError names it.
    """
    try:
        with path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                for start in range(0, size, BLOCK):  # keeping the existing content
                    block = file.read(min(BLOCK, size - start))
                    file.seek(start)
                    file.write(block.ljust(min(BLOCK, size - start), b"\0"))
    except OSError as error:
        path.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if os.name == "nt":  # flushes only what is open for writing, and no folders
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, *UNSUPPORTED):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(fd)


def reset_peak() -> None:
    """Start a new measurement for `peak_mib`, if Linux allows it. Memory of earlier stages is first returned
    to the system: models contain reference cycles, and the C library keeps freed memory.
    """
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # only glibc has it; Windows opens no library of None
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # elsewhere the peak is that of the process's whole life
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Peak resident memory of this process since `reset_peak`, in MiB; 0 if it cannot be measured."""
    with suppress(OSError):
        match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if match:
            return int(match[1]) / 2**10
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
