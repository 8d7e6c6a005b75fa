"""Data sections of a recipe. No torch."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from qcompress.schema.formats import Options
from qcompress.schema.tasks import distinct


class _Grown(Options):
    """Base of options that were extended: unset options of `_ADDED` are not written, so that the digests of
    recipes without them do not change.
    """

    _ADDED: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = handler(self)
        return {key: value for key, value in values.items() if value is not None or key not in self._ADDED}


class Columns(_Grown):
    """Column names of a table, or array names of an archive. An omitted key is its own column name; without
    `pair` no second text is read.
    """

    text: str | None = None
    """The text (sequence-classification, feature-extraction)."""
    pair: str | None = None
    """The second text of a pair (sequence-classification)."""
    label: str | None = None
    """The label: a name or its index, a number for a regression, a list of names or indices for several
    labels (in .tsv and .csv joined by `|`). Without this key, a table without a column `label` has none."""
    tokens: str | None = None
    """The words, a list (token-classification)."""
    tags: str | None = None
    """A label for each word, a list of names or indices (token-classification); -100 is not counted."""
    image: str | None = None
    """The image (image-classification); in an archive the array `images`, uint8 [images, height, width, 3],
    and the array of labels is `labels`."""
    text_pair: str | None = None
    """The text to compare with (feature-extraction); read if it is named, or with a column `score`."""
    score: str | None = None
    """The similarity of the two texts, a number (feature-extraction). Without this key, a table without a
    column `score` has none."""

    question: str | None = None
    """The question (question-answering)."""
    context: str | None = None
    """The text that has the answer (question-answering)."""
    answers: str | None = None
    """The answers (question-answering): a mapping of the lists `text` and `answer_start` as in the hub's
    SQuAD, a list of texts, or a text. Without this key, a table without a column `answers` has none."""

    _ADDED: ClassVar[tuple[str, ...]] = ("image", "text_pair", "score", "question", "context", "answers")


class Augment(Options):
    """Random changes of training images, after resizing."""

    flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    crop: int = Field(default=0, ge=0)
    """Pad each image with this number of black pixels on each side, and crop it to its size at a random
    place. He et al. (arXiv:1512.03385), section 4.2, train on CIFAR-10 with 4, and flip.
    """


FILES = ("text", "table", "npz")
"""Data sources that are lists of files."""

SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")
"""Supported table formats."""


RESULTS = ("label", "positions", "tokens", "prediction", "reference", "rank", "correct", "nll", "loss",
           "cosine", "embedding", "context", "windows", "exact_match", "answer_f1", "score", "error",
           "outputs")  # fmt: skip
"""Result columns of a sample, which can be used in goals without `slices`."""


class TextData(_Grown):
    """Text from files, examples from tables, images from archives or folders, or any from a `datasets`
    name.
    """

    text: list[str] | None = None
    """UTF-8 files, relative to the recipe, joined in this order. For a classification, which can only
    calibrate on them and measure agreement with float: one example a line."""
    table: list[str] | None = None
    """Files of examples for a classification, relative to the recipe, by suffix: .tsv (quotes are literal),
    .csv, .jsonl, .parquet; for question-answering also .json in SQuAD's format. A .tsv of `task.glue` is as
    GLUE published it, unless `columns` are named."""
    npz: list[str] | None = None
    """numpy archives of images and their labels, relative to the recipe; `columns` names the arrays. For the
    task any archives of arrays [samples, ...]: those with the name of an input of the model, and others for
    the loss and the metrics."""
    folder: str | None = None
    """A folder of images, relative to the recipe, with a subfolder for each label, named after it."""
    augment: Augment | None = None
    """Random changes of the images, for `data.train` only; none: no changes."""
    columns: Columns | None = None
    """Column names of a table or of a dataset; with `task.glue` they are known."""
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
    slices: list[str] | None = Field(default=None, min_length=1)
    """Columns whose values split an evaluation set into slices, so that goals hold for each slice
    (`gate.regression`: `<set>.<metric>@<column>=<value>`). In an archive an array for each.
    """
    limit: int | None = Field(default=None, ge=1)
    """At most this many sequences of `task.context` tokens, or examples: spread over the whole for training
    and calibration, the first ones for evaluation."""

    _ADDED: ClassVar[tuple[str, ...]] = ("npz", "folder", "augment", "slices")

    @model_validator(mode="after")
    def _one_origin(self) -> TextData:
        origins = [self.text, self.table, self.npz, self.folder, self.dataset]
        if sum(origin is not None for origin in origins) != 1:
            raise ValueError(
                "give exactly one of `text`, `table` and `dataset` (of images: `npz`, `folder`, `dataset`)"
            )
        for name in FILES:
            if getattr(self, name) is not None and not getattr(self, name):
                raise ValueError(f"`{name}` names no file")
        if self.columns is not None and (self.text is not None or self.folder is not None):
            origin = "text" if self.text is not None else "folder"
            raise ValueError(f"`columns` belong to `table` or `dataset` (or `npz`), and `{origin}` has none")
        return self

    @model_validator(mode="after")
    def _slices_have_names(self) -> TextData:
        for name in self.slices or ():
            if name in RESULTS:
                raise ValueError(f"`slices` names {name!r}, which is a result of a sample: rename the column")
            if not name.strip() or "=" in name:
                raise ValueError(f"`slices` names {name!r}, and a goal could not: rename the column")
        distinct(self.slices, "slices")
        return self

    @property
    def files(self) -> list[str]:
        """Files of the section."""
        return self.text or self.table or self.npz or []


class Data(Options):
    """Data of a run, by purpose."""

    train: TextData | None = None
    """Data of phases that train with the task's loss."""
    calibration: TextData | None = None
    """Data for observing ranges and for block-wise calibration; labels are not needed."""
    evaluate: dict[str, TextData] = Field(min_length=1)
    """Named evaluation sets; the ladder shows the first one first."""
