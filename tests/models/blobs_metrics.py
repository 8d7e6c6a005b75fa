"""The user's metrics of `blobs_net.py`."""

from __future__ import annotations

import numpy as np
from blobs_rule import covered


def iou(outputs: dict[str, np.ndarray], sample: dict[str, np.ndarray]) -> float:
    """Intersection over union of the mask."""
    found, truth = covered(outputs["mask"]), sample["truth"] > 0.5
    return (found & truth).sum() / max((found | truth).sum(), 1)


def share_error(outputs: dict[str, np.ndarray], sample: dict[str, np.ndarray]) -> float:
    return abs(float(outputs["share"]) - float(sample["truth"].mean()))
