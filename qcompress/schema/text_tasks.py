"""Base of task sections, and the sections of tasks of text without labels. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from qcompress.schema.formats import Options


class TaskOptions(Options):
    """Base of the options of a task."""

    output: ClassVar[str] = "logits"
    """Name of the graph's output."""
    ranked: ClassVar[bool] = True
    """True if the largest output is the answer, so that rows agree where they choose the same one."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Suffixes of `table` that this task reads besides those of tables."""
    running: ClassVar[bool] = False
    """True if samples are windows of a whole text, which have no labels of their own."""


class FeatureExtraction(TaskOptions):
    """An embedding of each text. Metrics: cosine_spearman and cosine_pearson (scored pairs of texts); without
    scores the agreement is the mean cosine of each embedding with the float model's.
    """

    sources: ClassVar[tuple[str, ...]] = ("text", "table", "dataset")
    """Keys of `data` that may name its examples."""
    columns: ClassVar[tuple[str, ...]] = ("text", "text_pair", "score")
    """Keys of `columns` that it reads, the input first."""
    output: ClassVar[str] = "embeddings"
    ranked: ClassVar[bool] = False
    kind: ClassVar[str] = "regression"
    """An embedding is compared as numbers are, by squared differences."""

    name: Literal["feature-extraction"] = "feature-extraction"
    pooling: Literal["mean", "cls", "last-token"] | None = None
    """Embedding of a text from those of its tokens: their mean without padding, the first one's, or the last
    one's. none: as the checkpoint's 1_Pooling/config.json (sentence-transformers) says.
    """
    normalize: bool | None = None
    """Scale each embedding to length 1; none: as the checkpoint's modules.json says."""
    context: int = Field(default=128, ge=2)
    """Largest number of tokens of one text; longer ones are cut."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics for pairs with scores, the main one first."""
        return ("cosine_spearman", "cosine_pearson")

    @property
    def main(self) -> tuple[str, ...]:
        """Metrics that the ladder shows."""
        return self.metrics[:1]

    def within(self, context: int) -> FeatureExtraction:
        """Task with at most `context` tokens."""
        return self.model_copy(update={"context": min(self.context, context)})


class FillMask(TaskOptions):
    """Prediction of masked tokens of a text. Metrics: pseudo_perplexity, masked_accuracy."""

    sources: ClassVar[tuple[str, ...]] = ("text", "dataset")
    """Keys of `data` that may name its examples."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Keys of `columns` that it reads, the input first."""
    running: ClassVar[bool] = True

    name: Literal["fill-mask"] = "fill-mask"
    context: int = Field(default=128, ge=4)
    """Tokens of one sequence, special tokens included."""
    share: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens of a sequence that are masked, at least one token. BERT (arXiv:1810.04805) is
    trained with 0.15.
    """
    mask_seed: int = Field(default=0, ge=0)
    """Seed of the masked places of evaluation and calibration."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics of the task, the main one first."""
        return ("pseudo_perplexity", "masked_accuracy")

    @property
    def main(self) -> tuple[str, ...]:
        """Metrics that the ladder shows."""
        return self.metrics

    def within(self, context: int) -> FillMask:
        """Task with sequences of at most `context` tokens."""
        return self.model_copy(update={"context": min(self.context, context)})


class QuestionAnswering(TaskOptions):
    """The answer to a question as a part of its context, as in SQuAD. Metrics: answer_f1, exact_match."""

    sources: ClassVar[tuple[str, ...]] = ("table", "dataset")
    """Keys of `data` that may name its examples."""
    columns: ClassVar[tuple[str, ...]] = ("question", "context", "answers")
    """Keys of `columns` that it reads, the input first."""
    suffixes: ClassVar[tuple[str, ...]] = (".json",)
    ranked: ClassVar[bool] = False

    name: Literal["question-answering"] = "question-answering"
    context: int = Field(default=384, ge=16)
    """Tokens of one window: the question, a part of the context, and special tokens."""
    stride: int = Field(default=128, ge=0)
    """Tokens that two windows of one context share."""
    answer_tokens: int = Field(default=30, ge=1)
    """Largest number of tokens of an answer."""
    unanswerable: bool = False
    """Questions may have no answer (SQuAD 2.0), for which the first token stands."""

    @model_validator(mode="after")
    def _windows_advance(self) -> QuestionAnswering:
        if self.stride >= self.context:
            raise ValueError(f"stride {self.stride} must be below context {self.context}")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics for data with answers, the main one first."""
        return ("answer_f1", "exact_match")

    @property
    def main(self) -> tuple[str, ...]:
        """Metrics that the ladder shows."""
        return self.metrics

    def within(self, context: int) -> QuestionAnswering:
        """Task with windows of at most `context` tokens."""
        context = min(self.context, context)
        return self.model_copy(update={"context": context, "stride": min(self.stride, context // 3)})
