"""Classification of words: named entities, parts of speech.

Torch is imported only where tensors are made. The first sub-token of a word carries the word's label; the
others, and special tokens, are -100, which losses and metrics skip.

Shapes: inputs int64 [batch, longest]; logits [batch, longest, labels].

A result of one sample: `positions` (of the first sub-tokens of the counted words), `prediction` (a label of
each; None if a logit is not finite), and, if the data have labels, `label` in the form of the prediction and
`loss`, summed over the words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompress.errors import UsageError
from qcompress.models import load_tokenizer as reader
from qcompress.models.architecture import Head
from qcompress.schema.data import Columns
from qcompress.schema.recipe import TextData, TokenClassification
from qcompress.schema.tasks import AGREEMENT
from qcompress.tasks import padded
from qcompress.tasks.examples import Batch, Examined, joined, rows
from qcompress.tasks.labels import (
    IGNORED,
    dataset_names,
    labels_of,
    named_outputs,
    settle,
    spelling,
    without_point,
)
from qcompress.tasks.padded import PaddedExamples, Sample, collate, kit, length, notes, processor
from qcompress.tasks.scores import agreement, span_f1
from qcompress.tasks.table import Slices, Table, Wanted, demand_text, read_table, table_slices
from qcompress.tasks.text import demand_encoder_memory, read_lines

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "collate",
    "joined",
    "kit",
    "length",
    "notes",
    "processor",
    "reader",
    "rows",
]  # part of a task's interface, common to all padded samples

KNOWN = ("label", "positions")
"""Fields of a result that do not depend on the model."""


def head(task: TokenClassification) -> Head:
    """One output for each label, at every position. transformers has no problem type for it."""
    return Head(task.name, labels_of(task).names)


def settled(task: TokenClassification, config: dict[str, Any]) -> TokenClassification:
    """Task with the labels of a checkpoint, in the order of its outputs."""
    return task.model_copy(update={"labels": settle(task.labels, config)})


def examples(data: TextData, base: Path, tokenizer: Any, task: TokenClassification) -> PaddedExamples:
    """Examples for training or calibration; with a limit spread evenly over the data."""
    chosen = padded.spread(_read(data, base, task), data.limit)
    return PaddedExamples(_tokenize(chosen, tokenizer, task), label_array)


def samples(
    data: TextData, base: Path, tokenizer: Any, task: TokenClassification, limit: int | None
) -> list[Sample]:
    """Evaluation samples in the order of the data, at most `limit` and `data.limit` of them."""
    return _tokenize(padded.first(_read(data, base, task), limit, data.limit), tokenizer, task)


def slices(data: TextData, base: Path, task: TokenClassification) -> Slices:
    """Values of `data.slices` for each example, in the order of the data."""
    return table_slices(data, base, wanted(data))


def examine(data: TextData, base: Path, task: TokenClassification, most: int | None) -> Examined:
    """Read the first `most` examples of each file, without a tokenizer."""
    rows = _read(data, base, task, most)
    return Examined(len(rows), "tags" in rows[0], tuple(row["tokens"] for row in rows))


def label_cells(data: TextData, base: Path, task: TokenClassification, most: int | None) -> list[Any]:
    """Tags as written in the data; empty without tags."""
    if data.text is not None:
        return []
    asked = wanted(data)
    table = read_table(data, base, replace(asked, columns={"tags": asked.columns["tags"]}, most=most))
    cells = table.columns.get("tags", ()) if table.names is None else ()
    return [tag for tags in cells for tag in tags if not _is_ignored(tag)]


def label_array(samples: Sequence[Sample], longest: int) -> np.ndarray:
    """Label array of samples, int64 [batch, longest], -100 at ignored positions."""
    labels = np.full((len(samples), longest), IGNORED, np.int64)
    for row, sample in enumerate(samples):
        labels[row, sample.known["positions"]] = sample.known["label"]
    return labels


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy over all words of the batch, []; logits [batch, longest, labels]."""
    import torch.nn.functional as F

    labels = padded.labels_in(batch)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def logits_of(task: TokenClassification, config: dict[str, Any]) -> tuple[int, int]:
    """Largest number of positions of one sample, and logits of each; `config` is the model's config.json."""
    return task.context, len(task.labels or named_outputs(config))


def compared(sample: Sample, logits: np.ndarray) -> np.ndarray:
    """Logits of a sample for the comparison of rows, [positions, labels], without padding."""
    return logits[: sample.length]


def measure(batch: Sequence[Sample], logits: np.ndarray) -> list[dict[str, Any]]:
    """Results of the samples; logits [batch, longest, labels]."""
    return [_result(sample.known, row) for sample, row in zip(batch, logits, strict=True)]


def results(
    known: Sequence[Mapping[str, Any]], logits: Sequence[np.ndarray], task: TokenClassification
) -> list[dict[str, Any]]:
    """Results from the known fields of each sample and its logits [positions, labels]."""
    return [_result(fields, row) for fields, row in zip(known, logits, strict=True)]


def _result(known: Mapping[str, Any], logits: np.ndarray) -> dict[str, Any]:
    scored = logits[list(known["positions"])].astype(np.float64)
    finite = bool(np.isfinite(scored).all())
    result = {**known, "prediction": scored.argmax(-1).tolist() if finite else None}
    if "label" in known:
        result["loss"] = _cross_entropy(scored, known["label"]) if finite else math.nan
    return result


def _cross_entropy(logits: np.ndarray, labels: Sequence[int]) -> float:
    """Sum of -log softmax(logits)[label] over the words; logits [words, labels]."""
    if not len(labels):
        return 0.0
    top = logits.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]
    return float((log_sum - logits[np.arange(len(labels)), list(labels)]).sum())


def metrics(
    results: Sequence[Mapping[str, Any]],
    task: TokenClassification,
    reference: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, float]:
    """Metrics of results; without labels, agreement with the float model's results (`reference`),
    by words.
    """
    answers = [result["prediction"] for result in results]
    labelled = "label" in results[0]
    if not labelled and reference is None:
        return {}
    truth = [result["label" if labelled else "prediction"] for result in (results if labelled else reference)]
    if any(answer is None for answer in (*answers, *truth)):
        return dict.fromkeys(_names(task) if labelled else (AGREEMENT,), math.nan)
    words = [word for answer in answers for word in answer]
    share = agreement([word for label in truth for word in label], words) if words else math.nan
    if not labelled:
        return {AGREEMENT: share}
    values = {"token_accuracy": share}
    if task.spans:
        values["span_f1"] = span_f1(_tag_names(truth, task), _tag_names(answers, task))
    return {name: values[name] for name in _names(task)}


def _names(task: TokenClassification) -> list[str]:
    return [name for name in task.metrics if name != "span_f1" or task.spans]


def _tag_names(labels: Sequence[Sequence[int]], task: TokenClassification) -> list[list[str]]:
    return [[task.labels[index] for index in sequence] for sequence in labels]


# Reading ------------------------------------------------------------------------------------------


def _read(
    data: TextData, base: Path, task: TokenClassification, most: int | None = None
) -> list[dict[str, Any]]:
    """Examples as {"tokens", "tags"}, tags if present: indices, or -100 for a word without one; the first
    `most` of each file.
    """
    if data.text is not None:
        return [{"tokens": line.split()} for line in read_lines(data, base, most)]
    asked = replace(wanted(data), most=most)
    table = read_table(data, base, asked)
    columns = {role: [_list(cell, place) for cell, place in zip(cells, table.places, strict=True)]
               for role, cells in table.columns.items()}  # fmt: skip
    for place, words in zip(table.places, columns["tokens"], strict=True):
        if not words:
            raise UsageError(f"{place}: the words are an empty list", fix="remove that row")
        for word in words:
            demand_text(word, asked.columns["tokens"], place, "tokens")
    if "tags" in columns:
        columns["tags"] = _tags(table, columns, task)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def wanted(data: TextData) -> Wanted:
    """Columns to read: those that the recipe names, or `tokens` and `tags`."""
    named = {role: name for role, name in (data.columns or Columns()).model_dump().items() if name}
    optional = frozenset() if "tags" in named else frozenset({"tags"})
    return Wanted({"tokens": "tokens", "tags": "tags", **named}, optional)


def _list(cell: Any, place: str) -> list[Any]:
    if not isinstance(cell, list):
        fix = "write words and tags as lists, in .jsonl"
        raise UsageError(f"{place}: {cell!r:.60} is not a list", fix=fix)
    return cell


def _tags(table: Table, columns: dict[str, list[Any]], task: TokenClassification) -> list[list[int]]:
    labels = labels_of(task)
    cells = dataset_names(table.names, labels, columns["tags"])
    for place, words, tags in zip(table.places, columns["tokens"], cells, strict=True):
        if len(words) != len(tags):
            raise UsageError(
                f"{place}: {len(words)} words and {len(tags)} tags", fix="correct or remove that row"
            )
    counted = [(tag, place) for place, tags in zip(table.places, cells, strict=True)
               for tag in tags if not _is_ignored(tag)]  # fmt: skip
    read = labels.read(*zip(*counted, strict=True), named=table.names is not None) if counted else []
    outputs = iter(read)
    return [[IGNORED if _is_ignored(tag) else next(outputs) for tag in tags] for tags in cells]


def _is_ignored(tag: Any) -> bool:
    return without_point(spelling(tag) or "") == str(IGNORED)


def _tokenize(rows: list[dict[str, Any]], tokenizer: Any, task: TokenClassification) -> list[Sample]:
    fills = padded.padding_of(tokenizer)
    if not tokenizer.is_fast:
        what = "this tokenizer cannot map tokens to words"
        raise UsageError(what, fix="add its tokenizer.json")
    if not getattr(tokenizer.backend_tokenizer.pre_tokenizer, "add_prefix_space", True):
        raise UsageError(
            "this tokenizer treats every word as the middle of a word: it needs the blanks between words",
            fix="set `add_prefix_space` to true in tokenizer.json and tokenizer_config.json",
        )
    if rows:
        demand_encoder_memory([max((" ".join(example["tokens"]) for example in rows), key=len)], tokenizer)
    result = []
    for example in rows:
        words = example["tokens"]
        whole = tokenizer(words, is_split_into_words=True, return_attention_mask=True, verbose=False)
        cut = len(whole["input_ids"]) > task.context
        encoded = whole
        if cut:
            encoded = tokenizer(words, is_split_into_words=True, return_attention_mask=True, truncation=True,
                                max_length=task.context)  # fmt: skip
        places: dict[int, int] = {}
        for place, word in enumerate(encoded.word_ids()):
            if word is not None:
                places.setdefault(word, place)
        tags = example.get("tags")
        counted = [word for word in places if tags is None or tags[word] != IGNORED]
        known: dict[str, Any] = {"positions": [places[word] for word in counted]}
        if tags is not None:
            known["label"] = [tags[word] for word in counted]
        inputs = {name: np.array(encoded[name], np.int64) for name in fills}
        result.append(Sample(inputs, fills, known, "tokens", cut))
    return result
