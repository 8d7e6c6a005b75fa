"""Workspace of a run: stage cache, resuming, locks and the run directory. No torch.

    cache/<stage>/<key>/           finished: the stage's files, and manifest.json
    cache/<stage>/<key>.partial/   in work, or left by a killed run
    out/<name>/<key>/              the run: copies of the files for users
    out/<name>/latest              the run that finished last

A stage works in `.partial`; its manifest is written when all other files are on the disk, and the rename to
the final name is the commit. So an entry is either complete or absent, whenever the process dies. The next
run finds `.partial` unchanged, with the `checkpoint*` files from which the stage resumes. Locks of stages are
next to the entries, the run's lock is inside the run.

The manifest has the digest of every file. A file is checked against it before it is reused, read by a later
stage or placed; an entry with a difference is made again. `.<key>.digests.json` next to an entry remembers
digests, so that only changed files are read (`digests.py`); `check_cache` reads all.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from qcompress.errors import BusyError, ContractError
from qcompress.system.digests import Memory, read_sealed, write_sealed
from qcompress.system.filesystem import machine_errors, make_folder, peak_mib, reset_peak, sync
from qcompress.system.fingerprint import differences, plain, stage_key
from qcompress.system.locks import Lock
from qcompress.system.placed import Placed, inside

MANIFEST = "manifest.json"
POLL_S = 0.2

_PROMISED = {"stage", "parts", "files", "digest", "seconds", "peak_mib", "created"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A finished stage. `digest` covers the content, `key` the inputs of the stage.

    `seconds` and `peak_mib` (memory of this process) are those of the process that finished the stage: a
    reused step has its original cost, a resumed one the cost of its last part.
    """

    stage: str
    path: Path
    digest: str
    key: str
    reused: bool
    seconds: float
    peak_mib: float
    parts: dict[str, Any]


class Workspace:
    """Folders of one run, locked against other processes until `close`.

    `fresh` makes every stage anew, whatever is in the cache; a finished entry remains until its successor is
    finished. `check_cache` reads every file of the cache and the run instead of trusting remembered digests.
    """

    def __init__(
        self,
        out: Path,
        cache: Path,
        name: str,
        key: str,
        *,
        fresh: bool = False,
        check_cache: bool = False,
        log: Callable[[str], None] = _log.info,
    ) -> None:
        self.cache, self.fresh, self.check_cache, self.log = cache, fresh, check_cache, log
        self.run_dir = out / inside(name) / inside(key)
        self.placed = Placed(self.run_dir, log, check_cache)
        with machine_errors(self.run_dir):
            make_folder(self.run_dir)
            self._lock = Lock(self.run_dir / ".lock")
            if not self._lock.take():
                pid = self._lock.holder().get("pid")
                raise BusyError(
                    f"{self.run_dir} is in use by another run: {self._lock}",
                    fix=f"wait for it, stop it{f' (kill {pid})' if pid else ''}, or choose another --out",
                )

    def step(
        self,
        stage: str,
        parts: Mapping[str, object],
        make: Callable[[Path], None],
        *,
        place: Mapping[str, str] = {},
    ) -> Step:
        """Finished stage, from the cache or made by `make(folder)`.

        A folder left by a killed run is passed to `make` unchanged. All files that `make` leaves are content,
        except `checkpoint*` at the top and interrupted writes (`*.tmp`), which are removed.

        `place` copies content into the run: {file, folder or glob: destination}; a destination ending in `/`
        is a folder. Missing files are skipped. Files of an earlier run that `make` no longer leaves are
        removed.
        """
        inside(stage)
        parts = plain(parts)
        key = stage_key(stage, parts)
        entry = self.cache / stage / key
        with machine_errors(entry):
            reused = not self.fresh and damage(entry, whole=self.check_cache) is None
            if not reused:
                make_folder(entry.parent)
                with self._only_maker(stage, Lock(entry.parent / f".{key}.lock")):
                    reused = self._make(stage, entry, parts, make)
            manifest = manifest_of(entry)
            if manifest is None:
                raise ContractError(f"{entry / MANIFEST} has disappeared")
            if reused:
                self.log(f"{stage}: reused, made {manifest['created']}")
            self.placed.place(stage, entry, manifest["files"], place)
        cost = {"seconds": manifest["seconds"], "peak_mib": manifest["peak_mib"]}
        return Step(stage, entry, manifest["digest"], key, reused, parts=parts, **cost)

    def close(self) -> None:
        """Release the run directory."""
        self._lock.release()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _only_maker(self, stage: str, lock: Lock) -> Iterator[None]:
        logged = False
        while not lock.take():
            if not logged:
                self.log(f"{stage}: being made by another run, waiting for it: {lock}")
                logged = True
            time.sleep(POLL_S)
        try:
            yield
        finally:
            lock.release()

    def _make(self, stage: str, entry: Path, parts: dict[str, Any], make: Callable[[Path], None]) -> bool:
        """Make the entry; returns True if it turns out to be finished already."""
        partial = entry.with_name(entry.name + ".partial")
        if self.fresh:
            if partial.exists():
                shutil.rmtree(partial)
            self.log(f"{stage}: runs (asked to make it again)")
        else:
            why = would_reuse(self.cache, stage, parts, whole=self.check_cache)[1]
            if not why:  # the process that held the lock before has finished it
                return True
            if partial.exists() and damage(partial) is None:
                # The manifest is proof that only the rename was missing; the checkpoints are gone already.
                _commit(partial, entry)
                return True
            self.log(f"{stage}: runs ({why})")
        partial.mkdir(exist_ok=True)
        (partial / MANIFEST).unlink(missing_ok=True)
        reset_peak()
        start = time.perf_counter()
        with machine_errors(partial):
            make(partial)
            cost = {"seconds": round(time.perf_counter() - start, 3), "peak_mib": round(peak_mib(), 1)}
            _seal(partial, {"stage": stage, "parts": parts, **cost})
            _commit(partial, entry)
        return False


NEVER = "never finished for this recipe"
"""Reason why a stage runs."""


def has_entries(cache: Path, stage: str) -> bool:
    """True if the cache has any entry of a stage, finished or not. Without one, no key is needed to tell that
    the stage runs.
    """
    with machine_errors(cache / stage):
        return (cache / stage).is_dir()


def would_reuse(
    cache: Path, stage: str, parts: Mapping[str, object], *, whole: bool = False
) -> tuple[bool, str]:
    """True if `step` would find this stage finished; otherwise the changes since the last finished stage of
    this recipe.

    `whole`: read every file, whatever is remembered of it.
    """
    parts = plain(parts)
    entry = cache / stage / stage_key(stage, parts)
    with machine_errors(entry):
        wrong = damage(entry, whole=whole)
        if wrong is None:
            return True, ""
        if entry.is_dir():
            return False, f"damaged: {wrong}"
        if entry.with_name(entry.name + ".partial").is_dir():
            return False, "unfinished: goes on from where it was stopped"
        finished = [path for path in (cache / stage).glob("*") if not path.suffix]
        manifests = [manifest_of(path) for path in finished]
    same = [
        manifest
        for manifest in manifests
        if manifest and manifest["parts"].get("recipe") == parts.get("recipe")
    ]
    if not same:
        return False, NEVER
    changes = differences(max(same, key=lambda manifest: manifest["created"])["parts"], parts)
    more = [f"and {len(changes) - 4} more"] if len(changes) > 4 else []
    return False, ", ".join([*changes[:4], *more]) or "the form of the key changed"


def point_latest(folder: Path) -> None:
    """Point `latest` in the parent folder to a run that has its verdict, whatever that is. Failed and
    interrupted runs do not change `latest`.
    """
    link = folder.with_name("latest")
    partial = link.with_name(f".latest.{os.getpid()}.tmp")
    with machine_errors(link):
        partial.unlink(missing_ok=True)
        try:
            partial.symlink_to(folder.name, target_is_directory=True)
        except OSError:  # no such links on this file system, or (Windows) not for this user
            partial.write_text(folder.name + "\n", encoding="utf-8")
        os.replace(partial, link)


def followed(folder: Path) -> Path:
    """Resolve a path to a run directory; `latest` is a file on file systems without links."""
    if folder.name == "latest" and folder.is_file():
        return folder.with_name(folder.read_text(encoding="utf-8").strip())
    return folder


def _seal(partial: Path, made: Mapping[str, object]) -> None:
    """Remove files for resuming, and write the manifest of the others."""
    files: dict[str, dict[str, Any]] = {}
    spent: list[Path] = []
    memory = _memory(partial)
    for path in sorted(partial.rglob("*")):
        name = path.relative_to(partial).as_posix()
        if name.startswith("checkpoint") or ".tmp" in {Path(part).suffix for part in name.split("/")}:
            spent.append(path)
        elif path.is_symlink() or not (path.is_file() or path.is_dir()) or name == MANIFEST:
            raise ContractError(
                f"stage {made['stage']} left {name}, which is not a regular file or has a reserved name",
                fix="write plain files only, and leave manifest.json to the workspace",
            )
        else:
            sync(path)
            if path.is_file():
                files[name] = {"sha256": memory.digest(name, whole=True), "bytes": path.stat().st_size}
    content = "".join(f"{name}\0{files[name]['sha256']}\n" for name in sorted(files))
    # Only now, so that a run killed while hashing still has the checkpoints.
    for path in reversed(spent):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    manifest = {
        **made,
        "files": files,
        "digest": hashlib.sha256(content.encode()).hexdigest(),
        "created": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
    }
    memory.keep()
    write_sealed(partial / MANIFEST, manifest)
    sync(partial / MANIFEST)
    sync(partial)


def _commit(partial: Path, entry: Path) -> None:
    old = entry.with_name(entry.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if entry.exists():  # its successor is ready only now
        os.rename(entry, old)
    os.rename(partial, entry)
    sync(entry.parent)
    if old.exists():
        shutil.rmtree(old)


def damage(entry: Path, *, whole: bool = False) -> str | None:
    """First difference between the folder and its manifest, or None. `whole`: read every file."""
    manifest = manifest_of(entry)
    if manifest is None:
        return f"{MANIFEST} is missing, torn or altered"
    key = entry.name.removesuffix(".partial")
    if stage_key(manifest["stage"], manifest["parts"]) != key:
        return f"{MANIFEST} belongs to another entry"
    memory = _memory(entry)
    try:
        return next(_wrong(entry, manifest["files"], memory, whole), None)
    finally:
        memory.keep()


def _memory(entry: Path) -> Memory:
    """Remembered digests of an entry's files; renaming the entry keeps them valid."""
    key = entry.name.removesuffix(".partial")
    return Memory(entry, entry.with_name(f".{key}.digests.json"))


def _wrong(entry: Path, files: Mapping[str, Any], memory: Memory, whole: bool) -> Iterator[str]:
    for name, promised in files.items():
        path = entry / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != promised["bytes"]:
            yield f"{name} has {path.stat().st_size} bytes instead of {promised['bytes']}"
        elif memory.digest(name, whole=whole) != promised["sha256"]:
            memory.forget(name)
            if memory.digest(name) != promised["sha256"]:
                yield f"{name} has other content than was written"


def manifest_of(entry: Path) -> dict[str, Any] | None:
    """Manifest of a finished entry; None if it is missing or damaged."""
    manifest = read_sealed(entry / MANIFEST)
    return manifest if manifest is not None and manifest.keys() >= _PROMISED else None
