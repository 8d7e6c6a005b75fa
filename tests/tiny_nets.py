"""Convolutional nets small enough to train in a test, images for them, and the first stages run on them.

Nothing in them is trivial: batch norms have factors of both signs and one of 0, statistics off 0 and 1, and
every bias differs from 0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    logging,
)

from qcompress.models import FAMILIES, describe
from qcompress.models.architecture import Architecture
from qcompress.models.cifar_net import CifarResNet
from qcompress.models.folded import assemble
from qcompress.models.plan import LayerPlan, PointPlan, plan_layers, plan_points
from qcompress.models.rebuild import rebuild
from qcompress.parity.runners import open_session
from qcompress.pipeline.stages.fold import fold
from qcompress.pipeline.stages.load import fingerprint, load
from qcompress.pipeline.stages.train import train
from qcompress.recipe.check import head_of
from qcompress.schema.recipe import Model, Recipe
from qcompress.system.artifacts import FloatModel, FoldedModel, TrainedModel
from qcompress.system.reporter import Reporter
from qcompress.tasks import TASKS

LABELS, SIZE = 6, 32
"""Labels and height of every net; widths of images differ from their heights in none of them."""

KINDS = ("basic", "bottleneck", "cifar", "efficientnet", "mobilenet")
FAMILY = {
    "basic": "resnet", "bottleneck": "resnet", "cifar": "cifar-resnet", "efficientnet": "efficientnet",
    "lite": "efficientnet", "mobilenet": "mobilenet-v2",
}  # fmt: skip
"""Family of each kind; `lite` is an EfficientNet with ReLU6."""

STEMS = {
    "resnet": "resnet.embedder.embedder.convolution",
    "cifar-resnet": "conv1",
    "efficientnet": "efficientnet.embeddings.convolution",
    "mobilenet-v2": "mobilenet_v2.conv_stem.first_conv.convolution",
}
CLASSIFIERS = {
    "resnet": "classifier.1", "cifar-resnet": "linear", "efficientnet": "classifier",
    "mobilenet-v2": "classifier",
}  # fmt: skip


def make_net(kind: str, seed: int = 0, labels: int = LABELS) -> nn.Module:
    """A model with random weights that mean something."""
    torch.manual_seed(seed)
    if kind == "cifar":
        model = CifarResNet(1, (16, 32, 64), 3, labels)
    elif kind in ("efficientnet", "lite"):
        config = EfficientNetConfig(
            in_channels=[32, 16], out_channels=[16, 24], kernel_sizes=[3, 5], strides=[1, 2],
            num_block_repeats=[1, 2], expand_ratios=[1, 6], width_coefficient=0.25, depth_coefficient=1.0,
            hidden_dim=320, image_size=SIZE, num_labels=labels,
            hidden_act="relu6" if kind == "lite" else "swish",
        )  # fmt: skip
        model = EfficientNetForImageClassification(config)
    elif kind == "mobilenet":
        config = MobileNetV2Config(
            depth_multiplier=0.05, depth_divisible_by=4, min_depth=4, expand_ratio=2, output_stride=8,
            finegrained_output=False, image_size=SIZE, num_labels=labels,
        )  # fmt: skip
        model = MobileNetV2ForImageClassification(config)
    else:
        config = ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type=kind, num_labels=labels
        )
        model = ResNetForImageClassification(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                noise = torch.randn(4, module.num_features, generator=random)
                module.weight.copy_(1 + 0.2 * noise[0])
                module.weight[1], module.weight[2] = -0.6, 0.0
                module.bias.copy_(0.3 * noise[1])
                module.running_mean.copy_(0.2 * noise[2])
                module.running_var.copy_(0.5 + 0.3 * noise[3].abs())
                module.num_batches_tracked.fill_(7)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                features = module.weight[0].numel()
                module.weight.copy_(
                    torch.randn(module.weight.shape, generator=random) * (1.5 / features) ** 0.5
                )
                if module.bias is not None:
                    module.bias.copy_(0.3 * torch.randn(module.bias.shape, generator=random))
    return model.eval()


def save_net(folder: Path, kind: str, **options: Any) -> Path:
    """A checkpoint with a preprocessor that changes no pixel's place."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    model = make_net(kind, **options)
    if kind == "cifar":
        save_file({name: tensor for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "cifar-resnet", "depth": 8}))
    else:
        model.save_pretrained(folder)
    return folder


def save_images(file: Path, count: int = 48, seed: int = 5) -> Path:
    """Images of `LABELS` kinds of stripes in noise, uint8 [count, SIZE, SIZE, 3], and their labels."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % LABELS
    row = np.arange(SIZE)[None, :, None, None] * (1 + labels[:, None, None, None])
    clean = 127 + 80 * np.sin(row / 3 + np.arange(3))
    noise = random.normal(0, 25, (count, SIZE, SIZE, 3))
    np.savez(file, images=np.clip(clean + noise, 0, 255).astype(np.uint8), labels=labels)
    return file


def recipe_values(kind: str, archive: str, steps: int = 3, **sections: Any) -> dict[str, Any]:
    """A small recipe; `sections` replace whole sections."""
    data = {"npz": [archive]}
    values: dict[str, Any] = {
        "name": f"tiny-{kind}",
        "model": {"family": FAMILY[kind], "source": "model"},
        "task": {
            "name": "image-classification",
            "mean": [0.5, 0.45, 0.4],
            "std": [0.25, 0.2, 0.3],
            "size": [SIZE, SIZE],
        },
        "data": {
            "train": {**data, "limit": 24},
            "calibration": {**data, "limit": 16},
            "evaluate": {"test": data},
        },
        "format": "w8a8",
        **sections,
    }
    values["train"] = {"device": "cpu", "batch_size": 8, **values.get("train", {})}
    if values.get("method", "ptq") != "ptq":
        values["train"].setdefault("phases", {"finetune": {"steps": steps}})
    return values


def pixels(count: int = 6, seed: int = 9) -> Tensor:
    """Inputs, fp32 [count, 3, SIZE, SIZE]."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, SIZE, SIZE, generator=random)


@dataclass(frozen=True)
class NetLine:
    """A recipe on its way through the stages, in one folder; `Line` of `tiny.py` for images."""

    recipe: Recipe
    folder: Path
    base: Path
    float_model: FloatModel
    architecture: Architecture
    plan: tuple[LayerPlan, ...]
    points: tuple[PointPlan, ...]

    @property
    def family(self) -> str:
        return self.architecture.family

    @property
    def trained(self) -> TrainedModel:
        return TrainedModel(self.folder / "train")

    @property
    def folded(self) -> FoldedModel:
        return FoldedModel(self.folder / "fold")

    def train(self) -> NetLine:
        """Run the stage."""
        self.trained.path.mkdir()
        train(self.float_model, self.recipe, self.base, self.architecture, self.plan, self.trained.path,
              Reporter(silent=True))  # fmt: skip
        return self

    def fold(self) -> NetLine:
        """Run the stage."""
        self.folded.path.mkdir()
        fold(self.float_model, self.trained, self.folded.path)
        return self

    def model(self, stage: str) -> nn.Module:
        """The model as one of the stages float, train, fold left it."""
        if stage == "float":
            return FAMILIES[self.family].load_float(self.float_model.source, self.float_model.path)
        return rebuild(self.float_model, self.trained).model if stage == "train" else assemble(self.folded)

    def logits(self, stage: str, x: Tensor) -> Tensor:
        """Logits of one of the stages."""
        with torch.no_grad():
            return self.model(stage)(pixel_values=x).logits


def net_line(folder: Path, kind: str, archive: Path, source: Path | None = None, **sections: Any) -> NetLine:
    """Make a recipe, run the stage `load` and lay the formats over the model."""
    source = source or save_net(folder / "model", kind)
    recipe = Recipe.model_validate(recipe_values(kind, archive.name, **sections))
    head, family = head_of(recipe), FAMILY[kind]
    loaded = folder / "load"
    loaded.mkdir(parents=True)
    processor = TASKS[recipe.task.name].processor(recipe.task)
    load(Model(family=family, source=str(source)), source, fingerprint(source), loaded, head, 0, processor)
    architecture = describe(family, source, head)
    return NetLine(
        recipe=recipe,
        folder=folder,
        base=archive.parent,
        float_model=FloatModel(loaded, source=source),
        architecture=architecture,
        plan=plan_layers(recipe, architecture),
        points=plan_points(recipe, architecture),
    )


@dataclass(frozen=True)
class Done:
    """A net with its folded form and its graph."""

    line: NetLine
    path: Path

    @property
    def file(self) -> Path:
        return self.path / "model.onnx"

    @property
    def books(self) -> list[str]:
        """Layers whose weights are looked up."""
        return [item.name for item in self.line.plan if item.weights and not item.integers]

    def run(self, x: Tensor, optimized: bool = False) -> np.ndarray:
        """Logits of the graph in ONNX Runtime."""
        session = open_session(self.file, 1, optimized)
        return session.run(["logits"], {"pixel_values": x.numpy()})[0]
