"""Tokenized examples of different lengths, padded on the right to the longest of each batch.

Torch is imported only where tensors are made.

Shapes: inputs int64 [batch, longest]; labels int64 [batch] (single), fp32 [batch, labels] (multi), fp32
[batch] (regression), int64 [batch, longest] with -100 at ignored positions (tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompress.errors import UsageError
from qcompress.tasks.examples import LABELS, Batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One tokenized example. `known`: fields of samples.json.gz that are known from the data; without `label`
    if the data have none.
    """

    inputs: Mapping[str, np.ndarray]
    padding: Mapping[str, int]
    known: Mapping[str, Any]
    kind: str
    """single, multi, regression, or tokens."""
    cut: bool = False
    """True if it was longer than `task.context`."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.inputs["input_ids"])


@dataclass(frozen=True)
class PaddedExamples:
    """Examples for training or calibration. `labels` makes the label array of samples, [batch, ...]."""

    samples: Sequence[Sample]
    labels: Callable[[Sequence[Sample], int], np.ndarray]
    unit = "tokens"

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, [examples]."""
        return np.array([sample.length for sample in self.samples], np.int64)

    @property
    def notes(self) -> list[str]:
        """Messages for users about changes to the examples."""
        return notes(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, rows: Sequence[int], moment: tuple[int, ...] | None = None) -> Batch:
        """Examples of these rows, padded to the longest of them; without labels if the data have none."""
        import torch

        chosen = [self.samples[row] for row in rows]
        inputs = collate(chosen)
        arrays = dict(inputs)
        if all("label" in sample.known for sample in chosen):
            arrays[LABELS] = self.labels(chosen, inputs["input_ids"].shape[1])
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def length(sample: Sample) -> int:
    """Tokens of a sample."""
    return sample.length


def processor(task: object) -> None:
    """None: text is prepared by the checkpoint's tokenizer only."""


def collate(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Model inputs, int64 [batch, longest of the batch], padded on the right."""
    longest = max(sample.length for sample in samples)
    inputs = {}
    for name, fill in samples[0].padding.items():
        inputs[name] = np.full((len(samples), longest), fill, np.int64)
        for row, sample in enumerate(samples):
            inputs[name][row, : sample.length] = sample.inputs[name]
    return inputs


def notes(samples: Sequence[Sample]) -> list[str]:
    """Messages for users about changes to the samples, once for each set."""
    cut = [sample.length for sample in samples if sample.cut]
    return [f"{len(cut)} of {len(samples)} examples are cut at {max(cut)} tokens"] if cut else []


def padding_of(tokenizer: Any) -> dict[str, int]:
    """Padding value of each input of the tokenizer's models."""
    if tokenizer.pad_token_id is None:
        raise UsageError(
            "the tokenizer has no padding token, and a batch of sequences of several lengths needs one",
            fix="set `pad_token` in tokenizer_config.json",
        )
    fills = {
        "input_ids": tokenizer.pad_token_id,
        "attention_mask": 0,
        "token_type_ids": tokenizer.pad_token_type_id,
    }
    names = {*tokenizer.model_input_names, "attention_mask"}
    return {name: fill for name, fill in fills.items() if name in names}


def spread(samples: list[Sample], limit: int | None) -> list[Sample]:
    """At most `limit` samples, spread evenly: the beginning of a table alone is rarely typical."""
    count = len(samples)
    if limit is None or limit >= count:
        return samples
    return [samples[index * count // limit] for index in range(limit)]


def first(samples: list[Sample], *limits: int | None) -> list[Sample]:
    """The first samples, up to the smallest limit."""
    known = [limit for limit in limits if limit is not None]
    return samples[: min(known)] if known else samples


def kit(inputs: Mapping[str, np.ndarray], samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Arrays of a probe kit: `length` [samples], and the graph's inputs as `input.<name>`, all int32."""
    lengths = np.array([sample.length for sample in samples], np.int32)
    return {"length": lengths, **{f"input.{name}": array.astype(np.int32) for name, array in inputs.items()}}


def labels_in(batch: Batch) -> Tensor:
    """Labels of a batch, for a loss. Raises UsageError without labels."""
    if LABELS not in batch:
        raise UsageError(
            "the training data have no labels, and the task's loss needs them",
            fix="name the column with `data.train.columns: {label: ...}` ({tags: ...} for tokens)",
        )
    return batch[LABELS]
