"""Classification and regression: what is read, padded, learned and measured, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification
from word_tokenizer import CLS, FIRST, PAD, SEP, WORDS, word_tokenizer

from qcompress.errors import UsageError
from qcompress.models.architecture import Head
from qcompress.schema.recipe import CausalLm, SequenceClassification, TextData
from qcompress.tasks import TASKS
from qcompress.tasks.examples import inputs_of
from qcompress.tasks.sequence_classification import (
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

GOOD, BAD, FILM, A, VERY = (FIRST + WORDS.index(word) for word in ("good", "bad", "film", "a", "very"))
TEXTS = ["good film", "a very very bad film", "bad", "very good"]
LABELS = ["pos", "neg", "neg", "pos"]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "data.jsonl") -> TextData:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TextData(table=[name])


def rows(labels: list[Any] | None = None) -> list[dict[str, Any]]:
    chosen = LABELS if labels is None else labels
    return [{"text": text, "label": label} for text, label in zip(TEXTS, chosen, strict=True)]


def task(**options: Any) -> SequenceClassification:
    return SequenceClassification(**{"labels": ["neg", "pos"], "context": 16, **options})


def bert(**options: Any) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=FIRST + len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16, pad_token_id=PAD, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return BertForSequenceClassification(config).eval()


# Reading and padding ------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_right_to_its_own_longest(tmp_path: Path) -> None:
    example_set = examples(write(tmp_path, rows()), tmp_path, word_tokenizer(), task())
    assert example_set.lengths.tolist() == [4, 7, 3, 4] and len(example_set) == 4
    batch = example_set.batch([0, 2])
    assert batch["input_ids"].tolist() == [[CLS, GOOD, FILM, SEP], [CLS, BAD, SEP, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["token_type_ids"].tolist() == [[0] * 4] * 2
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.int64
    assert example_set.batch([1])["input_ids"].shape == (1, 7)
    assert inputs_of(batch).keys() == {"input_ids", "attention_mask", "token_type_ids"}


def test_a_pair_has_token_types_and_what_is_too_long_is_cut_and_counted(tmp_path: Path) -> None:
    data = write(tmp_path, [{"a": "good film", "b": "very very very bad", "label": 0},
                            {"a": "a", "b": "film", "label": 1}])  # fmt: skip
    data = TextData.model_validate({**data.model_dump(), "columns": {"text": "a", "pair": "b"}})
    sample_list = samples(data, tmp_path, word_tokenizer(), task(context=8), None)
    batch = collate(sample_list)
    assert batch["input_ids"].tolist() == [[CLS, GOOD, FILM, SEP, VERY, VERY, VERY, SEP],
                                           [CLS, A, SEP, FILM, SEP, PAD, PAD, PAD]]  # fmt: skip
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0]]
    assert [sample.cut for sample in sample_list] == [True, False]
    assert notes(sample_list) == ["1 of 2 examples are cut at 8 tokens"] and notes(sample_list[1:]) == []
    exact = samples(data, tmp_path, word_tokenizer(), task(context=5), None)
    assert [(sample.cut, sample.length) for sample in exact] == [(True, 5), (False, 5)]


def test_padding_changes_no_logit(tmp_path: Path) -> None:
    model = bert(num_labels=2)
    example_set = examples(write(tmp_path, rows()), tmp_path, word_tokenizer(), task())
    with torch.no_grad():
        together = model(**inputs_of(example_set.batch([0, 1, 2, 3]))).logits
        for row, logits in enumerate(together):
            alone = example_set.batch([row])
            assert alone["input_ids"].shape == (1, example_set.lengths[row]) and alone["attention_mask"].all()
            # fp32: the order of sums differs
            torch.testing.assert_close(model(**inputs_of(alone)).logits[0], logits, atol=1e-6, rtol=0)


def test_a_limit_is_spread_for_training_and_the_first_for_evaluation(tmp_path: Path) -> None:
    data = write(tmp_path, [{"text": "a", "label": index % 2, "n": index} for index in range(10)])
    limited = data.model_copy(update={"limit": 4})
    spread = examples(limited, tmp_path, word_tokenizer(), task())
    assert [sample.known["label"] for sample in spread.samples] == [0, 0, 1, 1]  # rows 0, 2, 5 and 7
    first = samples(limited, tmp_path, word_tokenizer(), task(), 3)
    assert [sample.known["label"] for sample in first] == [0, 1, 0]
    assert len(samples(limited, tmp_path, word_tokenizer(), task(), None)) == 4


def test_lines_of_text_are_examples_without_labels(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good film\r\n\n  bad \nlast")
    example_set = examples(TextData(text=["a.txt"]), tmp_path, word_tokenizer(), task())
    assert example_set.lengths.tolist() == [4, 3, 3]
    batch = example_set.batch([0, 1, 2])
    assert "labels" not in batch
    with pytest.raises(UsageError, match="the training data have no labels") as refused:
        loss(torch.zeros(3, 2), batch)
    assert "columns" in refused.value.fix


@pytest.mark.parametrize("labels", [None, [-1, -1, -1, -1]])
def test_a_table_may_have_no_labels(labels: list[int] | None, tmp_path: Path) -> None:
    """No column `label`, or -1 throughout, which is how the hub's GLUE writes a test set."""
    plain = [{"text": text} for text in TEXTS] if labels is None else rows(labels)
    sample_list = samples(write(tmp_path, plain), tmp_path, word_tokenizer(), task(), None)
    assert len(sample_list) == 4 and not any("label" in sample.known for sample in sample_list)


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(UsageError, match="the tokenizer has no padding token"):
        samples(write(tmp_path, rows()), tmp_path, tokenizer, task(), None)


# Labels -------------------------------------------------------------------------------------------

NUMBER: dict[str, Any] = {"kind": "regression", "labels": None}


def known(data: TextData, folder: Path, task: SequenceClassification) -> list[Any]:
    return [sample.known["label"] for sample in samples(data, folder, word_tokenizer(), task, None)]


def test_names_and_indices_mean_the_models_outputs(tmp_path: Path) -> None:
    for labels in (LABELS, ["POS", "Neg", " neg", "pos"], [1, 0, 0, 1], ["1", "0", "0", "1"]):
        assert known(write(tmp_path, rows(labels)), tmp_path, task()) == [1, 0, 0, 1]
    assert known(write(tmp_path, rows([2, 0, 1, 2])), tmp_path, task(labels=None)) == [2, 0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["pos", "neg", "neutral", "pos"], {},
         "the data have the labels neg, neutral, pos, and the model has neg, pos"),
        (["pos", "neg", "neg", "pos"], {"labels": None}, "and the model has labels without names"),
        ([1, 0, 2, 1], {}, "data.jsonl:3: 2 is not the name or the index of a label"),
        ([1, 0, -1, 1], {}, "data.jsonl:3: -1 is not the name or the index of a label"),
        ([1, None, 0, 1], {}, "data.jsonl:2: an empty field is not a label"),
        (["pos", "", "neg", "pos"], {}, "data.jsonl:2: an empty field is not a label"),
        ([1, 0.5, 0, 1], {}, "data.jsonl:2: the number 0.5 is not a label"),
        ([True, 0, 0, 1], {}, "data.jsonl:1: the label 'true' is not one of the model's"),
        ([1.5, "much", 0, 1], NUMBER, "data.jsonl:2: the label 'much' is not a number"),
        ([1.5, None, 0, 1], NUMBER, "data.jsonl:2: the label None is not a number"),
        ([1.5, "nan", 0, 1], NUMBER, "the label 'nan' is not a number"),
        ([["pos"], 3.5, [], []], {"kind": "multi"}, "data.jsonl:2: the labels 3.5 are not a list"),
        ([["pos"], ["new"], [], []], {"kind": "multi"}, "labels new, pos, and the model has neg, pos"),
        ([["pos"], [5], [], []], {"kind": "multi"}, "data.jsonl:2: 5 is not the name or the index"),
    ],
)  # fmt: skip
def test_a_label_that_is_none_of_the_models_is_refused(
    labels: list[Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        known(write(tmp_path, rows(labels)), tmp_path, task(**options))
    assert refused.value.fix


def test_the_order_of_the_outputs_is_the_checkpoints(tmp_path: Path) -> None:
    """NLI checkpoints have GLUE's labels in another order than GLUE; its integers keep GLUE's meaning."""
    mnli = SequenceClassification(glue="mnli")
    config = {"id2label": {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"}}
    settled_task = settled(mnli, config)
    assert settled_task.labels == ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]
    pairs = [{"premise": "a", "hypothesis": "film", "label": label} for label in (0, 1, 2, "entailment")]
    assert known(write(tmp_path, pairs), tmp_path, settled_task) == [2, 1, 0, 2]
    assert known(write(tmp_path, pairs), tmp_path, settled(mnli, {})) == [0, 1, 2, 0]


def test_names_fill_in_where_the_checkpoint_has_none() -> None:
    nameless = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    assert settled(task(), nameless).labels == ["neg", "pos"] == settled(task(), {}).labels
    assert settled(task(labels=None), nameless).labels == ["LABEL_0", "LABEL_1"]
    assert settled(task(), {"id2label": {"0": "pos", "1": "neg"}}).labels == ["pos", "neg"]
    regression = SequenceClassification(glue="stsb", kind="regression")
    assert settled(regression, nameless) == regression


@pytest.mark.parametrize(
    "names", [["pos", "neutral"], ["pos", "neg", "neutral"], ["LABEL_0", "LABEL_1", "LABEL_2"]]
)
def test_labels_that_are_not_the_checkpoints_are_refused_with_both_sets(names: list[str]) -> None:
    config = {"id2label": {str(place): name for place, name in enumerate(names)}}
    with pytest.raises(UsageError) as refused:
        settled(task(), config)
    assert "(neg, pos)" in str(refused.value) and f"({', '.join(names)})" in str(refused.value)
    assert "task.labels" in refused.value.fix


def test_a_datasets_own_names_decide_what_its_integers_mean() -> None:
    from qcompress.tasks.labels import Labels, dataset_names

    assert dataset_names(("pos", "neg"), Labels(("neg", "pos")), [0, [1, 0], -1]) == [
        "pos",
        ["neg", "pos"],
        -1,
    ]
    assert dataset_names(("pos", "neg"), Labels(("LABEL_0", "LABEL_1")), [0, 1]) == [0, 1]
    assert dataset_names(None, Labels(("neg", "pos")), [0, 1]) == [0, 1]


def test_several_labels_are_a_list_or_text_with_bars(tmp_path: Path) -> None:
    multi = task(kind="multi", labels=["x", "y", "z"])
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]
    lists = [["x", "z"], [], ["y"], [0, 1, 2]]
    assert known(write(tmp_path, rows(lists)), tmp_path, multi) == expected
    (tmp_path / "a.csv").write_text("text,label\na,x|z\na,\na,y\na,0|1|z\n")
    assert known(TextData(table=["a.csv"]), tmp_path, multi) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"labels": ["neg", "pos"]}, Head("sequence-classification", ("neg", "pos"),
                                          "single_label_classification")),
        ({}, Head("sequence-classification", None, "single_label_classification")),
        ({"kind": "multi", "labels": ["x", "y"]},
         Head("sequence-classification", ("x", "y"), "multi_label_classification")),
        ({"glue": "stsb", "kind": "regression"}, Head("sequence-classification", ("score",), "regression")),
        ({"glue": "rte"}, Head("sequence-classification", ("entailment", "not_entailment"),
                               "single_label_classification", any_order=True)),
    ],
)  # fmt: skip
def test_a_head_has_the_labels_and_the_problem_type(options: dict[str, Any], expected: Head) -> None:
    assert head(SequenceClassification(**options)) == expected
    assert TASKS["causal-lm"].head(CausalLm()) == Head()


# Loss and results ---------------------------------------------------------------------------------

KINDS: dict[str, tuple[dict[str, Any], list[Any], dict[str, Any]]] = {
    "single": ({"labels": ["x", "y", "z"]}, [2, 0, 1, 2], {"num_labels": 3}),
    "multi": ({"labels": ["x", "y", "z"]}, [["x", "z"], [], ["y"], ["z"]], {"num_labels": 3}),
    "regression": ({"labels": None}, [0.5, 3.25, -1.0, 2.0], {"num_labels": 1}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_transformers_and_so_is_the_mean_of_the_samples(
    kind: str, tmp_path: Path
) -> None:
    options, labels, shape = KINDS[kind]
    this = task(kind=kind, **options)
    model = bert(problem_type=head(this).problem, **shape)
    example_set = examples(write(tmp_path, rows(labels)), tmp_path, word_tokenizer(), this)
    batch = example_set.batch([0, 1, 2, 3])
    with torch.no_grad():
        stock = model(**batch)
    ours = loss(stock.logits, batch)
    assert ours.shape == () and ours.item() > 0.1
    torch.testing.assert_close(ours, stock.loss, rtol=1e-6, atol=0)  # fp32: the order of sums
    each = measure(example_set.samples, stock.logits.numpy())
    assert np.mean([one["loss"] for one in each]) == pytest.approx(stock.loss.item(), rel=1e-5)
    assert logits_of(this, {}) == (1, stock.logits.shape[1])
    assert compared(example_set.samples[0], stock.logits[0].numpy()).shape == (1, stock.logits.shape[1])


def test_results_of_hand_made_logits() -> None:
    single = results([{"label": 1}, {"label": 0}, {}], np.array([[0.0, 2.0], [1.0, 3.0], [4.0, 1.0]]), task())
    assert [one["prediction"] for one in single] == [1, 1, 0]
    assert single[0]["loss"] == pytest.approx(math.log(1 + math.exp(-2.0)))
    assert "loss" not in single[2] and "label" not in single[2]
    multi = results([{"label": [1, 0]}, {}], np.array([[0.5, 2.0], [-1.0, 3.0]]), task(kind="multi"))
    assert [one["prediction"] for one in multi] == [[1, 1], [0, 1]]
    assert multi[0]["loss"] == pytest.approx((math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(2.0))) / 2)
    number = results([{"label": 1.0}, {}], np.array([[3.0], [2.5]]), task(kind="regression", labels=None))
    assert [one["prediction"] for one in number] == [3.0, 2.5] and number[0]["loss"] == 4.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_leaves_no_metric(kind: str, broken: float) -> None:
    this = task(kind=kind, **KINDS[kind][0])
    label = {"single": 1, "multi": [0, 1, 1], "regression": 1.0}[kind]
    logits = np.random.default_rng(0).normal(size=(3, 1 if kind == "regression" else 3))
    logits[1, 0] = broken
    outcomes = results([{"label": label}] * 3, logits, this)
    assert (
        outcomes[1]["prediction"] is None
        and math.isnan(outcomes[1]["loss"])
        and math.isfinite(outcomes[0]["loss"])
    )
    values = metrics(outcomes, this)
    assert values.keys() == set(this.metrics) and all(math.isnan(value) for value in values.values())
    unlabelled = results([{}] * 3, logits, this)
    assert math.isnan(metrics(unlabelled, this, unlabelled)["agreement"])


def test_metrics_of_results_are_those_of_the_task() -> None:
    logits = np.array([[0.0, 2.0], [3.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    outcomes = results([{"label": label} for label in (1, 0, 0, 1)], logits, task())
    assert metrics(outcomes, task()) == pytest.approx(
        {"accuracy": 3 / 4, "f1": 4 / 5, "mcc": 1 / math.sqrt(3)}
    )
    assert list(metrics(outcomes, SequenceClassification(glue="mrpc"))) == ["f1", "accuracy"]
    assert list(metrics(outcomes, SequenceClassification(glue="cola"))) == ["mcc", "accuracy"]


def test_without_labels_agreement_with_float_is_measured() -> None:
    reference = results([{}] * 4, np.array([[0.0, 2.0], [3.0, 1.0], [0.0, 1.0], [0.0, 1.0]]), task())
    row = results([{}] * 4, np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]), task())
    assert metrics(row, task(), reference) == {"agreement": 0.75}
    assert metrics(reference, task(), reference) == {"agreement": 1.0}
    assert metrics(row, task()) == {}  # the float model is gone
