"""Models that classify images: DeiT, DINOv2, Swin, ConvNeXt, MobileNet, RegNet and any other architecture of
transformers' AutoModelForImageClassification, discovered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcompress.models.architecture import PIXELS
from qcompress.models.auto_family import AutoFamily

if TYPE_CHECKING:
    from torch import Tensor

IMAGES = AutoFamily(
    family="image-model",
    autos={"image-classification": "AutoModelForImageClassification"},
    inputs=(PIXELS,),
)

TASKS, INPUTS = tuple(IMAGES.autos), IMAGES.inputs

DEPTH = None
"""Blocks have several shapes: `model.blocks` and layer drop do not apply."""

CAUSAL = False

describe, task_config, signature = IMAGES.describe, IMAGES.task_config, IMAGES.signature
load_float, empty, tie = IMAGES.load_float, IMAGES.empty, IMAGES.tie
install_points, shorten, prefix = IMAGES.install_points, IMAGES.shorten, IMAGES.prefix


def graph_inputs(pixel_values: Tensor) -> dict[str, Tensor]:
    """Inputs of the exported graph for images, fp32 [batch, channels, height, width]."""
    return {PIXELS: pixel_values}
