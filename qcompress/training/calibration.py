"""The calibration data as batches on the device, and the statistics of the float model on them."""

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
from qcompress.training.loop import in_order, to_device
from qcompress.training.observer import observe

LOGITS = 2**26
"""Most logits of one calibration batch."""


@dataclass(frozen=True)
class Calibration:
    """Calibration data, where a recipe needs any; `config` is the model's config.json."""

    recipe: Recipe
    config: dict[str, Any]
    examples: Examples | None
    device: torch.device

    @property
    def size(self) -> int:
        """Examples of a batch."""
        # every position has a row of logits, although nobody looks at them here
        room = LOGITS // math.prod(TASKS[self.recipe.task.name].logits_of(self.recipe.task, self.config))
        return max(1, min(self.recipe.train.batch_size, room))

    def batches(self) -> Iterator[Batch]:
        """Every example, in order."""
        for batch in in_order(self.examples, self.size) if self.examples is not None else ():
            yield to_device(batch, self.device)

    def unpadded(self) -> Iterator[Batch]:
        """Every example, batched with others of its own length: for who cannot leave padding out himself."""
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
    """Statistics of the float model on the calibration data, for all that is rounded."""
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
