"""Distance between two rows of the parity table, accumulated over pairs of logits. No torch.

Shapes: logits [positions, vocabulary] in fp32; sums are kept in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qcompress.system.filesystem import allocate

STEP = 64
"""Positions compared in one chunk."""


@dataclass
class Distance:
    """Running comparison of a row with the previous row.

    `range` is the largest minus the smallest logit of the reference; cosine and snr_db are over all logits
    together, so that a few positions with small logits do not dominate. snr_db is None for zero error,
    because JSON has no infinity; top1_agreement is None where a position has a single logit, which always
    ranks first, and where the largest output is not an answer (`ranked` False, as for embeddings).
    """

    to: str
    ranked: bool = True
    largest: float = 0.0
    absolute: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    dot: float = 0.0
    square_reference: float = 0.0
    square_row: float = 0.0
    square_error: float = 0.0
    agree: int = 0
    positions: int = 0
    count: int = 0
    broken: int = 0

    def add_kept(self, file: Path, rows: Mapping[int, np.ndarray]) -> None:
        """Compare logits [positions, vocabulary] by sample with the array written by `keep_logits`. The file
        is opened at each call, because mapped pages count as memory.
        """
        if rows:
            kept = np.load(file, mmap_mode="r")
            for sample, logits in rows.items():
                self.add(kept[sample, : len(logits)], logits)

    def add(self, reference: np.ndarray, row: np.ndarray) -> None:
        """Add the logits of some positions, in chunks, because a vocabulary is wide."""
        for start in range(0, len(row), STEP):
            self._add(reference[start : start + STEP], row[start : start + STEP])

    def _add(self, reference: np.ndarray, row: np.ndarray) -> None:
        broken = int(np.count_nonzero(~np.isfinite(row)) + np.count_nonzero(~np.isfinite(reference)))
        self.broken += broken
        if broken:
            return
        error = np.abs(row - reference)
        self.largest = max(self.largest, float(error.max()))
        self.absolute += float(error.sum(dtype=np.float64))
        self.low = min(self.low, float(reference.min()))
        self.high = max(self.high, float(reference.max()))
        a, b = reference.ravel(), row.ravel()
        self.dot += float(np.einsum("i,i->", a, b, dtype=np.float64))
        self.square_reference += float(np.einsum("i,i->", a, a, dtype=np.float64))
        self.square_row += float(np.einsum("i,i->", b, b, dtype=np.float64))
        self.square_error += float(np.einsum("i,i->", error.ravel(), error.ravel(), dtype=np.float64))
        self.agree += int((reference.argmax(-1) == row.argmax(-1)).sum())
        self.positions += reference.shape[0]
        self.count += reference.size

    def to_json(self) -> dict[str, object]:
        """Fields of parity.json; NaN if a logit was not finite or nothing was compared."""
        if self.broken or not self.count:
            values = dict.fromkeys(
                ("max_abs", "mean_abs", "range", "cosine", "snr_db", "top1_agreement"), math.nan
            )
            return {"to": self.to, **values, "positions": self.positions}
        norm = math.sqrt(self.square_reference * self.square_row)
        error = self.square_error
        return {
            "to": self.to,
            "max_abs": self.largest,
            "mean_abs": self.absolute / self.count,
            "range": self.high - self.low,
            "cosine": self.dot / norm if norm else math.nan,
            "snr_db": decibels(self.square_reference, error),
            "top1_agreement": self.agree / self.positions
            if self.ranked and self.count > self.positions
            else None,
            "positions": self.positions,
        }


def decibels(signal: float, error: float) -> float | None:
    """10 log10 of a ratio of squares; None for zero error, NaN for zero signal.

    >>> decibels(100.0, 1.0)
    20.0
    """
    if error == 0:
        return None
    return 10 * math.log10(signal / error) if signal else math.nan


def keep_logits(file: Path, shape: tuple[int, int, int], rows: Mapping[int, np.ndarray]) -> None:
    """Write logits [positions, vocabulary], each at its sample's index, into an .npy array of `shape`
    [samples, most positions, vocabulary]; entries of other samples are kept.
    """
    if not rows:
        return
    if not file.exists():
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
        allocate(file, file.stat().st_size)
    kept = np.lib.format.open_memmap(file, mode="r+")
    for sample, logits in rows.items():
        kept[sample, : len(logits)] = logits
