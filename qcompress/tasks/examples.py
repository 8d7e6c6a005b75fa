"""Examples for training and calibration, common to all tasks.

A batch is a mapping of tensors: the model's inputs under their own names (`input_ids` int64 [batch,
sequence], `attention_mask` of that shape if sequences are padded, ...; `pixel_values` fp32 [batch, channels,
height, width]), and `labels`, which only a loss reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]

LABELS = "labels"
"""The only key of a batch that is not an input of the model; of a user's task the prefix of such keys."""


class Examples(Protocol):
    """Examples that were read and tokenized, or resized for the model."""

    lengths: np.ndarray
    """Tokens of each example, [examples]; 1 for an image."""
    unit: str
    """Unit of the lengths: tokens or images."""
    notes: list[str]
    """Messages for users about changes to the examples, such as the number of cut ones."""

    def __len__(self) -> int:
        """Number of examples."""

    def batch(self, rows: Sequence[int], moment: tuple[int, ...] | None = None) -> Batch:
        """Examples of these rows, padded on the right to the longest of them.

        `moment` is that of an update, (seed, phase, step): random changes of an example in training depend on
        it and on the row only. None: no changes.
        """


@dataclass(frozen=True)
class OfOneSize:
    """Base of examples that are not cut and not padded."""

    samples: Sequence[Any]

    @property
    def lengths(self) -> np.ndarray:
        """1 for each sample."""
        return np.ones(len(self.samples), np.int64)

    @property
    def notes(self) -> list[str]:
        """Empty: samples are not modified."""
        return []

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True)
class Examined:
    """A section of a recipe's data, before tokenizing or image processing."""

    rows: int
    labelled: bool
    texts: tuple[Any, ...] = ()
    """Tokenizer input of each example: a text, a pair of texts, or a list of words."""
    size: tuple[int, int] | None = None
    """Height and width of the first image, if known without opening it."""


def apart(examples: Examples) -> Examples:
    """Examples of which none has two inputs that only a loss reads together."""
    return examples.apart() if hasattr(examples, "apart") else examples


def rows(samples: Sequence[Any]) -> int:
    """Number of results that `joined` makes of samples: one each."""
    return len(samples)


def joined(
    results: list[dict[str, Any]], reference: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Results of the samples, unchanged: every sample has its own."""
    return results


def inputs_of(batch: Batch) -> Batch:
    """Model inputs of a batch."""
    return {name: tensor for name, tensor in batch.items() if not name.startswith(LABELS)}
