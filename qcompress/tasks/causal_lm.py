"""Next-token prediction: training sequences, evaluation windows, perplexity and token accuracy.

Torch is imported only where tensors are made.

Perplexity follows the sliding-window recipe of transformers' documentation: windows of `context` tokens start
`stride` tokens apart, and each counts only the targets that no earlier window counted. The first token of a
window is never a target, so with stride = context one token in `context` is not counted.

Shapes: token ids [batch, sequence] int64; logits [batch, sequence, vocabulary].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompress.errors import UsageError
from qcompress.models import load_tokenizer as reader
from qcompress.models.architecture import CAUSAL_LM, Head
from qcompress.schema.recipe import CausalLm, TextData
from qcompress.tasks.examples import Batch, Examined, joined, rows
from qcompress.tasks.padded import processor
from qcompress.tasks.table import Slices
from qcompress.tasks.text import demand_encoder_memory, read_text

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["joined", "processor", "reader", "rows"]  # part of a task's interface, common to all text tasks

STEP = 64
"""Positions measured at once, because the vocabulary is large."""


@dataclass(frozen=True)
class Window:
    """One sample: token ids [length], and the position of its first counted target (at least 1)."""

    ids: np.ndarray
    first: int


@dataclass(frozen=True)
class Sequences:
    """Token sequences of one length, int64 [sequences, context]."""

    ids: Tensor
    unit = "tokens"

    @property
    def lengths(self) -> np.ndarray:
        """The context length, once for each sequence."""
        return np.full(len(self.ids), self.ids.shape[1])

    @property
    def notes(self) -> list[str]:
        """Empty: sequences are not modified."""
        return []

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int], moment: tuple[int, ...] | None = None) -> Batch:
        """Sequences of these rows; they need no mask."""
        return {"input_ids": self.ids[list(rows)]}


KNOWN = ("tokens",)
"""Fields of a result that do not depend on the model."""


def settled(task: CausalLm, config: dict[str, Any]) -> CausalLm:
    """The task unchanged: it takes no labels from a checkpoint."""
    return task


def tokenize(data: TextData, base: Path, tokenizer: Any) -> np.ndarray:
    """Token ids of the whole text, int64 [tokens], without special tokens."""
    text = read_text(data, base)
    demand_encoder_memory([text], tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return np.asarray(encoded["input_ids"], dtype=np.int64)


def examples(data: TextData, base: Path, tokenizer: Any, task: CausalLm) -> Sequences:
    """Training or calibration sequences of `context` tokens, consecutive without overlap.

    With a limit, they are spread evenly over the text: its beginning alone is rarely typical.
    """
    import torch

    ids = tokenize(data, base, tokenizer)
    count = len(ids) // task.context
    if count == 0:
        raise UsageError(
            f"the text has {len(ids)} tokens, fewer than one sequence of {task.context}",
            fix="lower task.context or name more text",
        )
    whole = torch.from_numpy(ids[: count * task.context]).view(count, task.context)
    if data.limit is None or data.limit >= count:
        return Sequences(whole)
    return Sequences(whole[torch.arange(data.limit) * count // data.limit])


def samples(data: TextData, base: Path, tokenizer: Any, task: CausalLm, limit: int | None) -> list[Window]:
    """Evaluation windows in the order of the text, at most `limit` and `data.limit` of them."""
    ids = tokenize(data, base, tokenizer)
    stride = task.stride or task.context
    windows, counted = [], 0
    for start in range(0, len(ids), stride):
        piece = ids[start : start + task.context]
        first = max(counted - start, 1)
        if len(piece) > first:
            windows.append(Window(piece, first))
        counted = start + len(piece)
        if counted >= len(ids):
            break
    if not windows:
        raise UsageError(f"the text has {len(ids)} tokens: nothing to measure", fix="name more text")
    limits = [number for number in (limit, data.limit) if number is not None]
    return windows[: min(limits)] if limits else windows


def slices(data: TextData, base: Path, task: CausalLm) -> Slices:
    """Raise UsageError: rows are joined to one text, whose windows are not rows."""
    raise UsageError(
        "a sample of causal-lm is a window of the whole text, not a row of a table: it has no slices",
        fix="drop `slices`, or name an evaluation set for each part",
    )


def examine(data: TextData, base: Path, task: CausalLm, most: int | None) -> Examined:
    """Read the first `most` lines of the text."""
    text = read_text(data, base, most)
    return Examined(1, False, (text,))


def label_cells(data: TextData, base: Path, task: CausalLm, most: int | None) -> list[Any]:
    """Empty: text has no labels."""
    return []


def head(task: CausalLm) -> Head:
    """The model's own head, which has no labels."""
    return CAUSAL_LM


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of each next token, []."""
    import torch.nn.functional as F

    ids = batch["input_ids"]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def logits_of(task: CausalLm, config: dict[str, Any]) -> tuple[int, int]:
    """Largest number of positions of one sample, and logits of each; `config` is the model's config.json."""
    return task.context, config["vocab_size"]


def compared(window: Window, logits: np.ndarray) -> np.ndarray:
    """Logits of a sample for the comparison of rows, [positions, vocabulary], without padding."""
    return logits[: len(window.ids)]


def length(window: Window) -> int:
    """Tokens of a sample."""
    return len(window.ids)


def collate(batch: list[Window]) -> dict[str, np.ndarray]:
    """Ids and mask, int64 [batch, longest]; shorter windows are padded on the right with token 0, mask 0."""
    longest = max(len(window.ids) for window in batch)
    ids = np.zeros((len(batch), longest), np.int64)
    mask = np.zeros((len(batch), longest), np.int64)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)] = window.ids
        mask[row, : len(window.ids)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def measure(batch: list[Window], logits: np.ndarray) -> list[dict[str, float]]:
    """Results of each sample: summed negative log-likelihood, counted targets, and targets ranked first."""
    import torch
    import torch.nn.functional as F

    results = []
    for row, window in enumerate(batch):
        nll, correct = 0.0, 0
        for start in range(window.first, len(window.ids), STEP):
            end = min(start + STEP, len(window.ids))
            scores = torch.from_numpy(logits[row, start - 1 : end - 1]).float()
            targets = torch.from_numpy(window.ids[start:end])
            nll += F.cross_entropy(scores, targets, reduction="none").double().sum().item()
            correct += int((scores.argmax(-1) == targets).sum())
        results.append({"nll": nll, "tokens": len(window.ids) - window.first, "correct": correct})
    return results


def kit(inputs: dict[str, np.ndarray], batch: list[Window]) -> dict[str, np.ndarray]:
    """Arrays of a probe kit, int32: `ids` [samples, longest], `length` and `first` [samples]."""
    return {
        "ids": collate(batch)["input_ids"].astype(np.int32),
        "length": np.array([len(window.ids) for window in batch], np.int32),
        "first": np.array([window.first for window in batch], np.int32),
    }


def notes(samples: list[Window]) -> list[str]:
    """Empty: windows are not modified."""
    return []


def metrics(
    samples: list[dict[str, float]], task: CausalLm | None = None, reference: object = None
) -> dict[str, float]:
    """perplexity = exp(sum nll / sum tokens) and token_accuracy; NaN stays NaN, overflow becomes inf.

    `task` and `reference` are ignored.
    """
    tokens = sum(sample["tokens"] for sample in samples)
    mean = sum(sample["nll"] for sample in samples) / tokens
    perplexity = math.inf if mean > 700 else math.exp(mean)
    accuracy = sum(sample["correct"] for sample in samples) / tokens
    return {"perplexity": perplexity, "token_accuracy": accuracy}
