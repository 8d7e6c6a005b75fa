"""Locks between processes: one holder, released when its process ends in any way. No torch."""

from __future__ import annotations

import errno
import functools
import json
import os
import socket
import weakref
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qcompress.errors import MachineError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Error numbers of a file system without locks."""


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
            if error.errno in UNSUPPORTED:
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
