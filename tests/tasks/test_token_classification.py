"""Tagging words: which sub-token carries a label, and what is learned and measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertConfig, BertForTokenClassification
from word_tokenizer import CLS, FIRST, PAD, SEP, WORDS, word_tokenizer

from qcompress.errors import UsageError
from qcompress.models.architecture import Head
from qcompress.schema.recipe import TextData, TokenClassification
from qcompress.tasks.token_classification import (
    collate,
    compared,
    examples,
    head,
    logits_of,
    loss,
    measure,
    metrics,
    notes,
    results,
    samples,
    settled,
)

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
ROWS = [
    {"tokens": ["anna", "is", "in", "paris-rome"], "tags": ["B-PER", "O", "O", "B-LOC"]},
    {"tokens": ["a-very-bad", "film"], "tags": [0, -100]},
]
ANNA, IS, IN, PARIS, ROME = (FIRST + WORDS.index(word) for word in ("anna", "is", "in", "paris", "rome"))


def task(**options: Any) -> TokenClassification:
    return TokenClassification(**{"labels": TAGS, "context": 16, **options})


def write(folder: Path, rows: list[dict[str, Any]]) -> TextData:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TextData(table=["data.jsonl"])


def test_the_first_sub_token_of_a_word_carries_its_label(tmp_path: Path) -> None:
    example_set = examples(write(tmp_path, ROWS), tmp_path, word_tokenizer(), task())
    batch = example_set.batch([0, 1])
    assert batch["input_ids"].tolist()[0] == [CLS, ANNA, IS, IN, PARIS, ROME, SEP]
    assert batch["labels"].tolist() == [[-100, 1, 0, 0, 3, -100, -100], [-100, 0] + [-100] * 5]
    assert batch["input_ids"][1, -1] == PAD and batch["attention_mask"].sum(1).tolist() == [7, 6]
    assert [sample.known["positions"] for sample in example_set.samples] == [[1, 2, 3, 4], [1]]
    assert batch["token_type_ids"].shape == batch["labels"].shape == (2, 7)


def test_words_that_are_cut_lose_their_labels_and_are_counted(tmp_path: Path) -> None:
    sample_list = samples(write(tmp_path, ROWS), tmp_path, word_tokenizer(), task(context=5), None)
    assert collate(sample_list)["input_ids"].tolist()[0] == [CLS, ANNA, IS, IN, SEP]
    assert sample_list[0].known == {"positions": [1, 2, 3], "label": [1, 0, 0]}
    assert notes(sample_list) == ["2 of 2 examples are cut at 5 tokens"]


def test_words_may_have_no_tags(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("anna is in paris-rome\n")
    for data in (TextData(text=["a.txt"]), write(tmp_path, [{"tokens": ROWS[0]["tokens"]}])):
        (sample,) = samples(data, tmp_path, word_tokenizer(), task(), None)
        assert sample.known == {"positions": [1, 2, 3, 4]}
        batch = examples(data, tmp_path, word_tokenizer(), task()).batch([0])
        assert "labels" not in batch
        with pytest.raises(UsageError, match="the training data have no labels"):
            loss(torch.zeros(1, 7, 5), batch)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a"], "tags": ["B-ORG"]}, "have the labels B-ORG, and the model has O, B-PER"),
        ({"tokens": ["a"], "tags": [5]}, "data.jsonl:1: 5 is not the name or the index of a label"),
        ({"tokens": ["a", "film"], "tags": [0]}, "data.jsonl:1: 2 words and 1 tags"),
        ({"tokens": "a film", "tags": [0]}, "data.jsonl:1: 'a film' is not a list"),
        ({"tokens": [], "tags": []}, "data.jsonl:1: the words are an empty list"),
        ({"tokens": [1], "tags": [0]}, "data.jsonl:1: the column 'tokens' is not text but 1"),
        ({"words": ["a"]}, "data.jsonl has the columns words, and not 'tokens'"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        samples(write(tmp_path, [row]), tmp_path, word_tokenizer(), task(), None)
    assert refused.value.fix


def test_a_tokenizer_that_loses_the_words_is_refused(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    with pytest.raises(UsageError, match="treats every word as the middle of a word"):
        samples(write(tmp_path, ROWS), tmp_path, tokenizer, task(), None)


def test_the_loss_is_that_of_transformers_and_so_is_the_samples_sum(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=FIRST + len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16, pad_token_id=PAD, num_labels=5,
    )  # fmt: skip
    model = BertForTokenClassification(config).eval()
    example_set = examples(write(tmp_path, ROWS), tmp_path, word_tokenizer(), task())
    batch = example_set.batch([0, 1])
    with torch.no_grad():
        stock = model(**batch)
    torch.testing.assert_close(loss(stock.logits, batch), stock.loss, rtol=1e-6, atol=0)  # the order of sums
    each = measure(example_set.samples, stock.logits.numpy())
    assert sum(one["loss"] for one in each) == pytest.approx(5 * stock.loss.item(), rel=1e-5)
    assert [len(one["prediction"]) for one in each] == [4, 1]
    assert compared(example_set.samples[1], stock.logits[1].numpy()).shape == (6, 5)
    assert logits_of(task(), {}) == (16, 5)


def hot(*labels: int) -> np.ndarray:
    """Logits [positions, 5] whose largest is each label's."""
    return 3.0 * np.eye(5)[list(labels)]


def test_metrics_of_results_are_the_hand_worked_ones() -> None:
    known = [{"positions": [1, 2, 3], "label": [1, 2, 0]}, {"positions": [0, 2], "label": [3, 1]}]
    outcomes = results(known, [hot(4, 1, 2, 3), hot(3, 4, 4)], task())
    assert [one["prediction"] for one in outcomes] == [[1, 2, 3], [3, 4]]
    # entities: PER, LOC, PER; found: PER, LOC, LOC (its I-LOC goes on in the next word): 1 whole one is right
    assert metrics(outcomes, task()) == {"span_f1": pytest.approx(2 * 1 / (3 + 3)), "token_accuracy": 3 / 5}
    assert outcomes[0]["loss"] == pytest.approx(
        2 * math.log(1 + 4 * math.exp(-3)) + math.log(math.exp(3) + 4)
    )
    plain = TokenClassification(labels=["A", "B", "C", "D", "E"])
    assert metrics(outcomes, plain) == {"token_accuracy": 3 / 5}


def test_without_labels_agreement_is_counted_by_words() -> None:
    known = [{"positions": [0, 1, 2]}, {"positions": [0]}]
    reference = results(known, [hot(0, 1, 2), hot(3)], task())
    row = results(known, [hot(0, 1, 1), hot(3)], task())
    assert metrics(row, task(), reference) == {"agreement": 3 / 4}
    assert metrics(row, task()) == {}
    logits = hot(0, 1, 1)
    logits[2, 4] = math.nan
    broken = results(known, [logits, hot(3)], task())
    assert math.isnan(metrics(broken, task(), reference)["agreement"])
    labelled = [{**one, "label": [0] * len(one["positions"])} for one in known]
    assert all(
        math.isnan(value) for value in metrics(results(labelled, [logits, hot(3)], task()), task()).values()
    )


def test_labels_come_from_the_recipe_or_the_checkpoint() -> None:
    config = {"id2label": {str(place): name for place, name in enumerate(reversed(TAGS))}}
    assert settled(task(), config).labels == TAGS[::-1]
    assert settled(task(labels=None), config).labels == TAGS[::-1]
    assert head(task()) == Head("token-classification", tuple(TAGS), None)
    with pytest.raises(UsageError, match=r"\(O, B-X\) are not those .* \(I-LOC, B-LOC"):
        settled(task(labels=["O", "B-X"]), config)
