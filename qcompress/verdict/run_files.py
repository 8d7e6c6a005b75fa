"""Checks files of a run directory against the digests that the run recorded. No torch.

`.placed.json` has the records (`placed.read_placed`). A run without it, such as an artifact of a CI server
that leaves out hidden files, is read too: its JSON must have the right form. The graph, its data and the plan
are not checked here but in `run_directory.broken`, against parity.json, certificate.json and build.json.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qcompress.errors import IncomparableError
from qcompress.system.artifacts import read_json, read_object
from qcompress.system.digests import Seen, differs, prefix_digest
from qcompress.system.placed import read_placed, record

AGAIN = "run the recipe again: it puts the file back"

LOG = "log.jsonl"
"""Log of the run; it grows after its digest was recorded."""

UNREAD = ("model.onnx", "engine/model.plan", "probe/", "report.html")
"""Name prefixes that `check_files` skips: large files, and files that no command reads."""

READERS = ("config.json", "preprocessor_config.json", "tokenizer*.json", "special_tokens_map.json")
"""Files that must be JSON objects if no digest was recorded."""


class _Shape(BaseModel):
    """Keys of a file that every reader relies on."""

    model_config = ConfigDict(extra="allow", strict=True, defer_build=True)


class _Manifest(_Shape):
    recipe: str
    source: str = ""
    base: str = ""
    stages: dict[str, dict[str, Any]] = {}
    versions: dict[str, str | None] = {}


class _Row(_Shape):
    stage: str
    status: Literal["measured", "not-run", "deferred"]
    reason: str | None = None
    metrics: dict[str, float | None] | None = None
    distance: dict[str, Any] | None = None


class _Parity(_Shape):
    rows: list[_Row]
    sets: list[str] = []
    main: dict[str, Any] = {}
    inputs: dict[str, Any] = {}


class _Verdict(_Shape):
    verdict: Literal["accept", "regression", "anomalous", "inconclusive", "unjudged"]
    goals: list[dict[str, Any]]
    reasons: list[str]


SHAPES: dict[str, type[_Shape]] = {
    "manifest.json": _Manifest, "parity.json": _Parity, "verdict.json": _Verdict,
}  # fmt: skip


def check_files(run: Path) -> None:
    """Raise IncomparableError for a file that was changed after the run had recorded it. A missing file is
    left to its reader: CI keeps only some files.
    """
    placed = read_placed(run)
    if not placed:
        for file in (match for rule in READERS for match in run.glob(rule)):
            read_object(file)
    for name, known in placed.items():
        file = run / name
        if name.startswith(UNREAD) or not file.is_file():
            continue
        if name == LOG:
            changed = prefix_digest(file, known["bytes"]) != known["sha256"]
        else:
            changed = differs(file, known["sha256"], Seen.from_json(known)) is not None
        if changed:
            raise IncomparableError(f"{file} was changed after the run had written it", fix=AGAIN)


def read_shaped(file: Path) -> dict[str, Any]:
    """Read manifest.json, parity.json or verdict.json. Raises IncomparableError if a key that every reader
    relies on is missing or has another type.
    """
    content = read_json(file)
    try:
        SHAPES[file.name].model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise IncomparableError(f"{file}: {where}: {first['msg']}", fix=AGAIN) from None
    return content


def read_run_samples(file: Path) -> dict[str, dict[str, Any]]:
    """Read the sets of samples.json.gz. Raises IncomparableError if the file is damaged or is not such a
    file.
    """
    from qcompress.parity.sample_results import read_samples

    try:
        return read_samples(file)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise IncomparableError(f"{file} cannot be read ({error})", fix="measure that run again") from None


def record_files(run: Path, *names: str) -> None:
    """Record the digests of files that a command added to a finished run, if the run has a list
    of its files.
    """
    if read_placed(run):
        record(run, *names)
