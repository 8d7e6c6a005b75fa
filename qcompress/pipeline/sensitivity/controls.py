"""Control mixtures: choices of equal size by other costs, for comparison with the measured costs. No torch.

weight-error   relative error of each weight, summed: no data, no model shuffled       the measured costs,
permuted among layers of equal sizes: each format gets as many layers of each
               size, and chance alone decides which
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from qcompress.errors import UsageError
from qcompress.pipeline.sensitivity.mixture import Choice

CONTROLS = ("weight-error", "shuffled")

Choices = Mapping[str, Mapping[str, Choice]]
"""For each layer, its choices by the name of the format."""


def check_controls(names: Sequence[str]) -> None:
    """Raise UsageError for an unknown control."""
    for name in names:
        if name not in CONTROLS:
            raise UsageError(f"unknown control {name!r}", fix=f"name one of {', '.join(CONTROLS)}")


def other_costs(
    control: str, layers: Choices, errors: Mapping[str, Mapping[str, float]], seed: int
) -> dict[str, dict[str, Choice]]:
    """Copy the choices with the costs of a control. `errors`: relative weight error by layer and format."""
    if control == "weight-error":
        return {
            name: {
                word: replace(choice, cost=errors[name].get(word, 0.0)) for word, choice in choices.items()
            }
            for name, choices in layers.items()
        }
    alike: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for name, choices in layers.items():
        alike.setdefault(tuple((word, choice.bytes) for word, choice in choices.items()), []).append(name)
    random = np.random.default_rng(seed)
    lender = {
        name: names[index]
        for names in alike.values()
        for name, index in zip(names, random.permutation(len(names)), strict=True)
    }
    return {
        name: {
            word: replace(choice, cost=layers[lender[name]][word].cost) for word, choice in choices.items()
        }
        for name, choices in layers.items()
    }
