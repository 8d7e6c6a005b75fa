"""The jobs of a study: which recipe, which overrides, which parts of which files, and a digest of all of it.

A job is one run. Its digest covers the resolved recipe, the content of the data files and the float model it
starts from, and no path of a machine.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel
from study import START, Study, TaskOptions

from qcompress.pipeline.stages.load import fingerprint
from qcompress.recipe.load import load_recipe
from qcompress.system.artifacts import sha256_file
from qcompress.system.fingerprint import stage_key


@dataclass(frozen=True)
class Job:
    """One run: a recipe, its overrides, and the digest of everything that its result depends on."""

    name: str
    recipe: Path
    overrides: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class Place:
    """Where a study lies, its data, and its runs."""

    folder: Path
    data: Path
    work: Path

    @property
    def made(self) -> Path:
        """What the study's own script makes."""
        return self.work / "made"


def file_of(name: str, place: Place) -> Path:
    """A file that study.yaml names."""
    return place.data / name.replace("{study}", str(place.folder))


def split_data(name: str, task: TaskOptions, place: Place) -> dict[str, Path]:
    """The files train, holdout and test of a task; the first two are written into the work directory.

    Lines and arrays are moved as they are. Rows are drawn by a generator of seed 0, whatever the study's.
    """
    source = file_of(task.train, place)
    folder = place.work / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    files = {"test": file_of(task.test, place)}
    for part, content in (_split_archive if task.key == "npz" else _split_lines)(source, task).items():
        files[part] = folder / f"{part}{source.suffix}"
        if not files[part].is_file() or files[part].read_bytes() != content:
            files[part].write_bytes(content)
    return files


def _split_lines(source: Path, task: TaskOptions) -> dict[str, bytes]:
    lines = source.read_bytes().splitlines(keepends=True)
    head, lines = (lines[:1], lines[1:]) if task.header else ([], lines)
    parts = _rows(len(lines), task, at_random=task.key == "table")
    return {part: b"".join([*head, *(lines[row] for row in rows)]) for part, rows in parts.items()}


def _split_archive(source: Path, task: TaskOptions) -> dict[str, bytes]:
    with np.load(source) as archive:
        arrays = {name: archive[name] for name in task.columns["train"].values()}
    found = {}
    for part, rows in _rows(len(next(iter(arrays.values()))), task, at_random=True).items():
        packed = io.BytesIO()
        np.savez(packed, **{name: array[rows] for name, array in arrays.items()})
        found[part] = packed.getvalue()
    return found


def _rows(count: int, task: TaskOptions, at_random: bool) -> dict[str, np.ndarray]:
    """Which rows train and which are held out, each in their order."""
    order = np.random.default_rng(0).permutation(count) if at_random else np.arange(count)
    cut = count - round(count * task.holdout)
    return {"train": np.sort(order[:cut]), "holdout": np.sort(order[cut:])}


def start_job(study: Study, task: str, place: Place) -> Job:
    """The run that makes a task's float model."""
    start = study.start
    settings = {"seed": start.seed, **study.tasks[task].set, **start.set, **study.tasks[task].start}
    return _job(f"{START}-{task}-{start.seed}", start.recipe, settings, study, task, place, measured="test")


def arm_job(
    study: Study, arm: str, task: str, seed: int, place: Place, start: tuple[Job, Path] | None,
    chosen: dict[str, Any], trial: int | None = None,
) -> Job:  # fmt: skip
    """A final run, or a trial: `chosen` are the overrides under trial, `start` the float model's run."""
    item = study.arms[arm]
    settings = {"seed": seed, **study.set, **study.tasks[task].set, **item.set, **chosen}
    suffix = "" if trial is None else f"-trial-{trial}"
    measured = "test" if trial is None else "holdout"
    return _job(f"{arm}-{task}-{seed}{suffix}", item.recipe, settings, study, task, place, measured, start)


def _job(
    name: str, recipe: str, settings: dict[str, Any], study: Study, task: str, place: Place, measured: str,
    start: tuple[Job, Path] | None = None,
) -> Job:  # fmt: skip
    options = study.tasks[task]
    key, files = options.key, split_data(task, options, place)
    evaluate = {measured: files[measured]}
    if measured == "test":
        evaluate |= {name: file_of(other, place) for name, other in options.others.items()}
    settings = {
        "name": f"{place.folder.name}-{name}",
        f"data.train.{key}": [str(files["train"])],
        f"data.calibration.{key}": [str(files["train"])],
        **settings,
    }
    overrides = [f"{path}={_written(value, place)}" for path, value in settings.items()]
    columns = options.columns.get("test" if measured == "test" else "train")
    more = {"columns": columns} if columns else {}
    sections = {name: {key: [str(file)], **more} for name, file in evaluate.items()}
    overrides += ["data.evaluate=", f"data.evaluate={_written(sections, place)}"]
    if start is not None:
        overrides.append(f"model.run={_written(str(start[1]), place)}")
    file = place.folder / recipe
    recipe_values = load_recipe(file, overrides).recipe
    values = essence(recipe_values, recipe_values.model_dump(mode="json", by_alias=True))
    if start is not None:
        values["model"]["run"] = start[0].digest
    text = json.dumps(values, sort_keys=True)
    for path, stands in ((place.work, "{work}"), (place.data, "{data}"), (place.folder, "{study}")):
        text = text.replace(str(path), stands)
    contents: dict[str, Any] = {"train": sha256_file(files["train"])}
    contents |= {part: sha256_file(found) for part, found in evaluate.items()}
    source = values["model"].get("source")
    if source is not None and (file.parent / source).is_dir():
        contents["model"] = fingerprint(file.parent / source)
    return Job(name, file, tuple(overrides), stage_key("study", {"values": text, "data": contents}))


def essence(value: Any, dumped: Any) -> Any:
    """What was chosen of a recipe, without what is as by default: a key that a later version adds changes no
    run that does not write it. Names stay, since a choice among classes is known by them alone.
    """
    if isinstance(value, BaseModel) and isinstance(dumped, dict):
        fields = type(value).model_fields
        chosen = [
            name
            for name, field in fields.items()
            if name == "name" or getattr(value, name) != field.get_default(call_default_factory=True)
        ]
        keys = {name: fields[name].serialization_alias or fields[name].alias or name for name in chosen}
        return {key: essence(getattr(value, name), dumped[key]) for name, key in keys.items()}
    if isinstance(value, dict) and isinstance(dumped, dict):
        return {key: essence(item, dumped[key]) for key, item in value.items()}
    if isinstance(value, list | tuple) and isinstance(dumped, list):
        return [essence(item, other) for item, other in zip(value, dumped, strict=True)]
    return dumped


def _written(value: Any, place: Place) -> str:
    """A value as an override writes it: JSON is YAML."""
    text = json.dumps(value)
    for name, stands in (("{data}", place.data), ("{study}", place.folder), ("{made}", place.made)):
        text = text.replace(name, str(stands))
    return text
