"""Outputs of a user's module: by name in its graph, and as one array where rows of the ladder are compared.
No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PYTHON = "python"
"""Value of `model_type`, and key of config.json with the facts of a user's module."""


@dataclass(frozen=True)
class Output:
    """One output: [batch, *shape]."""

    name: str
    shape: tuple[int, ...]
    scale: float = 1.0
    """Largest magnitude of the example's output: outputs are compared in units of theirs."""

    @property
    def size(self) -> int:
        """Number of values of one sample."""
        return math.prod(self.shape)


def outputs_in(config: Mapping[str, Any]) -> tuple[Output, ...]:
    """Outputs that the config.json of a user's module lists; empty for another model."""
    listed = config.get(PYTHON, {}).get("outputs", ())
    return tuple(Output(item["name"], tuple(item["shape"]), item["scale"]) for item in listed)


def inputs_in(config: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Inputs that the config.json of a user's module lists: shape and type of one sample, by name."""
    return {item["name"]: (tuple(item["shape"]), item["element"]) for item in config[PYTHON]["inputs"]}


def apart(joined: Any, outputs: Sequence[Output]) -> dict[str, Any]:
    """Outputs [batch, *shape] by name, from a tensor or array [batch, values] of all of them."""
    named, start = {}, 0
    for output in outputs:
        named[output.name] = joined[:, start : start + output.size].reshape(-1, *output.shape)
        start += output.size
    return named


def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Outputs [batch, ...] side by side, fp32 [batch, values]."""
    import numpy as np

    return np.concatenate([array.reshape(len(array), -1).astype(np.float32) for array in arrays], axis=1)
