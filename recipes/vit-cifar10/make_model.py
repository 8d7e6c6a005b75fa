"""A small ViT with random weights, for recipes/vit-cifar10-float.yaml to train from the beginning.

    python recipes/vit-cifar10/make_model.py [DIRECTORY]

4 blocks, width 96, patches of 4 x 4 pixels: 0.3 M parameters. Weights are drawn as transformers draws them,
with seed 0. Pixel values are normalized with the means and deviations of CIFAR-10's training images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

SIZE = 32
"""Pixels of an edge."""

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""CIFAR-10's, in its order."""

PREPARATION = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.4914, 0.4822, 0.4465],
    "image_std": [0.2470, 0.2435, 0.2616],
}


def make_model(folder: Path) -> None:
    """Write the checkpoint: config.json, model.safetensors, preprocessor_config.json."""
    config = ViTConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=192, image_size=SIZE,
        patch_size=4, id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )  # fmt: skip
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    text = json.dumps(PREPARATION, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "model")
    make_model(parser.parse_args().folder)
