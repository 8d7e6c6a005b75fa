"""The goals of a recipe: what must hold for `accept`. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from qcompress.formats import Options

METRICS: dict[str, Literal["lower", "higher"]] = {
    "perplexity": "lower",
    "token_accuracy": "higher",
    "accuracy": "higher",
    "f1": "higher",
    "f1_macro": "higher",
    "f1_micro": "higher",
    "mcc": "higher",
    "pearson": "higher",
    "spearman": "higher",
    "span_f1": "higher",
    "top5_accuracy": "higher",
    "cross_entropy": "lower",
    "agreement": "higher",
}
"""Every metric a task reports, and which way is better."""

BEST = {"cross_entropy": 0.0}
"""The best value of a metric, where it is not 1."""


class Goal(Options):
    """One limit on a metric, against its float value unless it is a threshold."""

    threshold: float | None = None
    """The metric itself: at most this (lower is better) or at least this (higher is better)."""
    max_degradation: float | None = Field(default=None, alias="max-degradation", ge=0)
    """Largest absolute loss."""
    percent_max_degradation: float | None = Field(default=None, alias="percent-max-degradation", ge=0)
    """Largest loss in percent of the reference."""

    @model_validator(mode="after")
    def _one_limit(self) -> Goal:
        if (
            sum(
                limit is not None
                for limit in (self.threshold, self.max_degradation, self.percent_max_degradation)
            )
            != 1
        ):
            raise ValueError("give exactly one of threshold, max-degradation, percent-max-degradation")
        return self


class ParityGoal(Options):
    """Limits on the distance of a row to the row before it."""

    max_abs: float | None = Field(default=None, ge=0)
    """Largest difference of a logit, as a fraction of the logits' range."""
    mean_abs: float | None = Field(default=None, ge=0)
    """Mean difference of the logits, as a fraction of the logits' range."""
    top1_agreement: float | None = Field(default=None, ge=0, le=1)
    """Least share of positions with the same best token or label; a regression has none."""


PARITY: dict[str, dict[str, ParityGoal]] = {
    "fp32": {
        "folded": ParityGoal(max_abs=0.0),
        "onnx": ParityGoal(mean_abs=2e-4, top1_agreement=0.998),
        "engine": ParityGoal(mean_abs=2e-3, top1_agreement=0.99),
    },
    "fp16": {
        "folded": ParityGoal(max_abs=0.0),
        "onnx": ParityGoal(mean_abs=2e-3, top1_agreement=0.99),
        "engine": ParityGoal(mean_abs=2e-3, top1_agreement=0.99),
    },
    "bf16": {"folded": ParityGoal(max_abs=0.0)},
}
"""Distances to the row before that a correct pipeline reaches, by compute type; a recipe's own limits win."""


class Gate(Options):
    """What must hold for `accept`."""

    float_floor: dict[str, float] = {}
    """Worst acceptable value of the float model's own metric: a broken model is no reference."""
    recovery: dict[str, Goal] = {}
    """Goals on the last measured row, against float."""
    parity: dict[Literal["trained", "folded", "onnx", "engine"], ParityGoal] = {}
    """Limits that replace the defaults (folded equals trained; onnx within 2e-4 of the range). Where the
    graph was compared from its own codes (`verify.held`), the default limits of the onnx row are about that
    comparison, and a limit written here about the graph as it runs."""
