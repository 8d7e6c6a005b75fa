"""Modules of a few lines with a given step between their layers, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Linear or convolution layers `first` and `second`, and a function between them."""

    def __init__(self, between: Callable[[Net, Tensor], Tensor], *, convolutions: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.norm = nn.GroupNorm(2, 8) if convolutions else nn.LayerNorm(8)
        layer = (lambda: nn.Conv2d(8, 8, 3, padding=1)) if convolutions else (lambda: nn.Linear(8, 8))
        self.first, self.second, self.third = layer(), layer(), layer()
        self.relu = nn.ReLU()
        nn.init.normal_(self.norm.weight, 1, 0.2)
        nn.init.normal_(self.norm.bias, 0, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self, self.first(x)))


def example(rows: int = 3, length: int = 5) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, length, 8, generator=torch.Generator().manual_seed(rows))}


def pictures(rows: int = 3, side: int = 6) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 8, side, side, generator=torch.Generator().manual_seed(rows))}
