"""Pictures of bright blobs."""

from __future__ import annotations

import torch
from torch import Tensor

SIDE = 16


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [count, 1, SIDE, SIDE], the brightness of their ground [count], and the true masks."""
    random = torch.Generator().manual_seed(seed)
    places = torch.arange(SIDE).float()
    centre = torch.rand(count, 2, 1, generator=random) * SIDE
    radius = 3 + 4 * torch.rand(count, 1, 1, generator=random)
    squares = (places - centre[:, 0])[:, :, None] ** 2 + (places - centre[:, 1])[:, None] ** 2
    truth = (squares.sqrt() < radius).float()[:, None]
    level = torch.rand(count, generator=random)
    noise = 0.3 * torch.randn(count, 1, SIDE, SIDE, generator=random)
    return truth + noise + level[:, None, None, None], level, truth
