"""What a task hands to training and to calibration, whatever the task.

A batch is a mapping of tensors: the model's inputs under their own names (`input_ids` int64 [batch,
sequence], `attention_mask` of the same shape where sequences are padded, ...; `pixel_values` fp32 [batch,
channels, height, width]), and `labels`, which only a loss reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]

LABELS = "labels"
"""The one key of a batch that is no input of the model."""


class Examples(Protocol):
    """Examples that were read and tokenized, or brought to the model's size."""

    lengths: np.ndarray
    """Tokens of each example, [examples]; 1 for an image."""
    unit: str
    """What the lengths count: tokens or images."""
    notes: list[str]
    """What was done to the examples that a user should know, such as how many were cut."""

    def __len__(self) -> int:
        """How many there are."""

    def batch(self, rows: Sequence[int], moment: tuple[int, ...] | None = None) -> Batch:
        """The examples of these rows, padded on the right to the longest of them.

        `moment` is that of an update, (seed, phase, step): examples that are varied in training are so as a
        function of it and of their row alone. None: nothing is varied.
        """


@dataclass(frozen=True)
class Examined:
    """A section of a recipe's data as it is before a tokenizer or an image processor sees it."""

    rows: int
    labelled: bool
    texts: tuple[Any, ...] = ()
    """Input of the tokenizer for each example: a text, a pair of texts, or a list of words."""
    size: tuple[int, int] | None = None
    """Height and width of the first image, where they are known without opening it."""


def inputs_of(batch: Batch) -> Batch:
    """What the model sees of a batch."""
    return {name: tensor for name, tensor in batch.items() if name != LABELS}
