"""MobileNetV2: a small convolutional net that classifies images (Sandler et al., arXiv:1801.04381).

Follows transformers' MobileNetV2ForImageClassification.

Layers: the stem's convolution with its depthwise and its projection, then of each inverted residual the
expansion, the depthwise convolution and the projection, the last 1x1 convolution and the classifier. Every
convolution has a batch norm; projections have no activation. Behind ReLU6 or ReLU inputs are never negative;
the outputs of projections and the image can be. With `tf_padding` each convolution reads its input through an
F.pad of as many zeros as TensorFlow adds, which depend on the size of the image and may differ between its
sides; for targets without TensorRT they become padding of the convolution.

Points: the inputs of additions, in blocks with stride 1 and as many outputs as inputs.

The momentum of transformers' batch norms is 0.997, and torch defines momentum as the complement of
TensorFlow's: in training mode running statistics are those of the last batch. Train with sufficiently large
batches. A checkpoint whose batch norms were folded into identities cannot be trained
(`batchnorm.are_folded`).
"""

from __future__ import annotations

from typing import Any

from qcompress.models.architecture import convolution
from qcompress.models.convnet import (
    CAUSAL,
    DEPTH,
    INPUTS,
    TASKS,
    ConvNet,
    Outline,
    divisible,
    integers,
)
from qcompress.models.layer_selection import Names
from qcompress.models.stock_images import StockImages

__all__ = ["CAUSAL", "DEPTH", "INPUTS", "TASKS"]

WIDTHS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
"""Channels of the outputs of the stem and of the 16 blocks at width 1."""

STRIDES = (2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
"""Strides of the blocks, as long as the output stride allows."""

STEM, TOP = 32, 1280
"""Channels of the first and of the last convolution at width 1."""

NUMBERS: dict[str, Any] = {
    "num_channels": 3, "depth_divisible_by": 8, "min_depth": 8, "output_stride": 32,
}  # fmt: skip
"""Defaults of transformers' MobileNetV2Config, for the integers that determine the convolutions."""


def _wide(config: dict[str, Any], channels: int) -> int:
    """Channels at the width of the config, `depth_multiplier`."""
    return _rounded(config, channels * config.get("depth_multiplier", 1.0))


def _rounded(config: dict[str, Any], channels: float) -> int:
    _, divisor, least, _ = integers(config, NUMBERS, NUMBERS)
    return divisible(round(channels), divisor, least)


def _width(config: dict[str, Any]) -> int:
    is_narrow = config.get("depth_multiplier", 1.0) < 1
    return TOP if config.get("finegrained_output", True) and is_narrow else _wide(config, TOP)


def _strides(config: dict[str, Any]) -> list[int]:
    """Strides of the blocks; from the output stride on dilations replace them."""
    strides, total = [], 2  # the stem's
    for stride in STRIDES:
        strides.append(1 if total == config.get("output_stride", NUMBERS["output_stride"]) else stride)
        total *= strides[-1]
    return strides


def _outline(config: dict[str, Any]) -> Outline:
    image, *_ = integers(config, NUMBERS, NUMBERS)
    outline, positive = Outline(), _nonnegative(config)
    root, inner, outputs = "mobilenet_v2", _wide(config, STEM), _wide(config, WIDTHS[0])

    def conv(module: str, *shape: int, groups: int = 1, nonnegative: bool = positive) -> None:
        name, norm = f"{root}.{module}.convolution", f"{root}.{module}.normalization"
        outline.layers.append(convolution(name, *shape, groups=groups, norm=norm, nonnegative=nonnegative))

    conv("conv_stem.first_conv", image, inner, 3, nonnegative=False)
    if not config.get("first_layer_is_expansion", True):
        conv("conv_stem.expand_1x1", inner, inner, 1)
    conv("conv_stem.conv_3x3", inner, inner, 3, groups=inner)
    conv("conv_stem.reduce_1x1", inner, outputs, 1)
    for index, (width, stride) in enumerate(zip(WIDTHS[1:], _strides(config), strict=True)):
        inputs, outputs = outputs, _wide(config, width)
        inner = _rounded(config, inputs * config.get("expand_ratio", 6.0))
        block = f"layer.{index}"
        outline.blocks.append(f"{root}.{block}")
        conv(f"{block}.expand_1x1", inputs, inner, 1, nonnegative=False)
        conv(f"{block}.conv_3x3", inner, inner, 3, groups=inner)
        conv(f"{block}.reduce_1x1", inner, outputs, 1)
        if stride == 1 and inputs == outputs:
            outline.addition(f"{root}.{block}", outputs, False)
    conv("conv_1x1", outputs, _width(config), 1, nonnegative=False)
    return outline


def _nonnegative(config: dict[str, Any]) -> bool:
    """True if outputs of activations are never negative."""
    return config.get("hidden_act", "relu6") in ("relu", "relu6")


NET = ConvNet(
    family="mobilenet-v2",
    title="MobileNetV2ForImageClassification",
    classifier="classifier",
    embeddings="mobilenet_v2.conv_stem",
    outline=_outline,
    width=_width,
    blocks=r"layer\.",
    size=None,
    nonnegative=_nonnegative,
)
STOCK = StockImages(NET)

describe, task_config, signature = NET.describe, NET.task_config, NET.signature
load_float, empty, tie = STOCK.load_float, STOCK.empty, STOCK.tie
graph_inputs, install_points = STOCK.graph_inputs, STOCK.install_points


def shorten(config: dict[str, Any], blocks: int) -> tuple[dict[str, Any], Names]:
    """The whole model: the number of blocks is a constant, and no block can be left out."""
    return config, lambda name: name
