"""Metrics against numbers worked by hand."""

from __future__ import annotations

import math

import pytest

from qcompress.schema.goals import BEST, METRICS
from qcompress.schema.recipe import (
    AnyTask,
    CausalLm,
    FeatureExtraction,
    FillMask,
    ImageClassification,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from qcompress.tasks.scores import agreement, scores, span_f1, spans

LABELS, ANSWERS = [1, 1, 1, 0, 0, 1, 0, 1], [1, 0, 1, 0, 1, 1, 0, 1]
"""4 true and 1 false positives, 2 true and 1 false negatives."""


def test_scores_of_two_labels_are_the_hand_worked_ones() -> None:
    metrics = scores(("accuracy", "f1", "mcc"), LABELS, ANSWERS)
    assert metrics["accuracy"] == 6 / 8
    assert metrics["f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 1))
    assert metrics["mcc"] == pytest.approx((4 * 2 - 1 * 1) / math.sqrt(5 * 5 * 3 * 3))
    assert list(metrics) == ["accuracy", "f1", "mcc"]


def test_mcc_where_labels_and_answers_have_other_shares() -> None:
    # 1 true positive, 2 false negatives, 5 true negatives; Cohen's kappa would be 0.385
    metrics = scores(("mcc", "f1"), [1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0])
    assert metrics["mcc"] == pytest.approx((1 * 5 - 0 * 2) / math.sqrt(1 * 3 * 5 * 7))
    assert metrics["f1"] == pytest.approx(2 * 1 / (2 * 1 + 0 + 2))


def test_scores_of_three_labels_average_over_the_labels() -> None:
    labels, answers = [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0]
    # f1 of each label: 2*1/(2+1+1), 2*2/(4+1+0), 2*1/(2+0+1)
    assert scores(("f1_macro",), labels, answers)["f1_macro"] == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)


def test_scores_of_several_labels_each() -> None:
    labels, answers = [[1, 0, 1], [0, 1, 0], [1, 1, 0]], [[1, 0, 0], [0, 1, 0], [1, 1, 1]]
    metrics = scores(("f1_micro", "f1_macro", "accuracy"), labels, answers)
    assert metrics["f1_micro"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 1))
    assert metrics["f1_macro"] == pytest.approx((1 + 1 + 0) / 3)
    assert metrics["accuracy"] == pytest.approx(1 / 3)


def test_correlations_are_the_hand_worked_ones() -> None:
    metrics = scores(("pearson", "spearman"), [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 10.0])
    # deviations -1.5 -0.5 0.5 1.5 and -3 -1 -2 6: 13 / sqrt(5 * 50); ranks 1 3 2 4: 1 - 6 * 2 / (4 * 15)
    assert metrics["pearson"] == pytest.approx(13 / math.sqrt(5 * 50))
    assert metrics["spearman"] == pytest.approx(0.8)


def test_a_constant_answer_has_no_correlation_and_an_mcc_of_nothing() -> None:
    assert math.isnan(scores(("pearson",), [1.0, 2.0, 3.0], [2.0, 2.0, 2.0])["pearson"])
    assert scores(("mcc",), [0, 1, 1], [1, 1, 1])["mcc"] == 0.0


def test_one_answer_that_is_none_leaves_no_score_at_all() -> None:
    metrics = scores(("accuracy", "f1", "mcc"), [1, 0], [1, None])
    assert len(metrics) == 3 and all(math.isnan(value) for value in metrics.values())
    assert math.isnan(agreement([1, None], [1, 1])) and math.isnan(agreement([1, 1], [None, 1]))


def test_agreement_is_a_share_or_a_correlation() -> None:
    assert agreement([0, 1, 2, 2], [0, 1, 1, 2]) == 0.75
    assert agreement([[1, 0], [0, 0]], [[1, 0], [0, 1]]) == 0.5
    assert agreement([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 10.0]) == pytest.approx(13 / math.sqrt(250))
    assert agreement([2.5, 2.5], [2.5, 2.5]) == 1.0  # the float row with itself, constant or not


SENTENCE = ["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "O", "I-ORG", "I-ORG", "O", "B-PER", "I-LOC"]


def test_entities_are_those_of_a_hand_worked_sentence() -> None:
    assert spans(SENTENCE) == {(0, 2, "PER"), (3, 4, "LOC"), (4, 5, "LOC"), (6, 8, "ORG"), (9, 10, "PER"),
                               (10, 11, "LOC")}  # fmt: skip
    assert spans(["O", "O"]) == set() == spans([])
    assert spans(["B-PER"]) == {(0, 1, "PER")}


def test_an_entity_counts_only_where_both_ends_and_the_type_are_right() -> None:
    label = ["B-PER", "I-PER", "O", "B-LOC", "O", "B-ORG"]
    answer = ["B-PER", "O", "O", "B-LOC", "O", "B-PER"]
    # 3 entities, 3 found, 1 right
    assert span_f1([label], [answer]) == pytest.approx(1 / 3)
    # entities of all sequences count together: 4 entities, 4 found, 2 right
    assert span_f1([label, ["B-LOC"]], [answer, ["B-LOC"]]) == pytest.approx(1 / 2)
    assert span_f1([["O"]], [["O"]]) == 0.0


OF_GLUE = ("cola", "mrpc", "qqp", "stsb", "mnli")


def test_every_metric_of_every_task_is_known_with_its_direction() -> None:
    tasks = [
        CausalLm(),
        *(SequenceClassification(kind=kind) for kind in ("single", "multi", "regression")),
        *(SequenceClassification.model_validate({"glue": name}) for name in OF_GLUE),
        TokenClassification(labels=["O", "B-X", "I-X"]),
        TokenClassification(labels=["NOUN", "VERB"]),
        ImageClassification(),
        ImageClassification(labels=["cat", "dog"]),
        FeatureExtraction(),
        FillMask(),
        QuestionAnswering(),
        AnyTask(score="net.py:score", error="net.py:error"),
    ]
    for task in tasks:
        assert set(task.main) <= set(task.metrics) <= METRICS.keys(), task
    assert {metric for task in tasks for metric in task.metrics} | {"agreement"} == METRICS.keys()
    assert BEST.keys() < METRICS.keys()


@pytest.mark.parametrize(
    ("glue", "main"),
    [("cola", ["mcc"]), ("mrpc", ["f1", "accuracy"]), ("stsb", ["spearman", "pearson"]),
     ("sst2", ["accuracy"]), ("qqp", ["accuracy"]), ("mnli", ["accuracy"]), ("rte", ["accuracy"]),
     ("qnli", ["accuracy"]), ("wnli", ["accuracy"])],
)  # fmt: skip
def test_the_official_metric_of_glue_comes_first(glue: str, main: list[str]) -> None:
    task = SequenceClassification.model_validate({"glue": glue})
    assert list(task.main) == main and list(task.metrics[: len(main)]) == main
    assert ("f1" in task.metrics) == (glue in ("mrpc", "qqp"))
