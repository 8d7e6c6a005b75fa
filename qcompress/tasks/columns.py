"""Names of a table's columns: those that a task asks for, and the closest to a missing one. Torch-free."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence

from qcompress.errors import UsageError
from qcompress.tasks.text import printable

SHOWN = 20
"""Number of columns named in one message."""


class ColumnError(UsageError):
    """A column is missing or has unsuitable content. `role`: its key under `columns`, or `slices`."""

    def __init__(self, message: str, *, fix: str, role: str) -> None:
        super().__init__(message, fix=fix)
        self.role = role


def columns_in(
    name: str,
    header: Sequence[str],
    columns: Mapping[str, str],
    optional: Collection[str],
    *,
    what: str = "columns",
) -> dict[str, str]:
    """Existing columns by role. Raises ColumnError for a missing required column, and for an optional one if
    another column has nearly its name. `what`: word for the columns in messages.
    """
    for role, column in columns.items():
        if column not in header and (role not in optional or _alike(column, header)):
            raise missing_column(name, header, column, role, what)
    return {role: column for role, column in columns.items() if column in header}


def missing_column(
    name: str, header: Sequence[str], column: str, role: str, what: str = "columns"
) -> ColumnError:
    """Error for a missing column, with the closest name."""
    shown = (
        ", ".join(printable(other) if other == other.strip() else repr(other) for other in header[:SHOWN])
        or "none"
    )
    near = _alike(column, header) or next(iter(difflib.get_close_matches(column, header, n=1)), None)
    if role == "slices":
        fix = "name the right one under `slices`" + (f", such as {json.dumps(near)}" if near else "")
    else:
        fix = f"write `columns: {{{role}: {json.dumps(near)}}}`, or rename the column" if near else ""
    fix = fix or f"name the right one with `columns: {{{role}: ...}}`"
    return ColumnError(f"{name} has the {what} {shown}, and not {column!r}", fix=fix, role=role)


def _alike(column: str, header: Sequence[str]) -> str | None:
    """Column whose name differs only in case, blanks, punctuation or a plural s."""
    return next((other for other in header if _plain(other) == _plain(column)), None)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold().removesuffix("s")
