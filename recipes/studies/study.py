"""A study: arms, tasks, seeds, trials and tables as study.yaml says them.

tasks    files below the data directory (QCOMPRESS_ASSETS, or --data), and overrides of the recipe. Every
         run, that of the float model too, trains on the train file without the part held out; trials are
         measured on that part and on nothing else, the final runs on the test file.
start    the recipe of the float model that all arms of a task start from.
arms     a recipe and overrides each; `trials` lists overrides to choose from, as many for every arm, or
         names the arm whose choice this one takes (the same arm with another number of updates), or none.
tables   which arms stand in one table, and against which of them they are compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from qcompress.errors import UsageError
from qcompress.recipe.yaml_file import read_yaml
from qcompress.schema.formats import Options

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
