"""Split of calibration samples into those that choose a mixture and those that judge it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Sampling:
    """Numbers of choosing and judging samples, and the seed that draws them; None takes the first samples."""

    choosing: int
    judging: int
    seed: int | None = None

    @property
    def limit(self) -> int | None:
        """Number of samples to read; None is all of them."""
        return self.choosing + self.judging if self.seed is None else None

    def parts(self, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
        """Choosing samples and judging samples, without overlap.

        >>> Sampling(2, 3).parts(list("abcdefgh"))
        (['a', 'b'], ['c', 'd', 'e'])
        """
        if self.seed is not None:
            samples = [samples[row] for row in np.random.default_rng(self.seed).permutation(len(samples))]
        return samples[: self.choosing], samples[self.choosing : self.choosing + self.judging]
