"""Metrics of classification and regression, from per-sample predictions. Torch-free.

accuracy, f1 and mcc are scikit-learn's, correlations are scipy's; both come with the extra `train`. A
prediction of None, given for logits that are not finite, makes every metric NaN: a broken model must not get
a score.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np


def scores(names: Sequence[str], labels: Sequence[Any], answers: Sequence[Any]) -> dict[str, float]:
    """Compute the named metrics of predictions.

    Shapes: ints [samples] for one label, 0/1 [samples, labels] for several, floats [samples] for a number.
    """
    return {name: _finite(name, labels, answers) for name in names}


def _finite(name: str, labels: Sequence[Any], answers: Sequence[Any]) -> float:
    if any(answer is None for answer in answers):
        return math.nan
    return score(name, labels, answers)


def score(name: str, labels: Sequence[Any], answers: Sequence[Any]) -> float:
    """Compute one metric."""
    if name in ("pearson", "spearman"):
        return correlation(name, labels, answers)
    from sklearn import metrics

    if name == "accuracy":  # with several labels, all of a sample's labels must be right
        return float(metrics.accuracy_score(labels, answers))
    if name == "mcc":
        return float(metrics.matthews_corrcoef(labels, answers))
    average = {"f1": "binary", "f1_macro": "macro", "f1_micro": "micro"}[name]
    return float(metrics.f1_score(labels, answers, average=average, zero_division=0.0))


def correlation(name: str, labels: Sequence[float], answers: Sequence[float]) -> float:
    """Pearson's or Spearman's correlation; NaN if one side is constant, which scipy would only warn about."""
    from scipy import stats

    if len(labels) < 2 or len(set(labels)) == 1 or len(set(answers)) == 1:
        return math.nan
    compute = stats.pearsonr if name == "pearson" else stats.spearmanr
    return float(compute(labels, answers).statistic)


def agreement(reference: Sequence[Any], answers: Sequence[Any]) -> float:
    """Share of predictions that equal the reference's; Pearson's correlation for numbers.

    >>> agreement([1, 0, 2, 2], [1, 1, 2, 2])
    0.75
    """
    if any(answer is None for answer in (*reference, *answers)):
        return math.nan
    if any(isinstance(answer, float) for answer in answers):
        return 1.0 if list(reference) == list(answers) else correlation("pearson", reference, answers)
    return sum(a == b for a, b in zip(reference, answers, strict=True)) / len(answers)


def cross_entropy(logits: np.ndarray, label: int) -> float:
    """-log softmax(logits)[label]; logits fp64 [labels].

    >>> round(cross_entropy(np.array([0.0, 0.0]), 1), 6)
    0.693147
    """
    top = logits.max()
    return float(np.log(np.exp(logits - top).sum()) + top - logits[label])


Span = tuple[int, int, str]
"""Start, end (exclusive) and type of an entity."""


def spans(tags: Sequence[str]) -> set[Span]:
    """Entities of a sequence of IOB2 tags. Source: conlleval (CoNLL-2000), with its reading of broken
    sequences: an `I-` after `O`, or of another type than the tag before it, begins an entity.

    >>> sorted(spans(["B-PER", "I-PER", "B-PER", "O", "I-LOC", "I-ORG"]))
    [(0, 2, 'PER'), (2, 3, 'PER'), (4, 5, 'LOC'), (5, 6, 'ORG')]
    """
    entities: set[Span] = set()
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and not (mark == "I" and name == kind):
            entities.add((start, place, kind))
            kind = ""
        if mark in ("B", "I") and not kind:
            start, kind = place, name
    return entities


def span_f1(labels: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> float:
    """F1 of whole entities over all sequences together: right if both ends and the type match; 0 without
    entities.
    """
    pairs = [(spans(label), spans(answer)) for label, answer in zip(labels, answers, strict=True)]
    right = sum(len(label & answer) for label, answer in pairs)
    total = sum(len(label) + len(answer) for label, answer in pairs)
    return 2 * right / total if total else 0.0


ARTICLES = re.compile(r"\b(a|an|the)\b")


def plain_answer(text: str) -> list[str]:
    """Words of an answer in lower case, without punctuation and articles. Source: SQuAD's evaluate-v1.1.py.

    >>> plain_answer("The  Eiffel Tower!")
    ['eiffel', 'tower']
    """
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return ARTICLES.sub(" ", kept).split()


def exact_match(labels: Sequence[str], answer: str) -> float:
    """1 if the answer equals one of the labels but for case, punctuation and articles; without labels, if it
    is empty.
    """
    words = plain_answer(answer)
    return float(any(plain_answer(label) == words for label in labels or [""]))


def answer_f1(labels: Sequence[str], answer: str) -> float:
    """Largest F1 of the answer's words against those of a label; without labels 1 for an empty answer.

    >>> answer_f1(["the red house"], "red houses and house")
    0.6666666666666666
    """
    return max(_word_f1(plain_answer(label), plain_answer(answer)) for label in labels or [""])


def _word_f1(label: list[str], answer: list[str]) -> float:
    if not label or not answer:
        return float(label == answer)
    common = sum((Counter(label) & Counter(answer)).values())
    return 2 * common / (len(label) + len(answer))
