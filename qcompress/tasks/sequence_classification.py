"""One answer to each text or pair of texts: a label, several labels, or a number.

Torch is imported only where tensors are made.

Shapes: inputs int64 [batch, longest]; logits [batch, labels], [batch, 1] for a regression.

A result of one sample: `prediction` (index of the largest logit; for several labels a 0 or 1 each, 1 where
the logit is above 0; for a regression the number itself; None where a logit is not finite), and, where the
data have labels, `label` of the same form and `loss`.
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
from qcompress.tasks.examples import Batch, Examined
from qcompress.tasks.labels import MISSING, dataset_names, labels_of, named_outputs, settle, spelling
from qcompress.tasks.padded import PaddedExamples, Sample, collate, kit, length, notes, processor
from qcompress.tasks.scores import agreement, cross_entropy, scores
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
]  # of a task's interface, and the same for all padded samples

KNOWN = ("label",)
"""Fields of a result that no model changes."""

PROBLEMS = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}

BROKEN = 1e-3
"""Largest share of broken lines in a file that GLUE published."""

ZEROS_AND_ONES = ("0", "1", "0.0", "1.0", "false", "true")

AT_ONCE = 1000
"""Texts tokenized together."""


def head(task: SequenceClassification) -> Head:
    """One output for each label, one for a regression."""
    if task.kind == "regression":
        return Head(task.name, ("score",), PROBLEMS["regression"])
    names = labels_of(task).names
    return Head(task.name, names, PROBLEMS[task.kind], any_order=names is not None and task.labels is None)


def settled(task: SequenceClassification, config: dict[str, Any]) -> SequenceClassification:
    """The task with the labels of a checkpoint, in the order of its outputs."""
    if task.kind == "regression":
        return task
    return task.model_copy(update={"labels": settle(labels_of(task).names, config)})


def examples(data: TextData, base: Path, tokenizer: Any, task: SequenceClassification) -> PaddedExamples:
    """Examples for training or calibration; with a limit spread evenly over the whole."""
    found = _read(data, base, task)
    chosen = padded.spread(list(range(len(found))), data.limit)
    return PaddedExamples(_tokenize([found[row] for row in chosen], tokenizer, task), label_array)


def samples(
    data: TextData, base: Path, tokenizer: Any, task: SequenceClassification, limit: int | None
) -> list[Sample]:
    """Evaluation samples in the order of the data, at most `limit` and `data.limit` of them."""
    found = padded.first(_read(data, base, task), limit, data.limit)
    return _tokenize(found, tokenizer, task)


def slices(data: TextData, base: Path, task: SequenceClassification) -> Slices:
    """What `data.slices` say of each example, in the order of the data."""
    return table_slices(data, base, wanted(data, task))


def examine(data: TextData, base: Path, task: SequenceClassification, most: int | None) -> Examined:
    """The first examples, at most so many of each file, as far as they are known without a tokenizer."""
    found = _read(data, base, task, most)
    texts = tuple((one["text"], one["pair"]) if "pair" in one else one["text"] for one in found)
    return Examined(len(found), "label" in found[0], texts)


def label_cells(data: TextData, base: Path, task: SequenceClassification, most: int | None) -> list[Any]:
    """The cells of the labels as the data spell them; none without labels, and for a regression."""
    if data.text is not None or task.kind == "regression":
        return []
    asked = wanted(data, task)
    table = read_table(data, base, replace(asked, columns={"label": asked.columns["label"]}, most=most))
    cells = list(table.columns.get("label", ()))
    if table.names is not None or all(value in (MISSING, None, "") for value in cells):
        return []  # a dataset's own names are names
    places = zip(cells, table.places, strict=True)
    return [one for cell, place in places for one in _several(cell, place)] if task.kind == "multi" else cells


def label_array(samples: Sequence[Sample], longest: int) -> np.ndarray:
    """Labels of some samples: int64 [batch], fp32 [batch, labels] or, for a regression, fp32 [batch]."""
    labels = [sample.known["label"] for sample in samples]
    return np.array(labels, np.int64 if isinstance(labels[0], int) else np.float32)


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean loss, [], as transformers has it for each problem type; the form of the labels says which."""
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
    """The logits of a sample that rows are compared by, [1, labels]."""
    return logits[None]


def measure(batch: Sequence[Sample], logits: np.ndarray) -> list[dict[str, Any]]:
    """Result of each sample; logits [batch, labels]."""
    return [_result(one.known, row, one.kind) for one, row in zip(batch, logits, strict=True)]


def results(
    known: Sequence[Mapping[str, Any]], logits: Sequence[np.ndarray], task: SequenceClassification
) -> list[dict[str, Any]]:
    """The same, from what is known of each sample and its logits [labels]."""
    return [_result(one, row, task.kind) for one, row in zip(known, logits, strict=True)]


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
    """Mean of log(1 + exp(-x)) where the label is 1 and log(1 + exp(x)) where it is 0."""
    return float(np.logaddexp(0, np.where(label == 1, -logits, logits)).mean())


def metrics(
    found: Sequence[Mapping[str, Any]],
    task: SequenceClassification,
    reference: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, float]:
    """Metrics of some results; without labels, agreement with the results of the float model."""
    answers = [result["prediction"] for result in found]
    if "label" in found[0]:
        return scores(task.metrics, [result["label"] for result in found], answers)
    if reference is None:
        return {}
    return {AGREEMENT: agreement([result["prediction"] for result in reference], answers)}


# Reading ------------------------------------------------------------------------------------------


def _read(
    data: TextData, base: Path, task: SequenceClassification, most: int | None = None
) -> list[dict[str, Any]]:
    """Examples as {"text", "pair", "label"}, the latter two where there are any; `most` of each file."""
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
    """The columns that are read: those that the recipe names, those of GLUE, or `text` and `label`."""
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
    flat = [(one, place) for cell, place in zip(cells, places, strict=True) for one in cell]
    outputs = iter(labels.read(*zip(*flat, strict=True), named=known is not None) if flat else ())
    rows = [[next(outputs) for _ in cell] for cell in cells]
    for row, place in zip(rows, places, strict=True):
        if len(set(row)) < len(row):
            raise UsageError(f"{place}: a label is there twice", fix="write each label of a row once")
    return [[int(index in row) for index in range(len(labels.names))] for row in rows]


def _refuse_vectors(cells: Sequence[Sequence[Any]], places: Sequence[str], outputs: int) -> None:
    """Refuse lists that hold a 0 or a 1 for each label: their numbers would be read as indices."""
    if all(len(cell) == outputs and all(spelling(one) in ZEROS_AND_ONES for one in cell) for cell in cells):
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
        raise UsageError(f"{place}: the label {cell!r:.60} is not a number", fix="mend or remove that row")
    return number


def _several(cell: Any, place: str) -> list[Any]:
    """The labels of one example: a list, text with `|` between them, or a whole number, as text would be."""
    if isinstance(cell, str):
        return [name for name in cell.split("|") if name.strip()]
    if isinstance(cell, list):
        return cell
    if isinstance(cell, int) or (isinstance(cell, float) and cell.is_integer()):
        return [cell]
    raise UsageError(
        f"{place}: the labels {cell!r:.60} are not a list", fix="write a list of names or indices"
    )


def _tokenize(found: list[dict[str, Any]], tokenizer: Any, task: SequenceClassification) -> list[Sample]:
    fills, result = padded.padding_of(tokenizer), []
    for start in range(0, len(found), AT_ONCE):
        some = found[start : start + AT_ONCE]
        texts = [one["text"] for one in some]
        pairs = [one["pair"] for one in some] if "pair" in some[0] else None
        options = {"return_attention_mask": True, "verbose": False}
        demand_encoder_memory([*texts, *(pairs or ())], tokenizer)
        whole = tokenizer(texts, pairs, **options)["input_ids"]
        encoded = tokenizer(texts, pairs, truncation=True, max_length=task.context, **options)
        for row, one in enumerate(some):
            inputs = {name: np.array(encoded[name][row], np.int64) for name in fills}
            known = {"label": one["label"]} if "label" in one else {}
            result.append(Sample(inputs, fills, known, task.kind, cut=len(whole[row]) > task.context))
    return result
