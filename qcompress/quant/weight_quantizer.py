"""Base class of weight quantizers: codes are the nearest integers of a scale, or -1, 0 and 1 by a threshold.

Training, its artifact and folding share this implementation, so that their integers are equal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.quant.affine import Grid, to_codes, to_ternary


class CodedWeight(nn.Module):
    """Base class of every weight quantizer. Its `forward` returns codes * scale with the codes of
    `codes_of`.
    """

    grid: Grid
    bounds: tuple[int, int]

    def scale_of(self, weight: Tensor) -> Tensor:
        """Scale for this weight, in the grid's shape."""
        raise NotImplementedError

    def of_rows(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Rows [n] of the quantized weight, [n, width], for a grid `by_row`: values and gradients equal those
        of the whole weight, without quantizing other rows.
        """
        return F.embedding(rows, self(weight))

    def refresh(self, weight: Callable[[], Tensor]) -> None:
        """Renew buffers that follow the weight, if they are due; called before each pass, because `forward`
        writes to no buffer. `weight` computes the weight that the quantizer receives.
        """

    @property
    def takes_noise(self) -> bool:
        """True if Quant-Noise may leave parts of the weight float."""
        return True

    def parts(self, weight: Tensor) -> dict[str, Tensor]:
        """Tensors of this weight's quantizer that the trained artifact keeps, by name."""
        tensors, threshold = {"scale": self.scale_of(weight)}, self.threshold_of(weight)
        return tensors if threshold is None else tensors | {"threshold": threshold}

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
