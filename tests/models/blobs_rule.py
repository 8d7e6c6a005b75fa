"""What counts as covered, in a module of its own that the metrics import."""

from __future__ import annotations

import numpy as np


def covered(mask: np.ndarray) -> np.ndarray:
    return mask > 0
