"""Calibration data as batches on the device, and statistics of the float model on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from qcompress.models.plan import LayerPlan, PointPlan, rounded
from qcompress.quant.ranges import Statistics
from qcompress.schema.recipe import Recipe
from qcompress.system.reporter import Reporter
from qcompress.tasks import TASKS
from qcompress.tasks.examples import Batch, Examples
from qcompress.training.batches import in_order, to_device
from qcompress.training.observer import observe

LOGITS = 2**26
"""Upper limit of logits in one calibration batch."""


@dataclass(frozen=True)
class Calibration:
    """Calibration data of a recipe, None where the recipe needs none; `config` is the model's config.json."""

    recipe: Recipe
    config: dict[str, Any]
    examples: Examples | None
    device: torch.device

    @property
    def size(self) -> int:
        """Batch size in examples: the recipe's, lowered so that a batch has at most `LOGITS` logits."""
        # the model computes logits for every position, although calibration discards them
        room = LOGITS // math.prod(TASKS[self.recipe.task.name].logits_of(self.recipe.task, self.config))
        return max(1, min(self.recipe.train.batch_size, room))

    def batches(self) -> Iterator[Batch]:
        """Batches of all examples, in order."""
        for batch in in_order(self.examples, self.size) if self.examples is not None else ():
            yield to_device(batch, self.device)

    def unpadded(self) -> Iterator[Batch]:
        """Batches of equal-length examples, for consumers that cannot mask padding."""
        lengths = [] if self.examples is None else self.examples.lengths.tolist()
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for _, rows in groupby(order, key=lengths.__getitem__):
            alike = list(rows)
            for start in range(0, len(alike), self.size):
                yield to_device(self.examples.batch(alike[start : start + self.size]), self.device)


def observe_all(
    model: nn.Module,
    plan: tuple[LayerPlan, ...],
    points: tuple[PointPlan, ...],
    calibration: Calibration,
    reporter: Reporter,
) -> dict[str, Statistics]:
    """Collect statistics of every activation that the plan or a quantization point rounds, on the
    calibration data.
    """
    if not any(item.weights and item.activations for item in plan) and not rounded(points):
        return {}
    total = -(-len(calibration.examples) // calibration.size)
    with reporter.bar("calibrate ranges", total) as bar:

        def counted() -> Iterator[Batch]:
            for index, batch in enumerate(calibration.batches()):
                yield batch
                bar.advance(f"batch {index + 1} of {total}")

        data = calibration.examples
        tokens = None if data.unit == "images" else int(data.lengths.sum())
        return observe(model, plan, counted(), tokens, points, len(data))
