"""Metrics of bootstrap samples: each from per-sample results and how often each sample was drawn. No torch.

A metric here is a function of `columns` (per-sample results by name, one value a sample) and `counts`
[draws, samples], and gives [draws]. All draws at once: with counts a metric is a few matrix products, where
computing it again for every draw takes minutes. A draw in which a metric is undefined gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import stats

Columns = Mapping[str, list[Any]]


def draw_counts(samples: int, draws: int, task: int) -> np.ndarray:
    """How often each sample is drawn with replacement, float64 [draws, samples]; rows sum to `samples`.

    They depend on nothing but the arguments: all runs of a task see the same draws, which is what makes their
    differences paired.
    """
    random = np.random.default_rng([20_150_505, task])
    return random.multinomial(samples, np.full(samples, 1 / samples), size=draws).astype(np.float64)


def perplexity(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """exp of the mean negative log-likelihood of a token."""
    with np.errstate(over="ignore"):
        return np.exp((counts @ _numbers(columns["nll"])) / (counts @ _numbers(columns["tokens"])))


def token_accuracy(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """Share of the tokens that the model ranks first."""
    return (counts @ _numbers(columns["correct"])) / (counts @ _numbers(columns["tokens"]))


def accuracy(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """Share of samples whose prediction is the label; of several labels all must be right."""
    right = [label == answer for label, answer in zip(columns["label"], columns["prediction"], strict=True)]
    return (counts @ np.array(right, np.float64)) / counts.sum(axis=1)


def top5_accuracy(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """Share of images whose label is among the five first answers."""
    right = [rank < 5 for rank in columns["rank"]]
    return (counts @ np.array(right, np.float64)) / counts.sum(axis=1)


def cross_entropy(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """Mean loss of a sample."""
    return (counts @ _numbers(columns["loss"])) / counts.sum(axis=1)


def f1(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """F1 of label 1 against the rest; 0 where it is neither a label nor a prediction."""
    label, answer = (np.array(columns[name]) == 1 for name in ("label", "prediction"))
    total = counts @ (label.astype(np.float64) + answer)
    return 2 * (counts @ (label & answer)) / np.maximum(total, 1)


def mcc(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """Matthews correlation coefficient, for several classes R_K (Gorodkin 2004); 0 where a side is constant.

    With c right of s samples, t_k labels and p_k predictions of class k: (c s - sum t_k p_k) /
    sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2)).
    """
    label, answer = (np.array(columns[name]) for name in ("label", "prediction"))
    classes = np.union1d(label, answer)
    labels, answers = (counts @ (side[:, None] == classes).astype(np.float64) for side in (label, answer))
    total, right = counts.sum(axis=1), counts @ (label == answer)
    spread = (total**2 - (answers**2).sum(1)) * (total**2 - (labels**2).sum(1))
    apart = right * total - (labels * answers).sum(1)
    return np.where(spread > 0, apart / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)


def pearson(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """Pearson's correlation of labels and predictions."""
    label, answer = (_numbers(columns[name]) for name in ("label", "prediction"))
    size = counts.shape[1]
    return _correlation(counts, np.tile(label, (len(counts), 1)), np.tile(answer, (len(counts), 1)), size)


def spearman(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """Spearman's: Pearson's of the ranks within each draw, ties sharing the mean of their ranks."""
    label, answer = (_ranks(_numbers(columns[name]), counts) for name in ("label", "prediction"))
    return _correlation(counts, label, answer, counts.shape[1])


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean rank of each value among the drawn ones, less one half, [draws, samples]."""
    place = stats.rankdata(values, method="dense") - 1
    levels = np.zeros((place.max() + 1, len(values)))
    levels[place, np.arange(len(values))] = 1.0
    each = counts @ levels.T  # how many drawn samples have each of the different values
    return (np.cumsum(each, axis=1) - each / 2)[:, place]


def _correlation(counts: np.ndarray, a: np.ndarray, b: np.ndarray, size: int) -> np.ndarray:
    a = a - (counts * a).sum(1, keepdims=True) / size
    b = b - (counts * b).sum(1, keepdims=True) / size
    with np.errstate(invalid="ignore", divide="ignore"):
        return (counts * a * b).sum(1) / np.sqrt((counts * a * a).sum(1) * (counts * b * b).sum(1))


def _numbers(values: list[Any]) -> np.ndarray:
    return np.array(values, np.float64)


REPLICATES: dict[str, Callable[[Columns, np.ndarray], np.ndarray]] = {
    "perplexity": perplexity,
    "token_accuracy": token_accuracy,
    "accuracy": accuracy,
    "top5_accuracy": top5_accuracy,
    "cross_entropy": cross_entropy,
    "f1": f1,
    "mcc": mcc,
    "pearson": pearson,
    "spearman": spearman,
}
"""Metrics that can be bootstrapped; a comparison of another one has no bootstrap interval, and says so."""
