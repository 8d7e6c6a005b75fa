"""ResNet: a convolutional net that classifies images (He et al., arXiv:1512.03385).

Follows transformers' ResNetForImageClassification.

Convolutions in the order of the forward pass: the stem, then the two (basic) or three (bottleneck)
convolutions of each block and that of its shortcut, if it has one. Every convolution has a batch norm. Inputs
after a ReLU are never negative: those of all convolutions but the stem, of the skip without a convolution,
and of the classifier.
"""

from __future__ import annotations

import re
from typing import Any

from qcompress.errors import ModelError
from qcompress.models.architecture import convolution
from qcompress.models.convnet import CAUSAL, DEPTH, INPUTS, TASKS, ConvNet, Outline, integers
from qcompress.models.layer_selection import Names
from qcompress.models.stock_images import StockImages

__all__ = ["CAUSAL", "DEPTH", "INPUTS", "TASKS"]

DEFAULTS: dict[str, Any] = {
    "num_channels": 3,
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
}
"""Defaults of transformers' ResNetConfig, for the keys that determine the convolutions' shapes."""

REDUCTION = 4
"""Ratio of a bottleneck's outer to its inner channels."""


def _outline(config: dict[str, Any]) -> Outline:
    channels, width, sizes, depths = integers(config, DEFAULTS, DEFAULTS)
    kind = config.get("layer_type", "bottleneck")
    if kind not in ("basic", "bottleneck") or len(sizes) != len(depths):
        raise ModelError(
            f"config.json: layer_type {kind!r} with {len(sizes)} hidden_sizes and {len(depths)} depths is "
            "not a ResNet",
            fix="copy config.json again",
        )
    outline, positive = Outline(), _nonnegative(config)
    stem = "resnet.embedder.embedder"
    outline.layers.append(_conv(stem, channels, width, 7, False))
    inputs = width
    for stage, (size, depth) in enumerate(zip(sizes, depths, strict=True)):
        for index in range(depth):
            block = f"resnet.encoder.stages.{stage}.layers.{index}"
            outline.blocks.append(block)
            down = index == 0 and (stage > 0 or config.get("downsample_in_first_stage", False))
            inner = size // REDUCTION
            shapes = [(inputs, inner, 1), (inner, inner, 3), (inner, size, 1)]
            if kind == "basic":
                shapes = [(inputs, size, 3), (size, size, 3)]
            for number, shape in enumerate(shapes):
                outline.layers.append(
                    _conv(f"{block}.layer.{number}", *shape, positive if number == 0 else True)
                )
            projected = inputs != size or down
            if projected:
                outline.layers.append(_conv(f"{block}.shortcut", inputs, size, 1, positive))
            outline.addition(block, size, positive and not projected)
            inputs = size
    return outline


def _conv(module: str, inputs: int, outputs: int, kernel: int, nonnegative: bool):
    name, norm = f"{module}.convolution", f"{module}.normalization"
    return convolution(name, inputs, outputs, kernel, norm=norm, nonnegative=nonnegative)


def _nonnegative(config: dict[str, Any]) -> bool:
    """True if outputs of a block, which pass `hidden_act`, are never negative; inside a block the
    activation is always a ReLU.
    """
    return config.get("hidden_act", "relu") == "relu"


def _width(config: dict[str, Any]) -> int:
    return config.get("hidden_sizes", DEFAULTS["hidden_sizes"])[-1]


NET = ConvNet(
    family="resnet",
    title="ResNetForImageClassification",
    classifier="classifier.1",
    embeddings="resnet.embedder",
    outline=_outline,
    width=_width,
    blocks=r"encoder\.stages\.",
    size=None,
    nonnegative=_nonnegative,
)
STOCK = StockImages(NET)

describe, task_config, signature = NET.describe, NET.task_config, NET.signature
load_float, empty, tie = STOCK.load_float, STOCK.empty, STOCK.tie
graph_inputs, install_points = STOCK.graph_inputs, STOCK.install_points


def shorten(config: dict[str, Any], blocks: int) -> tuple[dict[str, Any], Names]:
    """Config and tensor names of a model with the first blocks only, but at least one of each stage."""
    left, depths = blocks, []
    for depth in config.get("depths", DEFAULTS["depths"]):
        depths.append(max(1, min(depth, left)))
        left -= depths[-1]

    def names(name: str) -> str | None:
        block = re.match(r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.", name)
        return name if block is None or int(block[2]) < depths[int(block[1])] else None

    return {**config, "depths": depths}, names
