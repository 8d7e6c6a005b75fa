"""The files of a run, opened for a page; a missing file is None."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompress.report.html.figures import Document
from qcompress.system import strict_json
from qcompress.system.artifacts import read_json
from qcompress.verdict.run_directory import LoadedRun, load


@dataclass(frozen=True)
class Evidence:
    """A run and its files; `place` is the run's number on a page about several runs."""

    loaded: LoadedRun
    place: int | None = None

    @property
    def name(self) -> str:
        """Name of the run on a page about several runs."""
        return f"{self.loaded.recipe.name}/{self.loaded.path.resolve().name}"

    @property
    def parity(self) -> Document:
        return self._document("parity.json", self.loaded.parity)

    @property
    def verdict(self) -> Document:
        return self._document("verdict.json", self.loaded.verdict)

    @property
    def manifest(self) -> Document:
        return self._document("manifest.json", self.loaded.manifest)

    def optional(self, name: str) -> Document | None:
        """Open a JSON file that the run may lack."""
        file = self.loaded.path / name
        return self._document(name, read_json(file)) if file.is_file() else None

    def log(self) -> Document:
        """Records of log.jsonl, one per line. An incomplete line, left by a killed run, is an
        empty record.
        """
        file = self.loaded.path / "log.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        return self._document("log.jsonl", [_record(line) for line in lines])

    def recipe_text(self) -> str:
        return (self.loaded.path / "recipe.resolved.yaml").read_text(encoding="utf-8")

    def _document(self, name: str, content: Any) -> Document:
        return Document(name if self.place is None else f"{self.place}/{name}", content)


def _record(line: str) -> dict[str, Any]:
    try:
        record = strict_json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def evidence(folder: Path, place: int | None = None) -> Evidence:
    """Open the run in a folder. Raises UsageError if the folder is not a finished run."""
    return Evidence(load(folder), place)
