"""Which calibration samples choose a mixture and which judge it: none does both. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Sampling:
    """How many samples choose and how many judge, and the seed that draws them; None takes the first ones."""

    choosing: int
    judging: int
    seed: int | None = None

    @property
    def limit(self) -> int | None:
        """Samples that have to be read; None is all of them."""
        return self.choosing + self.judging if self.seed is None else None

    def parts(self, found: list[Sample]) -> tuple[list[Sample], list[Sample]]:
        """Those that choose and those that judge.

        >>> Sampling(2, 3).parts(list("abcdefgh"))
        (['a', 'b'], ['c', 'd', 'e'])
        """
        if self.seed is not None:
            found = [found[row] for row in np.random.default_rng(self.seed).permutation(len(found))]
        return found[: self.choosing], found[self.choosing : self.choosing + self.judging]
