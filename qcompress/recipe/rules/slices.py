"""What a recipe's slices must keep to: which sets have them, what goals name, and what is in the data. No
torch.
"""

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
from qcompress.tasks.slices import EVERY, spelled

SHOWN = 12
"""Values named in one message."""


def slices_of(recipe: Recipe, data: TextData, base: Path) -> dict[str, list[str | None]]:
    """The values of a set's slices for each of its samples. Raises UsageError for those that goals cannot
    name.
    """
    if not data.slices:
        return {}
    found = TASKS[recipe.task.name].slices(data, base, recipe.task)
    limits = (recipe.verify.samples, data.limit)
    columns = {name: first(cells, *limits) for name, cells in found.columns.items()}
    return spelled(columns, first(found.places, *limits))


def judge_slices(recipe: Recipe, document: Document) -> None:
    """Slices are of evaluation sets that have columns, and a goal names one that its set keeps."""
    for name in ("train", "calibration"):
        data = getattr(recipe.data, name)
        if data is not None and data.slices and document.sound(key := ("data", name, "slices")):
            document.report(key, "parts the sets of `data.evaluate` alone", "drop it")
    for name, data in recipe.data.evaluate.items():
        key = ("data", "evaluate", name, "slices")
        if not data.slices or not document.sound(key, ("task", "name")):
            continue
        if recipe.task.name == "causal-lm":
            message = "a sample of causal-lm is a window of the whole text, and no row of a table"
            document.report(key, message, "drop it, or name an evaluation set for each part")
        elif data.text is not None or data.folder is not None:
            origin = "text" if data.text is not None else "folder"
            document.report(key, f"`{origin}` has no columns", "drop it, or read a table or a dataset")
        else:
            continue
        document.tainted.add(key)
    for goal, section, column, value in _parts(recipe):
        key = ("gate", "regression", goal)
        if not document.sound(key) or section not in recipe.data.evaluate:
            continue
        if not column or not value:
            fix = f"write `<set>.<metric>@<column>=<value>`, or `={EVERY}` for each value"
            document.report(key, "names no part of a set", fix)
            document.tainted.add(key)
        elif column not in RESULTS and column not in (recipe.data.evaluate[section].slices or ()):
            kept = ("data", "evaluate", section, "slices")
            if document.sound(kept):
                message = f"names the column {column!r}, which `data.evaluate.{section}` does not keep"
                document.report(key, message, f"write `slices: [{column}]` there")
                document.tainted.add(key)


def judge_values(recipe: Recipe, document: Document, base: Path, *, hub: bool) -> None:
    """The columns are there, of values that goals can name, among them those that goals do name. Reads the
    data; a dataset of the hub only if `hub`. What this machine cannot read is left to the one that measures.
    """
    for name, data in recipe.data.evaluate.items():
        key: Key = ("data", "evaluate", name)
        if not data.slices or not document.sound((*key, "slices"), key, ("task",), ("verify", "samples")):
            continue
        if data.dataset is not None and not hub and not os.path.isdir(base / data.dataset):
            continue
        try:
            found = slices_of(recipe, data, base)
        except (MachineError, ModuleNotFoundError):
            continue
        except UsageError as error:
            document.report((*key, "slices"), error.message, error.fix)
            continue
        for goal, section, column, value in _parts(recipe):
            place = ("gate", "regression", goal)
            if section != name or column not in found or value == EVERY or not document.sound(place):
                continue
            known = sorted(set(found[column]) - {None})
            if value not in known:
                more = ", ..." if len(known) > SHOWN else ""
                message = (
                    f"no sample of {name} has {column} {value!r}; there are {', '.join(known[:SHOWN])}{more}"
                )
                document.report(place, message, "name one of them")


def _parts(recipe: Recipe) -> Iterator[tuple[str, str, str, str]]:
    """Goals on parts of a set: the goal's name, its set, the column, the value."""
    for name in recipe.gate.regression:
        metric, at, part = name.partition("@")
        if at:
            column, _, value = part.partition("=")
            yield name, metric.rpartition(".")[0], column, value
