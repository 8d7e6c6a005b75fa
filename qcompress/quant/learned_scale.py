"""Learned scale of LSQ (arXiv:1902.08153): its parametrization, and the projection that keeps it positive."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

Parametrization = Literal["relative", "absolute"]

PARAMETRIZATIONS: dict[str, Parametrization] = {"adamw": "relative", "sgd": "absolute"}
"""Parametrization for each optimizer."""


class LearnedScale(nn.Module):
    """Base of quantizers with a learned scale s = unit * ratio, where `ratio` is the parameter.

        relative   unit is the initial scale, ratio starts at 1. Adam moves a parameter by about its learning
                   rate, whatever the gradient's size, so the rate is a fraction of the initial scale here.
        absolute   unit is 1, ratio is the scale itself. SGD moves a parameter by its gradient times the
                   learning rate, so any other unit would move s by unit^2 times LSQ's update.

    Attributes:
        start: the initial scale.
        unit: constant factor, in the scale's shape.
        ratio: the parameter, in the scale's shape.
        floor: smallest fraction of the initial scale that an update may leave.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"ratio": "scale"}
    parametrization: Parametrization = "relative"

    def make_scale(self, shape: tuple[int, ...], floor: float) -> None:
        """Create the parameter and its constants; `start_at` sets their values."""
        self.floor = floor
        self.register_buffer("start", torch.ones(shape))
        self.register_buffer("unit", torch.ones(shape))
        self.ratio = nn.Parameter(torch.ones(shape))

    @torch.no_grad()
    def start_at(self, scale: Tensor) -> None:
        """Set the initial scale, in the parametrization chosen before."""
        self.start.copy_(scale)
        if self.parametrization == "relative":
            self.unit.copy_(scale)
            self.ratio.fill_(1.0)
        else:
            self.unit.fill_(1.0)
            self.ratio.copy_(scale)

    def learned_scale(self) -> Tensor:
        """The current scale, differentiable in `ratio`."""
        return self.unit * self.ratio

    @torch.no_grad()
    def advance(self) -> None:
        """Project the scale to its floor after each update."""
        torch.maximum(self.ratio, self.floor * (self.start / self.unit), out=self.ratio)

    @torch.no_grad()
    def movement(self) -> Tensor:
        """Relative change |s / start - 1| of every scale, in the scale's shape."""
        return (self.learned_scale() / self.start - 1).abs()


def unit_of(model: nn.Module, name: str) -> Tensor | None:
    """Unit in which a parameter of the model stores a learned scale; None for other parameters."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    return module.unit if attribute == "ratio" and isinstance(module, LearnedScale) else None
