"""Sections on layers (bits, SNR between folded model and graph) and on the bytes of the files."""

from __future__ import annotations

import math

from qcompress.report.html import charts
from qcompress.report.html.evidence import Evidence
from qcompress.report.html.figures import Document, Figure
from qcompress.report.html.parts import Cell, Chart, Section, Table, table
from qcompress.report.layers import summary

FILES = {
    "float_layer_bytes": "layers as fp32",
    "quantized_bytes": "layers as stored",
    "initializer_bytes": "all that the graph stores",
    "file_bytes": "model.onnx",
}
"""Keys of sizes.json and their labels on the page."""


def layers(run: Evidence) -> Section:
    """Section with the bits of every layer and, after `verify --layers`, its SNR and differing codes."""
    title, sizes, layerwise = "Layers", run.optional("sizes.json"), run.optional("layers.json")
    if sizes is None and layerwise is None:
        return Section("layers", title, ("sizes.json and layers.json are missing.",))
    lines, drawn = [], []
    if sizes is None:
        lines.append("sizes.json is missing, so no bits.")
    elif not sizes.content["layers"]:
        lines.append("No layer is quantized.")
    else:
        drawn.append(_bits(sizes))
    tables = _kernels(sizes) if sizes is not None else ()
    if layerwise is None:
        lines.append("No distances by layer: `qcompress verify RUN --layers` makes layers.json.")
    else:
        lines += summary(layerwise.content)
        drawn.append(_distances(layerwise))
    return Section("layers", title, tuple(lines), tables=tables, charts=tuple(drawn))


def _kernels(sizes: Document) -> tuple[Table, ...]:
    """Table of each layer's kernel in ONNX Runtime; none for an older file or a graph that was not read."""
    path = ("kernels", "onnxruntime", "layers")
    entries = sizes.at(*path)
    if not entries:
        return ()
    rows: list[list[Cell]] = [
        [layer["name"], layer["operator"] or "-", layer["form"],
         sizes.figure(*path, place, "decoded_bytes", unit="bytes"), layer["reason"] or "-"]
        for place, layer in enumerate(entries)
    ]  # fmt: skip
    columns = ("layer", "operator", "form", "bytes as floats", "why not on integers")
    return (table("Kernels in ONNX Runtime", columns, rows, folded=True),)


def _bits(sizes: Document) -> Chart:
    entries = sizes.content["layers"]
    names = [layer["name"] for layer in entries]
    rows = [
        [layer["name"], *(sizes.figure("layers", place, key) for key in ("weights", "information_bits",
         "stored_bits")), sizes.figure("layers", place, "bytes", unit="bytes")]
        for place, layer in enumerate(entries)
    ]  # fmt: skip
    columns = (
        charts.Bars("bits of information", [layer["information_bits"] for layer in entries]),
        charts.Bars("KiB stored", [layer["bytes"] / 1024 for layer in entries]),
    )
    title = "Bits and bytes by layer"
    bits_table = table(
        title, ("layer", "weights", "bits of information", "bits stored", "bytes"), rows, folded=True
    )
    return Chart(charts.bars("chart-bits", title, names, columns), bits_table)


def _distances(layerwise: Document) -> Chart:
    entries = layerwise.content["layers"]
    rows: list[list[Cell]] = []
    for place, layer in enumerate(entries):
        distance = ("layers", place, "onnx_to_folded")
        rows.append(
            [
                layer["name"],
                layerwise.figure("layers", place, "folded_to_trained", "max_abs"),
                layerwise.share((*distance, "max_abs"), (*distance, "range")),
                layerwise.figure(*distance, "snr_db"),
                *(layerwise.figure("layers", place, key) for key in ("codes", "differ", "ties")),
            ]
        )
    columns = ("input of", "trained max |d|", "folded to onnx max |d| / range", "SNR dB", "codes", "differ",
               "ties among them")  # fmt: skip
    snr = [_finite(layer["onnx_to_folded"]["snr_db"]) for layer in entries]
    title = "Folded to ONNX by layer"
    drawing = charts.bars(
        "chart-snr",
        title,
        [layer["name"] for layer in entries],
        (
            charts.Bars("SNR, dB", snr),
            charts.Bars("codes that differ", [layer.get("differ") for layer in entries]),
        ),
    )
    return Chart(drawing, table(title, columns, rows, folded=True))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def sizes(run: Evidence) -> Section:
    """Section with the bytes of the float layers, the stored layers, the graph and the engine."""
    document, build = run.optional("sizes.json"), run.optional("engine/build.json")
    rows: list[tuple[str, Figure]] = []
    lines = []
    if document is None:
        lines.append("sizes.json is missing.")
    else:
        rows += [(name, document.figure(key, unit="bytes")) for key, name in FILES.items()]
    if build is None:
        lines.append("engine/build.json is missing.")
    elif build.at("plan", "bytes") is None:
        lines.append(f"No engine: {build.content.get('status')}, {build.content.get('reason')}")
    else:
        rows.append((f"engine for {build.content['target']}", build.figure("plan", "bytes", unit="bytes")))
        rows.append(("the engine at most", build.figure("limit_bytes", unit="bytes")))
    rows = [(name, figure) for name, figure in rows if figure.value is not None]
    if not rows:
        return Section("sizes", "Sizes", tuple(lines))
    title = "Sizes"
    values = [figure.value / 2**20 for _, figure in rows]
    drawing = charts.bars("chart-sizes", title, [name for name, _ in rows], (charts.Bars("MiB", values),))
    size_table = table(title, ("what", "bytes"), rows)
    return Section("sizes", title, tuple(lines), charts=(Chart(drawing, size_table),))
