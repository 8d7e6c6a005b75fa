"""Operating system functions for `workspace.py`: locks, durable writes, peak memory, worded
errors. No torch.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import gc
import json
import os
import re
import shutil
import socket
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qcompress.errors import MachineError, UsageError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

BLOCK = 1 << 20

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
    """Exclusive lock that ends with its process, also by SIGKILL, and that no child inherits.

    `path` names the holder. The file remains after release, because deleting it would let two processes lock
    two files of one name. Without fcntl the file itself is the lock; it remains only if its holder is killed,
    which the next process detects.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def take(self) -> bool:
        """Take the lock; False if a live process has it, possibly this one."""
        fd = self._flock() if fcntl else self._create()
        if fd is None:
            return False
        self._fd = fd
        _held().add(self)
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        try:
            os.ftruncate(fd, 0)
            os.write(fd, json.dumps(holder).encode())
        except OSError:
            self.release()
            raise
        return True

    def holder(self) -> dict[str, Any]:
        """pid, host and since; empty until the holder has written them."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) and isinstance(content.get("pid"), int) else {}

    def __str__(self) -> str:
        holder = self.holder()
        if not holder:
            return f"a process that has not signed {self.path}"
        return f"process {holder['pid']} on {holder.get('host')}, since {holder.get('since')}"

    def release(self) -> None:
        """Release the lock; does nothing if it is not held."""
        if self._fd is None:
            return
        if fcntl:
            # Closing alone would leave it with a child that was forked a moment ago.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self.drop()
        if not fcntl:
            self.path.unlink(missing_ok=True)

    def drop(self) -> None:
        """Close this process's handle; a lock shared with the parent process stays with the parent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _flock(self) -> int | None:
        assert fcntl is not None
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if isinstance(error, BlockingIOError):
                return None
            if error.errno in _NO_LOCKS:
                raise MachineError(
                    f"{self.path}: the file system of this folder has no locks ({error.strerror})",
                    fix="choose --out and --cache on a local disk",
                ) from error
            raise
        return fd

    def _create(self) -> int | None:
        """Create the lock file without fcntl, after removing that of a dead process."""
        for _ in range(2):
            try:
                return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                # Windows refuses to delete files that a live process has open (and os.kill would end it).
                pid = self.holder().get("pid")
                if os.name != "nt" and (pid is None or _is_alive(pid)):
                    return None
                try:
                    self.path.unlink(missing_ok=True)
                except PermissionError:
                    return None
        return None


@functools.cache
def _held() -> weakref.WeakSet[Lock]:
    """Locks of this process. A forked child, such as a data loader's worker, drops its copies at once, or it
    would hold them beyond its parent's death.
    """
    held: weakref.WeakSet[Lock] = weakref.WeakSet()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: [lock.drop() for lock in list(held)])
    return held


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


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
        if error.errno not in (errno.EINVAL, *_NO_LOCKS):  # some network file systems cannot sync a folder
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
