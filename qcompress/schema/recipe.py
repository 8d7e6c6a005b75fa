"""Schema of a recipe: every section, axis value and option as a typed value. No torch.

A docstring below a field is its help text (`qcompress list`, JSON Schema). `recipe/` reads YAML with line
numbers and has the checks that need a model; number formats are in `formats.py`.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Annotated, Any, Literal, Union

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_serializer,
    model_validator,
)

from qcompress.schema.adapters import Adapter, NoAdapter
from qcompress.schema.axes import METHODS, beside_preset
from qcompress.schema.data import Data
from qcompress.schema.data import TextData as TextData
from qcompress.schema.export import Build, Export
from qcompress.schema.export import Profile as Profile  # re-exported: this module has all sections
from qcompress.schema.families import DISCOVERED
from qcompress.schema.formats import (
    ACTIVATION_WORDS,
    FORMAT_PRESETS,
    WEIGHT_FORMATS,
    WEIGHT_WORDS,
    ActivationFormat,
    Options,
    over_preset,
    weight_format_class,
)
from qcompress.schema.goals import Gate
from qcompress.schema.method_options import (
    Calibrate,
    Objective,
    PlainStepper,
    Role,
    Schedule,
    Sharpness,
    Stepper,
    TaskObjective,
)
from qcompress.schema.model import HUB_ID as HUB_ID
from qcompress.schema.model import Model as Model
from qcompress.schema.quantizers import Quantizers, quantizers
from qcompress.schema.stages import ROWS as ROWS
from qcompress.schema.stages import STAGES as STAGES
from qcompress.schema.stages import Row
from qcompress.schema.stages import Stage as Stage
from qcompress.schema.tasks import AnyTask as AnyTask
from qcompress.schema.tasks import CausalLm as CausalLm
from qcompress.schema.tasks import FeatureExtraction as FeatureExtraction
from qcompress.schema.tasks import FillMask as FillMask
from qcompress.schema.tasks import ImageClassification as ImageClassification
from qcompress.schema.tasks import QuestionAnswering as QuestionAnswering
from qcompress.schema.tasks import SequenceClassification as SequenceClassification
from qcompress.schema.tasks import Task
from qcompress.schema.tasks import TokenClassification as TokenClassification


def _word(words: dict[str, Any], default: str) -> BeforeValidator:
    """Validator that expands a short form (`int8`) to its value; other values are left to the field."""

    def expand(value: object) -> object:
        if isinstance(value, str):
            if value not in words:
                raise ValueError(f"unknown format; known: {', '.join(words)}, or a mapping such as {default}")
            return words[value]
        return value

    return BeforeValidator(expand)


def _spelled(value: Options | str | None) -> object:
    """Format as a recipe writes it: `float` for None."""
    return "float" if value is None else value.model_dump() if isinstance(value, Options) else value


def _weight_kind(value: object) -> str:
    """Kind of weight format that a value is meant to be."""
    if value is None:
        return "float"
    fields = type(value).model_fields if isinstance(value, Options) else value
    return weight_format_class(fields if isinstance(fields, dict) else ()).__name__


_TAGGED = tuple(Annotated[one, Tag(one.__name__)] for one in WEIGHT_FORMATS)
Stored = Annotated[Union[(*_TAGGED, Annotated[None, Tag("float")])], Discriminator(_weight_kind)]  # noqa: UP007
Weights = Annotated[Stored, _word(WEIGHT_WORDS, "{bits: 4, block: 64}")]
Activations = Annotated[ActivationFormat | None, _word(ACTIVATION_WORDS, "{bits: 8}")]


# Sections -----------------------------------------------------------------------------------------


class LayerFormat(Options):
    """Exception for the layers that a pattern matches; omitted keys keep their value."""

    weights: Weights | Literal["inherit"] = "inherit"
    activations: Activations | Literal["inherit"] = "inherit"

    @field_serializer("weights", "activations")
    def _spell_float(self, value: Options | Literal["inherit"] | None) -> object:
        return _spelled(value)


def _layer_format(value: object) -> object:
    """Expand a short form: `float`, `int8` ... is the format of a layer's weights; presets also set its
    activations.
    """
    if isinstance(value, str):
        if value in FORMAT_PRESETS:
            return {key: FORMAT_PRESETS[value][key] for key in ("weights", "activations")}
        return {"weights": value}
    return value


class Format(Options):
    """Number formats of all tensors."""

    preset: str | None = None
    """A row of the presets (`w8a8`, `w4a16-g64`...); other keys override it."""
    weights: Weights = None
    """Linear layers: int8, int4, int3, int2, ternary, float, or {bits, ternary, granularity, block,
    container}."""
    activations: Activations = None
    """Inputs of quantized linear layers: int8, float."""
    embeddings: Weights = None
    """Embedding tables, and an output head tied to one."""
    attention: Activations = None
    """Operands of both matmuls of an attention (query, key, probabilities, value): int8, float."""
    cache: Activations = None
    """Keys and values only, which a key-value cache stores (`export.cache`): int8, float; for these two it
    overrides `attention`.
    """
    residual: Activations = None
    """Both inputs of each residual addition, and of squeeze-and-excite products: int8, float."""
    compute: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of all floating-point tensors, and of the scales."""
    layers: dict[str, Annotated[LayerFormat, BeforeValidator(_layer_format)]] = {}
    """Exceptions by name of a layer or a point (`*.query_point`): globs; the last match wins; a glob without
    a match is a mistake.
    """

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, value: object) -> object:
        value = {"preset": value} if isinstance(value, str) else value
        if not isinstance(value, dict) or not isinstance(value.get("preset"), str):
            return value
        if value["preset"] not in FORMAT_PRESETS:
            raise ValueError(f"unknown preset {value['preset']!r}; known: {', '.join(FORMAT_PRESETS)}")
        preset = FORMAT_PRESETS[value["preset"]]
        return {
            **value,
            **{key: over_preset(key, preset[key], value.get(key, preset[key])) for key in preset},
        }

    @field_serializer("weights", "activations", "embeddings", "attention", "cache", "residual")
    def _spell_float(self, value: Options | None) -> object:
        return _spelled(value)

    @property
    def is_float(self) -> bool:
        """True if nothing is quantized."""
        formats = (self.weights, self.activations, self.embeddings, self.attention, self.cache, self.residual)
        return not any((*formats, self.layers))


class PhaseOptions(Options):
    """One phase of the schedule."""

    steps: int = Field(ge=0)
    """Updates; for a block-wise phase, updates of each block."""
    lr: dict[Role, Annotated[float, Field(gt=0)]] = {}
    """Learning rates that differ from `train.lr` in this phase."""


class Train(Options):
    """Training options: steps, learning rates, optimizer."""

    batch_size: int = Field(default=8, ge=1)
    """Sequences of one update, over all processes."""
    lr: dict[Role, Annotated[float, Field(gt=0)]] = {}
    """Learning rate of each role; omitted roles have the default of `LEARNING_RATES`."""
    phases: dict[str, PhaseOptions] = {}
    """Steps of the schedule's phases; `qcompress check` shows their names."""
    decay: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the learning rate after the warm-up."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of a phase's steps with a rising learning rate."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd: with `momentum`, in Nesterov's form."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of sgd; 0: none."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay of the role `weight`; scales and adapters never decay."""
    layer_drop: float = Field(default=0.0, ge=0, lt=1)
    """Probability that an update leaves out a block (LayerDrop, arXiv:1909.11556), in phases that train
    weights, so that `model.blocks: every-other` can drop blocks afterwards."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of accelerate."""
    compile: bool = False
    """Compile the model's forward and backward passes with torch.compile. The first updates are slow. Needs
    Triton on a GPU and a C++ compiler on a CPU.
    """
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of training and of the torch rows of the ladder."""
    checkpoint_every_s: int = Field(default=60, ge=1)
    """Seconds between two checkpoints; a killed run resumes from the newest."""


LEARNING_RATES: dict[str, float] = {
    "weight": 2e-5,
    "other": 2e-5,
    "scale": 1e-3,
    "adapter": 1e-3,
    "centroid": 1e-3,
}
"""Default learning rate of each role. For a learned scale it is relative to the starting value under AdamW,
and the rate of LSQ's own update under SGD.
"""


class Verify(Options):
    """Measurement options."""

    require: list[Row] = ["float", "trained", "folded", "onnx"]
    """Rows that must be measured; a missing one makes the verdict anomalous. With `compute: bf16` the default
    omits onnx, which ONNX Runtime cannot run in bf16.
    """
    samples: int | None = Field(default=None, ge=1)
    """Largest number of samples of each evaluation set; none: all."""
    batch_size: int = Field(default=8, ge=1)
    """Samples of one forward pass."""
    distance_samples: int = Field(default=64, ge=1)
    """Samples of the first evaluation set whose logits are compared between rows; for a classifier all
    samples are compared.
    """
    held: Literal["auto", "always", "never"] = "auto"
    """Compare graph and folded model from the graph's own codes as well (teacher-forced codes), one
    quantization point after another, on the first `distance_samples`: a flip on a rounding tie then does not
    affect later points, and every differing code that is not on a tie is counted. auto: if the onnx row
    misses its default limits. Where folding changed numbers (batch norms, raised scales), the folded model is
    compared from the trained model's codes; never: it is judged as it runs.
    """
    sharpness: Sharpness | None = None
    """Measure the sharpness of the trained model as well (`{}`: with the defaults); none: do not
    measure it.
    """


Tracker = Literal["tensorboard", "mlflow", "wandb"]
TRACKERS: tuple[str, ...] = ("tensorboard", "mlflow", "wandb")


def _several(value: object) -> object:
    """Expand the name of one tracker to a list."""
    return [value] if isinstance(value, str) else value


class Recipe(Options):
    """One run: a float model, a method, a format, a target, and goals."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*(\.[a-z0-9-]+)*$", max_length=100)
    """A slug; name of the run's folder."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of all random numbers."""
    model: Model
    task: Task
    data: Data
    format: Format = Format.model_construct()
    method: str = "ptq"
    """A preset of the five axes; `qcompress list methods`."""
    quantizer: Annotated[Quantizers, BeforeValidator(quantizers)] = Quantizers.model_construct()
    adapter: Adapter = NoAdapter.model_construct()
    objective: Objective = TaskObjective.model_construct()
    stepper: Stepper = PlainStepper.model_construct()
    schedule: Schedule = Calibrate.model_construct()
    train: Train = Train.model_construct()
    export: Export = Export.model_construct()
    build: Build = Build.model_construct()
    verify: Verify = Verify.model_construct()
    gate: Gate = Gate.model_construct()
    tracking: Annotated[list[Tracker], BeforeValidator(_several)] = []
    """Trackers of accelerate that receive the records of log.jsonl: tensorboard, mlflow, wandb, or several of
    them. They affect neither the numbers of a run nor the reuse of stages.
    """

    @model_validator(mode="before")
    @classmethod
    def _apply_method(cls, value: object) -> object:
        if not isinstance(value, dict) or not isinstance(value.get("method", "ptq"), str):
            return value
        method = value.get("method", "ptq")
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
        written = {
            axis: beside_preset(axis, preset, value.get(axis, preset))
            for axis, preset in METHODS[method].items()
        }
        return {**value, **written}

    @model_validator(mode="before")
    @classmethod
    def _family_of_task(cls, value: object) -> object:
        """Default of `model.family`."""
        if not isinstance(value, dict):
            return value
        model, task = value.get("model"), value.get("task")
        named = task.get("name") if isinstance(task, dict) else task
        if isinstance(model, dict) and "family" not in model and named in DISCOVERED:
            return {**value, "model": {"family": DISCOVERED[named], **model}}
        return value

    @model_validator(mode="before")
    @classmethod
    def _required_rows(cls, value: object) -> object:
        """Default of `verify.require`: an external graph has no trained and no folded model to measure, and
        ONNX Runtime's CPU provider cannot run a graph in bf16.
        """
        if not isinstance(value, dict):
            return value
        export, verify, form = value.get("export"), value.get("verify", {}), value.get("format")
        rows = None
        if isinstance(export, dict) and export.get("graph"):
            rows = ["float", "onnx"]
        elif isinstance(form, dict) and form.get("compute") == "bf16":
            rows = ["float", "trained", "folded"]
        if rows is None or not isinstance(verify, dict):
            return value
        return {**value, "verify": {"require": rows, **verify}}

    @property
    def trains_float(self) -> bool:
        """True if nothing is quantized, so that the result is another float model."""
        return self.format.is_float and self.export.graph is None


RECIPE: ContextVar[type[Recipe]] = ContextVar("recipe", default=Recipe)
"""The schema that validates recipes; `custom.py` adds custom components to it."""
