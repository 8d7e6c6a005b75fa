"""AWQ (Lin, Tang, Tang, Yang, Dang, Han; MLSys 2024; arXiv:2306.00978), by nvidia-modelopt.

Weights that read large channels matter more than others. AWQ multiplies the rows of a weight by a scale s
before rounding, and divides its input by it, so that those rows are rounded relatively finer. The scale is
s = (mean|x|)^alpha / w^(1 - alpha), and alpha is searched for each layer: the one with the least squared
error of the layer's output (section 3.2 of the paper). Ours is 1 / s, since it multiplies x.

modelopt's arithmetic (version 0.47, `awq_lite`, without the search for clipping): w_j is the mean over a
column of |W| / max|W| of its block, s is normalised by sqrt(max s * min s), and alpha runs over 0,
alpha_step, ... 1. The search rounds weights to the nearest of the layer's own format with ranges from
absolute maxima, whatever quantizer comes afterwards.
"""

from __future__ import annotations

from typing import Any

from qcompress.models.plan import LayerPlan
from qcompress.training.methods.modelopt import FixedRescaling


class Awq(FixedRescaling):
    """AWQ adapter: a fixed scale for each site; the options are `AwqOptions`."""

    def settings(self) -> dict[str, Any]:
        """modelopt's `algorithm` for AWQ."""
        return {"method": "awq_lite", "alpha_step": self.options.alpha_step}

    def quantizers(self, item: LayerPlan) -> dict[str, dict[str, Any]]:
        """modelopt's weight quantizer in the layer's own format; inputs stay float."""
        form = item.weights
        weight: dict[str, Any] = {"num_bits": form.bits, "axis": None if form.granularity == "tensor" else 0}
        if form.block is not None:  # along the last axis of [out, in]
            weight = {"num_bits": form.bits, "block_sizes": {-1: form.block, "type": "static"}}
        return {"weight_quantizer": weight}
