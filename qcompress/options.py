"""The options of every value of the five axes. No torch.

    quantizer   how does a tensor become integers while training?
    adapter     what function-preserving rescaling comes first, to be folded later?
    objective   what is minimised?
    stepper     how is one update made?
    schedule    what is trained when?

`methods/` holds the class that does the work of each value.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from qcompress.formats import Options

Role = Literal["weight", "scale", "adapter", "centroid", "other"]
"""What a trainable tensor is; each role has its own learning rate."""


def named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


# Axis 1: quantizers -------------------------------------------------------------------------------


class MinMax(Options):
    """Range from observed values; nothing is learned."""

    name: Literal["minmax"] = "minmax"
    range: Literal["absmax", "percentile", "mse"] = "absmax"
    """absmax: the largest magnitude; percentile: clip the rarest magnitudes; mse: least squared error."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """Share of magnitudes (in %) that `range: percentile` keeps."""


class Lsq(Options):
    """Learned step size (LSQ, arXiv:1902.08153)."""

    name: Literal["lsq"] = "lsq"
    init: Literal["lsq", "absmax", "percentile", "mse"] = "lsq"
    """Where the scale starts; lsq: 2 * mean|x| / sqrt(qmax), section 2.1 of the paper."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """Share of magnitudes (in %) that `init: percentile` keeps."""
    floor: float = Field(default=1e-3, gt=0, lt=1)
    """After each update a scale is at least this fraction of where it started."""


class Ternary(Options):
    """Ternary weights (TWN, arXiv:1605.04711): -a, 0, a with a threshold at 0.7 of the mean magnitude. As
    TernaryBERT (arXiv:2009.12812) and Teacher Intervention (arXiv:2302.11812) use it.
    """

    name: Literal["ternary"] = "ternary"
    threshold: float = Field(default=0.7, gt=0, lt=1)
    """Weights below this share of the mean magnitude become 0."""
    clip: float = Field(default=2.5, gt=0)
    """Weights are clamped to [-clip, clip] first; no gradient passes outside."""


class Dynamic(Options):
    """Range of the tensor at hand while training (TernaryBERT, arXiv:2009.12812); a static range, observed
    on the calibration data when training has ended, is what is deployed.
    """

    name: Literal["dynamic"] = "dynamic"
    clip: float | None = Field(default=2.5, gt=0)
    """Activations are clamped to [-clip, clip] first; no gradient passes outside. none: no clamping."""


WeightQuantizer = Annotated[MinMax | Lsq | Ternary, Field(discriminator="name"), BeforeValidator(named)]
ActivationQuantizer = Annotated[MinMax | Lsq | Dynamic, Field(discriminator="name"), BeforeValidator(named)]


class Quantizers(Options):
    """One quantizer for each role."""

    weights: WeightQuantizer = MinMax()
    activations: ActivationQuantizer = MinMax()
    embeddings: WeightQuantizer = MinMax()


def quantizers(value: object) -> object:
    """`quantizer: lsq` is lsq for weights and activations, and minmax for the embedding tables; ternary and
    dynamic belong together, as in TernaryBERT, tables included.
    """
    if not isinstance(value, str) and not (isinstance(value, dict) and "name" in value):
        return value
    name = value if isinstance(value, str) else value["name"]
    if name == "ternary":
        return {"weights": value, "activations": "dynamic", "embeddings": value}
    if name == "dynamic":
        return {"activations": value}
    return {"weights": value, "activations": value}


# Axis 2: adapters ---------------------------------------------------------------------------------


class NoAdapter(Options):
    """No rescaling."""

    name: Literal["none"] = "none"


class QuadapterOptions(Options):
    """Channel-wise rescaling before the activation quantizer, folded later (Quadapter, arXiv:2211.16912)."""

    name: Literal["quadapter"] = "quadapter"
    init: Literal["identity", "balanced"] = "balanced"
    """identity: every scale 1; balanced: sqrt(max|W_i| / max|x_i|), normalised to geometric mean 1."""
    bound: float = Field(default=100.0, gt=1)
    """Scales stay within [1/bound, bound]."""


Adapter = Annotated[NoAdapter | QuadapterOptions, Field(discriminator="name"), BeforeValidator(named)]


# Axes 3 and 4: objectives and steppers ------------------------------------------------------------


class TaskObjective(Options):
    """The loss of the task itself."""

    name: Literal["task"] = "task"


Objective = Annotated[TaskObjective, BeforeValidator(named)]


class PlainStepper(Options):
    """One forward, one backward, one update."""

    name: Literal["plain"] = "plain"
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm of one role; none: no clipping."""


Stepper = Annotated[PlainStepper, BeforeValidator(named)]


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
    """Steps between two looks at a block's error on all calibration data; the best state is kept."""


Schedule = Annotated[
    Calibrate | PlainSchedule | BlockwiseThenEndToEnd,
    Field(discriminator="name"),
    BeforeValidator(named),
]
