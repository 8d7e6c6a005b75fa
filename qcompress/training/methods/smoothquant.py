"""SmoothQuant (Xiao, Lin, Seznec, Wu, Demouth, Han; ICML 2023; arXiv:2211.10438), by nvidia-modelopt.

An activation channel that is much larger than the rest uses up the integers of a per-tensor scale.
SmoothQuant moves a part of its magnitude into the weights that read it (equation 4 of the paper, with j a
channel; ours is the inverse, since it multiplies x):

    a_j = max|W_j|^(1 - alpha) / max|x_j|^alpha          x * a is rounded, W / a is stored

modelopt's arithmetic (version 0.47): W_j is row j of the layer's own weight, maxima are over the calibration
data, a is clamped to [1e-4, 1e4], and 1 for a channel that is never active. The scale does not depend on
formats; modelopt is configured with int8 for all layers, the only format that it smooths.
"""

from __future__ import annotations

from typing import Any

from qcompress.models.plan import LayerPlan
from qcompress.training.methods.modelopt import FixedRescaling


class SmoothQuant(FixedRescaling):
    """SmoothQuant adapter: a fixed scale for each site; the options are `SmoothQuantOptions`."""

    def settings(self) -> dict[str, Any]:
        """modelopt's `algorithm` for SmoothQuant."""
        return {"method": "smoothquant", "alpha": self.options.alpha}

    def quantizers(self, item: LayerPlan) -> dict[str, dict[str, Any]]:
        """modelopt's int8 quantizers: per channel for weights, per tensor for inputs."""
        return {
            "weight_quantizer": {"num_bits": 8, "axis": 0},
            "input_quantizer": {"num_bits": 8, "axis": None},
        }
