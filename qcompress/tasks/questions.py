"""Questions about contexts, from SQuAD's JSON files, tables, and rows of `datasets`. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from qcompress.errors import UsageError
from qcompress.schema.data import Columns
from qcompress.schema.recipe import QuestionAnswering, TextData
from qcompress.tasks.columns import ColumnError
from qcompress.tasks.table import Slices, Wanted, demand_text, read_table, table_slices
from qcompress.tasks.text import read_file

SQUAD = ".json"
"""Suffix of files in SQuAD's format."""

SPECIAL = 8
"""Tokens of a window that are neither the question's nor needed for its context: special ones and room."""


@dataclass(frozen=True)
class Question:
    """One question. `answers`: text and first character in the context of each; empty if it has none in the
    context, None if the data do not say. `place`: source, for messages.
    """

    text: str
    context: str
    answers: tuple[tuple[str, int], ...] | None
    place: str

    def demand_room(self, tokenizer: Any, task: QuestionAnswering) -> None:
        """Raise UsageError if the question and the stride leave no tokens of a window for the context."""
        tokens = len(tokenizer(self.text, add_special_tokens=False, verbose=False)["input_ids"])
        needed = tokens + task.stride + SPECIAL
        if needed > task.context:
            raise UsageError(
                f"{self.place}: the question has {tokens} tokens, and {needed} are needed with the stride of "
                f"{task.stride}, of a context of {task.context}",
                fix=f"write `context: {needed}` or more, or a smaller `stride`",
            )


def read_questions(
    data: TextData, base: Path, task: QuestionAnswering, most: int | None = None
) -> list[Question]:
    """Questions of the data; the first `most` of each file. Raises UsageError, with row and file, for an
    answer that does not stand in the context, and for a question without one unless `task.unanswerable`.
    """
    files = data.table or []
    squad = [name for name in files if name.endswith(SQUAD)]
    if squad and len(squad) < len(files):
        raise UsageError(f"only some of {', '.join(files)} are SQuAD's JSON", fix="name files of one kind")
    if squad:
        questions = [
            question for name in squad for question in islice(_squad(base / name), most)
        ]  # fmt: skip
    else:
        questions = list(_table(data, base, most))
    if not questions:
        raise UsageError(f"{', '.join(files) or data.dataset} has no question", fix="name a larger file")
    for question in questions:
        if question.answers == () and not task.unanswerable:
            raise UsageError(
                f"{question.place}: the question has no answer",
                fix="write `unanswerable: true` under `task`, or remove such questions",
            )
    return questions


def slices_of(data: TextData, base: Path) -> Slices:
    """Values of `data.slices` for each question. Raises UsageError for SQuAD's JSON, which has no columns."""
    if any(name.endswith(SQUAD) for name in data.table or ()):
        raise UsageError("SQuAD's JSON has no columns for `slices`", fix="drop it, or write a .jsonl table")
    return table_slices(data, base, wanted(data))


def wanted(data: TextData) -> Wanted:
    """Columns to read: those that the recipe names, or `question`, `context` and `answers`."""
    named = {role: name for role, name in (data.columns or Columns()).model_dump().items() if name}
    optional = frozenset({"answers"} - named.keys())
    return Wanted({"question": "question", "context": "context", "answers": "answers", **named}, optional)


def _table(data: TextData, base: Path, most: int | None) -> Iterator[Question]:
    asked = replace(wanted(data), most=most)
    table = read_table(data, base, asked)
    answers = table.columns.get("answers", [None] * len(table))
    for place, text, context, cell in zip(
        table.places, table.columns["question"], table.columns["context"], answers, strict=True
    ):
        for role, words in (("question", text), ("context", context)):
            demand_text(words, asked.columns[role], place, role)
            if not words.strip():
                message = f"{place}: the column {asked.columns[role]!r} is empty"
                raise ColumnError(message, fix="correct or remove that row", role=role)
        known = None if "answers" not in table.columns else _answers(cell, context, place)
        yield Question(text, context, known, place)


def _squad(file: Path) -> Iterator[Question]:
    """Questions of a file in SQuAD's format, version 1.1 or 2.0."""
    try:
        articles = json.loads(read_file(file))["data"]
        for article in articles:
            for paragraph in article["paragraphs"]:
                for item in paragraph["qas"]:
                    place, context = f"{file.name}, question {item.get('id')}", paragraph["context"]
                    given = item.get("answers")
                    pairs = None if given is None else {
                        "text": [one["text"] for one in given],
                        "answer_start": [one["answer_start"] for one in given],
                    }  # fmt: skip
                    known = None if pairs is None else _answers(pairs, context, place)
                    yield Question(item["question"], context, known, place)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{file.name} is not in SQuAD's format ({type(error).__name__}: {error})",
            fix="name a file with `data`, `paragraphs` and `qas`, or a table with `columns:`",
        ) from None


def _answers(cell: Any, context: str, place: str) -> tuple[tuple[str, int], ...]:
    """Answers of a cell: a mapping of lists (`text`, `answer_start`) as on the hub, a list of texts, or a
    text. An answer without a place is the first one of its text in the context.
    """
    starts: list[Any] | None = None
    if isinstance(cell, dict):
        cell, starts = cell.get("text"), cell.get("answer_start")
    texts = [cell] if isinstance(cell, str) else cell
    if not isinstance(texts, list) or (starts is not None and len(starts) != len(texts)):
        shown = f"{cell!r:.60}"
        raise UsageError(
            f"{place}: the answers {shown} are not a list of texts", fix="correct or remove that row"
        )
    known = []
    for number, text in enumerate(texts):
        start = context.find(text) if isinstance(text, str) and starts is None else (starts or [-1])[number]
        right = isinstance(text, str) and text and type(start) is int and start >= 0
        if not right or context[start : start + len(text)] != text:
            at = "in the context" if starts is None else f"at character {start} of the context"
            raise UsageError(f"{place}: the answer {text!r:.60} does not stand {at}",
                             fix="correct or remove that row")  # fmt: skip
        known.append((text, start))
    return tuple(known)
