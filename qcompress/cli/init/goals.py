"""Goals of a first recipe: the metric, its allowed loss, and a floor of the float model. No torch."""

from __future__ import annotations

import math
from typing import Any

from qcompress.cli.init.data import Data, ImageData, TableData, TextData, label_of
from qcompress.cli.init.model import EMBEDDING, RUNNING

LOSS = 0.02
"""Allowed loss of the quantized model in accuracy, F1 or correlation, but at least `LOST` samples."""
LOST = 3
PERPLEXITY_PERCENT = 3
AGREEMENT = 0.97


def goals_of(data: Data, task: str, test: Any) -> tuple[dict[str, Any], str]:
    """Section `gate` of the recipe, with the reason."""
    if task in RUNNING:
        metric = "perplexity" if task == "causal-lm" else "pseudo_perplexity"
        goal = {f"test.{metric}": {"percent-max-degradation": PERPLEXITY_PERCENT}}
        goals = {"recovery": goal, "regression": goal}
        return goals, f"{PERPLEXITY_PERCENT} % of perplexity; state a floor once it is known"
    if isinstance(data, TextData):
        goal = {"test.agreement": {"threshold": AGREEMENT}}
        goals = {"recovery": goal, "regression": goal}
        what = "embeddings" if task == EMBEDDING else "answers"
        return goals, f"the data have no labels: the {what} must equal the float model's"
    metric, floor, about = _metric(data, task, test)
    count = len(test) if test else 0
    loss = max(LOSS, -(-LOST * 1000 // count) / 1000) if count else LOSS
    goal = {f"test.{metric}": {"max-degradation": loss}}
    goals = {"float_floor": {f"test.{metric}": floor}, "recovery": goal, "regression": goal}
    return goals, f"{about}; a loss of {loss:g}" + (
        f" is {loss * count:.0f} of {count} samples" if count else ""
    )


def _metric(data: TableData | ImageData, task: str, test: Any) -> tuple[str, float, str]:
    """Metric of the goals, the floor of a trained float model, and the reason."""
    if isinstance(data, ImageData):
        count = len(data.labels)
        if count == 2:
            return "accuracy", 0.75, "the float model must be halfway between chance and no mistake"
        return "accuracy", round(2 / count, 3), "the float model must be twice as good as chance"
    if data.kind == "regression":
        return (
            "cosine_spearman" if task == EMBEDDING else "spearman",
            0.3,
            "the float model must have learned something",
        )
    if data.kind == "multi":
        return "f1_micro", 0.3, "the float model must have learned something"
    if data.kind == "words":
        most = max(data.counts.values()) / sum(data.counts.values())
        return "token_accuracy", _floor(most), "the float model must beat the commonest tag"
    labels = [label_of(cells[data.label]) for _, cells in test]
    most = max(labels.count(label) for label in data.labels) / len(labels)
    return "accuracy", _floor(most), "the float model must beat always saying the commonest label"


def _floor(share: float) -> float:
    """Round a share down to three digits, so that it stays below 1."""
    return math.floor(share * 1000) / 1000
