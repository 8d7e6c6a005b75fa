"""Torch's global generators, which dropout, Quant-Noise and k-means draw from during training.

Training seeds them before each pass, so that draws depend on the recipe's seed and the step alone, and
restores the caller's state at its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_generators(seed: int) -> None:
    """Seed the generators of the CPU and of every CUDA device, as `torch.manual_seed` does, unless CUDA is
    not initialized: it then receives no seed for later.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def restored_generators(device: torch.device) -> Iterator[None]:
    """Context after which the generators have the state of before; `device` is the device of training."""
    used = device.type == "cuda" or torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if used else ()):
        yield
