"""Rules of slices: sets that may have them, goals that name them, and their values in the data. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from qcompress.errors import MachineError, UsageError
from qcompress.recipe.yaml_file import Document, Key
from qcompress.schema.data import RESULTS
from qcompress.schema.recipe import Recipe, TextData
from qcompress.tasks import TASKS
from qcompress.tasks.padded import first
from qcompress.tasks.slices import EVERY, slice_texts

SHOWN = 12
"""Number of values named in one message."""


def slices_of(recipe: Recipe, data: TextData, base: Path) -> dict[str, list[str | None]]:
    """Slice values of a set for each of its samples. Raises UsageError for values that goals cannot name."""
    if not data.slices:
        return {}
    slices = TASKS[recipe.task.name].slices(data, base, recipe.task)
    limits = (recipe.verify.samples, data.limit)
    columns = {name: first(cells, *limits) for name, cells in slices.columns.items()}
    return slice_texts(columns, first(slices.places, *limits))


def judge_slices(recipe: Recipe, document: Document) -> None:
    """Report slices of sets without columns, and goals on slices that their set does not keep."""
    for name in ("train", "calibration"):
        data = getattr(recipe.data, name)
        if data is not None and data.slices and document.sound(key := ("data", name, "slices")):
            document.report(key, "parts the sets of `data.evaluate` alone", "drop it")
    for name, data in recipe.data.evaluate.items():
        key = ("data", "evaluate", name, "slices")
        if not data.slices or not document.sound(key, ("task", "name")):
            continue
        if recipe.task.running:
            message = f"a sample of {recipe.task.name} is a window of the whole text, not a row of a table"
            document.report(key, message, "drop it, or name an evaluation set for each part")
        elif data.text is not None or data.folder is not None:
            origin = "text" if data.text is not None else "folder"
            document.report(key, f"`{origin}` has no columns", "drop it, or read a table or a dataset")
        else:
            continue
        document.tainted.add(key)
    for goal, section, column, value in _slice_goals(recipe):
        key = ("gate", "regression", goal)
        if not document.sound(key) or section not in recipe.data.evaluate:
            continue
        if not column or not value:
            fix = f"write `<set>.<metric>@<column>=<value>`, or `={EVERY}` for each value"
            document.report(key, "does not name a slice", fix)
            document.tainted.add(key)
        elif column not in RESULTS and column not in (recipe.data.evaluate[section].slices or ()):
            kept = ("data", "evaluate", section, "slices")
            if document.sound(kept):
                message = f"names the column {column!r}, which `data.evaluate.{section}` does not keep"
                document.report(key, message, f"write `slices: [{column}]` there")
                document.tainted.add(key)


def judge_values(recipe: Recipe, document: Document, base: Path, *, hub: bool) -> None:
    """Report missing slice columns, values that goals cannot name, and goals on values that do not occur.
    Reads the data; a dataset of the hub only if `hub`. Data that this machine cannot read are checked where
    they are measured.
    """
    for name, data in recipe.data.evaluate.items():
        key: Key = ("data", "evaluate", name)
        if not data.slices or not document.sound((*key, "slices"), key, ("task",), ("verify", "samples")):
            continue
        if data.dataset is not None and not hub and not os.path.isdir(base / data.dataset):
            continue
        try:
            slices = slices_of(recipe, data, base)
        except (MachineError, ModuleNotFoundError):
            continue
        except UsageError as error:
            document.report((*key, "slices"), error.message, error.fix)
            continue
        for goal, section, column, value in _slice_goals(recipe):
            place = ("gate", "regression", goal)
            if section != name or column not in slices or value == EVERY or not document.sound(place):
                continue
            known = sorted(set(slices[column]) - {None})
            if value not in known:
                more = ", ..." if len(known) > SHOWN else ""
                message = (
                    f"no sample of {name} has {column} {value!r}; there are {', '.join(known[:SHOWN])}{more}"
                )
                document.report(place, message, "name one of them")


def _slice_goals(recipe: Recipe) -> Iterator[tuple[str, str, str, str]]:
    """Goals on slices: name of the goal, its set, column and value."""
    for name in recipe.gate.regression:
        metric, at, slice_name = name.partition("@")
        if at:
            column, _, value = slice_name.partition("=")
            yield name, metric.rpartition(".")[0], column, value
