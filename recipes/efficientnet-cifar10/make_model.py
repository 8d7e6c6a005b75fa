"""A small EfficientNet with random weights, for recipes/efficientnet-cifar10-float.yaml to train from the
beginning.

    python recipes/efficientnet-cifar10/make_model.py [DIRECTORY]

Stem, one block without and four with expansion, kernels of 3 x 3 and 5 x 5, a head of 1280 channels: 0.1 M
parameters. Weights are drawn as transformers draws them, with seed 0, except that batch norms begin with 1:
transformers draws those of EfficientNet around 0, and nothing is learned. Images are prepared as those of the
ViT beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import torch
from torch import nn
from transformers import EfficientNetConfig, EfficientNetForImageClassification

VIT = Path(__file__).parents[1] / "vit-cifar10" / "make_model.py"
"""Has the labels of CIFAR-10 and the preparation of its images."""


def make_model(folder: Path) -> None:
    """Write the checkpoint: config.json, model.safetensors, preprocessor_config.json."""
    spec = importlib.util.spec_from_file_location("vit_make_model", VIT)
    vit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vit)
    config = EfficientNetConfig(
        in_channels=[32, 16, 24], out_channels=[16, 24, 40], kernel_sizes=[3, 3, 5], strides=[1, 1, 2],
        num_block_repeats=[1, 2, 2], expand_ratios=[1, 6, 6], width_coefficient=1.0, depth_coefficient=1.0,
        hidden_dim=1280, batch_norm_momentum=0.1, image_size=vit.SIZE, id2label=dict(enumerate(vit.LABELS)),
        label2id={label: index for index, label in enumerate(vit.LABELS)},
    )  # fmt: skip
    torch.manual_seed(0)
    model = EfficientNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    model.save_pretrained(folder)
    text = json.dumps(vit.PREPARATION, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "model")
    make_model(parser.parse_args().folder)
