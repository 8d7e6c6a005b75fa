"""Other ways of choosing a mixture of the same size, to hold the measured one against. No torch.

weight-error   the error of each weight relative to the weight, added up: no data, no model
shuffled       the measured costs, each layer with those of another one of its sizes: as many layers of each
               size get each format, and only which ones is left to chance
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from qcompress.errors import UsageError
from qcompress.pipeline.sensitivity.mixture import Choice

CONTROLS = ("weight-error", "shuffled")

Choices = Mapping[str, Mapping[str, Choice]]
"""For each layer, by the name of a format, what it would cost."""


def check_controls(names: Sequence[str]) -> None:
    """Raises UsageError for a name that is none."""
    for name in names:
        if name not in CONTROLS:
            raise UsageError(f"unknown control {name!r}", fix=f"name one of {', '.join(CONTROLS)}")


def other_costs(
    control: str, layers: Choices, errors: Mapping[str, Mapping[str, float]], seed: int
) -> dict[str, dict[str, Choice]]:
    """The same choices with the costs of a control. `errors`: for each layer, that of a format."""
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
        name: names[other]
        for names in alike.values()
        for name, other in zip(names, random.permutation(len(names)), strict=True)
    }
    return {
        name: {
            word: replace(choice, cost=layers[lender[name]][word].cost) for word, choice in choices.items()
        }
        for name, choices in layers.items()
    }
