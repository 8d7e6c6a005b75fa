"""What a page is made of: sections of lines, tables and charts, each with an anchor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompress.report.html.figures import Figure

Cell = str | Figure


@dataclass(frozen=True)
class Table:
    """Rows of text and figures. `folded`: the page shows it when asked to."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing and the figures that it draws, which the page has as a table, too."""

    svg: str
    table: Table


@dataclass(frozen=True)
class Section:
    """One part of a page. `lines` are sentences, `listed` what stands in a list below them."""

    anchor: str
    title: str
    lines: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    text: str = ""
    """A file as it is."""


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, folded: bool = False
) -> Table:
    """A table without the columns in which no row says anything."""
    kept = [place for place in range(len(columns)) if not rows or any(_says(row[place]) for row in rows)]
    return Table(
        title,
        tuple(columns[place] for place in kept),
        tuple(tuple(row[place] for place in kept) for row in rows),
        folded,
    )


def _says(cell: Cell) -> bool:
    return cell not in ("", "-") if isinstance(cell, str) else cell.value is not None
