"""Questions and contexts: what is read and refused, windows, answers, SQuAD's metrics, the model's ends."""

from __future__ import annotations

import doctest
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_bert import CLASSES, save_encoder, token_inputs
from transformers import BertForQuestionAnswering
from word_tokenizer import CLS, FIRST, SEP, WORDS, word_tokenizer

from qcompress.errors import UsageError
from qcompress.models import FAMILIES, describe
from qcompress.pipeline.stages.load import fingerprint, load
from qcompress.schema.recipe import Model, QuestionAnswering, TextData
from qcompress.tasks import scores
from qcompress.tasks.question_answering import (
    collate,
    examine,
    examples,
    head,
    joined,
    loss,
    measure,
    metrics,
    results,
    rows,
    samples,
    windows_of,
)
from qcompress.verdict.replicates import REPLICATES

TASK = QuestionAnswering(context=16, stride=2, answer_tokens=3)
CONTEXT = "a good film is in paris a very bad film is in rome anna is very very good"
QUESTION = "is a film in rome"


def squad(folder: Path, answers: Any = None, **more: Any) -> TextData:
    """A file in SQuAD's format with one question, asked twice."""
    given = [{"text": "in rome", "answer_start": CONTEXT.index("in rome")}] if answers is None else answers
    asked = [{"id": name, "question": QUESTION, "answers": given, **more} for name in ("x", "y")]
    content = {"data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": asked}]}]}
    (folder / "dev.json").write_text(json.dumps(content))
    return TextData(table=["dev.json"])


def write(folder: Path, rows: list[dict[str, Any]]) -> TextData:
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextData(table=["dev.jsonl"])


def test_a_long_context_is_read_in_windows_that_overlap(tmp_path: Path) -> None:
    read = samples(squad(tmp_path), tmp_path, word_tokenizer(), TASK, None)
    assert rows(read) == 2 and len(read) == 6 and [window.position for window in read] == [0, 1, 2] * 2
    question, context = ([FIRST + WORDS.index(word) for word in text.split()] for text in (QUESTION, CONTEXT))
    # 8 tokens of the context beside [CLS], 5 of the question and two [SEP]; the next window starts 6 later
    for window, start in zip(read, (0, 6, 12), strict=False):
        expected = [CLS, *question, SEP, *context[start : start + 8], SEP]
        assert list(window.inputs["input_ids"]) == expected
        first, starts, ends = window.spans
        words = [CONTEXT[begin:end] for begin, end in zip(starts, ends, strict=True)]
        assert first == 7 and words == CONTEXT.split()[start : start + 8]
    assert read[0].known["label"] == ["in rome"] and read[1].known == {}
    assert len(samples(squad(tmp_path), tmp_path, word_tokenizer(), TASK, 1)) == 3


@pytest.mark.parametrize(
    "answers",
    [{"text": ["in rome"], "answer_start": [CONTEXT.index("in rome")]}, ["in rome"], "in rome"],
)
def test_a_table_says_the_same_as_squads_file(answers: Any, tmp_path: Path) -> None:
    row = {"question": QUESTION, "context": CONTEXT, "answers": answers}
    table = samples(write(tmp_path, [row]), tmp_path, word_tokenizer(), TASK, None)
    file = samples(squad(tmp_path), tmp_path, word_tokenizer(), TASK, 1)
    assert [window.known for window in table] == [window.known for window in file]
    assert examine(write(tmp_path, [row]), tmp_path, TASK, None).labelled
    assert not examine(write(tmp_path, [{"question": "is", "context": "a"}]), tmp_path, TASK, None).labelled


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": ["in oslo"]}, "dev.jsonl:1: the answer 'in oslo' does not stand in the context"),
        (
            {"answers": {"text": ["a"], "answer_start": [1]}},
            "dev.jsonl:1: the answer 'a' does not stand at",
        ),
        (
            {"answers": {"text": ["a"], "answer_start": []}},
            "dev.jsonl:1: the answers .* are not a list of texts",
        ),
        ({"answers": 7}, "dev.jsonl:1: the answers 7 are not a list of texts"),
        ({"answers": []}, "dev.jsonl:1: the question has no answer"),
        ({"question": " "}, "dev.jsonl:1: the column 'question' is empty"),
        ({"context": None}, "dev.jsonl:1: the column 'context' is not text but None"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_its_place(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = write(tmp_path, [{"question": QUESTION, "context": CONTEXT, "answers": ["a"], **row}])
    with pytest.raises(UsageError, match=message):
        examine(data, tmp_path, TASK, None)


def test_a_file_of_another_format_and_a_question_without_room_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text('{"rows": []}')
    with pytest.raises(UsageError, match=r"dev.json is not in SQuAD's format \(KeyError: 'data'\)"):
        examine(TextData(table=["dev.json"]), tmp_path, TASK, None)
    tight = TASK.model_copy(update={"stride": 6})
    with pytest.raises(UsageError, match="question x: the question has 5 tokens, and 19 are needed"):
        samples(squad(tmp_path), tmp_path, word_tokenizer(), tight, None)
    with pytest.raises(UsageError, match="question x: the answer 'rome' does not stand at character 0"):
        examine(squad(tmp_path, [{"text": "rome", "answer_start": 0}]), tmp_path, TASK, None)


def by_hand(read: list[Any], logits: np.ndarray, null: bool) -> str:
    """The best answer of up to three tokens in any window."""
    best, answer, nothing = -math.inf, "", math.inf
    for window, row in zip(read, logits.astype(np.float64), strict=True):
        nothing = min(nothing, row[0].sum())
        first, starts, ends = window.spans
        for begin in range(len(starts)):
            for end in range(begin, min(begin + 3, len(starts))):
                score = row[first + begin, 0] + row[first + end, 1]
                if score > best:
                    best, answer = score, CONTEXT[starts[begin] : ends[end]]
    return "" if null and nothing > best else answer


@pytest.mark.parametrize("null", [False, True])
def test_the_best_part_of_any_window_is_the_answer(null: bool, tmp_path: Path) -> None:
    task = TASK.model_copy(update={"unanswerable": null})
    read = samples(squad(tmp_path), tmp_path, word_tokenizer(), task, 1)
    empty = 0
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(size=(3, 16, 2)).astype(np.float32)
        logits[:, 0] += 2 * (seed % 2)
        (made,) = joined(measure(read, logits), None)
        assert made["prediction"] == by_hand(read, logits, null)
        empty += made["prediction"] == ""
        known = [{name: made[name] for name in ("label", "context", "windows")}]
        assert joined(results(known, list(logits), task), None) == [made]
    assert (empty > 0) == null
    logits[1, 8, 1] = math.nan
    (broken,) = joined(measure(read, logits), None)
    assert broken["prediction"] is None and all(math.isnan(one) for one in metrics([broken], task).values())


def test_metrics_are_those_of_squad() -> None:
    assert doctest.testmod(scores).failed == 0
    cases = [
        (["The Eiffel Tower"], "eiffel tower.", 1, 1),
        (["in 1887", "1887"], "the year 1887", 0, 2 / 3),
        (["a b c"], "x y", 0, 0),
        ([], "", 1, 1),
        ([], "paris", 0, 0),
        (["paris"], "", 0, 0),
    ]
    for labels, answer, exact, overlap in cases:
        assert scores.exact_match(labels, answer) == exact
        assert scores.answer_f1(labels, answer) == pytest.approx(overlap)
    columns = {"exact_match": [1.0, 0.0, 0.0], "answer_f1": [1.0, 0.5, 0.0]}
    counts = np.array([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0]])
    assert REPLICATES["exact_match"](columns, counts) == pytest.approx([1 / 3, 2 / 3])
    assert REPLICATES["answer_f1"](columns, counts) == pytest.approx([0.5, 2.5 / 3])
    answers = [{"prediction": "a"}, {"prediction": "b"}]
    assert metrics(answers, TASK, [{"prediction": "a"}, {"prediction": "c"}]) == {"agreement": 0.5}


def test_a_window_without_the_answer_learns_the_first_token(tmp_path: Path) -> None:
    read = examples(squad(tmp_path), tmp_path, word_tokenizer(), TASK)
    batch = read.batch(range(3))
    # `in rome` are the words 11 and 12: cut in the second window (6 to 13), where they are tokens 12 and 13
    assert batch["labels"].tolist() == [[0, 0], [12, 13], [0, 0]]
    logits = torch.randn(3, 16, 2, generator=torch.Generator().manual_seed(0))
    mask = batch["attention_mask"].bool().numpy()
    each = []
    for row, labels in enumerate(batch["labels"].tolist()):
        for side, label in enumerate(labels):
            scores_of = logits[row, : mask[row].sum(), side].double().numpy()
            each.append(np.log(np.exp(scores_of).sum()) - scores_of[label])
    assert loss(logits, batch).item() == pytest.approx(np.mean(each), rel=1e-5)


def test_the_model_gives_both_ends_together(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CLASSES, ("bert", TASK.name), BertForQuestionAnswering)
    bare = save_encoder(tmp_path / "bare", text_file, "bert", TASK.name, bare=True)
    assert describe("bert", bare, head(TASK)).new_head == ("qa_outputs.weight", "qa_outputs.bias")
    model = BertForQuestionAnswering.from_pretrained(bare, num_labels=2).eval()
    model.save_pretrained(bare)
    architecture = describe("bert", bare, head(TASK))
    assert architecture.new_head == () and architecture.layers[-1].out_features == 2
    (tmp_path / "load").mkdir()
    load(Model(family="bert", source=str(bare)), bare, fingerprint(bare), tmp_path / "load", head(TASK))
    ours, inputs = FAMILIES["bert"].load_float(bare, tmp_path / "load"), token_inputs("bert", pad="right")
    with torch.no_grad():
        stock, logits = model(**inputs), ours(**inputs).logits
    torch.testing.assert_close(logits[..., 0], stock.start_logits)
    torch.testing.assert_close(logits[..., 1], stock.end_logits)


def test_a_prediction_reads_the_whole_context() -> None:
    windows = windows_of(QUESTION, CONTEXT, word_tokenizer(), TASK)
    assert len(windows) == 3 and collate(windows)["input_ids"].shape == (3, 16)
    (made,) = joined(measure(windows, np.zeros((3, 16, 2), np.float32)), None)
    assert made["prediction"] == "a"
