"""rich for untrusted text: no markup, emoji or control characters, no line ends in cells. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RichCast
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from qcompress.system.printable import show, show_block, show_lines


class Screen(Console):
    """Console that prints strings literally."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **options})

    def print(self, *objects: Any, **options: Any) -> None:
        """Print lines and tables; pass a document of several lines as `Text`."""
        super().print(*(show_lines(item) if isinstance(item, str) else item for item in objects), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render with control characters escaped in all texts."""
        for segment in super().render(renderable, options):
            if segment.control is None:
                segment = segment._replace(text=show_block(segment.text))
            yield segment


class Cells(Table):
    """Table whose cells are single lines; pass a cell of several lines as `Text`."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row."""
        super().add_row(*(Text(show(cell)) if isinstance(cell, str) else cell for cell in cells), **options)

    def add_column(self, header: RenderableType = "", *rest: Any, **options: Any) -> None:
        """Add a column; its header may have several lines."""
        super().add_column(_header(header), *rest, **options)


def _header(header: RenderableType) -> ConsoleRenderable | RichCast:
    return Text(show_block(header)) if isinstance(header, str) else header
