"""Next-token prediction: sequences to train on, windows to measure on, perplexity and token accuracy.

Torch is imported only where tensors are made: `tasks.text` is needed without it.

Perplexity follows the sliding-window recipe of transformers' documentation: windows of `context` tokens start
`stride` tokens apart, and each counts only the targets that no earlier window counted. The first token of a
window is never a target, so with stride = context one token in `context` is not counted.

Shapes: token ids [batch, sequence] int64; logits [batch, sequence, vocabulary].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompress.errors import UsageError
from qcompress.schema import CausalLm, TextData
from qcompress.tasks.text import read_text

if TYPE_CHECKING:
    from torch import Tensor, nn

STEP = 64
"""Positions measured at once: a vocabulary is wide."""

TaskLoss = Callable[["nn.Module", "Tensor"], "Tensor"]


@dataclass(frozen=True)
class Window:
    """One sample: token ids [length], and the position of its first target that counts (at least 1)."""

    ids: np.ndarray
    first: int


def tokenize(data: TextData, base: Path, tokenizer: Any) -> np.ndarray:
    """All token ids of the text, int64 [tokens]; no special tokens are added."""
    encoded = tokenizer(read_text(data, base), add_special_tokens=False, verbose=False)
    return np.asarray(encoded["input_ids"], dtype=np.int64)


def sequences(data: TextData, base: Path, tokenizer: Any, task: CausalLm) -> Tensor:
    """Training or calibration sequences, int64 [sequences, context], one after another without overlap.

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
        return whole
    return whole[torch.arange(data.limit) * count // data.limit]


def windows(data: TextData, base: Path, tokenizer: Any, task: CausalLm, samples: int | None) -> list[Window]:
    """Evaluation windows in the order of the text, at most `samples` and `data.limit` of them."""
    ids = tokenize(data, base, tokenizer)
    stride = task.stride or task.context
    found, counted = [], 0
    for start in range(0, len(ids), stride):
        piece = ids[start : start + task.context]
        first = max(counted - start, 1)
        if len(piece) > first:
            found.append(Window(piece, first))
        counted = start + len(piece)
        if counted >= len(ids):
            break
    if not found:
        raise UsageError(f"the text has {len(ids)} tokens: nothing to measure", fix="name more text")
    limits = [limit for limit in (samples, data.limit) if limit is not None]
    return found[: min(limits)] if limits else found


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each next token, []."""
    import torch.nn.functional as F

    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def collate(batch: list[Window]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int64 [batch, longest]; shorter windows are padded on the right with token 0, mask 0."""
    longest = max(len(window.ids) for window in batch)
    ids = np.zeros((len(batch), longest), np.int64)
    mask = np.zeros((len(batch), longest), np.int64)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)] = window.ids
        mask[row, : len(window.ids)] = 1
    return ids, mask


def measure(batch: list[Window], logits: np.ndarray) -> list[dict[str, float]]:
    """Per sample: summed negative log-likelihood, counted targets, and how many the model ranks first."""
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


def metrics(samples: list[dict[str, float]]) -> dict[str, float]:
    """perplexity = exp(sum nll / sum tokens) and token_accuracy; NaN stays NaN, overflow becomes inf."""
    tokens = sum(sample["tokens"] for sample in samples)
    mean = sum(sample["nll"] for sample in samples) / tokens
    perplexity = math.inf if mean > 700 else math.exp(mean)
    accuracy = sum(sample["correct"] for sample in samples) / tokens
    return {"perplexity": perplexity, "token_accuracy": accuracy}
