"""Embeddings of texts: pairs of texts with a similarity, or texts alone.

A sample is one text. The texts of one row of the data follow each other, and `joined` makes one result of
them: of a scored pair `label` (the score) and `prediction` (the cosine of the two embeddings, None if a value
is not finite); of other rows `cosine`, that of the embedding and the float model's (of two texts the mean),
and for the float model the `embedding` itself, fp32 [texts, width] in base64.

Torch is imported only where tensors are made.

Shapes: inputs int64 [texts, longest]; embeddings [texts, width]. In a batch for a loss the two texts of a
pair are neighbours, and `labels` has one number for each pair, fp32 [texts / 2].
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompress.errors import UsageError
from qcompress.models import load_tokenizer as reader
from qcompress.models.pooling import KEY, EmbeddingHead
from qcompress.schema.data import Columns
from qcompress.schema.recipe import FeatureExtraction, TextData
from qcompress.schema.tasks import AGREEMENT
from qcompress.tasks import padded
from qcompress.tasks.columns import ColumnError
from qcompress.tasks.examples import LABELS, Batch, Examined
from qcompress.tasks.labels import MISSING
from qcompress.tasks.padded import PaddedExamples, Sample, collate, kit, length, notes, processor
from qcompress.tasks.scores import correlation
from qcompress.tasks.table import Slices, Table, Wanted, demand_text, read_table, table_slices
from qcompress.tasks.text import demand_encoder_memory, read_lines

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "collate",
    "kit",
    "length",
    "notes",
    "processor",
    "reader",
]  # part of a task's interface, common to all padded samples

KNOWN = ("label",)
"""Fields of a result that do not depend on the model."""

PLACE = "place"
"""Field of a text: its place among the texts of its row, from 0."""

AT_ONCE = 1000
"""Number of texts tokenized together."""


@dataclass(frozen=True)
class Row:
    """One row of the data: one or two texts, and the score of a pair."""

    texts: tuple[str, ...]
    score: float | None = None


@dataclass(frozen=True)
class PairExamples:
    """Scored pairs for training. `samples` are the texts, two for each pair; `scores` fp32 [pairs], from 0 to
    1.
    """

    samples: Sequence[Sample]
    scores: np.ndarray
    unit = "tokens"

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer text of each pair, [pairs]."""
        tokens = [sample.length for sample in self.samples]
        return np.maximum(tokens[::2], tokens[1::2]).astype(np.int64)

    @property
    def notes(self) -> list[str]:
        """Messages for users about changes to the examples."""
        return notes(self.samples)

    def __len__(self) -> int:
        return len(self.scores)

    def batch(self, rows: Sequence[int], moment: tuple[int, ...] | None = None) -> Batch:
        """Texts of these pairs, padded to the longest of them, and the scores."""
        import torch

        chosen = [self.samples[2 * row + place] for row in rows for place in (0, 1)]
        tensors = {name: torch.from_numpy(array) for name, array in collate(chosen).items()}
        return {**tensors, LABELS: torch.from_numpy(self.scores[list(rows)])}

    def apart(self) -> PaddedExamples:
        """The texts, each one an example without a label."""
        return PaddedExamples([replace(sample, known={}) for sample in self.samples], _no_labels)


def head(task: FeatureExtraction) -> EmbeddingHead:
    """Pooling in place of a head. An embedding is trained as the numbers of a regression are."""
    return EmbeddingHead(
        task.name, None, "regression", pooling=task.pooling, normalize=task.normalize
    )  # fmt: skip


def settled(task: FeatureExtraction, config: dict[str, Any]) -> FeatureExtraction:
    """Task with the pooling of the model; `config` is its config.json."""
    return task.model_copy(update=config.get(KEY, {}))


def examples(
    data: TextData, base: Path, tokenizer: Any, task: FeatureExtraction
) -> PairExamples | PaddedExamples:
    """Examples for training or calibration, with a limit spread evenly over the data: pairs if the data have
    scores, which are moved to 0 (the lowest) to 1 (the highest score of the data), or texts.
    """
    rows = _read(data, base, task)
    scores = [row.score for row in rows if row.score is not None]
    chosen = padded.spread(rows, data.limit)
    texts = _tokenize(chosen, tokenizer, task)
    if not scores:
        return PaddedExamples(texts, _no_labels)
    low, width = min(scores), max(scores) - min(scores)
    moved = [(row.score - low) / width if width else 1.0 for row in chosen]
    return PairExamples(texts, np.array(moved, np.float32))


def _no_labels(samples: Sequence[Sample], longest: int) -> np.ndarray:
    raise UsageError(
        "texts without scores have no labels", fix="name the column with `columns: {score: ...}`"
    )


def samples(
    data: TextData, base: Path, tokenizer: Any, task: FeatureExtraction, limit: int | None
) -> list[Sample]:
    """Texts of the rows in the order of the data, at most `limit` and `data.limit` rows."""
    return _tokenize(padded.first(_read(data, base, task), limit, data.limit), tokenizer, task)


def rows(samples: Sequence[Sample]) -> int:
    """Number of rows of the data from which these texts are."""
    return sum(sample.known[PLACE] == 0 for sample in samples)


def slices(data: TextData, base: Path, task: FeatureExtraction) -> Slices:
    """Values of `data.slices` for each row, in the order of the data."""
    return table_slices(data, base, wanted(data))


def examine(data: TextData, base: Path, task: FeatureExtraction, most: int | None) -> Examined:
    """Read the first `most` rows of each file, without a tokenizer."""
    read = _read(data, base, task, most)
    return Examined(len(read), read[0].score is not None, tuple(text for row in read for text in row.texts))


def label_cells(data: TextData, base: Path, task: FeatureExtraction, most: int | None) -> list[Any]:
    """Empty: a score is a number in every reading."""
    return []


def loss(embeddings: Tensor, batch: Batch) -> Tensor:
    """Mean squared difference of each pair's cosine and its score, [] (Reimers and Gurevych,
    arXiv:1908.10084, section 3, the regression objective); embeddings [texts, width].
    """
    import torch.nn.functional as F

    if LABELS not in batch:
        raise UsageError(
            "the training data have no scores, and the task's loss needs them",
            fix="name the column with `data.train.columns: {score: ...}`, or write `method: distillation`",
        )
    first, second = embeddings.float().unflatten(0, (-1, 2)).unbind(1)
    return F.mse_loss(F.cosine_similarity(first, second, dim=-1), batch[LABELS])


def logits_of(task: FeatureExtraction, config: dict[str, Any]) -> tuple[int, int]:
    """One position, and the width of an embedding; `config` is the model's config.json."""
    return 1, int(config["dim" if "dim" in config else "hidden_size"])


def compared(sample: Sample, embedding: np.ndarray) -> np.ndarray:
    """Embedding of a text for the comparison of rows, [1, width]."""
    return embedding[None]


def measure(batch: Sequence[Sample], embeddings: np.ndarray) -> list[dict[str, Any]]:
    """Results of the texts, for `joined`; embeddings [texts, width]."""
    return [
        {**sample.known, "embedding": embedding}
        for sample, embedding in zip(batch, embeddings, strict=True)
    ]  # fmt: skip


def results(
    known: Sequence[Mapping[str, Any]], embeddings: Sequence[np.ndarray], task: FeatureExtraction
) -> list[dict[str, Any]]:
    """Results of the texts, for `joined`, from the known fields of each row and the embeddings [width]."""
    each = len(embeddings) // len(known)
    return [
        {**known[number // each], PLACE: number % each, "embedding": embedding}
        for number, embedding in enumerate(embeddings)
    ]


def joined(
    texts: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """One result for each row, from the results of its texts; `reference`: the float model's results, None
    for the float model, which is compared with itself.
    """
    starts = [number for number, text in enumerate(texts) if text[PLACE] == 0]
    grouped = [texts[start:end] for start, end in pairwise([*starts, len(texts)])]
    if "label" not in texts[0]:
        embedded = [np.stack([text["embedding"] for text in group]) for group in grouped]
        if reference is None:
            return [{"cosine": _cosine(values, values), "embedding": _packed(values)} for values in embedded]
        return [
            {"cosine": _cosine(values, _unpacked(known["embedding"], values.shape))}
            for values, known in zip(embedded, reference, strict=True)
        ]
    return [
        {"label": first["label"], "prediction": _cosine(first["embedding"][None], second["embedding"][None])}
        for first, second in grouped
    ]


def _packed(embeddings: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(embeddings, "<f4").tobytes()).decode("ascii")


def _unpacked(text: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(shape)


def _cosine(first: np.ndarray, second: np.ndarray) -> float | None:
    """Mean over the rows of two arrays [texts, width] of their cosine; None if a value is not finite."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        cosines = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return float(cosines.mean()) if np.isfinite(cosines).all() else None


def metrics(
    results: Sequence[Mapping[str, Any]],
    task: FeatureExtraction,
    reference: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, float]:
    """Metrics of results; without scores, the mean cosine with the float model's embeddings."""
    if "label" in results[0]:
        labels, cosines = ([result[name] for result in results] for name in ("label", "prediction"))
        broken = None in cosines
        return {
            name: math.nan if broken else correlation(name.removeprefix("cosine_"), labels, cosines)
            for name in task.metrics
        }
    if reference is None:
        return {}
    cosines = [result["cosine"] for result in results]
    return {AGREEMENT: math.nan if None in cosines else math.fsum(cosines) / len(cosines)}


# Reading ------------------------------------------------------------------------------------------


def wanted(data: TextData) -> Wanted:
    """Columns to read: those that the recipe names, or `text`, `text_pair` and `score`. A pair is read if it
    is named or has scores.
    """
    named = {role: name for role, name in (data.columns or Columns()).model_dump().items() if name}
    optional = frozenset({"text_pair", "score"} - named.keys())
    return Wanted({"text": "text", "text_pair": "text_pair", "score": "score", **named}, optional)


def _read(data: TextData, base: Path, task: FeatureExtraction, most: int | None = None) -> list[Row]:
    """Rows of the data; the first `most` of each file."""
    if data.text is not None:
        return [Row((line,)) for line in read_lines(data, base, most)]
    asked = replace(wanted(data), most=most)
    table = read_table(data, base, asked)
    scores = _scores(table, asked)
    roles = [role for role in ("text", "text_pair") if role in table.columns]
    if scores is not None and len(roles) == 1:
        message = f"{table.places[0]}: a score without a second text, which it compares the first one with"
        fix = "name the column of the second text with `columns: {text_pair: ...}`"
        raise ColumnError(message, fix=fix, role="score")
    for role in roles:
        for place, cell in zip(table.places, table.columns[role], strict=True):
            demand_text(cell, asked.columns[role], place, role)
            if not cell.strip():
                raise ColumnError(
                    f"{place}: the column {asked.columns[role]!r} is empty",
                    fix="correct or remove that row",
                    role=role,
                )
    texts = zip(*(table.columns[role] for role in roles), strict=True)
    return [Row(row, score) for row, score in zip(texts, scores or [None] * len(table), strict=True)]


def _scores(table: Table, asked: Wanted) -> list[float] | None:
    """Score of each row; None if no row has one. Raises ColumnError for a pair without a score among others,
    and for a score that is not a finite number.
    """
    cells = table.columns.get("score")
    if cells is None or all(cell in (MISSING, None, "") for cell in cells):
        return None
    return [_score(cell, place, asked) for cell, place in zip(cells, table.places, strict=True)]


def _score(cell: Any, place: str, asked: Wanted) -> float:
    try:
        number = math.nan if cell is None or isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        what = "has no score" if cell in (None, "") else f"has the score {cell!r:.60}, which is not a number"
        message = f"{place}: the pair {what} in the column {asked.columns['score']!r}"
        raise ColumnError(message, fix="correct or remove that row", role="score")
    return number


def _tokenize(rows: Sequence[Row], tokenizer: Any, task: FeatureExtraction) -> list[Sample]:
    fills, samples = padded.padding_of(tokenizer), []
    options = {"return_attention_mask": True, "verbose": False}
    texts = [
        (text, {PLACE: place} if row.score is None else {PLACE: place, "label": row.score})
        for row in rows
        for place, text in enumerate(row.texts)
    ]
    for start in range(0, len(texts), AT_ONCE):
        chunk = texts[start : start + AT_ONCE]
        words = [text for text, _ in chunk]
        demand_encoder_memory(words, tokenizer)
        whole = tokenizer(words, **options)["input_ids"]
        encoded = tokenizer(words, truncation=True, max_length=task.context, **options)
        for number, (_, known) in enumerate(chunk):
            inputs = {name: np.array(encoded[name][number], np.int64) for name in fills}
            cut = len(whole[number]) > task.context
            samples.append(Sample(inputs, fills, known, task.kind, cut=cut))
    return samples
