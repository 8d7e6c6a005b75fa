"""Modules with layers that one forward pass calls more than once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Twice(nn.Module):
    """A convolution and a linear layer of two calls each: the second convolution reads a smaller feature map,
    and the second linear layer an input of eight times the range.
    """

    def __init__(self, norm: Callable[[int], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.first, self.second = norm(8), norm(8)
        self.linear, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        large, small = self.first(self.shared(x)), self.second(self.shared(F.avg_pool2d(x, 2)))
        large, small = torch.tanh(large).mean((2, 3)), torch.tanh(small).mean((2, 3))
        return self.head(self.linear(large) + self.linear(8 * small.relu()))


def make() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    return Twice(), torch.zeros(1, 3, 16, 16)


class Lookups(nn.Module):
    """Two lookups of one table, the second times 3, as an encoder's and a decoder's, and a head that reads
    the table as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Embedding(20, 8), Scaled(20, 8), nn.Linear(8, 20, bias=False)
        self.second.weight = self.head.weight = self.first.weight

    def forward(self, ids: Tensor, others: Tensor) -> dict[str, Tensor]:
        first, second = self.first(ids), self.second(others)
        return {"first": first, "second": second, "logits": self.head(first + second)}


class Scaled(nn.Embedding):
    """A table whose rows are multiplied by 3."""

    def forward(self, ids: Tensor) -> Tensor:
        return 3 * super().forward(ids)


def lookups() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(4)
    return Lookups(), {"ids": torch.arange(10).view(2, 5), "others": torch.arange(10, 20).view(2, 5)}
