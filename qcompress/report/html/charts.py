"""Charts drawn by matplotlib as SVG for embedding in the page.

Charts are drawn in placeholder colours, which are replaced by the page's CSS variables, so that one drawing
serves light and dark mode; text stays text. Each drawing has a title and a description for screen readers.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

COLOURS = {
    "#000001": "var(--ink)",
    "#000002": "var(--line)",
    "#000011": "var(--series-1)",
    "#000012": "var(--series-2)",
    "#000013": "var(--series-3)",
}
"""Placeholder colours and the CSS variables that replace them. Matplotlib uses none of them by default."""

INK, LINE, *SERIES = COLOURS

WIDTH = 5.6
"""Width in inches of 72 units: at 400 pixels, the width of a small screen, text keeps its drawn size."""

STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}

SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}href"

NAMED = 48
"""Largest number of bars with labels. More would not be legible; the table has the names."""

MARKED = 40
"""Largest number of points of a line that get markers."""

LABEL = 30
"""Longest label of a bar."""


@dataclass(frozen=True)
class Series:
    """One line of a chart, drawn in its own subplot."""

    title: str
    x: Sequence[float | str]
    y: Sequence[float]


@dataclass(frozen=True)
class Bars:
    """One column of bars; None is a missing bar."""

    title: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Stairs:
    """Histograms over the same bins, by name. `ratios`: logarithmic bins."""

    title: str
    edges: Sequence[float]
    counts: Mapping[str, Sequence[int]]
    along: str
    what: str
    ratios: bool = False


def lines(anchor: str, title: str, series: Sequence[Series], along: str = "") -> str:
    """Draw each series in its own subplot, one below the other; returns SVG."""

    def draw(figure: Drawing) -> None:
        fields = figure.subplots(len(series), 1, squeeze=False)[:, 0]
        for place, (field, item) in enumerate(zip(fields, series, strict=True)):
            marker = "o" if len(item.x) <= MARKED else None
            field.plot(item.x, item.y, color=SERIES[place % len(SERIES)], marker=marker, markersize=4)
            if not isinstance(item.x[0], str):
                field.locator_params(axis="x", integer=True)
            field.set_title(item.title)
        fields[-1].set_xlabel(along)

    descriptions = [f"{item.title}: {_describe_values(item.x, item.y)}" for item in series]
    return _svg(anchor, title, descriptions, (WIDTH, 0.5 + 1.6 * len(series)), draw)


def stairs(anchor: str, title: str, fields: Sequence[Stairs]) -> str:
    """Draw each pair of histograms in its own subplot; the second histogram is dashed. Returns SVG."""

    def draw(figure: Drawing) -> None:
        places = figure.subplots(len(fields), 1, squeeze=False)[:, 0]
        for place, item in zip(places, fields, strict=True):
            for number, (name, counts) in enumerate(item.counts.items()):
                style = {"color": SERIES[number], "linestyle": ("-", "--")[number], "linewidth": 1.5}
                place.stairs(counts, item.edges, label=name, **style)
            place.set_yscale("log")
            place.set_ylim(bottom=0.5)
            _plain_log(place.yaxis, (1,))
            if item.ratios:
                place.set_xscale("log")
                _plain_log(place.xaxis, (1, 2, 5))
            place.set_title(item.title)
            place.set_xlabel(item.along)
            place.set_ylabel(item.what)
        places[0].legend(frameon=False, labelcolor=INK, loc="upper right", fontsize=9)

    descriptions = [
        f"{item.title}, {name}: {sum(counts)} {item.what}, {_describe_values(_middles(item.edges), counts)}"
        for item in fields
        for name, counts in item.counts.items()
    ]
    return _svg(anchor, title, descriptions, (WIDTH, 0.3 + 2.1 * len(fields)), draw)


def _plain_log(axis: Any, parts: Sequence[int]) -> None:
    """Label a logarithmic axis with plain numbers, at these multiples of powers of ten."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=parts))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _middles(edges: Sequence[float]) -> list[float]:
    return [float(f"{(low + high) / 2:.3g}") for low, high in zip(edges, edges[1:], strict=False)]


def bars(anchor: str, title: str, labels: Sequence[str], columns: Sequence[Bars]) -> str:
    """Draw columns of horizontal bars with shared labels; returns SVG."""

    def draw(figure: Drawing) -> None:
        fields = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        places = range(len(labels))
        for place, (field, column) in enumerate(zip(fields, columns, strict=True)):
            field.barh(places, [value or 0.0 for value in column.values], color=SERIES[place], height=0.7)
            field.set_title(column.title)
            whole = all(isinstance(value, int) for value in column.values)
            field.locator_params(axis="x", nbins=4, integer=whole)
            field.grid(visible=False, axis="y")
        if len(labels) <= NAMED:
            fields[0].set_yticks(places, [_short(label) for label in labels])
        fields[0].invert_yaxis()

    height = 0.7 + (0.21 * len(labels) if len(labels) <= NAMED else 6)
    descriptions = [f"{column.title}: {_describe_values(labels, column.values)}" for column in columns]
    return _svg(anchor, title, descriptions, (WIDTH, height), draw)


def intervals(
    anchor: str,
    title: str,
    labels: Sequence[str],
    bounds: Sequence[tuple[float, float, float]],
    along: str,
) -> str:
    """Draw a value with its lower and upper bound for each label, and a line at 0; returns SVG."""

    def draw(figure: Drawing) -> None:
        field = figure.subplots()
        places = range(len(labels))
        values, lows, highs = zip(*bounds, strict=True)
        field.axvline(0, color=INK, linewidth=0.8, linestyle="--")
        field.hlines(places, lows, highs, color=SERIES[0])
        for ends in (lows, highs):
            field.plot(ends, places, "|", color=SERIES[0])
        field.plot(values, places, "o", color=SERIES[0])
        field.set_yticks(places, [_short(label) for label in labels])
        field.set_ylim(len(labels) - 0.5, -0.5)
        field.set_xlabel(along)

    descriptions = [
        f"{label}: {value:.3g}, between {low:.3g} and {high:.3g}"
        for label, (value, low, high) in zip(labels, bounds, strict=True)
    ]
    return _svg(anchor, title, descriptions, (WIDTH, 0.9 + 0.35 * len(labels)), draw)


def _describe_values(names: Sequence[float | str], values: Sequence[float | None]) -> str:
    present = [(name, value) for name, value in zip(names, values, strict=True) if value is not None]
    if len(present) <= 8:
        return ", ".join(f"{name} {value:.5g}" for name, value in present) or "nothing"
    low, high = min(value for _, value in present), max(value for _, value in present)
    first, last = present[0], present[-1]
    return (
        f"{len(present)} values between {low:.5g} and {high:.5g}, "
        f"from {first[1]:.5g} at {first[0]} to {last[1]:.5g} at {last[0]}"
    )


def _short(label: str) -> str:
    """Shorten each line of a label from the left: layer names differ at their end."""
    lines = [_clean(line) for line in label.splitlines()]
    return "\n".join(line if len(line) <= LABEL else f"…{line[1 - LABEL :]}" for line in lines)


# Conversion to the page ---------------------------------------------------------------------------


def _svg(
    anchor: str,
    title: str,
    descriptions: Sequence[str],
    inches: tuple[float, float],
    draw: Callable[[Drawing], None],
) -> str:
    import matplotlib
    from matplotlib.figure import Figure as Drawing

    buffer = io.BytesIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": anchor}), _any_letter():
        figure = Drawing(figsize=inches, layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())
    _adapt_for_page(root, anchor)
    _add_description(root, anchor, title, descriptions)
    return ElementTree.tostring(root, encoding="unicode")


@contextmanager
def _any_letter() -> Iterator[None]:
    """Suppress matplotlib's warnings on missing glyphs: the reader's fonts have them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _adapt_for_page(root: ElementTree.Element, anchor: str) -> None:
    """Convert the SVG for HTML: names without namespaces, ids prefixed with `anchor`, the page's colours and
    font.
    """
    for node in root.iter():
        node.tag = node.tag.removeprefix(SVG)
        for name, value in list(node.attrib.items()):
            del node.attrib[name]
            node.set({XLINK: "href"}.get(name, name), _adapt_attribute(name, value, anchor))
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag == "metadata"]:
            parent.remove(child)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)


def _adapt_attribute(name: str, value: str, anchor: str) -> str:
    if name == "id":
        return f"{anchor}-{value}"
    if name == XLINK:
        return value.replace("#", f"#{anchor}-", 1)
    value = value.replace("url(#", f"url(#{anchor}-")
    for drawn, shown in COLOURS.items():
        value = value.replace(drawn, shown)
    return re.sub(r"(font-family: |font: [\d.]+px )[^;]*", r"\1var(--font)", value)  # either, by version


def _add_description(root: ElementTree.Element, anchor: str, title: str, descriptions: Sequence[str]) -> None:
    facts: dict[str, Any] = {"title": title, "desc": ". ".join(descriptions) + "."}
    for place, (tag, text) in enumerate(facts.items()):
        node = ElementTree.Element(tag, {"id": f"{anchor}-{tag}"})
        node.text = _clean(text)
        root.insert(place, node)
    root.set("role", "img")
    root.set("aria-labelledby", f"{anchor}-title {anchor}-desc")


def _clean(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
