"""Options of all values of the five axes, and of the sharpness measurement. No torch.

    quantizer   rounding of a tensor while training (`quantizers.py`)
    adapter     function-preserving rescaling that is folded later (`adapters.py`)
    objective   training loss
    stepper     computation of one update
    schedule    order of phases, and what each one trains

`methods/` has the class that implements each value.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from qcompress.schema.formats import Options
from qcompress.schema.quantizers import named

Role = Literal["weight", "scale", "adapter", "centroid", "other"]
"""Kind of a trainable tensor; each role has its own learning rate."""


# Axes 3 and 4: objectives and steppers ------------------------------------------------------------


class TaskObjective(Options):
    """The loss of the task itself."""

    name: Literal["task"] = "task"


class Distillation(Options):
    """Losses of TernaryBERT (arXiv:2009.12812) against the float model: soft labels, attention scores, hidden
    states. Its paper weighs them equally and uses no labels.
    """

    name: Literal["distillation"] = "distillation"
    logits: float = Field(default=1.0, ge=0)
    """Weight of the soft cross-entropy (mean squared error for a regression)."""
    attention: float = Field(default=1.0, ge=0)
    """Weight of the mean squared error of the attention scores, summed over the layers."""
    hidden: float = Field(default=1.0, ge=0)
    """Weight of the mean squared error of the hidden states, summed over embeddings and layers."""
    task: float = Field(default=0.0, ge=0)
    """Weight of the task's own loss."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the soft labels."""


class TeacherIntervention(Options):
    """Teacher Intervention (TI, arXiv:2302.11812): in the phase `intervention` the float model's signals
    replace the student's in every layer, so that the error of earlier layers does not reach later ones.
    """

    name: Literal["teacher-intervention"] = "teacher-intervention"
    mode: Literal["output", "context", "attention", "gradual", "inverted", "stochastic"] = "gradual"
    """Replaced signals: output of the attention block (TI-O), context (TI-C), attention map (TI-M), or all
    three in turn: gradual O, C, M (TI-G), inverted M, C, O, stochastic one of them for each update.
    """
    logits: float = Field(default=1.0, ge=0)
    """Weight of the soft cross-entropy (mean squared error for a regression)."""
    attention: float = Field(default=1.0, ge=0)
    """Weight of the mean squared error of the attention scores."""
    hidden: float = Field(default=1.0, ge=0)
    """Weight of the mean squared error of the hidden states."""
    output: float = Field(default=1.0, ge=0)
    """Weight of the mean squared error of the attention blocks' outputs."""
    out_loss: Literal["post_ln", "pre_residual"] = "post_ln"
    """Place of the comparison of those outputs: after LayerNorm (the published code, where TI-O gives V and
    the output projection no gradient) or before the residual (the paper's figure 3).
    """
    task: float = Field(default=0.0, ge=0)
    """Weight of the task's own loss."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the soft labels."""


Objective = Annotated[
    TaskObjective | Distillation | TeacherIntervention, Field(discriminator="name"), BeforeValidator(named)
]


class PlainStepper(Options):
    """One forward, one backward, one update."""

    name: Literal["plain"] = "plain"
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm of one role; none: no clipping."""


Ball = Literal["weight", "embedding", "bias", "norm", "weight-scale", "activation-scale"]
"""Kinds of tensors that a sharpness-aware stepper may perturb: quantized weights of layers, quantized
embedding tables, biases, weights and biases of norms, learned scales. No default includes tables: the
gradient of a large one would take up most of the norm.
"""


class Saq(Options):
    """Sharpness-aware quantization (SAQ, arXiv:2111.12273): the update descends at the worst point near the
    quantized weights. Two passes an update. Its published code quantizes with LIQ, whose levels are odd
    multiples of half a step: it has no zero and does not fit a symmetric integer grid, so it is not
    supported.
    """

    name: Literal["saq"] = "saq"
    case: Literal[1, 2, 3] = 3
    """Place of the perturbation: 1 Q(w) + e(w), 2 Q(w + e(w)), 3 Q(w) + e(Q(w)), the paper's choice."""
    rho: float = Field(default=0.05, ge=0)
    """Norm of the perturbation, over all tensors in the ball together."""
    ball: list[Ball] = Field(default=["weight", "bias", "norm"], min_length=1)
    """Kinds of tensors that are perturbed. The published code perturbs activation clip values as well: add
    `activation-scale` for that."""
    every: int = Field(default=1, ge=1)
    """Compute the perturbation at every k-th update and reuse it in between (after LookSAM, arXiv:2203.02714;
    the paper's own efficient variant is not public).
    """
    subset: float = Field(default=1.0, gt=0, le=1)
    """Share of the elements that are perturbed, drawn for each update; their perturbation is divided by the
    share (ESAM, arXiv:2110.03141).
    """
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest gradient norm of one role; none: no clipping, as in the paper and its code."""


class Squat(Options):
    """SQuAT (arXiv:2210.07171): alternates a sharpness objective for the weights with the step-size objective
    for the scales. Only the abstract of the paper was available: every option below is an interpretation of
    it.
    """

    name: Literal["squat"] = "squat"
    alternate: Literal["batch", "iteration", "fused"] = "batch"
    """batch: both objectives on each batch (three passes); iteration: weights and scales in turn; fused: the
    scales take the gradient of the first, unperturbed pass (two passes)."""
    perturb: Literal["quantized", "latent"] = "quantized"
    """Q(w) + e or Q(w + e); a small latent perturbation is mostly rounded away."""
    rho: float = Field(default=0.05, ge=0)
    """Norm of the perturbation, over all tensors in the ball together."""
    ball: list[Literal["weight", "embedding", "bias", "norm"]] = Field(default=["weight"], min_length=1)
    """Kinds of tensors that are perturbed; scales are frozen in the sharpness objective."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm of one role; none: no clipping."""


Stepper = Annotated[PlainStepper | Saq | Squat, Field(discriminator="name"), BeforeValidator(named)]


# Axis 5: schedules --------------------------------------------------------------------------------


class Calibrate(Options):
    """Observe ranges on the calibration data; train nothing."""

    name: Literal["calibrate"] = "calibrate"


class PlainSchedule(Options):
    """Observe ranges (if anything is quantized), then train everything together. Phase: finetune."""

    name: Literal["plain"] = "plain"


class BlockwiseThenEndToEnd(Options):
    """Quadapter's two phases. calibrate: one transformer block after another learns to reproduce its float
    output; finetune: adapter and quantizer scales learn the task's loss, every model weight frozen.
    """

    name: Literal["blockwise-then-end-to-end"] = "blockwise-then-end-to-end"
    evaluate_every: int = Field(default=25, ge=1)
    """Steps between two measurements of a block's error on all calibration data; the best state is kept."""


class TwoStep(Options):
    """Teacher Intervention's two steps (arXiv:2302.11812): `intervention`, a short phase in which the teacher
    intervenes, then `finetune` without it, with an optimizer and a learning-rate schedule of its own.
    """

    name: Literal["two-step"] = "two-step"


class Staged(Options):
    """iPQ (Quant-Noise, arXiv:2004.07320, section 3.3): `finetune` trains in float, with noise if any is set;
    then one set of layers after another becomes codebooks, each followed by a phase that trains the centroids
    and everything that is still float: `ffn`, `embeddings`, `attention`, `rest`.
    """

    name: Literal["staged"] = "staged"
    order: list[Literal["ffn", "embeddings", "attention", "rest"]] = [
        "ffn",
        "embeddings",
        "attention",
        "rest",
    ]
    """Order of the sets; all of them, each once. `rest` has the other layers: an untied head, a classifier,
    convolutions.
    """

    @model_validator(mode="after")
    def _each_once(self) -> Staged:
        if sorted(self.order) != sorted(SETS):
            raise ValueError(f"name each set once: {', '.join(SETS)}")
        return self


SETS = ("ffn", "embeddings", "attention", "rest")
"""Sets of layers that become codebooks together."""


Schedule = Annotated[
    Calibrate | PlainSchedule | BlockwiseThenEndToEnd | TwoStep | Staged,
    Field(discriminator="name"),
    BeforeValidator(named),
]


# Sharpness ----------------------------------------------------------------------------------------


class Sharpness(Options):
    """Steepness of the loss around the trained weights (`sharpness.py`)."""

    directions: int = Field(default=20, ge=1)
    """Number of random directions over which the rise of the loss is averaged, each in both senses."""
    rho: float = Field(default=0.05, gt=0)
    """Norm of a direction, over all quantized weights together."""
    samples: int = Field(default=64, ge=1)
    """Number of samples of the first evaluation set for the loss."""
    iterations: int = Field(default=100, ge=1)
    """Largest number of iterations for the largest eigenvalue of the loss's Hessian."""
    tolerance: float = Field(default=1e-2, gt=0, lt=1)
    """The search ends when ||Hv - av|| is at most this share of |a|."""
