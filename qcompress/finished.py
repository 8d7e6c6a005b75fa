"""A finished run as it lies on disk. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompress import own
from qcompress.artifacts import read_json
from qcompress.errors import RecipeError, UsageError
from qcompress.recipe import read
from qcompress.schema import Recipe
from qcompress.structure import validate


@dataclass(frozen=True)
class LoadedRun:
    """A run directory: its recipe, its report and its verdict, and where its artifacts lie."""

    path: Path
    recipe: Recipe
    manifest: dict[str, Any]
    parity: dict[str, Any]
    verdict: dict[str, Any]

    def stage(self, name: str) -> Path | None:
        """Folder of a stage in the cache, None if it is gone."""
        folder = Path(self.manifest["stages"][name]["path"]) if name in self.manifest["stages"] else None
        return folder if folder is not None and folder.is_dir() else None


def load(path: str | os.PathLike[str]) -> LoadedRun:
    """Open a run directory."""
    folder = Path(path)
    for name in ("recipe.resolved.yaml", "manifest.json", "parity.json", "verdict.json"):
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder} is not a finished run: {name} is missing",
                fix="name the run directory that `qcompress run` printed, or let the run finish",
            )
    manifest = read_json(folder / "manifest.json")
    return LoadedRun(
        path=folder,
        recipe=_recipe(folder / "recipe.resolved.yaml", manifest),
        manifest=manifest,
        parity=read_json(folder / "parity.json"),
        verdict=read_json(folder / "verdict.json"),
    )


def _recipe(file: Path, manifest: Mapping[str, Any]) -> Recipe:
    """The recipe that a run wrote; its data may be gone, so only its structure is checked."""
    with own.recorded(manifest.get("own", {})):
        document = read(file)
        recipe = validate(document)
    if document.mistakes or recipe is None:
        raise RecipeError(document.mistakes)
    return recipe
