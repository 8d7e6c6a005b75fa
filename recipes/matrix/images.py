"""Vision models of five families, small enough to train in some minutes: a pretrained ResNet-20 (He et al.,
section 4.2), and a ViT, a ResNet, an EfficientNet and a MobileNetV2 of transformers with random weights.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import torch
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

FAMILIES = ("vit", "cifar-resnet", "resnet", "efficientnet", "mobilenet-v2")

PRETRAINED = ("cifar-resnet",)
"""Those that need no training of ours."""

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def make(family: str, data: Path, out: Path) -> Path:
    """Write a family's checkpoint; `data` is the directory that QCOMPRESS_ASSETS names. Returns `out`."""
    vit = _vit()
    if family == "vit":
        vit.make_model(out)
        return out
    out.mkdir(parents=True, exist_ok=True)
    preparation = {**vit.PREPARATION, **IMAGENET}
    (out / "preprocessor_config.json").write_text(json.dumps(preparation, indent=1), encoding="utf-8")
    if family == "cifar-resnet":
        weights = data / "models" / "resnet-cifar10" / "resnet20.safetensors"
        shutil.copyfile(weights, out / "model.safetensors")
        (out / "config.json").write_text(
            json.dumps({"model_type": "cifar-resnet", "depth": 20}), encoding="utf-8"
        )
        return out
    torch.manual_seed(0)
    makers = {"resnet": _resnet, "efficientnet": _efficientnet, "mobilenet-v2": _mobilenet}
    model = makers[family](
        {
            "id2label": dict(enumerate(vit.LABELS)),
            "label2id": {name: at for at, name in enumerate(vit.LABELS)},
        }
    )
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # EfficientNet's are drawn around 0: it computes nothing
            torch.nn.init.ones_(module.weight)
    model.config.image_size = vit.SIZE
    model.save_pretrained(out)
    return out


def _resnet(labels: dict[str, object]) -> PreTrainedModel:
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic", **labels
    )
    return ResNetForImageClassification(config)


def _efficientnet(labels: dict[str, object]) -> PreTrainedModel:
    config = EfficientNetConfig(
        in_channels=[32, 16, 24], out_channels=[16, 24, 40], kernel_sizes=[3, 3, 5], strides=[1, 1, 2],
        num_block_repeats=[1, 2, 2], expand_ratios=[1, 6, 6], width_coefficient=1.0, depth_coefficient=1.0,
        hidden_dim=1280, **labels,
    )  # fmt: skip
    return EfficientNetForImageClassification(config)


def _mobilenet(labels: dict[str, object]) -> PreTrainedModel:
    config = MobileNetV2Config(depth_multiplier=0.25, output_stride=8, finegrained_output=False, **labels)
    return MobileNetV2ForImageClassification(config)


def _vit() -> ModuleType:
    """recipes/vit-cifar10/make_model.py."""
    file = Path(__file__).parents[1] / "vit-cifar10" / "make_model.py"
    spec = importlib.util.spec_from_file_location("vit_make_model", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
