"""Embeddings of texts: what is read and refused, the loss of scored pairs, results and metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from word_tokenizer import CLS, FIRST, SEP, WORDS, word_tokenizer

from qcompress.errors import UsageError
from qcompress.recipe.load import load_recipe
from qcompress.schema.recipe import FeatureExtraction, Recipe, TextData
from qcompress.tasks import TASKS
from qcompress.tasks.examples import apart
from qcompress.tasks.feature_extraction import (
    collate,
    examine,
    examples,
    joined,
    logits_of,
    loss,
    measure,
    metrics,
    results,
    rows,
    samples,
    slices,
)
from qcompress.verdict.replicates import REPLICATES

TASK = FeatureExtraction(context=6)
GOOD, BAD, FILM, VERY = (FIRST + WORDS.index(word) for word in ("good", "bad", "film", "very"))
PAIRS = [("good film", "bad film", 1.0), ("very good", "good", 4.0), ("bad", "very very bad", 2.5)]


def write(folder: Path, lines: list[dict[str, Any]], **options: Any) -> TextData:
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return TextData(table=["data.jsonl"], **options)


def scored(folder: Path, **options: Any) -> TextData:
    lines = [dict(zip(("text", "text_pair", "score"), pair, strict=True)) for pair in PAIRS]
    return write(folder, lines, **options)


def test_each_text_of_a_pair_is_a_sample_by_itself(tmp_path: Path) -> None:
    read = samples(scored(tmp_path), tmp_path, word_tokenizer(), TASK, None)
    inputs = [list(sample.inputs["input_ids"]) for sample in read]
    assert inputs[:2] == [[CLS, GOOD, FILM, SEP], [CLS, BAD, FILM, SEP]]
    assert inputs[2:4] == [[CLS, VERY, GOOD, SEP], [CLS, GOOD, SEP]]
    assert all(not sample.inputs["token_type_ids"].any() for sample in read)
    assert rows(read) == 3 and rows(samples(scored(tmp_path), tmp_path, word_tokenizer(), TASK, 2)) == 2
    assert examine(scored(tmp_path), tmp_path, TASK, None).labelled


def test_texts_alone_and_pairs_without_scores_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("good film\n\nbad\n", encoding="utf-8")
    lines = examine(TextData(text=["texts.txt"]), tmp_path, TASK, None)
    assert lines.rows == 2 and not lines.labelled and lines.texts == ("good film", "bad")
    unscored = write(tmp_path, [{"text": a, "text_pair": b, "part": "x"} for a, b, _ in PAIRS])
    assert not examine(unscored, tmp_path, TASK, None).labelled
    one = unscored.model_copy(update={"slices": ["part"]})
    assert slices(one, tmp_path, TASK).columns == {"part": ["x"] * 3}
    assert rows(samples(unscored, tmp_path, word_tokenizer(), TASK, None)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": None}, r"data.jsonl:2: the pair has no score in the column 'score'"),
        ({"score": "high"}, r"data.jsonl:2: the pair has the score 'high', which is not a number"),
        ({"score": True}, r"data.jsonl:2: the pair has the score True, which is not a number"),
        ({"score": "nan"}, r"data.jsonl:2: the pair has the score 'nan', which is not a number"),
        ({"text": " "}, r"data.jsonl:2: the column 'text' is empty"),
        ({"text_pair": ""}, r"data.jsonl:2: the column 'text_pair' is empty"),
        ({"text_pair": 7}, r"data.jsonl:2: the column 'text_pair' is not text but 7"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_its_place(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    lines = [dict(zip(("text", "text_pair", "score"), pair, strict=True)) for pair in PAIRS]
    lines[1] |= change
    with pytest.raises(UsageError, match=message) as caught:
        examine(write(tmp_path, lines), tmp_path, TASK, None)
    assert caught.value.fix == "correct or remove that row"


def test_a_score_needs_two_texts(tmp_path: Path) -> None:
    data = write(tmp_path, [{"text": "good", "score": 1}])
    with pytest.raises(UsageError, match=r"data.jsonl:1: a score without a second text") as caught:
        examine(data, tmp_path, TASK, None)
    assert "columns: {text_pair: ...}" in caught.value.fix


def test_the_loss_is_the_squared_difference_of_cosine_and_score(tmp_path: Path) -> None:
    read = examples(scored(tmp_path), tmp_path, word_tokenizer(), TASK)
    assert len(read) == 3 and list(read.lengths) == [4, 4, 5]
    batch = read.batch([2, 0])
    assert batch["labels"].tolist() == [0.5, 0.0]  # of 1 to 4: 2.5 and 1
    assert batch["input_ids"][:, 1].tolist() == [BAD, VERY, GOOD, BAD]
    embeddings = torch.tensor([[3.0, 4.0], [4.0, 3.0], [1.0, 0.0], [1.0, 1.0]])
    expected = ((24 / 25 - 0.5) ** 2 + (1 / math.sqrt(2)) ** 2) / 2
    assert loss(embeddings, batch).item() == pytest.approx(expected)
    texts = apart(read)
    assert len(texts) == 6 and "labels" not in texts.batch([0, 5])
    with pytest.raises(UsageError, match="no scores"):
        loss(embeddings, texts.batch([0]))


def test_cosines_of_pairs_are_ranked_and_a_broken_one_gives_no_metric(tmp_path: Path) -> None:
    read = samples(scored(tmp_path), tmp_path, word_tokenizer(), TASK, None)
    embeddings = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    made = joined(measure(read, embeddings), None)
    pairs = embeddings.astype(np.float64).reshape(3, 2, 5)
    expected = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs]
    assert [one["prediction"] for one in made] == pytest.approx(expected)
    scores = [score for *_, score in PAIRS]
    assert metrics(made, TASK) == pytest.approx({
        "cosine_spearman": stats.spearmanr(scores, expected).statistic,
        "cosine_pearson": stats.pearsonr(scores, expected).statistic,
    })  # fmt: skip
    columns, once = {name: [one[name] for one in made] for name in made[0]}, np.ones((1, 3))
    for name, value in metrics(made, TASK).items():
        assert REPLICATES[name](columns, once) == pytest.approx([value])
    again = joined(results([{"label": score} for score in scores], list(embeddings), TASK), None)
    assert again == made
    embeddings[3, 0] = math.inf
    broken = metrics(joined(measure(read, embeddings), None), TASK)
    assert all(math.isnan(value) for value in broken.values())


def test_without_scores_a_row_agrees_by_the_cosine_with_the_float_embeddings(tmp_path: Path) -> None:
    data = write(tmp_path, [{"text": a, "text_pair": b} for a, b, _ in PAIRS])
    read = samples(data, tmp_path, word_tokenizer(), TASK, None)
    random = np.random.default_rng(1)
    reference = random.normal(size=(6, 5)).astype(np.float32)
    moved = reference + 0.1 * random.normal(size=(6, 5)).astype(np.float32)
    known = joined(measure(read, reference), None)
    made = joined(measure(read, moved), known)
    lengths = np.linalg.norm(reference, axis=1) * np.linalg.norm(moved, axis=1)
    each = (reference * moved).sum(1) / lengths
    assert [one["cosine"] for one in made] == pytest.approx(np.reshape(each, (3, 2)).mean(1), abs=1e-6)
    assert metrics(known, TASK, known) == {"agreement": 1.0} and metrics(made, TASK) == {}
    assert metrics(made, TASK, known)["agreement"] == pytest.approx(np.mean(each), abs=1e-6)
    columns = {"cosine": [one["cosine"] for one in made]}
    drawn = REPLICATES["agreement"](columns, np.array([[1.0, 1.0, 1.0], [3.0, 0.0, 0.0]]))
    assert drawn == pytest.approx([np.mean(columns["cosine"]), columns["cosine"][0]])


def test_the_width_is_that_of_the_hidden_states() -> None:
    assert logits_of(TASK, {"hidden_size": 24}) == (1, 24) and logits_of(TASK, {"dim": 8}) == (1, 8)


def test_names_of_other_tools_are_accepted_and_the_resolved_recipe_writes_ours(tmp_path: Path) -> None:
    assert TASKS["feature-extraction"].collate is collate
    names = {"text-generation": "causal-lm", "text-classification": "sequence-classification",
             "ner": "token-classification", "sentence-similarity": "feature-extraction"}  # fmt: skip
    for name, ours in names.items():
        data = {"evaluate": {"dev": {"text": ["dev.txt"]}}}
        common = {"name": "x", "model": {"family": "bert", "source": "m"}, "data": data}
        for written in (name, {"name": name}):
            recipe = Recipe.model_validate({**common, "task": written, "format": "w8a8"})
            assert recipe.model_dump()["task"]["name"] == ours
    (tmp_path / "dev.txt").write_text("good\n")
    (tmp_path / "base.yaml").write_text(
        "name: x\nmodel: {family: bert, source: .}\ntask: {name: sentence-similarity, context: 32}\n"
        "data: {calibration: {text: [dev.txt]}, evaluate: {dev: {text: [dev.txt]}}}\nformat: w8a8\n"
    )
    (tmp_path / "top.yaml").write_text("extends: base.yaml\ntask: {name: feature-extraction, pooling: cls}\n")
    task = load_recipe(tmp_path / "top.yaml").recipe.task
    assert (task.name, task.context, task.pooling) == ("feature-extraction", 32, "cls")
