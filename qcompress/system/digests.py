"""Digests of files: computed, remembered with the state of the file, and sealed into JSON. No torch.

A digest that is remembered costs a `stat` instead of a read. It counts as long as inode, size, modification
time and change time are the same: no program can set the change time. JSON files of our own carry their own
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
"""Clocks of file systems advance in steps: a file that was written so shortly before it was hashed can be
written again without another time.
"""

CHUNK = 1 << 22


@dataclass(frozen=True)
class Seen:
    """A digest, and the state of the file from which it was computed at `hashed_ns`."""

    sha256: str
    bytes: int
    inode: int
    mtime_ns: int
    ctime_ns: int
    hashed_ns: int

    @classmethod
    def now(cls, path: Path) -> Seen:
        """Read the file. Its state is that of before: a write meanwhile makes the record worthless."""
        state, begin = path.stat(), time.time_ns()
        digest = sha256_file(path)
        return cls(digest, state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns, begin)

    @classmethod
    def from_json(cls, record: object) -> Seen | None:
        """A record of `to_json`, with or without further keys; None for anything else."""
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
    """None if the file at `path` has the digest `sha256`; otherwise what it has. `seen` spares reading it,
    unless `whole`. Raises FileNotFoundError.
    """
    found = seen if seen is not None and not whole and seen.sha256 == sha256 and seen.holds(path) else None
    found = found or Seen.now(path)
    return None if found.sha256 == sha256 else found


_digests: dict[Path, Seen] = {}


def digest_of(path: Path) -> str:
    """Digest of a file, which a process reads once as long as the file stays as it is."""
    seen = _digests.get(path)
    if seen is None or not seen.holds(path):
        seen = _digests[path] = Seen.now(path)
    return seen.sha256


def prefix_digest(path: Path, size: int) -> str:
    """Digest of the first `size` bytes of a file that grows."""
    with path.open("rb") as stream:
        return hashlib.sha256(stream.read(size)).hexdigest()


class Memory:
    """Remembered digests of the files of one folder, in one JSON file outside of it.

    A memory that is torn, altered or not writable costs time and nothing else.
    """

    def __init__(self, folder: Path, file: Path) -> None:
        self._folder, self._file = folder, file
        found = read_sealed(file) or {}
        self._seen = {name: Seen.from_json(record) for name, record in found.items() if name != SEAL}
        self._changed = False

    def digest(self, name: str, *, whole: bool = False) -> str:
        """Digest of a file of the folder; read if it was not read before, or if `whole`."""
        seen = self._seen.get(name)
        if whole or seen is None or not seen.holds(self._folder / name):
            seen = self._seen[name] = Seen.now(self._folder / name)
            self._changed = True
        return seen.sha256

    def forget(self, name: str) -> None:
        """Read a file again when its digest is next asked for."""
        self._changed |= self._seen.pop(name, None) is not None

    def keep(self) -> None:
        """Write the file, if anything is new."""
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
    """Write a JSON object with its seal, in one step. Several processes may write the same file."""
    write_whole(path, _text({**value, SEAL: seal_of(value)}))


def read_sealed(path: Path) -> dict[str, Any] | None:
    """An object of `write_sealed`; None where it is missing, torn or altered, be it by one bit."""
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
    """Copy a file to the disk under a temporary name, and put it at `target` if it has this digest; False if
    it has not. An OSError of a write names `target`.
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
