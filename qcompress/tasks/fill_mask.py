"""Prediction of masked tokens: sequences of a text of which some tokens are replaced by the mask.

Torch is imported only where tensors are made.

A sequence has `context` tokens with the tokenizer's special tokens around it. Pseudo-perplexity is exp of the
mean negative log-likelihood of the masked tokens. Salazar et al. (arXiv:1910.14659) mask one token at a time;
here all masked tokens of a sequence are predicted together, as in training.

Shapes: inputs int64 [batch, longest]; logits [batch, longest, vocabulary]; labels int64 [batch, longest],
-100 at tokens that are not masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompress.errors import UsageError
from qcompress.models import load_tokenizer as reader
from qcompress.models.architecture import Head
from qcompress.schema.recipe import FillMask, TextData
from qcompress.tasks import padded
from qcompress.tasks.examples import LABELS, Batch, Examined, joined, rows
from qcompress.tasks.padded import Sample, collate, length, notes, processor
from qcompress.tasks.table import Slices
from qcompress.tasks.text import demand_encoder_memory, read_text

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "collate",
    "joined",
    "length",
    "notes",
    "processor",
    "reader",
    "rows",
]  # part of a task's interface, common to all padded samples

KNOWN = ("tokens",)
"""Fields of a result that do not depend on the model."""

IGNORED = -100
"""Label of a token that is not masked."""


@dataclass(frozen=True)
class Masked(Sample):
    """A sequence with masked tokens: their places, and the tokens that stood there, both int64 [masked]."""

    places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    targets: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class MaskedText:
    """A text as sequences without masks, and the way of masking them. `first`, `last`: indices of the first
    token that may be masked, and of the first special token after it, counted from the end.
    """

    sequences: Sequence[Sample]
    first: int
    last: int
    mask: int
    task: FillMask

    def masked(self, row: int, moment: tuple[int, ...]) -> Masked:
        """The sequence of a row, with places that depend on `moment` and the row only."""
        sample = self.sequences[row]
        ids = sample.inputs["input_ids"]
        body = np.arange(self.first, len(ids) - self.last)
        count = max(1, round(self.task.share * len(body)))
        places = np.sort(np.random.default_rng([*moment, row]).choice(body, count, replace=False))
        hidden = ids.copy()
        hidden[places] = self.mask
        return Masked(
            {**sample.inputs, "input_ids": hidden}, sample.padding, {"tokens": count}, "tokens",
            places=places, targets=ids[places],
        )  # fmt: skip


@dataclass(frozen=True)
class MaskedExamples:
    """Sequences for training or calibration. Each update masks other tokens."""

    text: MaskedText
    rows: Sequence[int]
    unit = "tokens"

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, [sequences]."""
        return np.array([self.text.sequences[row].length for row in self.rows], np.int64)

    @property
    def notes(self) -> list[str]:
        """Empty: sequences are not cut."""
        return []

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int], moment: tuple[int, ...] | None = None) -> Batch:
        """Masked sequences of these rows, padded to the longest of them, and the labels."""
        import torch

        seed = (self.text.task.mask_seed,) if moment is None else moment
        chosen = [self.text.masked(self.rows[row], seed) for row in rows]
        inputs = collate(chosen)
        arrays = {**inputs, LABELS: _labels(chosen, inputs["input_ids"].shape[1])}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def head(task: FillMask) -> Head:
    """The model's own head, which has no labels."""
    return Head(task.name)


def settled(task: FillMask, config: dict[str, Any]) -> FillMask:
    """The task unchanged: it takes no labels from a checkpoint."""
    return task


def examples(data: TextData, base: Path, tokenizer: Any, task: FillMask) -> MaskedExamples:
    """Sequences for training or calibration; with a limit spread evenly over the text."""
    text = _sequences(data, base, tokenizer, task)
    return MaskedExamples(text, padded.spread(list(range(len(text.sequences))), data.limit))


def samples(data: TextData, base: Path, tokenizer: Any, task: FillMask, limit: int | None) -> list[Masked]:
    """Evaluation sequences in the order of the text, at most `limit` and `data.limit` of them."""
    text = _sequences(data, base, tokenizer, task)
    chosen = padded.first(list(range(len(text.sequences))), limit, data.limit)
    return [text.masked(row, (task.mask_seed,)) for row in chosen]


def slices(data: TextData, base: Path, task: FillMask) -> Slices:
    """Raise UsageError: rows are joined to one text, whose sequences are not rows."""
    raise UsageError(
        "a sample of fill-mask is a window of the whole text, not a row of a table: it has no slices",
        fix="drop `slices`, or name an evaluation set for each part",
    )


def examine(data: TextData, base: Path, task: FillMask, most: int | None) -> Examined:
    """Read the first `most` lines of the text."""
    return Examined(1, False, (read_text(data, base, most),))


def label_cells(data: TextData, base: Path, task: FillMask, most: int | None) -> list[Any]:
    """Empty: text has no labels."""
    return []


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of the masked tokens, []."""
    import torch.nn.functional as F

    masked = padded.labels_in(batch) != IGNORED
    return F.cross_entropy(logits[masked].float(), batch[LABELS][masked])


def logits_of(task: FillMask, config: dict[str, Any]) -> tuple[int, int]:
    """Largest number of positions of one sample, and logits of each; `config` is the model's config.json."""
    return task.context, config["vocab_size"]


def compared(sample: Masked, logits: np.ndarray) -> np.ndarray:
    """Logits of a sample for the comparison of rows, [positions, vocabulary], without padding."""
    return logits[: sample.length]


def measure(batch: Sequence[Masked], logits: np.ndarray) -> list[dict[str, Any]]:
    """Results of each sample: summed negative log-likelihood, masked tokens, and those ranked first; logits
    [batch, longest, vocabulary].
    """
    return [
        {**sample.known, **_scored(row[sample.places], sample.targets)}
        for sample, row in zip(batch, logits, strict=True)
    ]


def _scored(logits: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Results of masked tokens, logits [masked, vocabulary]."""
    scores = logits.astype(np.float64)
    top = scores.max(-1, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore"):
        log_sum = np.log(np.exp(scores - top).sum(-1)) + top[:, 0]
    nll = float((log_sum - scores[np.arange(len(targets)), targets]).sum())
    return {"nll": nll, "correct": int((scores.argmax(-1) == targets).sum())}


def kit(inputs: dict[str, np.ndarray], batch: Sequence[Masked]) -> dict[str, np.ndarray]:
    """Arrays of a probe kit, int32: those of padded samples, and `targets` [samples, longest], -100 at tokens
    that are not masked.
    """
    longest = max(sample.length for sample in batch)
    return {**padded.kit(inputs, batch), "targets": _labels(batch, longest).astype(np.int32)}


def metrics(
    results: Sequence[dict[str, Any]], task: object = None, reference: object = None
) -> dict[str, float]:
    """pseudo_perplexity = exp(sum nll / sum tokens) and masked_accuracy; NaN stays NaN, overflow becomes inf.

    `task` and `reference` are ignored.
    """
    tokens = sum(result["tokens"] for result in results)
    mean = sum(result["nll"] for result in results) / tokens
    accuracy = sum(result["correct"] for result in results) / tokens
    return {"pseudo_perplexity": math.inf if mean > 700 else math.exp(mean), "masked_accuracy": accuracy}


def _labels(samples: Sequence[Masked], longest: int) -> np.ndarray:
    labels = np.full((len(samples), longest), IGNORED, np.int64)
    for row, sample in enumerate(samples):
        labels[row, sample.places] = sample.targets
    return labels


def _sequences(data: TextData, base: Path, tokenizer: Any, task: FillMask) -> MaskedText:
    """The whole text in consecutive sequences without overlap."""
    if tokenizer.mask_token_id is None:
        raise UsageError(
            "the tokenizer has no mask, which stands for the tokens that the model predicts",
            fix="set `mask_token` in tokenizer_config.json, or name a checkpoint that was trained with masks",
        )
    text = read_text(data, base)
    demand_encoder_memory([text], tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    before, after = _special(tokenizer)
    room = task.context - len(before) - len(after)
    if not ids or room < 1:
        raise UsageError(f"the text has {len(ids)} tokens: nothing to measure", fix="name more text")
    fills = padded.padding_of(tokenizer)
    plain = Sample({}, fills, {}, "tokens")
    sequences = []
    for start in range(0, len(ids), room):
        tokens = np.array([*before, *ids[start : start + room], *after], np.int64)
        ones, zeros = np.ones_like(tokens), np.zeros_like(tokens)
        inputs = {"input_ids": tokens, "attention_mask": ones, "token_type_ids": zeros}
        sequences.append(replace(plain, inputs={name: inputs[name] for name in fills}))
    return MaskedText(sequences, len(before), len(after), tokenizer.mask_token_id, task)


def _special(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]
