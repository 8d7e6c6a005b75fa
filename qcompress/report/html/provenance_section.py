"""Sections on the origin of a run: time and memory, certificate, linter, versions, hashes, seed, host,
recipe.
"""

from __future__ import annotations

from typing import Any

from qcompress.report.html import charts
from qcompress.report.html.evidence import Evidence
from qcompress.report.html.figures import Document
from qcompress.report.html.parts import Cell, Chart, Section, Table, table
from qcompress.schema.recipe import STAGES

FINDING = ("severity", "rule", "layer", "found", "consequence", "fix")


def cost(run: Evidence) -> Section:
    """Section with the seconds and peak memory of every stage when it was executed."""
    stages = _stages(run)
    rows: list[list[Cell]] = [
        [
            name,
            run.manifest.figure("stages", name, "seconds", unit="s"),
            run.manifest.figure("stages", name, "peak_mib", unit="MiB"),
            "reused" if run.manifest.at("stages", name, "reused") else "ran",
        ]
        for name in stages
    ]
    title = "Time and memory by stage"
    cost_table = table(title, ("stage", "time", "peak memory", "in this run"), rows)
    recorded = [run.manifest.at("stages", name) for name in stages]
    columns = (
        charts.Bars("seconds", [stage.get("seconds") for stage in recorded]),
        charts.Bars("peak memory, MiB", [stage.get("peak_mib") for stage in recorded]),
    )
    drawn = (Chart(charts.bars("chart-cost", title, stages, columns), cost_table),) if stages else ()
    return Section("cost", title, charts=drawn)


def _stages(run: Evidence) -> list[str]:
    return [name for name in STAGES if name in run.manifest.content["stages"]]


def certificate(run: Evidence) -> Section:
    """Section on the certificate: codes and scales of each layer in the graph against the folded ones."""
    title, document = "Certificate", run.optional("certificate.json")
    if document is None:
        return Section("certificate", title, ("certificate.json is missing.",), tables=_lint(run))
    content = document.content
    layers = content.get("layers", [])
    passed = sum(bool(item.get("passed")) for item in layers)
    complete = "complete" if content.get("complete") else "not complete"
    lines = [f"It is {complete}: {passed} of {len(layers)} layers are bit for bit what was folded."]
    wrong = [
        f"{item['name']}: {'; '.join(item.get('reasons', []))}"
        for item in (*layers, *content.get("points", []))
        if not item.get("passed")
    ]
    tables = (_layers(document, layers),) if layers else ()
    return Section("certificate", title, tuple(lines), tuple(wrong), (*tables, *_lint(run)))


def _layers(document: Document, layers: list[dict[str, Any]]) -> Table:
    keys = ("weight_codes_equal", "scales_equal", "qdq_pairs", "expected_pairs", "passed")
    columns = ("layer", "codes equal", "scales equal", "Q/DQ pairs", "pairs expected", "passed")
    rows = [
        [layer["name"], *(document.figure("layers", place, key) for key in keys)]
        for place, layer in enumerate(layers)
    ]
    return table("Certificate by layer", columns, rows, folded=True)


def _lint(run: Evidence) -> tuple[Table, ...]:
    lint = run.optional("lint.json")
    if lint is None or not lint.content["findings"]:
        return ()
    rows = [[str(item.get(key, "")) for key in FINDING] for item in lint.content["findings"]]
    return (table(f"What the linter says for {lint.content.get('target')}", FINDING, rows),)


def manifest(run: Evidence) -> Section:
    """Section with versions, hashes, seed, host and the resolved recipe."""
    content = run.manifest.content
    origin: list[list[Cell]] = [
        ["recipe", str(content.get("recipe", ""))],
        ["seed", str(run.manifest.at("seed"))],
        ["model", str(content.get("source", ""))],
        ["run", str(run.loaded.path)],
        *([f"host, {key}", _plain(value)] for key, value in content.get("host", {}).items()),
    ]
    hashes: list[list[Cell]] = [
        [f"stage {name}", str(run.manifest.at("stages", name, "digest"))] for name in _stages(run)
    ]
    onnx = run.parity.at("onnx", "sha256")
    hashes += [["model.onnx", str(onnx)]] if onnx else []
    hashes += [[f"inputs of {name}", digest] for name, digest in run.parity.content.get("inputs", {}).items()]
    versions = [[name, str(version)] for name, version in content.get("versions", {}).items()]
    tables = (
        table("Made with", ("what", "found"), origin),
        table("Versions", ("package", "version"), versions, folded=True),
        table("Digests (SHA-256)", ("what", "digest"), hashes, folded=True),
    )
    return Section("manifest", "Manifest", tables=tables, text=run.recipe_text())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
