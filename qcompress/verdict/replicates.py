"""Metrics of bootstrap samples, from per-sample results and the number of times each sample was drawn. No
torch.

A metric here is a function of `columns` (per-sample results by name, one value a sample) and `counts` [draws,
samples], and returns [draws]. All draws are computed at once: with counts a metric is a few matrix products;
recomputing it for every draw takes minutes. A draw in which a metric is undefined gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

from qcompress.parity.sample_results import Columns


def draw_counts(samples: int, draws: int, task: int) -> np.ndarray:
    """Number of times each sample is drawn with replacement, float64 [draws, samples]; rows sum to `samples`.

    The counts depend on the arguments alone: all runs of a task get the same draws, so that their differences
    are paired.
    """
    random = np.random.default_rng([20_150_505, task])
    return random.multinomial(samples, np.full(samples, 1 / samples), size=draws).astype(np.float64)


def perplexity(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """exp of the mean negative log-likelihood of a token."""
    with np.errstate(over="ignore"):
        return np.exp((counts @ _numbers(columns["nll"])) / (counts @ _numbers(columns["tokens"])))


def token_accuracy(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """Share of tokens that the model ranks first, or of words that it labels correctly."""
    right, total = _words(columns, "label") if "positions" in columns else _tokens(columns)
    return (counts @ right) / (counts @ total)


def _tokens(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    return _numbers(columns["correct"]), _numbers(columns["tokens"])


def _words(columns: Columns, truth: str) -> tuple[np.ndarray, np.ndarray]:
    """Correct words and all words of each sequence, with `truth` as the column of correct labels."""
    pairs = list(zip(columns[truth], columns["prediction"], strict=True))
    right = [sum(one == other for one, other in zip(*pair, strict=True)) for pair in pairs]
    return np.array(right, np.float64), np.array([len(label) for label, _ in pairs], np.float64)


def agreement(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """Share of answers (of words, in sequences) that equal the float model's (`reference`); for numbers
    Pearson's correlation with them; for embeddings the mean cosine with them.
    """
    if "cosine" in columns:
        return _mean_of("cosine")(columns, counts)
    if "positions" in columns:
        right, total = _words(columns, "reference")
        return (counts @ right) / (counts @ total)
    if isinstance(columns["prediction"][0], float):
        return pearson({**columns, "label": columns["reference"]}, counts)
    return accuracy({**columns, "label": columns["reference"]}, counts)


def accuracy(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """Share of samples whose prediction equals the label; with several labels all must be right."""
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
    """F1 of label 1 against the rest; 0 without a label or prediction of 1."""
    label, answer = (np.array(columns[name]) == 1 for name in ("label", "prediction"))
    total = counts @ (label.astype(np.float64) + answer)
    return 2 * (counts @ (label & answer)) / np.maximum(total, 1)


def f1_macro(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """Mean F1 of the labels: those that occur in a draw, or all if a sample may have several."""
    both, total = _label_counts(columns, counts)
    each = 2 * both / np.maximum(total, 1)
    if isinstance(columns["label"][0], list):
        return each.mean(axis=1)
    return each.sum(axis=1) / (total > 0).sum(axis=1)


def f1_micro(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """F1 of all labels together; 0 if there are none."""
    both, total = _label_counts(columns, counts)
    return 2 * both.sum(axis=1) / np.maximum(total.sum(axis=1), 1)


def _label_counts(columns: Columns, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays [draws, labels]: samples with the label and its prediction; sum of labels and
    predictions.
    """
    label, answer = (np.array(columns[name]) for name in ("label", "prediction"))
    if label.ndim == 1:
        classes = np.union1d(label, answer)
        label, answer = (side[:, None] == classes for side in (label, answer))
    label, answer = label.astype(np.float64), answer.astype(np.float64)
    return counts @ (label * answer), counts @ (label + answer)


def span_f1(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """F1 of whole entities, from the counts of each sequence (`spans_right`, `spans_total`); 0 without
    entities.
    """
    right, total = (counts @ _numbers(columns[name]) for name in ("spans_right", "spans_total"))
    return np.where(total > 0, 2 * right / np.maximum(total, 1), 0.0)


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
    covariance = right * total - (labels * answers).sum(1)
    return np.where(spread > 0, covariance / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)


BLOCK = 128
"""Draws per block of the correlations, so that a block stays in the processor's cache."""


def pearson(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """Pearson's correlation of labels and predictions."""
    label, answer = (_numbers(columns[name]) for name in ("label", "prediction"))
    return np.concatenate([
        _correlation(block, np.tile(label, (len(block), 1)), np.tile(answer, (len(block), 1)))
        for block in _blocks(counts)
    ])  # fmt: skip


def spearman(columns: Columns, counts: np.ndarray) -> np.ndarray:
    """Spearman's correlation: Pearson's of the ranks within each draw, ties sharing the mean of
    their ranks.
    """
    label, answer = (_numbers(columns[name]) for name in ("label", "prediction"))
    return np.concatenate([
        _correlation(block, _ranks(label, block), _ranks(answer, block)) for block in _blocks(counts)
    ])  # fmt: skip


def _blocks(counts: np.ndarray) -> list[np.ndarray]:
    return [counts[start : start + BLOCK] for start in range(0, len(counts), BLOCK)]


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean rank of each value among the drawn ones, less one half, [draws, samples]."""
    place = stats.rankdata(values, method="dense") - 1
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(place.max() + 1))
    # number of drawn samples of each distinct value
    each = np.add.reduceat(counts[:, order], starts, axis=1)
    return (np.cumsum(each, axis=1) - each / 2)[:, place]


def _correlation(counts: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size = counts.shape[1]
    a = a - (counts * a).sum(1, keepdims=True) / size
    b = b - (counts * b).sum(1, keepdims=True) / size

    def weighted_product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.einsum("ij,ij,ij->i", counts, x, y)

    with np.errstate(invalid="ignore", divide="ignore"):
        return weighted_product(a, b) / np.sqrt(weighted_product(a, a) * weighted_product(b, b))


def _numbers(values: list[Any]) -> np.ndarray:
    return np.array(values, np.float64)


def _mean_of(name: str) -> Callable[[Columns, np.ndarray], np.ndarray]:
    """Mean of a column with a value of the metric for each sample."""
    return lambda columns, counts: counts @ _numbers(columns[name]) / counts.sum(axis=1)


REPLICATES: dict[str, Callable[[Columns, np.ndarray], np.ndarray]] = {
    "perplexity": perplexity,
    "token_accuracy": token_accuracy,
    "accuracy": accuracy,
    "top5_accuracy": top5_accuracy,
    "cross_entropy": cross_entropy,
    "f1": f1,
    "f1_macro": f1_macro,
    "f1_micro": f1_micro,
    "span_f1": span_f1,
    "agreement": agreement,
    "mcc": mcc,
    "pearson": pearson,
    "spearman": spearman,
    "pseudo_perplexity": perplexity,
    "masked_accuracy": token_accuracy,
    "answer_f1": _mean_of("answer_f1"),
    "exact_match": _mean_of("exact_match"),
    "cosine_pearson": pearson,
    "cosine_spearman": spearman,
    "score": _mean_of("score"),
    "error": _mean_of("error"),
}
"""Metrics with a bootstrap; a comparison of another metric has no bootstrap interval and a note."""
