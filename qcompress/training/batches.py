"""Batches of a training run: shuffled epochs, similar lengths together, and all examples in order."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch

from qcompress.tasks.examples import Batch, Examples

BUCKET = 32
"""Number of batches that are sorted by length together."""


def batch_rows(lengths: np.ndarray, size: int, step: int, seed: int) -> list[int]:
    """Indices of the examples of update `step`: shuffled epochs, one after another without a gap.

    Where examples differ in length, those of `BUCKET` batches are sorted by length to limit padding, and
    these batches are shuffled again.
    """
    count = len(lengths)
    places = range(step * size, (step + 1) * size)
    order = {epoch: _epoch(lengths, size, seed, epoch) for epoch in {place // count for place in places}}
    return [int(order[place // count][place % count]) for place in places]


@functools.lru_cache(maxsize=4)
def _cached_epoch(lengths: bytes, dtype: str, size: int, seed: int, epoch: int) -> np.ndarray:
    counts = np.frombuffer(lengths, dtype)
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(counts))
    if len(counts) == 0 or counts.min() == counts.max():
        return order
    for start in range(0, len(order), BUCKET * size):
        piece = order[start : start + BUCKET * size]
        piece = piece[np.argsort(counts[piece], kind="stable")]
        whole = len(piece) // size * size
        batches = piece[:whole].reshape(-1, size)
        order[start : start + len(piece)] = np.concatenate(
            [batches[random.permutation(len(batches))].ravel(), piece[whole:]]
        )
    return order


def _epoch(lengths: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the examples in one epoch."""
    return _cached_epoch(lengths.tobytes(), lengths.dtype.str, size, seed, epoch)


def in_order(examples: Examples, size: int) -> Iterator[Batch]:
    """Batches of all examples in order."""
    for start in range(0, len(examples), size):
        yield examples.batch(range(start, min(start + size, len(examples))))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy of a batch on the device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
