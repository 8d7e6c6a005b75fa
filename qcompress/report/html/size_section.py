"""Layers and bytes: bits of every layer, its distance between folded and graph, what the files weigh."""

from __future__ import annotations

import math

from qcompress.report.html import charts
from qcompress.report.html.evidence import Evidence
from qcompress.report.html.figures import Document, Figure
from qcompress.report.html.parts import Cell, Chart, Section, table
from qcompress.report.layers import summary

FILES = {
    "float_layer_bytes": "layers as fp32",
    "quantized_bytes": "layers as stored",
    "initializer_bytes": "all that the graph stores",
    "file_bytes": "model.onnx",
}
"""What sizes.json counts, and how the page calls it."""


def layers(run: Evidence) -> Section:
    """Bits of every layer, and, where `verify --layers` was asked, its SNR and codes."""
    title, sizes, apart = "Layers", run.optional("sizes.json"), run.optional("layers.json")
    if sizes is None and apart is None:
        return Section("layers", title, ("sizes.json and layers.json are missing.",))
    lines, drawn = [], []
    if sizes is None:
        lines.append("sizes.json is missing, so no bits.")
    elif not sizes.content["layers"]:
        lines.append("No layer is quantized.")
    else:
        drawn.append(_bits(sizes))
    if apart is None:
        lines.append("No distances by layer: `qcompress verify RUN --layers` makes layers.json.")
    else:
        lines += summary(apart.content)
        drawn.append(_distances(apart))
    return Section("layers", title, tuple(lines), charts=tuple(drawn))


def _bits(sizes: Document) -> Chart:
    found = sizes.content["layers"]
    names = [layer["name"] for layer in found]
    rows = [
        [layer["name"], *(sizes.figure("layers", place, key) for key in ("weights", "information_bits",
         "stored_bits")), sizes.figure("layers", place, "bytes", unit="bytes")]
        for place, layer in enumerate(found)
    ]  # fmt: skip
    columns = (
        charts.Bars("bits of information", [layer["information_bits"] for layer in found]),
        charts.Bars("KiB stored", [layer["bytes"] / 1024 for layer in found]),
    )
    title = "Bits and bytes by layer"
    told = table(
        title, ("layer", "weights", "bits of information", "bits stored", "bytes"), rows, folded=True
    )
    return Chart(charts.bars("chart-bits", title, names, columns), told)


def _distances(apart: Document) -> Chart:
    found = apart.content["layers"]
    rows: list[list[Cell]] = []
    for place, layer in enumerate(found):
        far = ("layers", place, "onnx_to_folded")
        rows.append(
            [
                layer["name"],
                apart.figure("layers", place, "folded_to_trained", "max_abs"),
                apart.share((*far, "max_abs"), (*far, "range")),
                apart.figure(*far, "snr_db"),
                *(apart.figure("layers", place, key) for key in ("codes", "differ", "ties")),
            ]
        )
    columns = ("input of", "trained max |d|", "folded to onnx max |d| / range", "SNR dB", "codes", "differ",
               "ties among them")  # fmt: skip
    snr = [_finite(layer["onnx_to_folded"]["snr_db"]) for layer in found]
    title = "Folded to ONNX by layer"
    drawing = charts.bars(
        "chart-snr",
        title,
        [layer["name"] for layer in found],
        (
            charts.Bars("SNR, dB", snr),
            charts.Bars("codes that differ", [layer.get("differ") for layer in found]),
        ),
    )
    return Chart(drawing, table(title, columns, rows, folded=True))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def sizes(run: Evidence) -> Section:
    """Bytes of the layers as they were and as they are stored, of the graph and of the engine."""
    found, build = run.optional("sizes.json"), run.optional("engine/build.json")
    rows: list[tuple[str, Figure]] = []
    lines = []
    if found is None:
        lines.append("sizes.json is missing.")
    else:
        rows += [(name, found.figure(key, unit="bytes")) for key, name in FILES.items()]
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
    told = table(title, ("what", "bytes"), rows)
    return Section("sizes", title, tuple(lines), charts=(Chart(drawing, told),))
