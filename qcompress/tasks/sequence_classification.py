"""Classification or regression of a text or a pair of texts: a label, several labels, or a number.

Torch is imported only where tensors are made.

Shapes: inputs int64 [batch, longest]; logits [batch, labels], [batch, 1] for a regression.

A result of one sample: `prediction` (index of the largest logit; for several labels a 0 or 1 each, 1 if the
logit is above 0; for a regression the number itself; None if a logit is not finite), and, if the data have
labels, `label` in the form of the prediction and `loss`.
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
from qcompress.schema.glue import GLUE
from qcompress.schema.recipe import SequenceClassification, TextData
from qcompress.schema.tasks import AGREEMENT
from qcompress.tasks import padded
from qcompress.tasks.examples import Batch, Examined, joined, rows
from qcompress.tasks.labels import MISSING, dataset_names, labels_of, named_outputs, settle, spelling
from qcompress.tasks.padded import PaddedExamples, Sample, collate, kit, length, notes, processor
from qcompress.tasks.scores import agreement, cross_entropy, scores
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

KNOWN = ("label",)
"""Fields of a result that do not depend on the model."""

PROBLEMS = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}

BROKEN = 1e-3
"""Largest share of broken lines in a file published by GLUE."""

ZEROS_AND_ONES = ("0", "1", "0.0", "1.0", "false", "true")

AT_ONCE = 1000
"""Number of texts tokenized together."""


def head(task: SequenceClassification) -> Head:
    """One output for each label, one for a regression."""
    if task.kind == "regression":
        return Head(task.name, ("score",), PROBLEMS["regression"])
    names = labels_of(task).names
    return Head(task.name, names, PROBLEMS[task.kind], any_order=names is not None and task.labels is None)


def settled(task: SequenceClassification, config: dict[str, Any]) -> SequenceClassification:
    """Task with the labels of a checkpoint, in the order of its outputs."""
    if task.kind == "regression":
        return task
    return task.model_copy(update={"labels": settle(labels_of(task).names, config)})


def examples(data: TextData, base: Path, tokenizer: Any, task: SequenceClassification) -> PaddedExamples:
    """Examples for training or calibration; with a limit spread evenly over the data."""
    rows = _read(data, base, task)
    chosen = padded.spread(list(range(len(rows))), data.limit)
    return PaddedExamples(_tokenize([rows[row] for row in chosen], tokenizer, task), label_array)


def samples(
    data: TextData, base: Path, tokenizer: Any, task: SequenceClassification, limit: int | None
) -> list[Sample]:
    """Evaluation samples in the order of the data, at most `limit` and `data.limit` of them."""
    rows = padded.first(_read(data, base, task), limit, data.limit)
    return _tokenize(rows, tokenizer, task)


def slices(data: TextData, base: Path, task: SequenceClassification) -> Slices:
    """Values of `data.slices` for each example, in the order of the data."""
    return table_slices(data, base, wanted(data, task))


def examine(data: TextData, base: Path, task: SequenceClassification, most: int | None) -> Examined:
    """Read the first `most` examples of each file, without a tokenizer."""
    rows = _read(data, base, task, most)
    texts = tuple((row["text"], row["pair"]) if "pair" in row else row["text"] for row in rows)
    return Examined(len(rows), "label" in rows[0], texts)


def label_cells(data: TextData, base: Path, task: SequenceClassification, most: int | None) -> list[Any]:
    """Label cells as written in the data; empty without labels, and for a regression."""
    if data.text is not None or task.kind == "regression":
        return []
    asked = wanted(data, task)
    table = read_table(data, base, replace(asked, columns={"label": asked.columns["label"]}, most=most))
    cells = list(table.columns.get("label", ()))
    if table.names is not None or all(value in (MISSING, None, "") for value in cells):
        return []  # the dataset has names for its integers
    places = zip(cells, table.places, strict=True)
    return (
        [label for cell, place in places for label in _several(cell, place)]
        if task.kind == "multi"
        else cells
    )


def label_array(samples: Sequence[Sample], longest: int) -> np.ndarray:
    """Label array of samples: int64 [batch], fp32 [batch, labels] or, for a regression, fp32 [batch]."""
    labels = [sample.known["label"] for sample in samples]
    return np.array(labels, np.int64 if isinstance(labels[0], int) else np.float32)


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean loss, [], as in transformers for each problem type, which the form of the labels determines."""
    import torch.nn.functional as F

    labels, logits = padded.labels_in(batch), logits.float()
    if not labels.is_floating_point():
        return F.cross_entropy(logits, labels)
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.mse_loss(logits.squeeze(-1), labels)


def logits_of(task: SequenceClassification, config: dict[str, Any]) -> tuple[int, int]:
    """One position, and an output for each label; `config` is the model's config.json."""
    return 1, 1 if task.kind == "regression" else len(labels_of(task).names or named_outputs(config))


def compared(sample: Sample, logits: np.ndarray) -> np.ndarray:
    """Logits of a sample for the comparison of rows, [1, labels]."""
    return logits[None]


def measure(batch: Sequence[Sample], logits: np.ndarray) -> list[dict[str, Any]]:
    """Results of the samples; logits [batch, labels]."""
    return [_result(sample.known, row, sample.kind) for sample, row in zip(batch, logits, strict=True)]


def results(
    known: Sequence[Mapping[str, Any]], logits: Sequence[np.ndarray], task: SequenceClassification
) -> list[dict[str, Any]]:
    """Results from the known fields of each sample and its logits [labels]."""
    return [_result(fields, row, task.kind) for fields, row in zip(known, logits, strict=True)]


def _result(known: Mapping[str, Any], logits: np.ndarray, kind: str) -> dict[str, Any]:
    label, scored = known.get("label"), logits.astype(np.float64)
    finite, error = bool(np.isfinite(scored).all()), math.nan
    answer: Any = None
    if finite and kind == "regression":
        answer = float(scored[0])
        error = math.nan if label is None else (answer - label) ** 2
    elif finite and kind == "multi":
        answer = [int(logit > 0) for logit in scored]
        error = math.nan if label is None else _binary_cross_entropy(scored, np.array(label))
    elif finite:
        answer = int(scored.argmax())
        error = math.nan if label is None else cross_entropy(scored, label)
    result = {**known, "prediction": answer}
    return result if label is None else {**result, "loss": error}


def _binary_cross_entropy(logits: np.ndarray, label: np.ndarray) -> float:
    """Mean of log(1 + exp(-x)) for labels 1 and log(1 + exp(x)) for labels 0."""
    return float(np.logaddexp(0, np.where(label == 1, -logits, logits)).mean())


def metrics(
    results: Sequence[Mapping[str, Any]],
    task: SequenceClassification,
    reference: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, float]:
    """Metrics of results; without labels, agreement with the float model's results (`reference`)."""
    answers = [result["prediction"] for result in results]
    if "label" in results[0]:
        return scores(task.metrics, [result["label"] for result in results], answers)
    if reference is None:
        return {}
    return {AGREEMENT: agreement([result["prediction"] for result in reference], answers)}


# Reading ------------------------------------------------------------------------------------------


def _read(
    data: TextData, base: Path, task: SequenceClassification, most: int | None = None
) -> list[dict[str, Any]]:
    """Examples as {"text", "pair", "label"}, the latter two if present; the first `most` of each file."""
    if data.text is not None:
        return [{"text": line} for line in read_lines(data, base, most)]
    asked = replace(wanted(data, task), most=most)
    table = read_table(data, base, asked)
    columns = dict(table.columns)
    if "label" in columns and all(value in (MISSING, None, "") for value in columns["label"]):
        del columns["label"]
    if "label" in columns:
        columns["label"] = _labels(table, task)
    for role in ("text", "pair"):
        for place, cell in zip(table.places, columns.get(role, ()), strict=False):
            demand_text(cell, asked.columns[role], place, role)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def wanted(data: TextData, task: SequenceClassification) -> Wanted:
    """Columns to read: those that the recipe names, those of GLUE, or `text` and `label`."""
    named = {role: name for role, name in (data.columns or Columns()).model_dump().items() if name}
    if task.glue is None:
        optional = frozenset() if "label" in named else frozenset({"label"})
        return Wanted({"text": "text", "label": "label", **named}, optional)
    glue = GLUE[task.glue]
    published = data.columns is None and all(name.endswith(".tsv") for name in data.table or ("",))
    return Wanted(
        {**(glue.tsv if published else glue.hub), **named},
        frozenset() if "label" in named else frozenset({"label"}),
        header=glue.header if published else None,
        broken=BROKEN if published else 0.0,
    )


def _labels(table: Table, task: SequenceClassification) -> list[Any]:
    if task.kind == "regression":
        return [
            _number(cell, place) for cell, place in zip(table.columns["label"], table.places, strict=True)
        ]
    labels, cells, places = labels_of(task), table.columns["label"], table.places
    if task.kind == "multi":
        cells = [_several(cell, place) for cell, place in zip(cells, places, strict=True)]
    known = table.names if task.glue is None else None
    cells = dataset_names(known, labels, cells)
    if task.kind == "single":
        return labels.read(cells, places, named=known is not None)
    if labels.names is None:
        raise UsageError("the model's labels have no names", fix="name them under `task.labels`")
    _refuse_vectors(cells, places, len(labels.names))
    flat = [(label, place) for cell, place in zip(cells, places, strict=True) for label in cell]
    outputs = iter(labels.read(*zip(*flat, strict=True), named=known is not None) if flat else ())
    rows = [[next(outputs) for _ in cell] for cell in cells]
    for row, place in zip(rows, places, strict=True):
        if len(set(row)) < len(row):
            raise UsageError(f"{place}: a label is repeated", fix="write each label of a row once")
    return [[int(index in row) for index in range(len(labels.names))] for row in rows]


def _refuse_vectors(cells: Sequence[Sequence[Any]], places: Sequence[str], outputs: int) -> None:
    """Refuse lists with a 0 or a 1 for each label: their numbers would be read as indices."""
    if all(
        len(cell) == outputs and all(spelling(value) in ZEROS_AND_ONES for value in cell) for cell in cells
    ):
        raise UsageError(
            f"{places[0]}: every row has {outputs} numbers 0 or 1, one for each label, and a list names the "
            "labels that apply",
            fix="write the names or the indices of the labels that apply, such as [0, 2] for [1, 0, 1]",
        )


def _number(cell: Any, place: str) -> float:
    try:
        number = math.nan if cell is None or isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{place}: the label {cell!r:.60} is not a number", fix="correct or remove that row")
    return number


def _several(cell: Any, place: str) -> list[Any]:
    """Labels of one example: a list, text separated by `|`, or a single whole number."""
    if isinstance(cell, str):
        return [name for name in cell.split("|") if name.strip()]
    if isinstance(cell, list):
        return cell
    if isinstance(cell, int) or (isinstance(cell, float) and cell.is_integer()):
        return [cell]
    raise UsageError(
        f"{place}: the labels {cell!r:.60} are not a list", fix="write a list of names or indices"
    )


def _tokenize(rows: list[dict[str, Any]], tokenizer: Any, task: SequenceClassification) -> list[Sample]:
    fills, result = padded.padding_of(tokenizer), []
    for start in range(0, len(rows), AT_ONCE):
        chunk = rows[start : start + AT_ONCE]
        texts = [example["text"] for example in chunk]
        pairs = [example["pair"] for example in chunk] if "pair" in chunk[0] else None
        options = {"return_attention_mask": True, "verbose": False}
        demand_encoder_memory([*texts, *(pairs or ())], tokenizer)
        whole = tokenizer(texts, pairs, **options)["input_ids"]
        encoded = tokenizer(texts, pairs, truncation=True, max_length=task.context, **options)
        for row, example in enumerate(chunk):
            inputs = {name: np.array(encoded[name][row], np.int64) for name in fills}
            known = {"label": example["label"]} if "label" in example else {}
            result.append(Sample(inputs, fills, known, task.kind, cut=len(whole[row]) > task.context))
    return result
