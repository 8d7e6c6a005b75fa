"""A module of somebody else: convolutions, a gate, and an attention with heads that talk to each other."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from strangers_blocks import Gated
from torch import Tensor, nn


class OddAttention(nn.Module):
    """Attention whose heads are mixed in front of the softmax, with a temperature for each head."""

    def __init__(self, width: int, heads: int, places: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mix = nn.Linear(heads, heads, bias=False)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 0.7))
        self.distance = nn.Parameter(torch.randn(heads, places, places) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        rows, places, width = x.shape
        split = self.qkv(x).reshape(rows, places, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = split
        scores = query @ key.transpose(-1, -2) * self.temperature / math.sqrt(width // self.heads)
        scores = self.mix((scores + self.distance).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.project((scores.softmax(-1) @ value).transpose(1, 2).reshape(rows, places, width))


class Stranger(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4, labels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 5, 2, 2, bias=False), nn.BatchNorm2d(width), nn.GELU())
        self.gated = nn.ModuleList(Gated(width) for _ in range(2))
        self.down, self.norm = nn.Conv2d(width, width, 2, 2), nn.LayerNorm(width)
        self.attention, self.share = OddAttention(width, heads, 16), nn.Parameter(torch.full((width,), 0.5))
        self.up, self.value, self.back = nn.Linear(width, 32), nn.Linear(width, 32), nn.Linear(32, width)
        self.head = nn.Linear(2 * width, labels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.gated:
            x = block(x)
        x = self.down(x).flatten(2).transpose(1, 2)
        x = x + self.share * self.attention(self.norm(x))
        x = x + self.back(F.silu(self.up(x)) * self.value(x))
        return self.head(torch.cat([x.mean(1), x.amax(1)], dim=-1))


def make() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    return Stranger(), torch.zeros(1, 3, 16, 16)


class Fused(nn.Module):
    """torch's encoder layer, whose fused form calls no layers, and two layers that stay float."""

    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.ConvTranspose2d(3, 16, 2, 2)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.twice, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.encoder(self.grow(x[..., ::4, ::4]).flatten(2).transpose(1, 2))
        return {"logits": self.head(self.twice(self.twice(x)).mean(1)), "hidden": x}


def fused() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(3)
    return Fused(), {"images": torch.zeros(1, 3, 16, 16)}


def half() -> tuple[nn.Module, Tensor]:
    return Stranger().half(), torch.zeros(1, 3, 16, 16)


def alone() -> nn.Module:
    return Stranger()


def of_other_size() -> tuple[nn.Module, Tensor]:
    return Stranger(), torch.zeros(1, 3, 64, 64)


def maps() -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 16, 16)


def broken() -> None:
    raise ZeroDivisionError("none")
