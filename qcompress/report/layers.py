"""Terminal table of layers.json."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console

from qcompress.system.screen import Cells


def print_layers(console: Console, document: dict[str, Any]) -> None:
    """Print one row for each layer, then the summary."""
    table = Cells(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), pad_edge=False)
    table.add_column("input of", no_wrap=True)
    distance_columns = ("trained\nmax |d|", "folded to onnx\nmax |d| / range", "SNR\ndB")
    for column in (
        *distance_columns,
        "codes\ndiffer",
        "of\ncodes",
        "ties\namong them",
        "farthest\nfrom a tie",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in document["layers"]:
        table.add_row(layer["name"], *_far(layer), *_codes(layer))
    console.print(table)
    console.print(*summary(document), sep="\n", soft_wrap=True)


def summary(document: dict[str, Any]) -> list[str]:
    """Sentences on the first layer that differs and the first difference that is not a rounding tie."""
    layers = {layer["name"]: layer for layer in document["layers"]}
    lines = []
    torch_apart = [
        name for name, layer in layers.items() if (layer["folded_to_trained"] or {}).get("max_abs")
    ]
    if torch_apart:
        lines.append(f"trained and folded differ first at the input of {torch_apart[0]}")
    first = document["first_difference"]
    if first is None:
        return [*lines, "folded and onnx agree in every code of every layer"]
    if layers[first]["codes"] is None:
        lines.append(f"folded and onnx differ first at the input of {first}")
        return lines
    differ, ties, codes = (
        sum(layer.get(name) or 0 for layer in layers.values()) for name in ("differ", "ties", "codes")
    )
    lines.append(f"folded and onnx differ first at the input of {first}: {layers[first]['differ']} codes")
    lines.append(
        f"every place starts from the codes of the graph: {differ} of {codes} differ, {ties} of them on "
        f"a tie between two codes (within {document['tie_limit']:g} of a step)"
    )
    if document["first_unexplained"]:
        lines.append(
            f"no rounding explains {document['unexplained']} of them, first at the input of "
            f"{document['first_unexplained']}"
        )
    return lines


def _far(layer: dict[str, Any]) -> tuple[str, str, str]:
    trained, onnx = layer["folded_to_trained"], layer["onnx_to_folded"]
    snr = onnx["snr_db"]
    return (
        "-" if trained is None else f"{trained['max_abs']:.1e}" if trained["max_abs"] else "0",
        f"{onnx['max_abs'] / onnx['range']:.1e}" if onnx["max_abs"] else "0",
        "" if snr is None else f"{snr:.0f}",
    )


def _codes(layer: dict[str, Any]) -> tuple[str, ...]:
    if layer["codes"] is None:
        return ("", "", "", "")
    return (
        *(str(layer[name]) for name in ("differ", "codes", "ties")),
        f"{layer['farthest']:.1e}" if layer["differ"] else "",
    )
