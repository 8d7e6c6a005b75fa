"""Terminal tables of sensitivity.json: layers by cost, and the mixture. No torch."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.text import Text

from qcompress.recipe.yaml_file import dump_yaml
from qcompress.system.screen import Cells

MOST = 20
"""Number of layers shown in the terminal; sensitivity.json has all."""


def print_sensitivity(console: Console, document: dict[str, Any], everything: bool = False) -> None:
    """Print each uniform format, its costliest layers, and the mixture with its recipe fragment."""
    formats = document["formats"]
    console.print(f"divergence from the float model in {document['unit']}, mean and standard error over "
                  f"{document['samples']} calibration samples", style="dim")  # fmt: skip
    whole = Cells("format", "bytes", "all layers rounded", "sum of single costs")
    for word, result_of_format in formats.items():
        total = sum(layer["alone"][0] for layer in result_of_format["layers"].values())
        whole.add_row(word, f"{result_of_format['bytes']:,}", _cost(result_of_format["all"]), f"{total:.3g}")
    if mixture := document["mixture"]:
        whole.add_row(
            "mixture", f"{mixture['bytes']:,}", _cost(mixture["measured"]), f"{mixture['predicted']:.3g}"
        )
    console.print(whole)
    for word, result_of_format in formats.items():
        console.print(_layers(word, result_of_format["layers"], everything))
    if mixture:
        data = "fresh samples" if mixture["fresh"] else "the samples that chose it, for want of others"
        line = f"mixture, on {mixture['samples']} of {data}: {_cost(mixture['measured'])}"
        if mixture["difference"]:
            uniform, difference = (_cost(mixture[key]) for key in ("uniform", "difference"))
            line += f"; the uniform format: {uniform}; difference {difference}"
        console.print(line)
        for control, result in mixture["controls"].items():
            line = f"control {control}, {result['bytes']:,} bytes: {_cost(result['measured'])}; "
            console.print(f"{line}difference of the mixture {_cost(result['difference'])}")
        counts = Counter(mixture["formats"].values())
        console.print("mixture: " + ", ".join(f"{count} x {word}" for word, count in counts.most_common()))
        console.print(Text(dump_yaml({"format": mixture["fragment"]})))


def _layers(word: str, layers: dict[str, Any], everything: bool) -> Cells:
    ranked = sorted(layers.items(), key=lambda item: -item[1]["alone"][0])
    shown = ranked if everything else ranked[:MOST]
    left = f", {len(ranked) - len(shown)} cheaper ones left out" if len(shown) < len(ranked) else ""
    table = Cells("layer", "rounded alone", "won if it stays float", "bytes", title=f"{word}{left}")
    for name, entry in shown:
        table.add_row(name, _cost(entry["alone"]), _cost(entry["wins"]), f"{entry['bytes']:,}")
    return table


def _cost(cost: list[float] | None) -> str:
    return "-" if cost is None else f"{cost[0]:.3g} ± {cost[1]:.1g}"
