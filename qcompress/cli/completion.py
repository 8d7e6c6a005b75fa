"""Shell completion of option values, from the tables that the commands read.

A table is imported when its values are completed, so that other completions and `--help` do not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import get_args


def words(known: Iterable[str]) -> Callable[[], list[str]]:
    """Completion function for these words; typer selects those that begin with the typed text.

    >>> words({"ptq": 1, "lsq": 2})()
    ['ptq', 'lsq']
    """
    listed = list(known)
    return lambda: listed


def targets() -> list[str]:
    """Devices, for `--target`."""
    from qcompress.schema.targets import TARGETS

    return list(TARGETS)


def methods() -> list[str]:
    """Presets of the five axes, for `--method`."""
    from qcompress.schema.axes import METHODS

    return list(METHODS)


def formats() -> list[str]:
    """Presets of number formats, for `--format`."""
    from qcompress.schema.formats import FORMAT_PRESETS

    return list(FORMAT_PRESETS)


def tasks() -> list[str]:
    """Tasks, for `--task`."""
    from qcompress.tasks import TASKS

    return list(TASKS)


def readings() -> list[str]:
    """Meanings of a column of labels, for `--labels-are`."""
    from qcompress.schema.tasks import READINGS

    return list(READINGS)


def compatibilities() -> list[str]:
    """Levels of hardware compatibility, for `--hardware-compatibility`."""
    from qcompress.schema.export import Build

    return list(get_args(Build.model_fields["hardware_compatibility"].annotation))
