"""What `workspace.py` asks of the system: locks, durable writes, peak memory, refusals in words. No torch."""

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
    """An exclusive lock that ends with its process, SIGKILL included, and that no child inherits.

    `path` says who holds it. The file stays when the lock goes, because deleting it would let two processes
    lock two files of one name. Without fcntl the file itself is the lock; it stays only if its holder is
    killed, and the next to come sees that.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def take(self) -> bool:
        """Take the lock, unless a live process has it; that may be this very process."""
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
        """pid, host and since; empty while the holder has not signed yet."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else {}

    def __str__(self) -> str:
        holder = self.holder()
        if not holder:
            return f"a process that has not signed {self.path}"
        return f"process {holder['pid']} on {holder.get('host')}, since {holder.get('since')}"

    def release(self) -> None:
        """Let it go; nothing happens when it is not held."""
        if self._fd is None:
            return
        if fcntl:
            # Closing alone would leave it with a child that was forked a moment ago.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self.drop()
        if not fcntl:
            self.path.unlink(missing_ok=True)

    def drop(self) -> None:
        """Close this process's handle; a lock that the parent process shares stays with the parent."""
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
        """Without fcntl: create the file, after removing that of a dead process."""
        for _ in range(2):
            try:
                return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                # Windows itself refuses to delete what a live process has open (and os.kill ends that).
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
    """The locks of this process. A forked child, such as a data loader's worker, drops its copies at once, or
    it would hold them beyond its parent's death.
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
    """Say in words what only the machine's owner can mend; every other error passes as it is.

    `path` stands in where the error names no file. Of a copy or a rename that fails, the destination is
    named: its disk is the one that is full.
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
                "finished stays, and what was interrupted goes on",
            ) from error
        if error.errno in _FORBIDDEN:
            raise MachineError(
                f"{place}: {error.strerror}",
                fix="give this user access to it, or choose other folders with --out and --cache",
            ) from error
        raise


@contextmanager
def writes_to(path: Path) -> Iterator[None]:
    """Name `path` in an OSError that names no file, as those of a write to an open file do."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def existing(path: Path) -> Path:
    """The path itself or the nearest folder above that is there."""
    return next(found for found in (path.absolute(), *path.absolute().parents) if found.exists())


def make_folder(path: Path) -> None:
    """Make a folder that a user named, and the folders above it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(
            f"{path} cannot be made: a file is where a folder should be ({error.filename})",
            fix="choose another --out or --cache",
        ) from error


def allocate(path: Path, size: int) -> None:
    """Give a file its blocks on the disk: writing into a mapped page of a file without them is a SIGBUS when
    the disk is full. Raises OSError, which names the file, and removes it.
    """
    try:
        with path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                for start in range(0, size, BLOCK):  # without changing what is there
                    block = file.read(min(BLOCK, size - start))
                    file.seek(start)
                    file.write(block.ljust(min(BLOCK, size - start), b"\0"))
    except OSError as error:
        path.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
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
    """Start a new measurement for `peak_mib`, where Linux allows it. What an earlier stage left behind goes
    back to the system first: a model refers to itself, and the C library keeps what was freed.
    """
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # only glibc has it; Windows opens no library of None
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # elsewhere the peak of the process's whole life stands in
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Largest resident memory of this process since `reset_peak`, in MiB; 0 where nothing measures it."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) / 2**10
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
