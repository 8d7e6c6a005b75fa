"""Task sections of a recipe. No torch.

`tasks/` has the module that implements each task, under its name.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from qcompress.schema.any_task import AnyTask as AnyTask
from qcompress.schema.glue import GLUE
from qcompress.schema.quantizers import named
from qcompress.schema.text_tasks import FeatureExtraction as FeatureExtraction
from qcompress.schema.text_tasks import FillMask as FillMask
from qcompress.schema.text_tasks import QuestionAnswering as QuestionAnswering
from qcompress.schema.text_tasks import TaskOptions


class CausalLm(TaskOptions):
    """Next-token prediction. Metrics: perplexity, token_accuracy."""

    sources: ClassVar[tuple[str, ...]] = ("text", "dataset")
    """Keys of `data` that may name its examples."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Keys of `columns` that it reads, the input first."""
    running: ClassVar[bool] = True

    name: Literal["causal-lm"] = "causal-lm"
    context: int = Field(default=1024, ge=2)
    """Tokens of one sequence."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens between the starts of evaluation windows; each window counts only tokens that no earlier window
    counted. none: the context, so that windows do not overlap.
    """

    @model_validator(mode="after")
    def _stride_covers_the_text(self) -> CausalLm:
        if self.stride is not None and self.stride > self.context:
            raise ValueError(
                f"stride {self.stride} is longer than context {self.context}: it would skip tokens"
            )
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics of the task."""
        return ("perplexity", "token_accuracy")

    @property
    def main(self) -> tuple[str, ...]:
        """Metrics that the ladder shows."""
        return ("perplexity",)

    def within(self, context: int) -> CausalLm:
        """Task with sequences of at most `context` tokens."""
        context = min(self.context, context)
        return self.model_copy(update={"context": context, "stride": min(self.stride or context, context)})


def distinct(names: list[str] | None, key: str = "labels") -> None:
    """Raise ValueError if a name is repeated; `key`: name of the list in the error."""
    twice = sorted({name for name in names or () if (names or []).count(name) > 1})
    if twice:
        raise ValueError(f"`{key}` names {', '.join(twice)} more than once")


LabelsAre = Literal["names", "indices"]
READINGS: tuple[str, ...] = get_args(LabelsAre)


class Labelled(TaskOptions):
    """Options of a task with labels. An unset `labels_are` is not written, so that older recipes keep their
    digests.
    """

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = handler(self)
        return {key: value for key, value in values.items() if value is not None or key != "labels_are"}


class SequenceClassification(Labelled):
    """One answer to each text, or pair of texts. Metrics: accuracy, f1 and mcc (single), f1_micro, f1_macro
    and accuracy (multi), spearman and pearson (regression).
    """

    sources: ClassVar[tuple[str, ...]] = ("text", "table", "dataset")
    """Keys of `data` that may name its examples."""
    columns: ClassVar[tuple[str, ...]] = ("text", "pair", "label")
    """Keys of `columns` that it reads, the input first."""

    name: Literal["sequence-classification"] = "sequence-classification"
    glue: Literal["cola", "sst2", "mrpc", "stsb", "rte", "qnli", "qqp", "mnli", "wnli"] | None = None
    """A task of GLUE: gives kind, labels, columns and the official metrics."""
    kind: Literal["single", "multi", "regression"] = "single"
    """One label of several; any number of labels; or a number."""
    labels: list[str] | None = Field(default=None, min_length=2)
    """Names of the labels; none: those of the checkpoint's config.json."""
    context: int = Field(default=128, ge=2)
    """Largest number of tokens of one example; longer ones are cut."""
    labels_are: LabelsAre | None = None
    """Content of a label column: names, or indices from 0 in the model's order. none: a cell that is a name
    of the model is that label, and whole numbers that are not all names are indices; a column with different
    labels under the two readings is refused.
    """

    @model_validator(mode="before")
    @classmethod
    def _kind_of_glue(cls, value: Any) -> Any:
        if isinstance(value, dict) and "kind" not in value and value.get("glue") == "stsb":
            return {**value, "kind": "regression"}
        return value

    @model_validator(mode="after")
    def _labels_fit(self) -> SequenceClassification:
        if self.glue is not None:
            kind = "single" if GLUE[self.glue].labels else "regression"
            if self.kind != kind:
                raise ValueError(f"`glue: {self.glue}` is of the kind {kind}, and `kind` is {self.kind}")
            if self.labels is not None and set(self.labels) != set(GLUE[self.glue].labels):
                raise ValueError(f"`glue: {self.glue}` has labels of its own: drop `labels`")
        if self.kind == "regression" and self.labels is not None:
            raise ValueError("a regression gives a number and has no labels: drop `labels`")
        if self.kind == "regression" and self.labels_are is not None:
            raise ValueError("a regression gives a number and has no labels: drop `labels_are`")
        distinct(self.labels)
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics for data with labels, the main ones first."""
        if self.kind == "regression":
            return ("spearman", "pearson")
        if self.kind == "multi":
            return ("f1_micro", "f1_macro", "accuracy")
        if self.glue is not None:
            return {"cola": ("mcc", "accuracy"), "qqp": ("accuracy", "f1")}.get(self.glue, self.main)
        if self.labels is None:
            return ("accuracy", "f1", "f1_macro", "mcc")
        return ("accuracy", "f1", "mcc") if len(self.labels) == 2 else ("accuracy", "f1_macro", "mcc")

    @property
    def main(self) -> tuple[str, ...]:
        """Metrics that the ladder shows: GLUE's official metrics, or the first."""
        return GLUE[self.glue].main if self.glue is not None else self.metrics[:1]

    def within(self, context: int) -> SequenceClassification:
        """Task with at most `context` tokens."""
        return self.model_copy(update={"context": min(self.context, context)})


class TokenClassification(Labelled):
    """One label for each word. Metrics: token_accuracy, and span_f1 if the labels are IOB2 (`B-...`, `I-...`,
    `O`).
    """

    sources: ClassVar[tuple[str, ...]] = ("text", "table", "dataset")
    """Keys of `data` that may name its examples."""
    columns: ClassVar[tuple[str, ...]] = ("tokens", "tags")
    """Keys of `columns` that it reads, the input first."""

    name: Literal["token-classification"] = "token-classification"
    labels: list[str] | None = Field(default=None, min_length=2)
    """Names of the tags; none: those of the checkpoint's config.json."""
    context: int = Field(default=128, ge=2)
    """Largest number of tokens of one example; longer ones are cut."""
    labels_are: LabelsAre | None = None
    """Content of a label column: names, or indices from 0 in the model's order. none: a cell that is a name
    of the model is that label, and whole numbers that are not all names are indices; a column with different
    labels under the two readings is refused.
    """

    @model_validator(mode="after")
    def _labels_fit(self) -> TokenClassification:
        distinct(self.labels)
        return self

    @property
    def spans(self) -> bool:
        """True if the labels mark entities: `B-` or `I-` and a type, or `O`."""
        labels = self.labels or ()
        return "O" in labels and all(label == "O" or label[:2] in ("B-", "I-") for label in labels)

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics for data with labels, the main one first."""
        return ("span_f1", "token_accuracy") if self.labels is None or self.spans else ("token_accuracy",)

    @property
    def main(self) -> tuple[str, ...]:
        """Metrics that the ladder shows."""
        return self.metrics[:1]

    def within(self, context: int) -> TokenClassification:
        """Task with at most `context` tokens."""
        return self.model_copy(update={"context": min(self.context, context)})


def _square(value: Any) -> Any:
    """Expand a number to height and width."""
    return [value, value] if isinstance(value, int) and not isinstance(value, bool) else value


Size = Annotated[
    list[int],
    Field(min_length=2, max_length=2),
    BeforeValidator(_square),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2},
            ]
        }
    ),
]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]


class ImageClassification(Labelled):
    """One label for each image. Metrics: accuracy, top5_accuracy (of five labels and more), cross_entropy."""

    sources: ClassVar[tuple[str, ...]] = ("npz", "folder", "dataset")
    """Keys of `data` that may name its examples."""
    columns: ClassVar[tuple[str, ...]] = ("image", "label")
    """Keys of `columns` that it reads, the input first."""

    name: Literal["image-classification"] = "image-classification"
    labels: list[str] | None = Field(default=None, min_length=2)
    """Names of the labels; none: those of the checkpoint's config.json."""
    mean: Channels | None = None
    """Mean of red, green and blue, of values from 0 to 1. With `std`: normalization of images, replacing the
    checkpoint's preprocessor_config.json.
    """
    std: Channels | None = None
    """Standard deviation of red, green and blue, of values from 0 to 1."""
    size: Size | None = None
    """Height and width to which images are resized (bilinear), or one number for both, with `mean` and `std`;
    none: no resizing.
    """
    labels_are: LabelsAre | None = None
    """Content of a label column: names, or indices from 0 in the model's order. none: a cell that is a name
    of the model is that label, and whole numbers that are not all names are indices; a column with different
    labels under the two readings is refused.
    """

    @model_validator(mode="after")
    def _add_up(self) -> ImageClassification:
        distinct(self.labels)
        if (self.mean is None) != (self.std is None) or (self.size is not None and self.mean is None):
            raise ValueError("`mean` and `std` belong together, and `size` needs both")
        if any(value <= 0 for value in (*(self.std or ()), *(self.size or ()))):
            raise ValueError("`std` and `size` must be above 0")
        return self

    @property
    def context(self) -> None:
        """None: images have the model's size, and nothing is cut."""
        return None

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics for data with labels, the main one first."""
        few = self.labels is not None and len(self.labels) < 5
        return ("accuracy", "cross_entropy") if few else ("accuracy", "top5_accuracy", "cross_entropy")

    @property
    def main(self) -> tuple[str, ...]:
        """Metrics that the ladder shows."""
        return self.metrics[:1]

    def within(self, context: int) -> ImageClassification:
        """The task unchanged: images have no context."""
        return self


AGREEMENT = "agreement"
"""Metric of data without labels: the share of answers that equal the float model's; for a regression
Pearson's correlation with the float model's numbers; for embeddings the mean cosine with the float model's.
"""

ALIASES = {
    "text-generation": "causal-lm",
    "text-classification": "sequence-classification",
    "ner": "token-classification",
    "sentence-similarity": "feature-extraction",
}
"""Names of tasks in transformers and Olive that stand for a task with another name here."""


def task_named(value: object) -> object:
    """Expand a task's name to a mapping, and replace another name of a task by its own.

    >>> task_named("ner"), task_named({"name": "text-generation", "context": 64})
    ({'name': 'token-classification'}, {'name': 'causal-lm', 'context': 64})
    """
    expanded = named(value)
    if isinstance(expanded, dict) and isinstance(expanded.get("name"), str):
        return {**expanded, "name": ALIASES.get(expanded["name"], expanded["name"])}
    return expanded


Task = Annotated[
    CausalLm
    | SequenceClassification
    | TokenClassification
    | ImageClassification
    | FeatureExtraction
    | FillMask
    | QuestionAnswering
    | AnyTask,
    Field(discriminator="name"),
    BeforeValidator(task_named),
]
