"""Section on training: losses and learned scales from log.jsonl (`history.py`), phases from manifest.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qcompress.report.html import charts
from qcompress.report.html.evidence import Evidence
from qcompress.report.html.figures import Document, Figure, computed
from qcompress.report.html.parts import Cell, Chart, Section, Table, table

NAMES = ("name", "block")
NUMBERS = ("steps", "passes", "before", "after", "last_loss")
"""Keys of a phase in manifest.json."""

DRAWN = 6
"""Number of scales in the chart: those that moved the most."""

LISTED = 200
"""Largest number of scales in the table; a sentence bounds the movement of the others."""

WHICH = ("least", "median", "largest")

Lines = list[int]
"""Indices of records in the log."""


def training(run: Evidence) -> Section:
    """Section with curves of losses and learned scales, and a table of the phases."""
    log = run.log()
    updates, scales = (_ordered(log, event) for event in ("update", "scales"))
    drawn = [*_losses(log, updates), *_terms(log, updates)]
    lines = (
        ["Each point is one update, and the losses are those of its batch."]
        if drawn
        else ["log.jsonl has fewer than two updates, so no loss curve."]
    )
    moved = _moved(log, scales)
    if moved:
        drawn.append(_scales(log, moved))
        lines += _scale_lines(moved)
    else:
        lines.append("It has no learned scale that was recorded twice, so no curves of scales.")
    return Section("training", "Training", tuple(lines), tables=_phases(run), charts=tuple(drawn))


def _ordered(log: Document, event: str) -> Lines:
    places = [place for place, record in enumerate(log.content) if record.get("event") == event]
    return sorted(places, key=lambda place: (log.content[place]["number"], log.content[place]["step"]))


# Losses -------------------------------------------------------------------------------------------


def _losses(log: Document, updates: Lines) -> list[Chart]:
    """Loss curves of the phases with at least two records."""
    phases: dict[int, Lines] = {}
    for place in updates:
        phases.setdefault(log.content[place]["number"], []).append(place)
    phases = {number: places for number, places in phases.items() if len(places) > 1}
    if not phases:
        return []
    series = [
        charts.Series(
            log.content[places[0]]["phase"],
            [log.content[place]["step"] for place in places],
            [log.content[place]["loss"] for place in places],
        )
        for places in phases.values()
    ]
    roles = _keys(log, updates, "lr")
    rows = [
        [
            log.content[place]["phase"],
            log.figure(place, "step"),
            log.figure(place, "loss"),
            *(log.figure(place, "lr", role) for role in roles),
        ]
        for places in phases.values()
        for place in places
    ]
    title = "Loss by update of each phase"
    loss_table = table(title, ("phase", "update", "loss", *(f"rate of {role}" for role in roles)), rows)
    return [Chart(charts.lines("chart-loss", title, series, "update"), loss_table)]


def _terms(log: Document, updates: Lines) -> list[Chart]:
    """Curves of the terms of the loss, if the objective logs them."""
    summed = [place for place in updates if log.content[place].get("terms")]
    if len(summed) < 2:
        return []
    series = []
    for name in _keys(log, summed, "terms"):
        present = [place for place in summed if name in log.content[place]["terms"]]
        steps = [log.content[place]["update"] for place in present]
        series.append(charts.Series(name, steps, [log.content[place]["terms"][name] for place in present]))
    names = [item.title for item in series]
    rows = [
        [
            log.content[place]["phase"],
            log.figure(place, "update"),
            *(log.figure(place, "terms", name) for name in names),
        ]
        for place in summed
    ]
    title = "Terms of the loss"
    drawing = charts.lines("chart-terms", title, series, "update of the run")
    return [Chart(drawing, table(title, ("phase", "update of the run", *names), rows))]


def _keys(log: Document, places: Lines, key: str) -> list[str]:
    return list(dict.fromkeys(name for place in places for name in log.content[place].get(key, {})))


# Learned scales -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Moved:
    """A learned scale and the records that contain it. A quantizer with many scales is represented by its
    least, median or largest scale, whichever moved the most.
    """

    name: str
    places: Lines
    which: int | None
    by: float
    """|log(last / first)|."""

    @property
    def title(self) -> str:
        return self.name if self.which is None else f"{self.name}, {WHICH[self.which]}"

    def path(self, place: int) -> tuple[str | int, ...]:
        """Path of the scale in a record."""
        return (place, "scales", self.name, *(() if self.which is None else (self.which,)))


def _moved(log: Document, scales: Lines) -> list[_Moved]:
    """Scales that were recorded at least twice, sorted by movement, largest first."""
    places: dict[str, Lines] = {}
    for place in scales:
        for name in log.content[place]["scales"]:
            places.setdefault(name, []).append(place)
    moved = []
    for name, recorded in places.items():
        if len(recorded) > 1:
            first, last = (log.content[place]["scales"][name] for place in (recorded[0], recorded[-1]))
            moved.append(_farthest(name, recorded, first, last))
    return sorted(moved, key=lambda item: -item.by)


def _farthest(name: str, places: Lines, first: Any, last: Any) -> _Moved:
    if not isinstance(first, list):
        return _Moved(name, places, None, _log_ratio(first, last))
    ratios = [_log_ratio(*ends) for ends in zip(first, last, strict=True)]
    which = max(range(len(ratios)), key=ratios.__getitem__)
    return _Moved(name, places, which, ratios[which])


def _log_ratio(first: float, last: float) -> float:
    return abs(math.log(last / first)) if first > 0 and last > 0 else 0.0


def _scale_lines(moved: list[_Moved]) -> list[str]:
    count = len(moved)
    lines = [
        f"{count} learned scales are in the log; drawn are the {min(DRAWN, count)} that moved the most. Of a "
        "quantizer with many scales it is the least, the median or the largest, whichever moved the most."
    ]
    if count > LISTED:
        factor = math.exp(moved[LISTED].by)
        lines.append(
            f"The {count - LISTED} that are not in the table moved by a factor of {factor:.4g} at most."
        )
    return lines


def _scales(log: Document, moved: list[_Moved]) -> Chart:
    series = [
        charts.Series(
            item.title,
            [log.content[place]["update"] for place in item.places],
            [log.at(*item.path(place)) for place in item.places],
        )
        for item in moved[:DRAWN]
    ]
    rows: list[list[Cell]] = []
    for item in moved[:LISTED]:
        first, last = (log.figure(*item.path(place)) for place in (item.places[0], item.places[-1]))
        which = "" if item.which is None else WHICH[item.which]
        rows.append([item.name, which, first, last, _ratio(first, last)])
    title = "Learned scales that moved the most"
    scale_table = table(title, ("scale", "which of many", "at first", "at last", "last / first"), rows)
    return Chart(charts.lines("chart-scales", title, series, "update of the run"), scale_table)


def _ratio(first: Figure, last: Figure) -> Figure:
    return computed(last.value / first.value if first.value else None)


# Phases -------------------------------------------------------------------------------------------


def _phases(run: Evidence) -> tuple[Table, ...]:
    phases = run.manifest.content.get("phases", [])
    if not phases:
        return ()
    rows = [
        [
            *(str(phase.get(key, "")) for key in NAMES),
            *(run.manifest.figure("phases", place, key) for key in NUMBERS),
        ]
        for place, phase in enumerate(phases)
    ]
    columns = (*NAMES, "steps", "passes", "error before", "error after", "last loss")
    return (table("Phases", columns, rows),)
