"""Output paths of commands: checked before the work, written atomically, with worded errors. Standard library
only.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qcompress.errors import MachineError, UsageError
from qcompress.system.filesystem import existing, machine_errors, writes_to

_NO_PLACE = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY)
"""Errors of a path that cannot be a file or folder of the wanted kind."""

_LOST = (
    errno.ENOENT, errno.ESTALE, errno.EIO, errno.ENODEV, errno.ENXIO, errno.EBUSY, errno.EFBIG, errno.EMFILE,
    errno.ENFILE, errno.ETXTBSY, errno.EINVAL, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EXDEV,
    errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP,
)  # fmt: skip
"""Errors of a path that has disappeared, or of a failing file system."""

_STEM = 200
"""Largest number of bytes of a file's name that the name of its partial file repeats; a name has
at most 255.
"""


@contextmanager
def place_errors(path: Path = Path("this command")) -> Iterator[None]:
    """Context that words errors of reading and writing files and folders. Errors of networks and closed pipes
    are raised unchanged.
    """
    try:
        with machine_errors(path):
            yield
    except OSError as error:
        if isinstance(error, BrokenPipeError | ConnectionError | ChildProcessError):
            raise
        named = error.filename if error.filename2 is None else error.filename2
        place = os.fsdecode(named) if isinstance(named, str | bytes) else str(path)
        if error.errno in _NO_PLACE:
            raise UsageError(f"{place}: {error.strerror}", fix="name another place") from error
        if error.errno in _LOST:
            raise MachineError(
                f"{place}: {error.strerror}", fix="check that its folder exists and its disk works"
            ) from error
        raise


def demand_place(path: Path, *, folder: bool = False) -> None:
    """Raise UsageError or MachineError if a file (or a folder with files in it) cannot be written at a path.
    Leaves nothing behind.
    """
    with place_errors(path):
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            mode = None
        if mode is not None and stat.S_ISDIR(mode) != folder:
            what = "a folder" if stat.S_ISDIR(mode) else "a file"
            raise UsageError(f"{path} is {what}", fix=f"name a {'folder' if folder else 'file'}")
        if mode is not None and not folder and not stat.S_ISREG(mode):
            return  # a device or a pipe
        where = path if folder and mode is not None else existing(path.parent)
        if not where.is_dir():
            raise UsageError(f"{path} cannot be made: {where} is a file", fix="name another place")
        try:
            with tempfile.TemporaryFile(dir=where, buffering=0) as file:
                file.write(bytes(4096))  # a full disk has no block left
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


def write_named(path: Path, text: str) -> None:
    """Write a file named by the user, and make its parent folders."""
    with place_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: a reader never sees part of it, and after a failure the old content remains.
    Links are followed; devices and pipes are written to. Raises OSError that names the file.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if path.exists() and not path.is_file() and not path.is_dir():
        _pour(path, text)
        return
    stem = os.fsdecode(os.fsencode(path.name)[:_STEM]) if len(os.fsencode(path.name)) > _STEM else path.name
    partial = path.with_name(f"{stem}.{os.getpid()}.tmp")  # several processes may write the file
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def append_whole(path: Path, text: str) -> None:
    """Append to a file; after a failure the old content remains."""
    with place_errors(path):
        size = path.stat().st_size if path.is_file() else None
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(text)
        except OSError as error:
            if size is not None:
                with suppress(OSError):
                    os.truncate(path, size)
            error.filename = str(path)
            raise


def _pour(path: Path, text: str) -> None:
    """Write to a device or to a pipe; a pipe without a reader is an error."""
    with writes_to(path):
        handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
        os.set_blocking(handle, True)
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
