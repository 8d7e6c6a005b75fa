"""Values of the columns that part an evaluation set, as text. Torch-free.

A value is spelled as a goal names it: text without the blanks around it, an integer in digits, a truth value
as `true` or `false`. A sample without one (an empty cell, null, NaN) is in no part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qcompress.errors import UsageError
from qcompress.tasks.text import is_text

MOST = 100
"""Different values of one column: what has more is no slice of a set, but a measure or a name of samples."""

EVERY = "*"
"""Stands in a goal for each value of a column, so that no value may be it."""


def spelled(columns: Mapping[str, Sequence[Any]], places: Sequence[str]) -> dict[str, list[str | None]]:
    """The columns' cells as text; `places`: where each row stands. Raises UsageError for a column whose
    values are of several types, of none that a goal can name, too many, or not there at all.
    """
    return {name: _column(name, cells, places) for name, cells in columns.items()}


def _column(name: str, cells: Sequence[Any], places: Sequence[str]) -> list[str | None]:
    found: list[str | None] = []
    first: tuple[str, str, str] | None = None
    for cell, place in zip(cells, places, strict=True):
        kind, value = _spell(cell, name, place)
        found.append(value)
        if value is None:
            continue
        first = first or (kind, value, place)
        if kind != first[0]:
            raise UsageError(
                f"{place}: {name} is {kind} ({value!r:.40}), and in {first[2]} {first[0]} ({first[1]!r:.40})",
                fix=f"write every value of {name} alike",
            )
    values = set(found) - {None}
    if not values:
        raise UsageError(f"the column {name!r} has no value in any sample", fix="name another under `slices`")
    if len(values) > MOST:
        raise UsageError(
            f"the column {name!r} has {len(values)} different values, and goals hold for at most {MOST}",
            fix="name a column of few values, such as one that groups them",
        )
    return found


def _spell(cell: Any, name: str, place: str) -> tuple[str, str | None]:
    """What kind of value a cell has, and the value; None for none."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "nothing", None
    if isinstance(cell, bool):
        return "a truth value", str(cell).lower()
    if isinstance(cell, int) or (isinstance(cell, float) and cell.is_integer()):
        return "a number", str(int(cell))  # a column of integers that lacks one comes as floats
    if not isinstance(cell, str):
        what = "no integer" if isinstance(cell, float) else "neither text nor a number"
        raise UsageError(
            f"{place}: {name} is {what}: {cell!r:.60}", fix="write a word for each group of values"
        )
    if not is_text(cell):
        raise UsageError(f"{place}: {name} holds half a character: {cell!r:.60}", fix="write another word")
    if cell.strip() == EVERY:
        raise UsageError(
            f"{place}: {name} is {EVERY!r}, which stands for every value", fix="write another word"
        )
    return "text", cell.strip() or None
