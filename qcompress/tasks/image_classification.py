"""One label for each image.

Torch is imported only where tensors are made.

Shapes: inputs fp32 [batch, 3, height, width]; logits [batch, labels].

A result of one sample: `prediction` (index of the largest logit; None if a logit is not finite), and, if
the data have labels, `label`, `rank` (number of logits ranked before the label's; 0: the prediction is right)
and `loss`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompress.models import FAMILIES, graph_signature, load_processor
from qcompress.models.architecture import Head
from qcompress.models.checkpoint_files import read_config
from qcompress.schema.data import Columns
from qcompress.schema.families import family_of
from qcompress.schema.recipe import ImageClassification, TextData
from qcompress.schema.tasks import AGREEMENT
from qcompress.tasks import padded
from qcompress.tasks.examples import Batch, Examined, joined, rows
from qcompress.tasks.image_slices import image_slices
from qcompress.tasks.images import ImageExamples, ImageSample, Picture, Reader, collate, read_pictures, shaped
from qcompress.tasks.labels import MISSING, dataset_names, labels_of, named_outputs, settle
from qcompress.tasks.scores import agreement, cross_entropy, scores
from qcompress.tasks.table import Slices

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["collate", "joined", "rows"]  # part of a task's interface

KNOWN = ("label",)
"""Fields of a result that do not depend on the model."""

BEST = 5
"""Number of first answers that count for top5_accuracy."""


def reader(directory: Path) -> Reader:
    """Image processor of a checkpoint."""
    config = read_config(directory) if (directory / "config.json").is_file() else {}
    family = FAMILIES.get(family_of(config.get("model_type", "")))
    size = tuple(graph_signature(family, directory)[0].axes[2:]) if family else None
    return Reader(load_processor(directory), size)


def processor(task: ImageClassification) -> dict[str, Any] | None:
    """Content of preprocessor_config.json for the recipe's options; None: the checkpoint's own.

    It configures ViT's processor, which works for any model: resize, divide by 255, normalize.
    """
    if task.mean is None:
        return None
    sized = {"size": dict(zip(("height", "width"), task.size, strict=True))} if task.size else {}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": task.size is not None,
        **sized,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": task.mean,
        "image_std": task.std,
    }


def head(task: ImageClassification) -> Head:
    """One output for each label."""
    return Head(task.name, labels_of(task).names, "single_label_classification")


def settled(task: ImageClassification, config: dict[str, Any]) -> ImageClassification:
    """Task with the labels of a checkpoint, in the order of its outputs."""
    return task.model_copy(update={"labels": settle(labels_of(task).names, config)})


def examples(data: TextData, base: Path, reader: Reader, task: ImageClassification) -> ImageExamples:
    """Images for training or calibration; with a limit spread evenly over the data."""
    pictures = padded.spread(_read(data, base, task), data.limit)
    return ImageExamples(shaped(pictures, reader), data.augment)


def samples(
    data: TextData, base: Path, reader: Reader, task: ImageClassification, limit: int | None
) -> list[ImageSample]:
    """Evaluation samples in the order of the data, at most `limit` and `data.limit` of them."""
    return shaped(padded.first(_read(data, base, task), limit, data.limit), reader)


def slices(data: TextData, base: Path, task: ImageClassification) -> Slices:
    """Values of `data.slices` for each image, in the order of the data."""
    return image_slices(data, base)


def examine(data: TextData, base: Path, task: ImageClassification, most: int | None) -> Examined:
    """Properties of the images that are known without opening one; `most` is ignored."""
    pictures = _read(data, base, task)
    return Examined(len(pictures), "label" in pictures[0].known, size=pictures[0].size)


def label_cells(data: TextData, base: Path, task: ImageClassification, most: int | None) -> list[Any]:
    """Labels as written in the data; empty for a folder (its names are label names) and without labels."""
    if data.folder is not None:
        return []
    columns = {role: name for role, name in (data.columns or Columns()).model_dump().items() if name}
    read = read_pictures(data, base, columns)
    cells = [picture.label for picture in read.pictures]
    return [] if read.names or all(label in (MISSING, None, "") for label in cells) else cells


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy, []."""
    import torch.nn.functional as F

    return F.cross_entropy(logits.float(), padded.labels_in(batch))


def logits_of(task: ImageClassification, config: dict[str, Any]) -> tuple[int, int]:
    """One position, and an output for each label; `config` is the model's config.json."""
    return 1, len(labels_of(task).names or named_outputs(config))


def length(sample: ImageSample) -> int:
    """1, because images have one size."""
    return 1


def compared(sample: ImageSample, logits: np.ndarray) -> np.ndarray:
    """Logits of a sample for the comparison of rows, [1, labels]."""
    return logits[None]


def measure(batch: Sequence[ImageSample], logits: np.ndarray) -> list[dict[str, Any]]:
    """Results of the samples; logits [batch, labels]."""
    return [_result(sample.known, row) for sample, row in zip(batch, logits, strict=True)]


def results(
    known: Sequence[Mapping[str, Any]], logits: Sequence[np.ndarray], task: ImageClassification
) -> list[dict[str, Any]]:
    """Results from the known fields of each sample and its logits [labels]."""
    return [_result(fields, row) for fields, row in zip(known, logits, strict=True)]


def _result(known: Mapping[str, Any], logits: np.ndarray) -> dict[str, Any]:
    scored, label = logits.astype(np.float64), known.get("label")
    finite = bool(np.isfinite(scored).all())
    result = {**known, "prediction": int(scored.argmax()) if finite else None}
    if label is None:
        return result
    if not finite:
        return {**result, "rank": None, "loss": math.nan}
    before = scored[:label] >= scored[label]  # among equal logits the first is the prediction
    rank = int(before.sum() + (scored[label + 1 :] > scored[label]).sum())
    return {**result, "rank": rank, "loss": cross_entropy(scored, label)}


def kit(inputs: Mapping[str, np.ndarray], samples: Sequence[ImageSample]) -> dict[str, np.ndarray]:
    """Arrays of a probe kit: the graph's inputs as `input.<name>`, fp32, and `length` [samples] of ones."""
    return {
        "length": np.ones(len(samples), np.int32),
        **{f"input.{name}": array for name, array in inputs.items()},
    }


def notes(samples: Sequence[ImageSample]) -> list[str]:
    """Empty: images are not modified."""
    return []


def metrics(
    results: Sequence[Mapping[str, Any]],
    task: ImageClassification,
    reference: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, float]:
    """Metrics of results; without labels, agreement with the float model's results (`reference`)."""
    answers = [result["prediction"] for result in results]
    if "label" not in results[0]:
        if reference is None:
            return {}
        return {AGREEMENT: agreement([result["prediction"] for result in reference], answers)}
    values = scores(["accuracy"], [result["label"] for result in results], answers)
    ranks = [result["rank"] for result in results]
    broken = any(rank is None for rank in ranks)
    values["top5_accuracy"] = math.nan if broken else sum(rank < BEST for rank in ranks) / len(ranks)
    values["cross_entropy"] = math.fsum(result["loss"] for result in results) / len(results)
    return {name: values[name] for name in task.metrics}


# Reading ------------------------------------------------------------------------------------------


def _read(data: TextData, base: Path, task: ImageClassification) -> list[Picture]:
    """Images, unopened, with labels as indices of the model's outputs; without labels if all are missing."""
    columns = {role: name for role, name in (data.columns or Columns()).model_dump().items() if name}
    read = read_pictures(data, base, columns)
    written = [picture.label for picture in read.pictures]
    if all(label in (MISSING, None, "") for label in written):
        return [replace(picture, known={}) for picture in read.pictures]
    labels = labels_of(task)
    cells = dataset_names(read.names, labels, written)
    named = data.folder is not None or read.names is not None
    outputs = labels.read(cells, [picture.place for picture in read.pictures], named=named)
    return [
        replace(picture, known={"label": output})
        for picture, output in zip(read.pictures, outputs, strict=True)
    ]
