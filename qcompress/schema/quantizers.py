"""Options of axis 1, the quantizers. No torch.

`quant/` has the class that implements each value.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from qcompress.schema.formats import Options


def named(value: object) -> object:
    """Expand a name to `{"name": name}`; other values are returned unchanged."""
    return {"name": value} if isinstance(value, str) else value


class QuantizerOptions(Options):
    """Base of the options of a quantizer."""

    short_form: ClassVar[tuple[str, ...]] = ("weights", "activations")
    """Keys of `quantizer` that its name alone sets."""
    companions: ClassVar[dict[str, str]] = {}
    """Quantizers that its name alone sets at further keys."""
    weights_only: ClassVar[tuple[str, ...]] = ("renew",)
    """Options that the short form does not give to `activations`: their ranges are not chosen again."""


class MinMax(QuantizerOptions):
    """Range from observed values; nothing is learned."""

    name: Literal["minmax"] = "minmax"
    range: Literal["absmax", "percentile", "mse"] = "absmax"
    """absmax: the largest magnitude; percentile: clip the rarest magnitudes; mse: least squared error."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """Share of magnitudes (in %) that `range: percentile` keeps."""
    renew: int | None = Field(default=None, ge=1)
    """Updates after which `percentile` and `mse` choose a weight's range again, as Quant-Noise's histograms
    do every 1000; none: the share of the largest magnitude chosen at the start is kept.
    """

    @model_validator(mode="after")
    def _renews_something(self) -> MinMax:
        if self.renew is not None and self.range == "absmax":
            raise ValueError(
                "`renew` is for `percentile` and `mse`: the largest magnitude is computed at each update"
            )
        return self

    @model_serializer(mode="wrap")
    def _unless_default(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit the default of `renew`, so that older recipes keep their digests."""
        return {key: value for key, value in spell(self).items() if (key, value) != ("renew", None)}


class Lsq(QuantizerOptions):
    """Learned step size (LSQ, arXiv:1902.08153)."""

    name: Literal["lsq"] = "lsq"
    init: Literal["mse", "lsq", "absmax", "percentile"] = "mse"
    """Starting scale. mse: least squared error; lsq: 2 * mean|x| / sqrt(qmax), section 2.1 of the paper."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """Share of magnitudes (in %) that `init: percentile` keeps."""
    floor: float = Field(default=1e-3, gt=0, lt=1)
    """Smallest scale after an update, as a fraction of the starting scale."""


class Ternary(QuantizerOptions):
    """Ternary weights (TWN, arXiv:1605.04711): -a, 0, a with a threshold at 0.7 of the mean magnitude. As
    TernaryBERT (arXiv:2009.12812) and Teacher Intervention (arXiv:2302.11812) use it.
    """

    short_form: ClassVar[tuple[str, ...]] = ("weights", "embeddings")
    companions: ClassVar[dict[str, str]] = {"activations": "dynamic"}

    name: Literal["ternary"] = "ternary"
    threshold: float = Field(default=0.7, gt=0, lt=1)
    """Weights below this share of the mean magnitude become 0."""
    clip: float = Field(default=2.5, gt=0)
    """Weights are clamped to [-clip, clip] first; no gradient passes outside."""


class Dynamic(QuantizerOptions):
    """Range of the current tensor while training (TernaryBERT, arXiv:2009.12812); deployed is a static range,
    observed on the calibration data after training. The ladder shows both.
    """

    short_form: ClassVar[tuple[str, ...]] = ("activations",)

    name: Literal["dynamic"] = "dynamic"
    clip: float | None = Field(default=2.5, gt=0)
    """Activations are clamped to [-clip, clip] first; no gradient passes outside. none: no clamping."""


class Codebook(QuantizerOptions):
    """k-means codebooks (product quantization; iPQ of Quant-Noise, arXiv:2004.07320, after arXiv:1907.05686).
    Used for every weight whose *format* is a codebook; the other quantizers serve the integer weights.
    """

    short_form: ClassVar[tuple[str, ...]] = ("codebook",)

    name: Literal["codebook"] = "codebook"
    iterations: int = Field(default=15, ge=1)
    """Rounds of k-means."""
    splits: int = Field(default=100, ge=0)
    """Largest number of rounds in which empty clusters are filled by splitting the fullest ones."""
    gradient: Literal["sum", "mean"] = "sum"
    """Gradient of a centroid over the blocks assigned to it: their sum, as in the published code for linear
    layers and tables, or their mean, as there for convolutions.
    """
    renew: int = Field(default=500, ge=1)
    """Updates between two searches for the centroids of the blocks that Quant-Noise's `form:
    round` rounds.
    """


class Noise(Options):
    """Quant-Noise (arXiv:2004.07320): each forward pass of training rounds a random part of the weights, and
    the others get an unbiased gradient. Evaluation and the deployed model round all weights.
    """

    p: float = Field(default=0.1, ge=0, le=1)
    """Share of the weights that are rounded; 0: training in float, 1: usual quantization-aware training."""
    form: Literal["round", "zero"] = "round"
    """Replacement of a rounded weight: its quantized value, or 0 with the others scaled by 1 / (1 - p), which
    the paper found as good for a codebook as its centroids.
    """
    block: int | None = Field(default=None, ge=1)
    """Consecutive input channels that are drawn together; none: one weight of an integer format, the block of
    a codebook.
    """

    @model_validator(mode="after")
    def _something_is_left(self) -> Noise:
        if self.form == "zero" and self.p == 1:
            raise ValueError("`form: zero` with p 1 leaves no weight: write less, such as 0.1")
        return self


QUANTIZERS: tuple[type[QuantizerOptions], ...] = (MinMax, Lsq, Ternary, Dynamic, Codebook)
"""Options of every quantizer, in the order in which lists show them."""

WeightQuantizer = Annotated[MinMax | Lsq | Ternary, Field(discriminator="name"), BeforeValidator(named)]
ActivationQuantizer = Annotated[MinMax | Lsq | Dynamic, Field(discriminator="name"), BeforeValidator(named)]


def _noise(value: object) -> object:
    """Expand a number to its mapping, and `none` to None."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"p": float(value)}
    return None if value == "none" else value


class Quantizers(Options):
    """One quantizer for each role."""

    weights: WeightQuantizer = MinMax.model_construct()
    activations: ActivationQuantizer = MinMax.model_construct()
    embeddings: WeightQuantizer = MinMax.model_construct()
    codebook: Annotated[Codebook, BeforeValidator(named)] = Codebook.model_construct()
    """Quantizer of weights and tables whose format is a codebook, in place of `weights` and `embeddings`."""
    noise: Annotated[Noise | None, BeforeValidator(_noise)] = None
    """Quant-Noise around the quantizers of weights and tables; none: all weights are rounded."""

    @model_serializer(mode="wrap")
    def _unless_default(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit defaults of `noise` and `codebook`, so that older recipes keep their digests."""
        values = spell(self)
        if values.get("noise") is None:
            values.pop("noise", None)
        if self.codebook == Codebook():
            values.pop("codebook", None)
        return values


ROLES = ("weights", "activations", "embeddings")
"""Keys of `Quantizers` that choose a quantizer by name."""


def quantizers(value: object) -> object:
    """Expand a short form: `quantizer: lsq` is lsq for weights and activations, and minmax for the embedding
    tables; ternary and dynamic belong together, as in TernaryBERT, tables included. `noise` may be beside a
    name. Each class declares the keys (`short_form`, `companions`); a custom quantizer has the base's.

    >>> quantizers({"name": "lsq", "noise": 0.5})
    {'weights': {'name': 'lsq'}, 'activations': {'name': 'lsq'}, 'noise': 0.5}
    """
    if not isinstance(value, str) and not (isinstance(value, dict) and "name" in value):
        return value
    noise_option: dict[str, object] = {}
    if isinstance(value, dict) and "noise" in value:
        noise_option = {"noise": value["noise"]}
        value = {key: option for key, option in value.items() if key != "noise"}
    name = value if isinstance(value, str) else value["name"]
    options = next((one for one in QUANTIZERS if one.model_fields["name"].default == name), QuantizerOptions)
    chosen: dict[str, object] = dict.fromkeys(options.short_form, value)
    if "weights" in chosen and "activations" in chosen and isinstance(value, dict):
        without = options.weights_only
        chosen["activations"] = {key: option for key, option in value.items() if key not in without}
    return {**chosen, **options.companions, **noise_option}
