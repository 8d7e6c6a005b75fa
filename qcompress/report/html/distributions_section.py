"""Weights before and after rounding, and the channels of activations before and after an adapter, from
distributions.json.
"""

from __future__ import annotations

from typing import Any

from qcompress.report.html import charts
from qcompress.report.html.evidence import Evidence
from qcompress.report.html.figures import Document
from qcompress.report.html.parts import Cell, Chart, Section, Table, table

TITLE = "Before and after"

LISTED = 200
"""Layers, or sites, that a table has."""

WEIGHTS = {"float": "float", "deployed": "codes × scale"}
CHANNELS = {"before": "before", "after": "after"}
"""The two histograms of a drawing, and how they are called."""


def distributions(run: Evidence) -> Section:
    """Both kinds, where there are any."""
    found = run.optional("distributions.json")
    if found is None:
        return Section("distributions", TITLE, ("distributions.json is missing.",))
    lines: list[str] = []
    drawn: list[Chart] = []
    tables: list[Table] = []
    if found.content["sites"]:
        lines.append(
            "A channel's magnitude is the largest that the float model has on the calibration data; after "
            "the adapter it is that times the channel's final scale. What is far above the median costs all "
            "others their integers."
        )
        drawn.append(_channels(found))
        tables += [_sites(found), _top(found)]
    if found.content["weights"]:
        lines.append(
            "A layer's SNR is that of its weight as training left it against codes times scale as they are "
            "deployed; drawn are the layers with the lowest."
        )
        drawn += _weights(found)
        tables.append(_noise(found))
    if not lines:
        lines.append("No weight is quantized.")
    return Section("distributions", TITLE, tuple(lines), tables=tuple(tables), charts=tuple(drawn))


def _channels(found: Document) -> Chart:
    title = "Channels by largest magnitude, before and after the adapter"
    fields = [
        charts.Stairs(
            site["site"],
            site["edges"],
            {name: site[key] for key, name in CHANNELS.items()},
            "largest magnitude",
            "channels",
            ratios=True,
        )
        for site in found.content["channels"]
        if site["edges"]
    ]
    return Chart(
        charts.stairs("chart-channels", title, fields), _bins(found, title, "channels", "site", CHANNELS)
    )


def _weights(found: Document) -> list[Chart]:
    if not found.content["histograms"]:
        return []
    title = "Weights of the layers with the lowest SNR"
    fields = [
        charts.Stairs(
            f"{layer['layer']}, {layer['snr_db']:.3g} dB",
            layer["edges"],
            {name: layer[key] for key, name in WEIGHTS.items()},
            "value",
            "weights",
        )
        for layer in found.content["histograms"]
    ]
    drawing = charts.stairs("chart-weights", title, fields)
    return [Chart(drawing, _bins(found, title, "histograms", "layer", WEIGHTS))]


def _bins(found: Document, title: str, key: str, named: str, columns: dict[str, str]) -> Table:
    rows: list[list[Cell]] = [
        [
            entry[named],
            found.figure(key, place, "edges", at),
            found.figure(key, place, "edges", at + 1),
            *(found.figure(key, place, column, at) for column in columns),
        ]
        for place, entry in enumerate(found.content[key])
        for at in range(max(0, len(entry["edges"]) - 1))
    ]
    return table(title, (named, "from", "to", *columns.values()), rows)


def _worst(entries: list[dict[str, Any]], goodness: Any) -> list[int]:
    """Places of the entries that a table has, the worst ones first."""
    return sorted(range(len(entries)), key=lambda place: goodness(entries[place]))[:LISTED]


def _sites(found: Document) -> Table:
    entries = found.content["sites"]
    ends = [(when, which) for when in CHANNELS for which in ("largest", "median")]
    rows: list[list[Cell]] = [
        [
            entries[place]["site"],
            found.figure("sites", place, "channels"),
            found.figure("sites", place, "silent"),
            *(found.figure("sites", place, *end) for end in ends),
            *(
                found.share(("sites", place, when, "largest"), ("sites", place, when, "median"))
                for when in CHANNELS
            ),
        ]
        for place in _worst(entries, lambda site: -_outlier(site))
    ]
    columns = ("site", "channels", "silent", *(f"{which} {when}" for when, which in ends),
               "largest / median before", "largest / median after")  # fmt: skip
    return table("Sites of the adapter", columns, rows)


def _outlier(site: dict[str, Any]) -> float:
    before = site["before"]
    return before["largest"] / before["median"] if before["median"] else 0.0


def _top(found: Document) -> Table:
    rows: list[list[Cell]] = [
        [
            site["site"],
            *(found.figure("channels", place, "top", at, key) for key in ("channel", "before", "after")),
        ]
        for place, site in enumerate(found.content["channels"])
        for at in range(len(site["top"]))
    ]
    title = "Largest channels of the sites that are drawn"
    return table(title, ("site", "channel", "before", "after"), rows, folded=True)


def _noise(found: Document) -> Table:
    entries = found.content["weights"]
    rows: list[list[Cell]] = [
        [
            entries[place]["layer"],
            found.figure("weights", place, "values"),
            found.figure("weights", place, "snr_db"),
        ]
        for place in _worst(entries, lambda entry: (entry["snr_db"] is None, entry["snr_db"] or 0.0))
    ]
    more = f", the {LISTED} worst of {len(entries)}" if len(entries) > LISTED else ""
    return table(f"SNR of the weights{more}", ("layer", "weights", "SNR, dB"), rows, folded=True)
