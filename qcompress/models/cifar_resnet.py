"""ResNet-20, -32, -44, -56 and -110 for small images (He et al., arXiv:1512.03385, section 4.2).

A 3x3 convolution, three stages of (depth - 2) / 6 basic blocks with 16, 32 and 64 channels, the mean, a
linear classifier. Shortcuts have no parameters ("option A"): every second pixel, padded with zero channels.
transformers has no such model; `cifar_net.py` holds ours.

A checkpoint is a directory with `config.json` and `model.safetensors`:

    {"model_type": "cifar-resnet", "depth": 20}      further keys: num_channels (3), id2label, label2id

and the tensors conv1, bn1, layer{1,2,3}.{block}.{conv1, bn1, conv2, bn2}, linear: the names of Yerlan
Idelbayev's reproduction (github.com/akamaster/pytorch_resnet_cifar10), whose weights lie there as a file for
each depth. A copy of one of them under the name `model.safetensors`, and that config.json beside it, make a
checkpoint.
"""

from __future__ import annotations

import re
from typing import Any

from qcompress.errors import ModelError
from qcompress.models.architecture import convolution
from qcompress.models.convnet import (
    CAUSAL,
    DEPTH,
    INPUTS,
    MOST_BLOCKS,
    TASKS,
    ConvNet,
    Outline,
    integers,
)  # fmt: skip
from qcompress.models.layer_selection import Names
from qcompress.models.stock_images import OwnImages

__all__ = ["CAUSAL", "DEPTH", "INPUTS", "TASKS"]

WIDTHS = (16, 32, 64)
"""Channels of the three stages."""

DEFAULTS: dict[str, Any] = {"depth": 20, "num_channels": 3}


def repeats(config: dict[str, Any]) -> int:
    """Number of blocks in a stage. Raises ModelError for a depth that is not 6 n + 2."""
    if "depth" not in config:
        raise ModelError("config.json names no depth", fix='write the depth, such as "depth": 20')
    depth, _ = integers(config, DEFAULTS, DEFAULTS)
    if depth < 8 or (depth - 2) % 6:
        raise ModelError(f"config.json: depth is {depth}, and it must be 6 n + 2", fix="write 20, 32, 44, 56")
    if depth // 2 > MOST_BLOCKS:
        raise ModelError(f"config.json: depth {depth} makes more than {MOST_BLOCKS} blocks")
    return (depth - 2) // 6


def _outline(config: dict[str, Any]) -> Outline:
    count, channels = repeats(config), config.get("num_channels", DEFAULTS["num_channels"])
    outline = Outline()
    outline.layers.append(convolution("conv1", channels, WIDTHS[0], 3, norm="bn1"))
    inputs = WIDTHS[0]
    for stage, width in enumerate(WIDTHS):
        for index in range(count):
            block = f"layer{stage + 1}.{index}"
            outline.blocks.append(block)
            for index_in_block, channels_in in enumerate((inputs, width), 1):
                name, norm = f"{block}.conv{index_in_block}", f"{block}.bn{index_in_block}"
                outline.layers.append(convolution(name, channels_in, width, 3, norm=norm, nonnegative=True))
            outline.addition(block, width, True)
            inputs = width
    return outline


NET = ConvNet(
    family="cifar-resnet",
    title="CifarResNet",
    classifier="linear",
    embeddings="act1",
    outline=_outline,
    width=lambda config: WIDTHS[-1],
    blocks=r"layer\d+\.",
    size=32,
    nonnegative=lambda config: True,
)
STOCK = OwnImages(NET)

describe, task_config, signature = NET.describe, NET.task_config, NET.signature
load_float, empty, tie = STOCK.load_float, STOCK.empty, STOCK.tie
graph_inputs, install_points = STOCK.graph_inputs, STOCK.install_points


def shorten(config: dict[str, Any], blocks: int) -> tuple[dict[str, Any], Names]:
    """Config and tensor names of the smallest model, with one block in each stage."""

    def names(name: str) -> str | None:
        block = re.match(r"layer\d\.(\d+)\.", name)
        return name if block is None or int(block[1]) < 1 else None

    return {**config, "depth": 8}, names
