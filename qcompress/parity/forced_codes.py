"""Forced codes: the folded model's integer codes are compared with those of another model, the trained one or
the ONNX graph, at one quantization point, and the folded model continues from the other model's codes.
`layerwise.py` gives the reasons.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.errors import ContractError
from qcompress.models.plan import call_name
from qcompress.parity.distance import Distance
from qcompress.quant.folded import Rounding

TIE = {"fp32": 1e-3, "fp16": 0.25}
"""Largest distance of a rounding tie from the middle between two codes, in steps: the compute type's noise at
code 127 after a block's sums.
"""

FINEST = 1e-3
"""Lower limit of that distance for narrow codes."""

NOISE = {"fp32": 1e-4, "fp16": 1e-2}
"""Largest input difference that rounding of the compute type explains, as a fraction of the input's range;
for points without codes.
"""

Inputs = dict[str, np.ndarray]
"""Arrays by name: inputs of a model, or float inputs of quantization points, fp32 [positions, features]."""


@dataclass
class Place:
    """Comparison at one quantization point."""

    name: str
    limit: float
    """Largest distance of a rounding tie, in steps."""
    rounds: bool = False
    trained: Distance = field(default_factory=lambda: Distance(to="trained"))
    onnx: Distance = field(default_factory=lambda: Distance(to="folded"))
    codes: int = 0
    differ: int = 0
    ties: int = 0
    farthest: float = 0.0
    margins: tuple[int, ...] = ()
    """Padding of the convolution in the graph, as Conv declares it; empty for other places."""

    def padded(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Values or codes of the graph in the shape of the model's input. Where the model pads an image with
        zeros in front of a convolution, the graph's convolution may pad it itself.
        """
        half = len(self.margins) // 2
        sides = list(zip(self.margins[:half], self.margins[half:], strict=True))
        sides = [(0, 0)] * (array.ndim - half) + sides
        grown = tuple(size + sum(side) for size, side in zip(array.shape, sides, strict=True))
        is_smaller = half > 0 and array.shape != tuple(shape) and grown == tuple(shape)
        return np.pad(array, sides) if is_smaller else array

    def count(self, x: Tensor, rounding: Rounding, forced: Tensor) -> None:
        """Compare the codes of x with those of the other model, of equal shape."""
        apart = (rounding.codes(x).short() - forced).abs_()
        differ = apart > 0
        steps = x[differ].double() / rounding.scale.double()
        low = steps.floor()
        off = (steps - low - 0.5).abs_()
        # the other code must be one of the two that the middle lies between
        between = (forced[differ] == low) | (forced[differ] == low + 1)
        most = max(map(abs, rounding.bounds))
        limit = max(FINEST, self.limit * most / 127)  # narrow codes are known to a smaller part of a step
        self.codes += forced.numel()
        self.differ += int(differ.sum())
        self.ties += int(((off <= limit) & (apart[differ] == 1) & between).sum())
        self.farthest = max(self.farthest, float(off.max()) if off.numel() else 0.0)

    def to_json(self) -> dict[str, Any]:
        entry = {
            "name": self.name,
            "folded_to_trained": self.trained.to_json() if self.trained.count else None,
            "onnx_to_folded": self.onnx.to_json(),
        }
        if not self.rounds:
            return {**entry, "codes": None}
        names = ("codes", "differ", "ties", "farthest")
        return {**entry, **{name: getattr(self, name) for name in names}, "unexplained": self.unexplained}

    @property
    def share(self) -> float:
        """Fraction of codes that differ, not counting two, which chance explains where codes are few."""
        return max(self.differ - 2, 0) / self.codes if self.codes else 0.0

    @property
    def unexplained(self) -> int:
        """Codes that differ by more than a rounding tie."""
        return self.differ - self.ties

    def diverges(self, noise: float) -> bool:
        """True if its input differs from the folded model's by more than noise."""
        if self.rounds:
            return self.differ > 0
        distance = self.onnx.to_json()
        return not distance["max_abs"] <= noise * distance["range"]


def summary(places: Sequence[Place]) -> dict[str, Any]:
    """Totals over quantization points in execution order: {"codes", "differ", "unexplained",
    "first_unexplained", "largest_share", "at"}. `largest_share` is the largest fraction of differing codes at
    one point, `at` its name.
    """
    most = max(places, key=lambda place: place.share)
    return {
        "codes": sum(place.codes for place in places),
        "differ": sum(place.differ for place in places),
        "unexplained": sum(place.unexplained for place in places),
        "first_unexplained": next((place.name for place in places if place.unexplained), None),
        "largest_share": most.share,
        "at": most.name,
    }


class Turn:
    """The calls of a quantization point, one after another; the first follows the last."""

    def __init__(self, name: str) -> None:
        self.name, self.call = name, 0

    def next(self, known: Container[str]) -> str:
        """Name of the next call, of those in `known`."""
        name = call_name(self.name, self.call)
        self.call = self.call + 1 if call_name(self.name, self.call + 1) in known else 0
        return name


class Held(nn.Module):
    """Replacement of an activation quantizer of the folded model that compares its codes with another
    model's, the trained one's or the graph's, and passes on the latter.

    `forced` maps the calls of quantization points (`call_name`) to these codes, integers of as many elements
    as x. All calls count in one comparison.
    """

    def __init__(self, rounding: Rounding, place: Place, forced: Inputs) -> None:
        super().__init__()
        self.rounding, self.place, self.forced = rounding, place, forced
        self._turn = Turn(place.name)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.place.padded(self.forced[self._turn.next(self.forced)], x.shape)
        if codes.size != x.numel():
            raise ContractError(f"{self.place.name}: {list(codes.shape)} codes for {list(x.shape)} values")
        forced = torch.from_numpy(codes).reshape(x.shape)
        self.place.count(x, self.rounding, forced)
        return forced.to(x.dtype) * self.rounding.scale
