"""What there is to choose from, as rows of a name and a line about it. No torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import qcompress
from qcompress.axes import AXES, METHODS
from qcompress.models import FAMILIES
from qcompress.schema import Task
from qcompress.targets.device import lacks
from qcompress.targets.table import TARGETS, Target
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
    """What each device is, and whether this machine builds for it or which command does on one that can."""
    return [(name, f"{target.note} {_builder(target)}") for name, target in TARGETS.items()]


def _builder(target: Target) -> str:
    if target.backend is None:
        return "There is nothing to build."
    types = [*target.compute, *(f"int{bits}" for bits in target.weight_bits)]
    about = f"SM{target.sm}, {', '.join(types)}; {target.requirement}"
    if lacks(target):
        command = f"qcompress build model.onnx --target {target.name} --out engine"
        return f"{about}; on the device: {command}"
    missing = find_spec(target.backend) is None
    return f"{about}; " + (f"here, after pip install {target.backend}" if missing else "builds here")


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
