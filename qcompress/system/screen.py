"""rich, for texts from outside: no markup, emoji or control character, no line end in a cell. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RichCast
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from qcompress.system.printable import show, show_block, show_lines


class Screen(Console):
    """A console that takes a text for a text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **options})

    def print(self, *objects: Any, **options: Any) -> None:
        """Print lines and tables; a document of several lines is a `Text`."""
        super().print(*(show_lines(one) if isinstance(one, str) else one for one in objects), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Whatever is drawn: its texts hold no control character."""
        for segment in super().render(renderable, options):
            if segment.control is None:
                segment = segment._replace(text=show_block(segment.text))
            yield segment


class Cells(Table):
    """A table whose cells are texts of one line; a cell of several lines is a `Text`."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row."""
        super().add_row(*(Text(show(cell)) if isinstance(cell, str) else cell for cell in cells), **options)

    def add_column(self, header: RenderableType = "", *rest: Any, **options: Any) -> None:
        """Add a column; its header may have several lines."""
        super().add_column(_header(header), *rest, **options)


def _header(header: RenderableType) -> ConsoleRenderable | RichCast:
    return Text(show_block(header)) if isinstance(header, str) else header
