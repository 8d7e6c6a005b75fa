"""How a weight becomes codes: the nearest integers of a scale, or -1, 0 and 1 by a threshold.

Training, its artifact and folding share this one way, so that their integers are the same.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.quant.affine import Grid, to_codes, to_ternary


class CodedWeight(nn.Module):
    """Base of every weight quantizer. Its `forward` gives codes * scale for the codes given here."""

    grid: Grid
    bounds: tuple[int, int]

    def scale_of(self, weight: Tensor) -> Tensor:
        """Scale for this weight, in the grid's shape."""
        raise NotImplementedError

    def of_rows(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Some rows [n] of the rounded weight, [n, width], for a grid `by_row`: the same values and
        gradients, without rounding the rows that are not asked for.
        """
        return F.embedding(rows, self(weight))

    @property
    def takes_noise(self) -> bool:
        """Whether Quant-Noise may leave parts of the weight as they are."""
        return True

    def parts(self, weight: Tensor) -> dict[str, Tensor]:
        """What is left of the quantizer of this weight when training has ended, by name."""
        found, threshold = {"scale": self.scale_of(weight)}, self.threshold_of(weight)
        return found if threshold is None else found | {"threshold": threshold}

    def threshold_of(self, weight: Tensor) -> Tensor | None:
        """Magnitude up to which a code is 0, in the grid's shape; beyond it the code is the sign. None: codes
        are the nearest integers.
        """
        return None

    def codes_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the weight (int8, the weight's shape) and their scale, in the grid's shape."""
        grid, scale, threshold = self.grid, self.scale_of(weight), self.threshold_of(weight)
        if threshold is None:
            codes = to_codes(grid.divide(weight), grid.align(scale), self.bounds)
        else:
            codes = to_ternary(grid.divide(weight), grid.align(threshold))
        return grid.join(codes), scale
