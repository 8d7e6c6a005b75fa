"""A ViT small enough to train in a test, images with something to learn, and the first stages run on them.

As in `tiny.py` nothing is trivial: norms off 1, biases off 0, logits spread over several units.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_bert import EncoderLine
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, logging

from qcompress.models import describe
from qcompress.models.architecture import Head
from qcompress.models.plan import plan_layers
from qcompress.pipeline.stages.load import fingerprint, load
from qcompress.pipeline.stages.train import train
from qcompress.schema.recipe import Model, Recipe
from qcompress.system.artifacts import FloatModel
from qcompress.system.reporter import Reporter
from qcompress.tasks import TASKS

SIZE, PATCH, WIDTH, HEADS, INNER, BLOCKS = 16, 4, 64, 2, 96, 2
TOKENS = (SIZE // PATCH) ** 2 + 1
LABELS = ("circle", "square", "stripe")
HEAD = Head("image-classification", LABELS, "single_label_classification")
PREPARATION = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": SIZE, "width": SIZE},
    "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.5, 0.45, 0.4], "image_std": [0.25, 0.2, 0.3],
}  # fmt: skip


def make_vit(seed: int = 0, blocks: int = BLOCKS, **options: Any) -> ViTForImageClassification:
    """A stock model with random weights that mean something."""
    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=blocks, num_attention_heads=HEADS, intermediate_size=INNER,
        image_size=SIZE, patch_size=PATCH, id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)}, **options,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = ViTForImageClassification(config).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=random)
            norm = "norm" in name and name.endswith(".weight")
            parameter.copy_(1 + 0.2 * noise if norm else 0.15 * noise)
    return model


def save_vit(folder: Path, *, bare: bool = False, **options: Any) -> Path:
    """A checkpoint in transformers' layout with its image processor; `bare`: of the model without a head."""
    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    model = make_vit(**options)
    (model.base_model if bare else model).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARATION))
    return folder


def draw(count: int, size: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Circles, squares and stripes in random colours: uint8 [count, size, size, 3] and labels [count]."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    rows, columns = np.mgrid[:size, :size]
    images = np.empty((count, size, size, 3), np.uint8)
    for place, label in enumerate(labels):
        x, y = random.uniform(size * 0.35, size * 0.65, 2)
        radius = random.uniform(size * 0.2, size * 0.35)
        shapes = (
            (rows - y) ** 2 + (columns - x) ** 2 < radius**2,
            np.maximum(abs(rows - y), abs(columns - x)) < radius,
            (rows // 3) % 2 == 0,
        )
        front, back = random.integers(0, 256, (2, 3))
        image = np.where(shapes[label][..., None], front, back) + random.normal(0, 12, (size, size, 3))
        images[place] = image.clip(0, 255)
    return images, labels


def write_images(folder: Path, count: int = 60) -> Path:
    """An archive `images.npz` in the folder, which is returned."""
    images, labels = draw(count)
    np.savez_compressed(folder / "images.npz", images=images, labels=labels)
    return folder


def pixels(rows: int = 4, seed: int = 1) -> dict[str, Tensor]:
    """Inputs of the graph: random images."""
    random = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(rows, 3, SIZE, SIZE, generator=random)}


def values(steps: int = 3, **sections: Any) -> dict[str, Any]:
    """A recipe on `images.npz`; `sections` replace whole sections, `steps` counts for every phase."""
    method = sections.get("method", "ptq")
    phases = {"quadapter": ("calibrate", "finetune"), "teacher-intervention": ("intervention", "finetune")}
    names = phases.get(method, () if method == "ptq" else ("finetune",))
    found = {
        "name": "tiny-vit",
        "model": {"family": "vit", "source": "model"},
        "task": {"name": "image-classification"},
        "data": {
            "train": {"npz": ["images.npz"]},
            "calibration": {"npz": ["images.npz"], "limit": 20},
            "evaluate": {"test": {"npz": ["images.npz"], "limit": 24}},
        },
        "format": "w8a8",
        **sections,
    }
    phases = {name: {"steps": steps} for name in names}
    found["train"] = {"device": "cpu", "batch_size": 6, "phases": phases, **found.get("train", {})}
    return found


@dataclass(frozen=True)
class VitLine(EncoderLine):
    """A recipe of images on its way through the stages, in one folder; the task is the real one."""

    images: Path = Path()

    def train(self) -> VitLine:
        """Run the stage, or go on with it."""
        self.trained.path.mkdir(exist_ok=True)
        train(self.float_model, self.recipe, self.images, self.architecture, self.plan, self.trained.path,
              Reporter(silent=True))  # fmt: skip
        return self


def vit_line(folder: Path, source: Path, images: Path, seed: int = 0, **sections: Any) -> VitLine:
    """Make a recipe, run the stage `load` and lay the formats over the model."""
    recipe = Recipe.model_validate(values(seed=seed, **sections))
    head = TASKS["image-classification"].head(recipe.task)
    loaded = folder / "load"
    loaded.mkdir(parents=True)
    load(Model(family="vit", source=str(source)), source, fingerprint(source), loaded, head, seed)
    architecture = describe("vit", source, head)
    return VitLine(
        recipe=recipe,
        folder=folder,
        float_model=FloatModel(loaded, source=source),
        architecture=architecture,
        plan=plan_layers(recipe, architecture),
        images=images,
    )
