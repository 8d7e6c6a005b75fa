"""One place where a model rounds, held against the graph: its codes, the ties among those that differ, and
the module that goes on with the graph's codes. `layerwise.py` says why.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.errors import ContractError
from qcompress.parity.distance import Distance
from qcompress.quant.folded import Rounding

TIE = {"fp32": 1e-3, "fp16": 0.25}
"""How far from the middle between two codes, in steps, a tie may lie: the noise of the compute type at code
127 after a block's sums."""

FINEST = 1e-3
"""The least of these limits, for narrow codes too."""

NOISE = {"fp32": 1e-4, "fp16": 1e-2}
"""Largest difference of an input that rounding of the compute type explains, as a fraction of its range; for
places without codes."""

Inputs = dict[str, np.ndarray]
"""Arrays by name: inputs of a model, or place -> its float input, fp32 [positions, features]."""


@dataclass
class Place:
    """What was found at one place."""

    name: str
    limit: float
    """Of ties, in steps."""
    rounds: bool = False
    trained: Distance = field(default_factory=lambda: Distance(to="trained"))
    onnx: Distance = field(default_factory=lambda: Distance(to="folded"))
    codes: int = 0
    differ: int = 0
    ties: int = 0
    farthest: float = 0.0

    def count(self, x: Tensor, rounding: Rounding, found: Tensor) -> None:
        """Compare the codes of x with those found in the graph; all of one shape."""
        apart = (rounding.codes(x).short() - found).abs_()
        differ = apart > 0
        steps = x[differ].double() / rounding.scale.double()
        low = steps.floor()
        off = (steps - low - 0.5).abs_()
        # the graph's code must be one of the two that the middle lies between
        between = (found[differ] == low) | (found[differ] == low + 1)
        most = max(map(abs, rounding.bounds))
        limit = max(FINEST, self.limit * most / 127)  # narrow codes are known to a smaller part of a step
        self.codes += found.numel()
        self.differ += int(differ.sum())
        self.ties += int(((off <= limit) & (apart[differ] == 1) & between).sum())
        self.farthest = max(self.farthest, float(off.max()) if off.numel() else 0.0)

    def to_json(self) -> dict[str, Any]:
        found = {
            "name": self.name,
            "folded_to_trained": self.trained.to_json() if self.trained.count else None,
            "onnx_to_folded": self.onnx.to_json(),
        }
        if not self.rounds:
            return {**found, "codes": None}
        names = ("codes", "differ", "ties", "farthest")
        return {**found, **{name: getattr(self, name) for name in names}, "unexplained": self.unexplained}

    @property
    def share(self) -> float:
        """Of its codes, those that differ, but for two, which are chance where there are few."""
        return max(self.differ - 2, 0) / self.codes if self.codes else 0.0

    @property
    def unexplained(self) -> int:
        return self.differ - self.ties

    def diverges(self, noise: float) -> bool:
        """Whether its input is another one than in the folded model."""
        if self.rounds:
            return self.differ > 0
        found = self.onnx.to_json()
        return not found["max_abs"] <= noise * found["range"]


class Held(nn.Module):
    """In the place of a rounding: holds its codes against the graph's, and goes on with the graph's.

    `graph` has the codes of the present window by place, integers of as many elements as x.
    """

    def __init__(self, rounding: Rounding, place: Place, graph: Inputs) -> None:
        super().__init__()
        self.rounding, self.place, self.graph = rounding, place, graph

    def forward(self, x: Tensor) -> Tensor:
        codes = self.graph[self.place.name]
        if codes.size != x.numel():
            raise ContractError(f"{self.place.name}: {list(codes.shape)} codes for {list(x.shape)} values")
        found = torch.from_numpy(codes).reshape(x.shape)
        self.place.count(x, self.rounding, found)
        return found.to(x.dtype) * self.rounding.scale
