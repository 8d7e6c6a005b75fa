"""Files of a run directory: copies of the stages' files, and their digests in `.placed.json`. No torch."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from qcompress.errors import ContractError, MachineError
from qcompress.system.digests import Seen, copy_checked, differs, read_sealed, write_sealed

PLACED = ".placed.json"


class Placed:
    """Files of one run. `whole`: read each of them instead of trusting remembered digests."""

    def __init__(self, run: Path, log: Callable[[str], None], whole: bool) -> None:
        self._run, self._log, self._whole = run, log, whole

    def place(self, stage: str, entry: Path, files: Mapping[str, Any], rules: Mapping[str, str]) -> None:
        """Copy the files of a finished stage into the run by `rules`; see `Workspace.step`."""
        placed = read_placed(self._run)
        before = json.dumps(placed)
        for rule, destination in rules.items():
            wanted = destinations(list(files), rule, destination)
            old = {name for name, was in placed.items() if (was["stage"], was["rule"]) == (stage, rule)}
            for name in old - wanted.keys():
                # An old engine beside a deferred build would be mistaken for a new one.
                record, path = placed.pop(name), self._run / inside(name)
                if path.is_file() and differs(path, record["sha256"], Seen.from_json(record)) is None:
                    self._log(f"{stage}: no longer made, removed from the run: {name}")
                    path.unlink()
            for name, source in wanted.items():
                record = self._put(stage, entry / source, name, files[source]["sha256"], placed.get(name))
                placed[name] = {**record.to_json(), "stage": stage, "rule": rule}
        if json.dumps(placed) != before:
            write_placed(self._run, placed)

    def _put(self, stage: str, source: Path, name: str, sha256: str, record: object) -> Seen:
        """Make the run's file `name` a copy of `source`, whose digest is `sha256`."""
        target, seen = self._run / name, Seen.from_json(record)
        if target.is_file():
            if seen is not None and seen.sha256 == sha256 and not self._whole and seen.holds(target):
                return seen
            current = Seen.now(target)
            if current.sha256 == sha256:
                return current
            if seen is not None and seen.sha256 == sha256:
                self._log(f"{stage}: {name} in the run was changed, and is put back")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not copy_checked(source, target, sha256):
            raise MachineError(
                f"{source} changed while it was copied",
                fix="check the disk, then run again with --check-cache",
            )
        return Seen.now(target)


def read_placed(run: Path) -> dict[str, dict[str, Any]]:
    """Records of the files of a run by name: `Seen`, and the stage and rule that placed them. Empty if the
    list is missing or damaged: then all files are placed again.
    """
    content = read_sealed(run / PLACED) or {}
    return content.get("files", {})


def write_placed(run: Path, placed: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the records of a run's files."""
    write_sealed(run / PLACED, {"files": placed})


def record(run: Path, *names: str) -> None:
    """Record files that a command wrote into a run. A file that was placed before keeps its stage and rule,
    so that the next run finds it.
    """
    placed = read_placed(run)
    for name in names:
        known = placed.get(name, {"stage": "run", "rule": name})
        placed[name] = {**Seen.now(run / name).to_json(), "stage": known["stage"], "rule": known["rule"]}
    write_placed(run, placed)


def forget(run: Path, *names: str) -> None:
    """Remove the records of files that are about to be written."""
    placed = read_placed(run)
    if any([placed.pop(name, None) for name in names]):
        write_placed(run, placed)


def inside(text: str) -> str:
    """Check a name or relative path from the caller. Raises ContractError if it leads out of the folder."""
    path = PurePosixPath(text)
    if not text or path.is_absolute() or ".." in path.parts or path.name in (".lock", PLACED):
        raise ContractError(f"{text!r} cannot name something inside a run or the cache")
    return text


def destinations(files: Collection[str], rule: str, destination: str) -> dict[str, str]:
    """Path inside the run -> content file, for one rule of `place`."""
    is_glob, into_folder = any(sign in rule for sign in "*?["), destination.endswith("/")
    if is_glob and not into_folder:
        raise ContractError(f"place: {rule} may mean several files, so {destination!r} must end in '/'")
    base, rule = PurePosixPath(inside(destination)), rule.rstrip("/")
    depth = rule.count("/") + 1
    paths = {}
    for file in files:
        above, rest = file.split("/")[:depth], file.split("/")[depth:]
        if fnmatch.fnmatchcase("/".join(above), rule) if is_glob else above == rule.split("/"):
            keeps_name = is_glob or (into_folder and not rest)
            paths[str(base.joinpath(*above[-1:] if keeps_name else (), *rest))] = file
    return paths
