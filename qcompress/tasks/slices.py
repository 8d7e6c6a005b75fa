"""Text values of slice columns, which split an evaluation set. Torch-free.

A value is written as goals name it: text without surrounding blanks, an integer in digits, a truth value as
`true` or `false`. A sample without a value (an empty cell, null, NaN) is in no slice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qcompress.errors import UsageError
from qcompress.tasks.text import is_text

MOST = 100
"""Largest number of different values in a column: a column with more holds measurements or identifiers."""

EVERY = "*"
"""Stands for each value of a column in goals, so that it cannot be a value."""


def slice_texts(columns: Mapping[str, Sequence[Any]], places: Sequence[str]) -> dict[str, list[str | None]]:
    """Convert the columns' cells to text; `places`: source of each row. Raises UsageError for a column with
    values of several types, values that goals cannot name, too many values, or none.
    """
    return {name: _column(name, cells, places) for name, cells in columns.items()}


def _column(name: str, cells: Sequence[Any], places: Sequence[str]) -> list[str | None]:
    texts: list[str | None] = []
    first: tuple[str, str, str] | None = None
    for cell, place in zip(cells, places, strict=True):
        kind, value = _cell_text(cell, name, place)
        texts.append(value)
        if value is None:
            continue
        first = first or (kind, value, place)
        if kind != first[0]:
            raise UsageError(
                f"{place}: {name} is {kind} ({value!r:.40}), and in {first[2]} {first[0]} ({first[1]!r:.40})",
                fix=f"write every value of {name} alike",
            )
    values = set(texts) - {None}
    if not values:
        raise UsageError(f"the column {name!r} has no value in any sample", fix="name another under `slices`")
    if len(values) > MOST:
        raise UsageError(
            f"the column {name!r} has {len(values)} different values, and goals hold for at most {MOST}",
            fix="name a column of few values, such as one that groups them",
        )
    return texts


def _cell_text(cell: Any, name: str, place: str) -> tuple[str, str | None]:
    """Kind of a cell's value and its text; None for an empty cell."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "nothing", None
    if isinstance(cell, bool):
        return "a truth value", str(cell).lower()
    if isinstance(cell, int) or (isinstance(cell, float) and cell.is_integer()):
        return "a number", str(int(cell))  # a column of integers with an empty cell is read as floats
    if not isinstance(cell, str):
        what = "not an integer" if isinstance(cell, float) else "neither text nor a number"
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
