"""Building blocks of a page: sections of lines, tables and charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompress.report.html.figures import Figure

Cell = str | Figure


@dataclass(frozen=True)
class Table:
    """Rows of text and figures. `folded`: collapsed until the reader opens it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing, and the table of its figures."""

    svg: str
    table: Table


@dataclass(frozen=True)
class Section:
    """One section of a page. `lines` are sentences, `listed` are the items of the list below them."""

    anchor: str
    title: str
    lines: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    text: str = ""
    """A whole file, shown verbatim."""


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, folded: bool = False
) -> Table:
    """Make a table; drops columns that are empty in every row."""
    kept = [
        place for place in range(len(columns)) if not rows or any(_has_content(row[place]) for row in rows)
    ]
    return Table(
        title,
        tuple(columns[place] for place in kept),
        tuple(tuple(row[place] for place in kept) for row in rows),
        folded,
    )


def _has_content(cell: Cell) -> bool:
    return cell not in ("", "-") if isinstance(cell, str) else cell.value is not None
