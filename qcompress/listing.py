"""What there is to choose from, as rows of a name and a line about it. No torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import qcompress
from qcompress.axes import AXES, METHODS
from qcompress.models import FAMILIES
from qcompress.schema import Task
from qcompress.targets.table import TARGETS
from qcompress.wording import sections_of


def _methods() -> list[tuple[str, str]]:
    spell = {
        name: ", ".join(f"{axis} {_axis_name(value)}" for axis, value in axes.items())
        for name, axes in METHODS.items()
    }
    return list(spell.items())


def _axis_name(value: object) -> str:
    return str(value["name"]) if isinstance(value, dict) else str(value)


def _axes() -> list[tuple[str, str]]:
    return [
        (f"{axis}: {options.model_fields['name'].default}", _first_paragraph(options))
        for axis, values in AXES.items()
        for options in values
    ]


def _models() -> list[tuple[str, str]]:
    return [(name, _first_paragraph(module)) for name, module in FAMILIES.items()]


def _tasks() -> list[tuple[str, str]]:
    options = sections_of(Task)
    return [(item.model_fields["name"].default, _first_paragraph(item)) for item in options]


def _targets() -> list[tuple[str, str]]:
    return [(name, target.note) for name, target in TARGETS.items()]


def _recipes() -> list[tuple[str, str]]:
    here = Path(qcompress.__file__).parent
    folder = next((place for place in (here / "recipes", here.parent / "recipes") if place.is_dir()), None)
    if folder is None:
        return []
    return [
        (str(file), file.read_text(encoding="utf-8").split("\n")[0].lstrip("# "))
        for file in sorted(folder.glob("*.yaml"))
    ]


def _first_paragraph(value: object) -> str:
    return " ".join(inspect.cleandoc(value.__doc__ or "").split("\n\n")[0].split())


LISTS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "methods": _methods,
    "axes": _axes,
    "models": _models,
    "tasks": _tasks,
    "targets": _targets,
    "recipes": _recipes,
}
