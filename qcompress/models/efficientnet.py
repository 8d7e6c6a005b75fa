"""EfficientNet: a small convolutional net that classifies images (Tan and Le, arXiv:1905.11946).

Follows transformers' EfficientNetForImageClassification.

Layers of each block (MBConv): the expansion (if the ratio is not 1), the depthwise convolution, the two 1x1
convolutions of squeeze-and-excite, which have biases and no batch norm, and the projection. Behind SiLU every
input can be negative; behind ReLU and ReLU6 (the Lite nets) only the outputs of projections and the image
can. A convolution with stride 2 reads its input through an asymmetric ZeroPad2d, a separate node in front of
the Q/DQ pair; for targets without TensorRT it becomes padding of the convolution.

Points: the input of squeeze-and-excite, which its pooling and its product read, its gate, and the inputs of
additions.

transformers' `batch_norm_momentum` is 0.99, and torch defines momentum as the complement of TensorFlow's: in
training mode running statistics are those of the last batch or two. Train with sufficiently large batches, or
set it to 0.01 in config.json.
"""

from __future__ import annotations

import math
from typing import Any

from qcompress.errors import ModelError
from qcompress.models.architecture import Point, convolution
from qcompress.models.convnet import (
    CAUSAL,
    DEPTH,
    INPUTS,
    MOST_BLOCKS,
    TASKS,
    ConvNet,
    Outline,
    divisible,
    integers,
)
from qcompress.models.layer_selection import Names
from qcompress.models.stock_images import StockImages

__all__ = ["CAUSAL", "DEPTH", "INPUTS", "TASKS"]

LISTS: dict[str, Any] = {
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
    "kernel_sizes": [3, 3, 5, 3, 5, 5, 3],
    "strides": [1, 2, 2, 2, 1, 2, 1],
    "num_block_repeats": [1, 2, 2, 3, 3, 4, 1],
    "expand_ratios": [1, 6, 6, 6, 6, 6, 6],
}
NUMBERS: dict[str, Any] = {"num_channels": 3, "depth_divisor": 8, "hidden_dim": 2560}
"""Defaults of transformers' EfficientNetConfig, for the keys that determine the convolutions' shapes."""

STEM, TOP = 32, 1280
"""Channels of the first and of the last convolution at width 1."""


def _outline(config: dict[str, Any]) -> Outline:
    lists = integers(config, LISTS, LISTS)
    channels, divisor, _ = integers(config, NUMBERS, NUMBERS)
    width, depth = config.get("width_coefficient", 2.0), config.get("depth_coefficient", 3.1)
    if depth * sum(config.get("num_block_repeats", LISTS["num_block_repeats"])) > MOST_BLOCKS:
        raise ModelError(f"config.json: depth_coefficient {depth} makes more than {MOST_BLOCKS} blocks")
    if len({len(values) for values in lists}) > 1:
        raise ModelError(f"config.json: {', '.join(LISTS)} differ in length", fix="copy config.json again")

    def wide(count: int) -> int:
        return divisible(count * width, divisor, divisor)

    outline, positive = Outline(), _nonnegative(config)
    stem = "efficientnet.embeddings"
    outline.layers.append(
        convolution(f"{stem}.convolution", channels, wide(STEM), 3, norm=f"{stem}.batchnorm")
    )
    outputs = wide(STEM)
    for first, last, kernel, _, repeats, ratio in zip(*lists, strict=True):
        for repeat in range(math.ceil(depth * repeats)):
            inputs, outputs = wide(last if repeat else first), wide(last)
            squeeze = config.get("squeeze_expansion_ratio", 0.25)
            adds = repeat > 0  # from the second block on the stride is 1
            _block(outline, inputs, outputs, kernel, ratio, squeeze, adds, positive)
    encoder = "efficientnet.encoder"
    outline.layers.append(convolution(f"{encoder}.top_conv", outputs, wide(TOP), 1, norm=f"{encoder}.top_bn"))
    return outline


def _block(
    outline: Outline, inputs: int, outputs: int, kernel: int, ratio: int, squeeze: float, adds: bool,
    positive: bool,
) -> None:  # fmt: skip
    """Add the layers and points of a block. `positive`: outputs of activations are never negative."""
    # the first block reads the stem's activation, the others a projection
    activated = positive and not outline.blocks
    block = f"efficientnet.encoder.blocks.{len(outline.blocks)}"
    outline.blocks.append(block)
    inner, narrow = inputs * ratio, max(1, int(inputs * squeeze))

    def conv(name: str, norm: str | None, *shape: int, groups: int = 1, nonnegative: bool = positive) -> None:
        full, name = norm and f"{block}.{norm}", f"{block}.{name}"
        outline.layers.append(convolution(name, *shape, groups=groups, norm=full, nonnegative=nonnegative))
        if norm is None:
            outline.biased.add(name)

    if ratio != 1:
        conv("expansion.expand_conv", "expansion.expand_bn", inputs, inner, 1, nonnegative=activated)
    depthwise = "depthwise_conv.depthwise_conv", "depthwise_conv.depthwise_norm"
    conv(*depthwise, inner, inner, kernel, groups=inner, nonnegative=positive if ratio != 1 else activated)
    conv("squeeze_excite.reduce", None, inner, narrow, 1)
    conv("squeeze_excite.expand", None, narrow, inner, 1)
    conv("projection.project_conv", "projection.project_bn", inner, outputs, 1)
    outline.points.append(Point(f"{block}.squeeze_excite.input_point", "residual", inner, positive))
    outline.points.append(Point(f"{block}.squeeze_excite.gate_point", "residual", inner, True))
    if adds:
        outline.addition(f"{block}.projection", outputs, False)


def _nonnegative(config: dict[str, Any]) -> bool:
    """True if outputs of activations are never negative."""
    return config.get("hidden_act", "swish") in ("relu", "relu6")


def _width(config: dict[str, Any]) -> int:
    return config.get("hidden_dim", NUMBERS["hidden_dim"])


NET = ConvNet(
    family="efficientnet",
    title="EfficientNetForImageClassification",
    classifier="classifier",
    embeddings="efficientnet.embeddings",
    outline=_outline,
    width=_width,
    blocks=r"encoder\.",
    size=None,
    nonnegative=_nonnegative,
)
STOCK = StockImages(NET)

describe, task_config, signature = NET.describe, NET.task_config, NET.signature
load_float, empty, tie = STOCK.load_float, STOCK.empty, STOCK.tie
graph_inputs, install_points = STOCK.graph_inputs, STOCK.install_points


def shorten(config: dict[str, Any], blocks: int) -> tuple[dict[str, Any], Names]:
    """The whole model: blocks are numbered through all stages, and no stage can be left out."""
    return config, lambda name: name
