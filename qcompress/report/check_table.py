"""Output of `qcompress check`, as text and as JSON. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from qcompress.models.architecture import Architecture
from qcompress.models.plan import LayerPlan
from qcompress.recipe.check import Report
from qcompress.recipe.load import Resolved
from qcompress.recipe.scale_reach import SMALL_REACH, scale_reach
from qcompress.schema.axes import PHASES
from qcompress.system.screen import Cells

FEW = 0.5
"""Share of the values in layers below which the file shrinks little."""


def print_check(
    console: Console, resolved: Resolved, report: Report, reuse: list[tuple[str, bool, str]]
) -> None:
    """Print the layers, patterns, phases and reusable stages of a checked recipe."""
    recipe = resolved.recipe
    architecture = report.architecture
    console.print(
        f"{recipe.name}: {architecture.family}, {architecture.parameters / 1e6:.2f} M parameters, "
        f"{len(architecture.blocks)} blocks; method {recipe.method}, target {recipe.build.target}"
        if recipe.export.graph is None
        else f"{recipe.name}: {architecture.family}, graph {recipe.export.graph}, external; target "
        f"{recipe.build.target}",
        markup=False,
    )
    if recipe.model.python is not None:
        console.print(f"the code of {recipe.model.python} makes the model, and runs here", markup=False)
    if recipe.export.graph is not None:
        _print_reuse(console, reuse)
        return
    table = Cells("layers", "kind", "weights", "inputs", header_style="bold")
    for (kind, weights, inputs), items in _grouped(report.plan).items():
        names = items[0].name + (f" and {len(items) - 1} more" if len(items) > 1 else "")
        table.add_row(names, kind, weights, inputs)
    console.print(table)
    for line in _floats(architecture):
        console.print(line, markup=False)
    for pattern, count in report.matches.items():
        line = f"format.layers {pattern!r} matches {count} layer{'s' if count != 1 else ''}"
        console.print(line)  # [ab] is a glob here
    phases = ", ".join(PHASES[recipe.schedule.name]) or "none"
    console.print(f"phases of {recipe.schedule.name}: {phases}")
    reach = scale_reach(recipe)
    if reach is not None and reach.share < SMALL_REACH:
        console.print(reach.note())
    for extent in report.bounded:
        console.print(f"looked at {extent}; a run looks at all of them first")
    _print_reuse(console, reuse)


def _floats(architecture: Architecture) -> Iterator[str]:
    """One line for each reason why modules stay float, and one for the share of the layers."""
    reasons: dict[str, list[str]] = {}
    for name, reason in architecture.floats:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{names[0]}{more}: float, {reason}"
    if architecture.covered < 0.995:
        yield f"layers hold {100 * architecture.covered:.0f} % of the values of the model's matrices"
    if architecture.covered < FEW:
        name, shape = architecture.uncovered[0]
        yield f"the file shrinks little: {name} {list(shape)} and others like it stay float"


def _print_reuse(console: Console, reuse: list[tuple[str, bool, str]]) -> None:
    for stage, reused, why in reuse:
        console.print(f"  {stage:8} {'reused' if reused else 'runs' + (f': {why}' if why else '')}")


def _grouped(plan: tuple[LayerPlan, ...]) -> dict[tuple[str, str, str], list[LayerPlan]]:
    groups: dict[tuple[str, str, str], list[LayerPlan]] = {}
    for item in plan:
        key = (item.layer.kind, str(item.weights or "float"), str(item.activations or "float"))
        groups.setdefault(key, []).append(item)
    return groups


def check_json(resolved: Resolved, report: Report, reuse: list[tuple[str, bool, str]]) -> dict[str, object]:
    """JSON document of `qcompress check --json`."""
    reach = scale_reach(resolved.recipe)
    return {
        "recipe": resolved.recipe.model_dump(mode="json", by_alias=True),
        "floats": dict(report.architecture.floats),
        "covered": report.architecture.covered,
        "layers": [
            {
                "name": item.name,
                "weights": str(item.weights or "float"),
                "inputs": str(item.activations or "float"),
            }
            for item in report.plan
        ],
        "matches": report.matches,
        "scale_reach": reach.share if reach is not None else None,
        "stages": [{"stage": stage, "reused": reused, "why": why} for stage, reused, why in reuse],
    }
