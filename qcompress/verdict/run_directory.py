"""Reader of finished run directories. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.errors import IncomparableError, UsageError
from qcompress.system.artifacts import read_object, sha256_file
from qcompress.system.placed import read_placed
from qcompress.system.workspace import damage, followed, manifest_of
from qcompress.verdict.run_files import AGAIN, check_files, read_shaped

if TYPE_CHECKING:
    from qcompress.schema.recipe import Recipe

RECIPE = "recipe.resolved.yaml"


@dataclass(frozen=True)
class LoadedRun:
    """A run directory: path, recipe, manifest, report and verdict."""

    path: Path
    manifest: dict[str, Any]
    parity: dict[str, Any]
    verdict: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the recipe."""
        return self.manifest["recipe"]

    @cached_property
    def recipe(self) -> Recipe:
        """Resolved recipe, read when it is first asked for. Raises IncomparableError if it is not a recipe of
        this version.
        """
        return _recipe(self.path / RECIPE, self.manifest)

    @property
    def smoke(self) -> bool:
        """True if the run was made by `run --smoke`."""
        return bool(self.manifest.get("smoke"))

    def demand_whole(self) -> None:
        """Raise UsageError for a smoke run, which cannot be judged."""
        if self.smoke:
            raise UsageError(
                f"{self.path} is a smoke run: two blocks and little data say nothing about the model",
                fix="run the recipe without --smoke, and name that run",
            )

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the model's outputs, in order; None if they have no names."""
        from qcompress.tasks import TASKS

        task, config = self.recipe.task, self.path / "config.json"
        if config.is_file():
            task = TASKS[task.name].settled(task, read_object(config))
        names = getattr(task, "labels", None)
        return tuple(names) if names else None

    def stage(self, name: str) -> Path | None:
        """Folder of a stage in the cache; None if it was deleted."""
        folder = Path(self.manifest["stages"][name]["path"]) if name in self.manifest["stages"] else None
        return folder if folder is not None and folder.is_dir() else None

    def checked_stage(self, name: str) -> Path | None:
        """Folder of a stage after a check of all its digests. Raises IncomparableError if a file is damaged
        or the folder belongs to another run.
        """
        folder = self.stage(name)
        if folder is None:
            return None
        wrong = damage(folder, whole=True)
        if wrong is None and manifest_of(folder)["digest"] != self.manifest["stages"][name]["digest"]:
            wrong = "it was made again with other content"
        if wrong:
            raise IncomparableError(
                f"{folder}: {wrong}", fix="run the recipe again: damaged stages are made again"
            )
        return folder


def load(path: str | os.PathLike[str]) -> LoadedRun:
    """Open a run directory. Raises UsageError if it is not a finished run, IncomparableError if one of its
    files was changed. The recipe is read when it is asked for; if its digest was not recorded, at once.
    """
    folder = followed(Path(path))
    if not folder.is_dir():
        what = "is a file, and a run is a directory" if folder.exists() else "does not exist"
        raise UsageError(f"{folder} {what}", fix="name the run directory that `qcompress run` printed")
    for name in (RECIPE, "manifest.json", "parity.json", "verdict.json"):
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder} is not a finished run: {name} is missing",
                fix="name the run directory that `qcompress run` printed, or let the run finish",
            )
    check_files(folder)
    run = LoadedRun(
        path=folder,
        manifest=read_shaped(folder / "manifest.json"),
        parity=read_shaped(folder / "parity.json"),
        verdict=read_shaped(folder / "verdict.json"),
    )
    if RECIPE not in read_placed(folder):
        _ = run.recipe  # refuses a file that the run may not have written
    return run


def _recipe(file: Path, manifest: Mapping[str, Any]) -> Recipe:
    """Read the resolved recipe; only its structure is checked, because its data may be gone."""
    from qcompress.recipe.load import read
    from qcompress.recipe.validate import validate
    from qcompress.schema import custom

    with custom.recorded(manifest.get("own", {})):
        document = read(file)
        recipe = validate(document)
    if document.mistakes or recipe is None:
        first = f": {document.mistakes[0]}" if document.mistakes else ""
        raise IncomparableError(f"{file} is not the recipe of a run{first}", fix=AGAIN)
    return recipe


def broken(folder: Path, parity: Mapping[str, Any]) -> Iterator[str]:
    """Messages on files that differ from the measured ones: the graph, the graph from which the engine was
    built, and the engine's plan. Missing files are skipped (CI keeps only some).
    """
    graph, build = folder / "model.onnx", folder / "engine" / "build.json"
    facts = read_object(build) if build.is_file() else {}
    graph_digest = sha256_file(graph) if graph.is_file() else None
    if graph_digest and parity.get("onnx") and graph_digest != parity["onnx"]["sha256"]:
        yield f"{graph} is not the file that was measured"
    if graph_digest and facts.get("onnx") and graph_digest != facts["onnx"]["sha256"]:
        yield f"the engine was built from another file than {graph}"
    for name, digest in _certified(folder).items():
        if (folder / name).is_file() and sha256_file(folder / name) != digest:
            yield f"{folder / name} is not the file that certificate.json is about"
    for file, digest in _data(folder, parity):
        if sha256_file(file) != digest:
            yield f"{file} is not the file that was measured"
    for file, digest in _data(folder, facts):
        if sha256_file(file) != digest:
            yield f"the engine was built from another file than {file}"
    plan = folder / "engine" / "model.plan"
    if plan.is_file() and facts.get("plan") and sha256_file(plan) != facts["plan"]["sha256"]:
        yield f"{plan} is not the engine that was built"
    engine = next((row for row in parity["rows"] if row["stage"] == "engine"), {})
    measured = engine.get("measured_on") or {}
    on_plan = measured.get("measured") == "plan" and facts.get("plan")
    if on_plan and measured["file_sha256"] != facts["plan"]["sha256"]:
        yield "the engine row was measured on another plan than the one that was built"


def _certified(folder: Path) -> dict[str, str]:
    """Digests in the certificate, by file; empty without a certificate."""
    file = folder / "certificate.json"
    return read_object(file).get("files", {}) if file.is_file() else {}


def _data(folder: Path, facts: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """External data files of the graph that exist, with their recorded digests."""
    for name, digest in (facts.get("onnx") or {}).get("data", {}).items():
        if (folder / name).is_file():
            yield folder / name, digest
