"""Answers to questions as parts of a context (SQuAD, arXiv:1606.05250).

A sample is one window: the question and a part of its context. The windows of a question overlap by `stride`
tokens and follow each other, and `joined` makes one result of them: `prediction` (the part of the context
with the largest sum of start and end logit, "" for no answer, None if a logit is not finite) and, if the data
have answers, `label` (their texts), `exact_match` and `answer_f1`.

Torch is imported only where tensors are made.

Shapes: inputs int64 [windows, longest]; logits [windows, longest, 2], of the first and of the last token of
the answer; labels int64 [windows, 2], 0 (the first token) for a window without the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompress.models import load_tokenizer as reader
from qcompress.models.architecture import Head
from qcompress.schema.recipe import QuestionAnswering, TextData
from qcompress.schema.tasks import AGREEMENT
from qcompress.tasks import padded
from qcompress.tasks.examples import Batch, Examined
from qcompress.tasks.padded import PaddedExamples, Sample, collate, kit, length, notes, processor
from qcompress.tasks.questions import Question, read_questions, slices_of
from qcompress.tasks.scores import agreement, answer_f1, exact_match
from qcompress.tasks.table import Slices
from qcompress.tasks.text import demand_encoder_memory

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

KNOWN = ("label", "context", "windows")
"""Fields of a result that do not depend on the model. `windows` has for each window the place of its first
token of the context, and the first and last character of each token.
"""

Spans = tuple[int, list[int], list[int]]
"""One window's entry of `windows`."""


@dataclass(frozen=True)
class Window(Sample):
    """A question and a part of its context. `position`: number of the window among those of its question."""

    position: int = 0
    spans: Spans = (0, [], [])
    task: QuestionAnswering = field(default_factory=QuestionAnswering)


def head(task: QuestionAnswering) -> Head:
    """Two outputs at every position: first and last token of the answer."""
    return Head(task.name, ("start", "end"))


def settled(task: QuestionAnswering, config: dict[str, Any]) -> QuestionAnswering:
    """The task unchanged: it takes no labels from a checkpoint."""
    return task


def examples(data: TextData, base: Path, tokenizer: Any, task: QuestionAnswering) -> PaddedExamples:
    """Windows for training or calibration; with a limit questions spread evenly over the data."""
    questions = padded.spread(read_questions(data, base, task), data.limit)
    return PaddedExamples(_windows(questions, tokenizer, task, training=True), label_array)


def label_array(samples: Sequence[Sample], longest: int) -> np.ndarray:
    """Label array of windows, int64 [batch, 2]."""
    return np.array([sample.known["label"] for sample in samples], np.int64)


def samples(
    data: TextData, base: Path, tokenizer: Any, task: QuestionAnswering, limit: int | None
) -> list[Sample]:
    """Windows of the questions in the order of the data, at most `limit` and `data.limit` questions."""
    questions = padded.first(read_questions(data, base, task), limit, data.limit)
    return _windows(questions, tokenizer, task)


def rows(samples: Sequence[Window]) -> int:
    """Number of questions from which these windows are."""
    return sum(sample.position == 0 for sample in samples)


def slices(data: TextData, base: Path, task: QuestionAnswering) -> Slices:
    """Values of `data.slices` for each question, in the order of the data."""
    return slices_of(data, base)


def examine(data: TextData, base: Path, task: QuestionAnswering, most: int | None) -> Examined:
    """Read the first `most` questions of each file, without a tokenizer."""
    questions = read_questions(data, base, task, most)
    texts = tuple((question.text, question.context) for question in questions)
    return Examined(len(questions), questions[0].answers is not None, texts)


def label_cells(data: TextData, base: Path, task: QuestionAnswering, most: int | None) -> list[Any]:
    """Empty: an answer is a text in every reading."""
    return []


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of the first and of the last token of the answers, []; padding cannot be chosen."""
    import torch.nn.functional as F

    padding = batch["attention_mask"].unsqueeze(-1) == 0
    scores = logits.float().masked_fill(padding, float("-inf"))
    return F.cross_entropy(scores, padded.labels_in(batch))


def logits_of(task: QuestionAnswering, config: dict[str, Any]) -> tuple[int, int]:
    """Largest number of positions of one window, and logits of each; `config` is the model's config.json."""
    return task.context, 2


def compared(sample: Sample, logits: np.ndarray) -> np.ndarray:
    """Logits of a window for the comparison of rows, [positions, 2], without padding."""
    return logits[: sample.length]


def measure(batch: Sequence[Window], logits: np.ndarray) -> list[dict[str, Any]]:
    """Results of the windows, for `joined`; logits [windows, longest, 2]."""
    return [
        {**window.known, "position": window.position, **_best(row, window.spans, window.task)}
        for window, row in zip(batch, logits, strict=True)
    ]


def results(
    known: Sequence[Mapping[str, Any]], logits: Sequence[np.ndarray], task: QuestionAnswering
) -> list[dict[str, Any]]:
    """Results of the windows, for `joined`, from the known fields of each question and the logits [longest,
    2] of each window.
    """
    windows = [
        ({**question, "position": position}, spans)
        for question in known
        for position, spans in enumerate(question["windows"])
    ]
    return [
        {**fields, **_best(row, spans, task)} for (fields, spans), row in zip(windows, logits, strict=True)
    ]


def _best(logits: np.ndarray, spans: Spans, task: QuestionAnswering) -> dict[str, Any]:
    """Best answer of one window as {"score", "span", "null"}: the sum of its two logits, its first and last
    character, and the sum of the logits of the first token, which stands for no answer.
    """
    first, starts, ends = spans
    tokens = logits[first : first + len(starts)].astype(np.float64)
    if not np.isfinite(logits[: first + len(starts)]).all():
        return {"score": None, "span": None, "null": None}
    sums = tokens[:, None, 0] + tokens[None, :, 1]
    allowed = np.triu(np.ones_like(sums, bool)) & ~np.triu(np.ones_like(sums, bool), task.answer_tokens)
    sums[~allowed] = -np.inf
    begin, end = np.unravel_index(sums.argmax(), sums.shape)
    null = float(logits[0].astype(np.float64).sum()) if task.unanswerable else -np.inf
    return {"score": float(sums[begin, end]), "span": (starts[begin], ends[end]), "null": null}


def joined(
    windows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """One result for each question, from the results of its windows; `reference` is not used."""
    starts = [number for number, window in enumerate(windows) if window["position"] == 0]
    return [_result(windows[start:end]) for start, end in pairwise([*starts, len(windows)])]


def _result(windows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    known = {name: windows[0][name] for name in KNOWN if name in windows[0]}
    broken = any(window["score"] is None for window in windows)
    answer = None if broken else _answer(known["context"], windows)
    result = {**known, "prediction": answer}
    if "label" not in known:
        return result
    measures = {"exact_match": exact_match, "answer_f1": answer_f1}
    scores = {
        name: float("nan") if answer is None else measure(known["label"], answer)
        for name, measure in measures.items()
    }
    return result | scores


def _answer(context: str, windows: Sequence[Mapping[str, Any]]) -> str:
    """The best part of the context in any window; "" if in every window no answer has a larger score."""
    best = max(windows, key=lambda window: window["score"])
    if min(window["null"] for window in windows) > best["score"]:
        return ""
    return context[best["span"][0] : best["span"][1]]


def metrics(
    results: Sequence[Mapping[str, Any]],
    task: QuestionAnswering,
    reference: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, float]:
    """Metrics of results; without answers, agreement with the float model's results (`reference`)."""
    if "label" in results[0]:
        return {name: sum(result[name] for result in results) / len(results) for name in task.metrics}
    if reference is None:
        return {}
    both = ([result["prediction"] for result in side] for side in (reference, results))
    return {AGREEMENT: agreement(*both)}


def windows_of(question: str, context: str, tokenizer: Any, task: QuestionAnswering) -> list[Sample]:
    """Windows of one question, for a prediction."""
    return _windows([Question(question, context, None, "the question")], tokenizer, task)


# Windows ------------------------------------------------------------------------------------------


def _windows(
    questions: Sequence[Question], tokenizer: Any, task: QuestionAnswering, training: bool = False
) -> list[Sample]:
    """Windows of the questions. Raises UsageError for a question that leaves no room for its context."""
    fills, windows = padded.padding_of(tokenizer), []
    demand_encoder_memory([question.context for question in questions], tokenizer)
    for question in questions:
        question.demand_room(tokenizer, task)
        encoded = tokenizer(
            question.text, question.context, truncation="only_second", max_length=task.context,
            stride=task.stride, return_overflowing_tokens=True, return_offsets_mapping=True,
            return_attention_mask=True, verbose=False,
        )  # fmt: skip
        parts = [_spans(encoded, number) for number in range(len(encoded["input_ids"]))]
        for number, spans in enumerate(parts):
            inputs = {name: np.array(encoded[name][number], np.int64) for name in fills}
            known: dict[str, Any] = {}
            if training and question.answers is not None:
                known = {"label": _places(question, spans)}
            elif not training and number == 0:
                answers = question.answers
                known = {"context": question.context, "windows": parts}
                known |= {} if answers is None else {"label": [text for text, _ in answers]}
            windows.append(Window(inputs, fills, known, "tokens", position=number, spans=spans, task=task))
    return windows


def _spans(encoded: Any, number: int) -> Spans:
    """Place of the first token of the context in a window, and first and last character of each token."""
    places = [place for place, owner in enumerate(encoded.sequence_ids(number)) if owner == 1]
    offsets = [encoded["offset_mapping"][number][place] for place in places]
    return places[0], [start for start, _ in offsets], [end for _, end in offsets]


def _places(question: Question, spans: Spans) -> tuple[int, int]:
    """First and last token of the first answer in a window; 0 for both if it is not in the window as a
    whole.
    """
    first, starts, ends = spans
    for text, start in (question.answers or ())[:1]:
        inside = [
            place
            for place, (begin, end) in enumerate(zip(starts, ends, strict=True))
            if begin < start + len(text) and end > start
        ]
        if inside and starts[0] <= start and ends[-1] >= start + len(text):
            return first + inside[0], first + inside[-1]
    return 0, 0
