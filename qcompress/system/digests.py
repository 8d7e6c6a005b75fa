"""Digests of files: computing them, remembering them with the file's state, sealing JSON files. No torch.

A remembered digest costs a `stat` instead of a read. It is valid while inode, size, modification time and
change time are unchanged: no program can set the change time. JSON files of this package contain their own
digest, `seal`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcompress.system import strict_json
from qcompress.system.artifacts import sha256_file
from qcompress.system.filesystem import sync
from qcompress.system.places import write_whole

SEAL = "seal"

GRANULARITY_NS = 100_000_000
"""Resolution of file system clocks: a file hashed so shortly after it was written can be written again
without a change of its times.
"""

CHUNK = 1 << 22


@dataclass(frozen=True)
class Seen:
    """A digest, and the state of its file at the time `hashed_ns`."""

    sha256: str
    bytes: int
    inode: int
    mtime_ns: int
    ctime_ns: int
    hashed_ns: int

    @classmethod
    def now(cls, path: Path) -> Seen:
        """Hash the file. The state is taken before reading: a write during the read invalidates
        the record.
        """
        state, begin = path.stat(), time.time_ns()
        digest = sha256_file(path)
        return cls(digest, state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns, begin)

    @classmethod
    def from_json(cls, record: object) -> Seen | None:
        """Record of `to_json`, possibly with further keys; None for any other value."""
        names = cls.__dataclass_fields__
        if not isinstance(record, dict) or not isinstance(record.get("sha256"), str):
            return None
        numbers = [record.get(name) for name in names if name != "sha256"]
        if not all(type(number) is int for number in numbers):
            return None
        return cls(**{name: record[name] for name in names})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def holds(self, path: Path) -> bool:
        """True if the file is in the state in which it was hashed."""
        try:
            state = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        same = (state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns)
        if same != (self.bytes, self.inode, self.mtime_ns, self.ctime_ns):
            return False
        return max(self.mtime_ns, self.ctime_ns) + GRANULARITY_NS < self.hashed_ns


def differs(path: Path, sha256: str, seen: Seen | None, *, whole: bool = False) -> Seen | None:
    """None if the file at `path` has the digest `sha256`; otherwise its actual record. A valid `seen` avoids
    reading the file, unless `whole`. Raises FileNotFoundError.
    """
    actual = seen if seen is not None and not whole and seen.sha256 == sha256 and seen.holds(path) else None
    actual = actual or Seen.now(path)
    return None if actual.sha256 == sha256 else actual


_digests: dict[Path, Seen] = {}


def digest_of(path: Path) -> str:
    """Digest of a file, cached in this process while the file is unchanged."""
    seen = _digests.get(path)
    if seen is None or not seen.holds(path):
        seen = _digests[path] = Seen.now(path)
    return seen.sha256


def prefix_digest(path: Path, size: int) -> str:
    """Digest of the first `size` bytes of a growing file."""
    with path.open("rb") as stream:
        return hashlib.sha256(stream.read(size)).hexdigest()


class Memory:
    """Remembered digests of the files in a folder, kept in a JSON file outside of it.

    If that file is damaged or cannot be written, digests are computed again.
    """

    def __init__(self, folder: Path, file: Path) -> None:
        self._folder, self._file = folder, file
        records = read_sealed(file) or {}
        self._seen = {name: Seen.from_json(record) for name, record in records.items() if name != SEAL}
        self._changed = False

    def digest(self, name: str, *, whole: bool = False) -> str:
        """Digest of a file in the folder; computed if it is not remembered, or if `whole`."""
        seen = self._seen.get(name)
        if whole or seen is None or not seen.holds(self._folder / name):
            seen = self._seen[name] = Seen.now(self._folder / name)
            self._changed = True
        return seen.sha256

    def forget(self, name: str) -> None:
        """Forget the digest of a file, so that it is read again."""
        self._changed |= self._seen.pop(name, None) is not None

    def keep(self) -> None:
        """Write the file, if digests were added or removed."""
        if not self._changed:
            return
        records = {name: seen.to_json() for name, seen in self._seen.items() if seen is not None}
        try:
            write_sealed(self._file, records)
        except OSError:
            return
        self._changed = False


def seal_of(value: Mapping[str, Any]) -> str:
    """Digest of a JSON object without its own seal."""
    text = strict_json.dumps({name: item for name, item in value.items() if name != SEAL}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its seal, atomically. Several processes may write one file."""
    write_whole(path, _text({**value, SEAL: seal_of(value)}))


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Read an object of `write_sealed`; None if it is missing or changed in any bit."""
    try:
        text = path.read_bytes().decode("utf-8")
        value = strict_json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(value, dict) and value.get(SEAL) == seal_of(value) and _text(value) == text
    return value if whole else None


def _text(value: Mapping[str, Any]) -> str:
    return strict_json.dumps(value, indent=2, sort_keys=True) + "\n"


def copy_checked(source: Path, target: Path, sha256: str) -> bool:
    """Copy a file to the disk under a temporary name, and rename it to `target` if it has this digest;
    returns False otherwise. An OSError of a write names `target`.
    """
    partial = target.with_name(f".{target.name}.tmp")
    digest = hashlib.sha256()
    with source.open("rb") as reading:
        try:
            with partial.open("wb") as writing:
                while chunk := reading.read(CHUNK):
                    digest.update(chunk)
                    writing.write(chunk)
            sync(partial)
        except OSError as error:
            error.filename = str(target)
            partial.unlink(missing_ok=True)
            raise
    if digest.hexdigest() != sha256:
        partial.unlink()
        return False
    os.replace(partial, target)
    return True
