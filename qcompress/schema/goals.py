"""Goals of a recipe: conditions of the verdict `accept`. No torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from qcompress.schema.formats import Options

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
    "cosine_spearman": "higher",
    "cosine_pearson": "higher",
    "pseudo_perplexity": "lower",
    "masked_accuracy": "higher",
    "answer_f1": "higher",
    "exact_match": "higher",
    "agreement": "higher",
    "score": "higher",
    "error": "lower",
}
"""All metrics of the tasks, and their better direction."""

BEST = {"cross_entropy": 0.0, "error": 0.0, "score": math.inf}
"""Best values of metrics for which it is not 1; of a user's own score none is known."""


IMPLAUSIBLE_GAIN = 0.5
"""Largest plausible gain of a compressed model, as a share of float's distance to a perfect metric (1, for
perplexity, rates and correlations alike). A larger gain counts as a mistake in the measurement until someone
has checked it.
"""

RESOURCES: dict[str, str] = {
    "latency_ms": "median latency of the engine at the first profile's optimal shape, launched as it is",
    "plan_bytes": "the serialized engine",
    "onnx_bytes": "the graph and its external data",
    "device_memory_bytes": "the engine's weights and activations on its device",
}
"""Costs of a run where it is deployed; less is better. Goals against a baseline name them."""


class Goal(Options):
    """One limit on a metric, against a reference unless it is a threshold: the float value under `recovery`,
    the baseline's under `regression`.
    """

    threshold: float | None = None
    """Limit of the metric itself: at most this (lower is better) or at least this (higher is better)."""
    max_degradation: float | None = Field(default=None, alias="max-degradation", ge=0)
    """Largest absolute loss."""
    percent_max_degradation: float | None = Field(default=None, alias="percent-max-degradation", ge=0)
    """Largest loss in percent of the reference."""
    min_recovery: float | None = Field(default=None, alias="min-recovery", gt=0)
    """Smallest allowed share of the reference: value / reference, or reference / value if lower is better."""

    @model_validator(mode="after")
    def _one_limit(self) -> Goal:
        limits = (self.threshold, self.max_degradation, self.percent_max_degradation, self.min_recovery)
        if sum(limit is not None for limit in limits) != 1:
            raise ValueError(
                "give exactly one of threshold, max-degradation, percent-max-degradation, min-recovery"
            )
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
        "deployed": ParityGoal(mean_abs=1e-2, top1_agreement=0.98),
        "engine": ParityGoal(mean_abs=2e-3, top1_agreement=0.99),
    },
    "fp16": {
        "folded": ParityGoal(max_abs=0.0),
        "onnx": ParityGoal(mean_abs=2e-3, top1_agreement=0.99),
        "deployed": ParityGoal(mean_abs=1e-2, top1_agreement=0.98),
        "engine": ParityGoal(mean_abs=2e-3, top1_agreement=0.99),
    },
    "bf16": {"folded": ParityGoal(max_abs=0.0)},
}
"""Distances to the row before that a correct pipeline reaches, by compute type; a recipe's own limits replace
them. `deployed` is the graph in ONNX Runtime's default session against the folded model with integer sums.
"""

DEPLOYED_ROUNDINGS = {
    "float-inputs": ParityGoal(mean_abs=2e-2, top1_agreement=0.9),
    "conv-biases": ParityGoal(mean_abs=6e-2, top1_agreement=0.9),
    "integer-sums": ParityGoal(mean_abs=5e-2, top1_agreement=0.9),
}
"""Limits of the deployed row if ONNX Runtime rounds values that no other row rounds (`stages/verify.py`). The
bundled GPT-2 at w4a16-g64: mean_abs 4.1e-3, top1_agreement 0.919; a small ResNet at W4A4: 4.0e-2, 0.980.
`integer-sums` is for an external graph, which is compared with fp32 products, so that rounding ties flip.
"""

DEPLOYED_FARTHEST = ParityGoal(mean_abs=0.1, top1_agreement=0.85)
"""Limits of the deployed row that flips on rounding ties do not excuse."""


class Gate(Options):
    """Conditions of the verdict `accept`."""

    float_floor: dict[str, float] = {}
    """Worst acceptable value of the float model's own metric: a broken model cannot be a reference."""
    recovery: dict[str, Goal] = {}
    """Goals on the last measured row, against float; if ONNX Runtime serves the target (`cpu`), on its
    default session (the row `deployed`) as well.
    """
    regression: dict[str, Goal] = {}
    """Goals against another run (`gate --baseline`): on `<set>.<metric>`, on a slice as
    `<set>.<metric>@<column>=<value>` (a column of the set's `slices`, or `label`; `*` as the value: on each
    value), or on one of `RESOURCES`.
    """
    on_inconclusive: Literal["fail", "pass"] = "fail"
    """Result of `gate --baseline` for a goal that the samples can neither confirm nor refute."""
    parity: dict[Literal["trained", "folded", "onnx", "deployed", "engine"], ParityGoal] = {}
    """Limits that replace the defaults (folded equals trained; onnx within 2e-4 of the range). If a
    row was compared from forced codes (`verify.held`), the default limits of the onnx row apply to that
    comparison, and a limit written here applies to the row as it runs.
    """


def lower_is_better(metric: str) -> bool:
    """True if smaller values of a metric (`<set>.<metric>`) are better."""
    return METRICS[metric.rpartition(".")[2]] == "lower"


def worst_value(metric: str, goal: Goal, base: float) -> float:
    """Worst value of a metric that a goal accepts; `base`: its reference."""
    if goal.threshold is not None:
        return goal.threshold
    if goal.min_recovery is not None:
        return base / goal.min_recovery if lower_is_better(metric) else base * goal.min_recovery
    loss = goal.max_degradation
    if loss is None:
        loss = abs(base) * goal.percent_max_degradation / 100
    return base + loss if lower_is_better(metric) else base - loss


def gain_too_large(metric: str, value: float, base: float) -> bool:
    """True if a metric is so much better than its reference that the measurement must be wrong."""
    return _gain(metric, value, base) > IMPLAUSIBLE_GAIN


def _gain(metric: str, value: float, base: float) -> float:
    """Gain as a share of the metric's distance to perfection."""
    best = BEST.get(metric.rpartition(".")[2], 1.0)
    if lower_is_better(metric):
        return (base - value) / (base - best) if base > best else 0.0
    return (value - base) / (best - base) if base < best else 0.0
