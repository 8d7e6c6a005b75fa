"""The tasks and their data, as a recipe writes them. No torch.

`tasks/` holds the module that does the work of each task, under the same name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from qcompress.formats import Options
from qcompress.glue import GLUE
from qcompress.quantizer_options import named


class CausalLm(Options):
    """Next-token prediction. Metrics: perplexity, token_accuracy."""

    name: Literal["causal-lm"] = "causal-lm"
    context: int = Field(default=1024, ge=2)
    """Tokens of one sequence."""
    stride: int | None = Field(default=None, ge=1)
    """Evaluation windows start this many tokens apart and only count what no earlier window counted; none:
    the context, so that windows do not overlap."""

    @model_validator(mode="after")
    def _stride_covers_the_text(self) -> CausalLm:
        if self.stride is not None and self.stride > self.context:
            raise ValueError(
                f"stride {self.stride} is longer than context {self.context}: it would skip tokens"
            )
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """Everything that is measured."""
        return ("perplexity", "token_accuracy")

    @property
    def main(self) -> tuple[str, ...]:
        """What a ladder shows."""
        return ("perplexity",)

    def within(self, context: int) -> CausalLm:
        """The same task on sequences of at most so many tokens."""
        context = min(self.context, context)
        return self.model_copy(update={"context": context, "stride": min(self.stride or context, context)})


def _distinct(labels: list[str] | None) -> None:
    twice = sorted({label for label in labels or () if (labels or []).count(label) > 1})
    if twice:
        raise ValueError(f"`labels` names {', '.join(twice)} more than once")


class SequenceClassification(Options):
    """One answer to each text, or pair of texts. Metrics: accuracy, f1 and mcc (single), f1_micro, f1_macro
    and accuracy (multi), spearman and pearson (regression).
    """

    name: Literal["sequence-classification"] = "sequence-classification"
    glue: Literal["cola", "sst2", "mrpc", "stsb", "rte", "qnli", "qqp", "mnli", "wnli"] | None = None
    """A task of GLUE: gives kind, labels, columns and the official metrics."""
    kind: Literal["single", "multi", "regression"] = "single"
    """One label of several; any number of labels; or a number."""
    labels: list[str] | None = Field(default=None, min_length=2)
    """Names of the labels; none: those of the checkpoint's config.json."""
    context: int = Field(default=128, ge=2)
    """Most tokens of one example; what is longer is cut."""

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
        _distinct(self.labels)
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """Everything that is measured where there are labels, the main ones first."""
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
        """What a ladder shows: GLUE's official metrics, or the first."""
        return GLUE[self.glue].main if self.glue is not None else self.metrics[:1]

    def within(self, context: int) -> SequenceClassification:
        """The same task on at most so many tokens."""
        return self.model_copy(update={"context": min(self.context, context)})


class TokenClassification(Options):
    """One label for each word. Metrics: token_accuracy, and span_f1 where the labels are IOB2 (`B-...`,
    `I-...`, `O`).
    """

    name: Literal["token-classification"] = "token-classification"
    labels: list[str] | None = Field(default=None, min_length=2)
    """Names of the tags; none: those of the checkpoint's config.json."""
    context: int = Field(default=128, ge=2)
    """Most tokens of one example; what is longer is cut."""

    @model_validator(mode="after")
    def _labels_fit(self) -> TokenClassification:
        _distinct(self.labels)
        return self

    @property
    def spans(self) -> bool:
        """Whether the labels mark entities: with `B-` or `I-` and a type, or `O`."""
        labels = self.labels or ()
        return "O" in labels and all(label == "O" or label[:2] in ("B-", "I-") for label in labels)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Everything that is measured where there are labels, the main one first."""
        return ("span_f1", "token_accuracy") if self.labels is None or self.spans else ("token_accuracy",)

    @property
    def main(self) -> tuple[str, ...]:
        """What a ladder shows."""
        return self.metrics[:1]

    def within(self, context: int) -> TokenClassification:
        """The same task on at most so many tokens."""
        return self.model_copy(update={"context": min(self.context, context)})


AGREEMENT = "agreement"
"""What is measured of a classification without labels: the share of answers that are the float model's; for a
regression Pearson's correlation with the float model's numbers."""

Task = Annotated[
    CausalLm | SequenceClassification | TokenClassification,
    Field(discriminator="name"),
    BeforeValidator(named),
]


class Columns(Options):
    """Names of a table's columns. What is left out is called as its key is; `pair` is not read then."""

    text: str | None = None
    """The text (sequence-classification)."""
    pair: str | None = None
    """The second text of a pair (sequence-classification)."""
    label: str | None = None
    """The label: a name or its index, a number for a regression, a list of names or indices for several
    labels (in .tsv and .csv joined by `|`). Without this key, a table without a column `label` has none."""
    tokens: str | None = None
    """The words, a list (token-classification)."""
    tags: str | None = None
    """A label for each word, a list of names or indices (token-classification); -100 is not counted."""


COLUMNS = {
    "sequence-classification": ("text", "pair", "label"),
    "token-classification": ("tokens", "tags"),
}
"""Keys of `columns` that a task reads."""

SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")
"""Tables that can be read."""


class TextData(Options):
    """Text from files, examples from tables, or either from a `datasets` name."""

    text: list[str] | None = None
    """UTF-8 files, relative to the recipe, joined in this order. For a classification, which can only
    calibrate on them and measure agreement with float: one example a line."""
    table: list[str] | None = None
    """Files of examples for a classification, relative to the recipe, by suffix: .tsv (quotes are literal),
    .csv, .jsonl, .parquet. A .tsv of `task.glue` is as GLUE published it, unless `columns` are named."""
    columns: Columns | None = None
    """Names of the columns of a table or of a dataset; with `task.glue` they are known."""
    dataset: str | None = None
    """A dataset's name on the hub, or a local directory that `datasets` can load."""
    config: str | None = None
    """Configuration of the dataset."""
    split: str = "train"
    """Split of the dataset."""
    revision: str | None = None
    """Commit of a hub dataset."""
    column: str = "text"
    """The dataset's column that holds the text, for causal-lm."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many sequences of `task.context` tokens, or examples: spread over the whole for training
    and calibration, the first ones for evaluation."""

    @model_validator(mode="after")
    def _one_origin(self) -> TextData:
        origins = [self.text, self.table, self.dataset]
        if sum(origin is not None for origin in origins) != 1:
            raise ValueError("give exactly one of `text`, `table` and `dataset`")
        for name in ("text", "table"):
            if getattr(self, name) is not None and not getattr(self, name):
                raise ValueError(f"`{name}` names no file")
        if self.text is not None and self.columns is not None:
            raise ValueError("`columns` belong to `table` or `dataset`, and `text` has none")
        return self

    @property
    def files(self) -> list[str]:
        """The files that are named."""
        return self.text or self.table or []


class Data(Options):
    """What is read, and for what."""

    train: TextData | None = None
    """For phases that train with the task's loss."""
    calibration: TextData | None = None
    """For ranges and for block-wise calibration; no labels are needed."""
    evaluate: dict[str, TextData] = Field(min_length=1)
    """Named evaluation sets; the first is the one a ladder shows first."""
