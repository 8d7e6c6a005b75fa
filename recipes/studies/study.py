"""A study: arms, tasks, seeds, trials and tables as study.yaml says them, and the jobs they make.

    tasks    files below the data directory (QCOMPRESS_ASSETS, or --data), and overrides of the recipe. Every
             run, that of the float model too, trains on the train file without the part held out; trials are
             measured on that part and on nothing else, the final runs on the test file.
    start    the recipe of the float model that all arms of a task start from.
    arms     a recipe and overrides each; `trials` lists overrides to choose from, as many for every arm, or
             names the arm whose choice this one takes (the same arm with another number of updates), or none.
    tables   which arms stand in one table, and against which of them they are compared.

A job is one run. Its digest covers the resolved recipe, the content of the data files and the float model it
starts from, and no path of a machine.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError, model_validator

from qcompress.artifacts import sha256_file
from qcompress.codekey import stage_key
from qcompress.errors import UsageError
from qcompress.formats import Options
from qcompress.recipe import load_recipe
from qcompress.stages.load import fingerprint
from qcompress.yamlfile import read_yaml

NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
"""Of an arm and of a task."""

START = "float"
"""Stands for an arm in the name of the float model's run."""


class TaskOptions(Options):
    """One task of a study."""

    train: str
    """File below the data directory, or `{study}/...` beside the study: one sample a line, or an archive."""
    test: str
    """File that the final runs are measured on."""
    others: dict[str, str] = {}
    """More sets, by name, that the final runs are measured on; no arm is trained on or chosen by them."""
    key: Literal["table", "text", "npz"] = "table"
    """Key of the recipe's data sections that takes a list of files."""
    header: bool = False
    """The first line of both files names the columns."""
    columns: dict[Literal["train", "test"], dict[str, str]] = {}
    """Of archives: `columns` of the train file, held-out part included, and of the test file."""
    holdout: float = Field(default=0.1, gt=0, lt=1)
    """Share of the train file that is held out: rows at random, the end of a text."""
    set: dict[str, Any] = {}
    """Overrides of every recipe on this task."""
    start: dict[str, Any] = {}
    """Overrides of the float model's recipe on this task."""

    @model_validator(mode="after")
    def _archives_have_columns(self) -> TaskOptions:
        if (self.key == "npz") != (self.columns.keys() == {"train", "test"}):
            raise ValueError(
                "`columns` names those of train and of test where `key` is npz, and nothing else"
            )
        if {"test", "holdout"} & self.others.keys():
            raise ValueError("`others` may not be called test or holdout, which are the task's own")
        return self


class StartOptions(Options):
    """The float model."""

    recipe: str
    seed: int = 0
    set: dict[str, Any] = {}
    """Overrides; in a text, `{data}` stands for the data directory and `{made}` for what `prepare` makes."""


class ArmOptions(Options):
    """One way of compressing the float model."""

    recipe: str
    set: dict[str, Any] = {}
    seeds: list[int] | None = None
    """none: those of the study."""
    tasks: list[str] | None = None
    """none: those of the study."""
    trials: list[dict[str, Any]] | str
    """Overrides to choose from; the name of another arm; or none."""


class TrialOptions(Options):
    """How one of an arm's trials is chosen."""

    seed: int = 0
    tasks: list[str] | None = None
    """The choice is made on the mean over these; none: all that the arm has."""


class TableOptions(Options):
    """One table."""

    arms: list[str] = Field(min_length=1)
    baseline: str
    metric: str | None = None
    """`set.metric`; none: the main one of the first set."""


class PlotOptions(Options):
    """Score against updates: a line for each series of arms."""

    series: dict[str, list[str]] = Field(min_length=1)


class Study(Options):
    """study.yaml."""

    title: str
    row: str = "onnx"
    """Row of the ladder that is compared."""
    seeds: list[int] = Field(min_length=1)
    tasks: dict[str, TaskOptions] = Field(min_length=1)
    prepare: str | None = None
    """A script beside study.yaml that makes what the recipes start from: it is given the folder to fill and
    the data directory."""
    start: StartOptions | None = None
    """none: the arms' recipes name their model."""
    set: dict[str, Any] = {}
    """Overrides of every arm."""
    arms: dict[str, ArmOptions] = Field(min_length=1)
    trials: TrialOptions = TrialOptions()
    tables: dict[str, TableOptions] = Field(min_length=1)
    plot: PlotOptions | None = None

    def jobs(self) -> Iterator[tuple[str, str, int]]:
        """(arm, task, seed) of every final run, seed by seed, so that a study that is cut short is even."""
        seeds = list(dict.fromkeys(seed for arm in self.arms for seed in self.seeds_of(arm)))
        for seed in seeds:
            for task in self.tasks:
                for arm in self.arms:
                    if task in self.tasks_of(arm) and seed in self.seeds_of(arm):
                        yield arm, task, seed

    def seeds_of(self, arm: str) -> list[int]:
        """Seeds of an arm's runs."""
        own = self.arms[arm].seeds
        return self.seeds if own is None else own

    def tasks_of(self, arm: str) -> list[str]:
        """Tasks that an arm is tried on."""
        own = self.arms[arm].tasks
        return list(self.tasks) if own is None else own

    def chooser(self, arm: str) -> str | None:
        """The arm whose trials decide about this one; None where there is nothing to choose."""
        trials = self.arms[arm].trials
        return arm if isinstance(trials, list) else None if trials == "none" else trials


def read_study(folder: Path) -> Study:
    """study.yaml of a folder. Raises UsageError with what is wrong in it."""
    file = folder / "study.yaml"
    document = read_yaml(file, str(file))
    if document.mistakes:
        raise UsageError(
            "\n".join(map(str, document.mistakes)), fix="name a study's folder, and mend its file"
        )
    try:
        study = Study.model_validate(document.value)
    except ValidationError as error:
        raise UsageError(f"{file}: {error}") from None
    problems = list(_problems(study, folder))
    if problems:
        raise UsageError("\n".join([f"{file}:", *(f"  {problem}" for problem in problems)]))
    return study


def _problems(study: Study, folder: Path) -> Iterator[str]:
    counts = {arm: len(item.trials) for arm, item in study.arms.items() if isinstance(item.trials, list)}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        yield f"arms must have equally many trials, at least one: {counts}"
    for arm, item in study.arms.items():
        if not set(study.tasks_of(arm)) <= set(study.tasks):
            yield f"{arm}: unknown task among {item.tasks}"
        if study.chooser(arm) not in (*counts, None):
            yield f"{arm}: trials: {item.trials!r} is no arm with trials of its own"
        if not (folder / item.recipe).is_file():
            yield f"{arm}: {item.recipe} does not exist"
    if study.start is not None and not (folder / study.start.recipe).is_file():
        yield f"start: {study.start.recipe} does not exist"
    if study.prepare is not None and not (folder / study.prepare).is_file():
        yield f"prepare: {study.prepare} does not exist"
    groups = {name: table.arms for name, table in study.tables.items()}
    groups |= study.plot.series if study.plot else {}
    for name, arms in groups.items():
        if not set(arms) <= set(study.arms):
            yield f"{name}: unknown arm among {arms}"
    for name, table in study.tables.items():
        if table.baseline not in table.arms:
            yield f"{name}: the baseline {table.baseline} is none of its arms"
    for name in (*study.arms, *study.tasks):
        if name == START or not NAME.fullmatch(name):
            yield f"{name!r} cannot name an arm or a task: lower case, digits and hyphens"


# Jobs ---------------------------------------------------------------------------------------------


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
