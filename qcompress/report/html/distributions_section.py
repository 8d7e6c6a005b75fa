"""Section "Before and after", from distributions.json: weights before and after rounding, channel magnitudes
before and after an adapter.
"""

from __future__ import annotations

from typing import Any

from qcompress.report.html import charts
from qcompress.report.html.evidence import Evidence
from qcompress.report.html.figures import Document
from qcompress.report.html.parts import Cell, Chart, Section, Table, table

TITLE = "Before and after"

LISTED = 200
"""Largest number of layers or sites in a table."""

WEIGHTS = {"float": "float", "deployed": "codes × scale"}
CHANNELS = {"before": "before", "after": "after"}
"""The two histograms of each drawing: JSON key and label."""


def distributions(run: Evidence) -> Section:
    """Section with the channel and the weight distributions that the run recorded."""
    document = run.optional("distributions.json")
    if document is None:
        return Section("distributions", TITLE, ("distributions.json is missing.",))
    lines: list[str] = []
    drawn: list[Chart] = []
    tables: list[Table] = []
    if document.content["sites"]:
        lines.append(
            "A channel's magnitude is the largest that the float model has on the calibration data; after "
            "the adapter it is that times the channel's final scale. What is far above the median costs all "
            "others their integers."
        )
        drawn.append(_channels(document))
        tables += [_sites(document), _top(document)]
    if document.content["weights"]:
        lines.append(
            "A layer's SNR is that of its weight as training left it against codes times scale as they are "
            "deployed; drawn are the layers with the lowest."
        )
        drawn += _weights(document)
        tables.append(_noise(document))
    if not lines:
        lines.append("No weight is quantized.")
    return Section("distributions", TITLE, tuple(lines), tables=tuple(tables), charts=tuple(drawn))


def _channels(document: Document) -> Chart:
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
        for site in document.content["channels"]
        if site["edges"]
    ]
    return Chart(
        charts.stairs("chart-channels", title, fields), _bins(document, title, "channels", "site", CHANNELS)
    )


def _weights(document: Document) -> list[Chart]:
    if not document.content["histograms"]:
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
        for layer in document.content["histograms"]
    ]
    drawing = charts.stairs("chart-weights", title, fields)
    return [Chart(drawing, _bins(document, title, "histograms", "layer", WEIGHTS))]


def _bins(document: Document, title: str, key: str, named: str, columns: dict[str, str]) -> Table:
    rows: list[list[Cell]] = [
        [
            entry[named],
            document.figure(key, place, "edges", at),
            document.figure(key, place, "edges", at + 1),
            *(document.figure(key, place, column, at) for column in columns),
        ]
        for place, entry in enumerate(document.content[key])
        for at in range(max(0, len(entry["edges"]) - 1))
    ]
    return table(title, (named, "from", "to", *columns.values()), rows)


def _worst(entries: list[dict[str, Any]], goodness: Any) -> list[int]:
    """Indices of the entries for a table, the worst first."""
    return sorted(range(len(entries)), key=lambda place: goodness(entries[place]))[:LISTED]


def _sites(document: Document) -> Table:
    entries = document.content["sites"]
    ends = [(when, which) for when in CHANNELS for which in ("largest", "median")]
    rows: list[list[Cell]] = [
        [
            entries[place]["site"],
            document.figure("sites", place, "channels"),
            document.figure("sites", place, "silent"),
            *(document.figure("sites", place, *end) for end in ends),
            *(
                document.share(("sites", place, when, "largest"), ("sites", place, when, "median"))
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


def _top(document: Document) -> Table:
    rows: list[list[Cell]] = [
        [
            site["site"],
            *(document.figure("channels", place, "top", at, key) for key in ("channel", "before", "after")),
        ]
        for place, site in enumerate(document.content["channels"])
        for at in range(len(site["top"]))
    ]
    title = "Largest channels of the sites that are drawn"
    return table(title, ("site", "channel", "before", "after"), rows, folded=True)


def _noise(document: Document) -> Table:
    entries = document.content["weights"]
    rows: list[list[Cell]] = [
        [
            entries[place]["layer"],
            document.figure("weights", place, "values"),
            document.figure("weights", place, "snr_db"),
        ]
        for place in _worst(entries, lambda entry: (entry["snr_db"] is None, entry["snr_db"] or 0.0))
    ]
    more = f", the {LISTED} worst of {len(entries)}" if len(entries) > LISTED else ""
    return table(f"SNR of the weights{more}", ("layer", "weights", "SNR, dB"), rows, folded=True)
