"""Checks of a recipe's data against its checkpoint: columns, labels, texts, images, token ids. No torch.

`check` reads the first `ROWS` rows of each file and answers in seconds; a run reads all rows before its first
stage. Data that need a package which is not installed here are checked by the stage that reads them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from qcompress.errors import MachineError, ModelError, UsageError
from qcompress.models import FAMILIES, chosen
from qcompress.models.architecture import PIXELS
from qcompress.models.pooling import settled_head
from qcompress.models.readers import check_reader, image_size, keeps_size
from qcompress.models.tokenizer_files import TokenizerFiles, first_with, read_tokenizer
from qcompress.recipe.rules.data import also, needs_labels, sections_of
from qcompress.recipe.rules.training import loss_phase
from qcompress.recipe.yaml_file import Document, Key, dotted
from qcompress.schema.data import FILES
from qcompress.schema.recipe import Recipe, TextData
from qcompress.schema.tasks import AGREEMENT, Labelled
from qcompress.tasks import TASKS
from qcompress.tasks.columns import ColumnError
from qcompress.tasks.examples import Examined
from qcompress.tasks.labels import TwoReadingsError, labels_of, spelling
from qcompress.tasks.padded import first, spread

ROWS = 50_000
"""Number of rows of each file that `check` reads."""

ENCODED = 5_000
"""Number of texts of a section that `check` encodes if token ids may exceed the embedding table."""


@dataclass
class _DataCheck:
    """State of a data check: recipe, checkpoint, and the mistakes and sections found so far."""

    recipe: Recipe
    document: Document
    base: Path
    directory: Path
    whole: bool
    """True: read all rows, and data of the hub too."""
    wrong: dict[tuple[str, str], list[Key]] = field(default_factory=dict)
    """Keys of each mistake: a file that several sections name is one mistake."""
    bounded: list[str] = field(default_factory=list)
    """Sections of which only the first rows were read."""

    @property
    def family(self) -> Any:
        return FAMILIES[self.recipe.model.family]

    def said(self, key: Key) -> bool:
        """True if this check has reported a mistake at the key."""
        return any(key in keys for keys in self.wrong.values())

    def add(self, key: Key, message: str, fix: str) -> None:
        """Collect a mistake, unless the key has one already."""
        if self.document.sound(key):
            self.wrong.setdefault((message, fix), []).append(key)


def judge_data(
    recipe: Recipe, document: Document, base: Path, directory: Path, *, whole: bool
) -> tuple[str, ...]:
    """Report the mistakes in a recipe's data; returns a note on sections that were read in part."""
    check = _DataCheck(recipe, document, base, directory, whole)
    tokenizer = _judge_reader(check)
    task = _with_labels(check)
    if task is not None:
        readable = []
        for section, data in sections_of(recipe):
            examined = _examine(check, section, data, task)
            if examined is not None:
                readable.append((section, data))
                _judge_section(check, section, data, examined, tokenizer)
        _judge_readings(check, readable, task)
    for (message, fix), keys in check.wrong.items():
        document.report(keys[0], f"{message}{also(keys)}", fix)
    rows = f"the first {ROWS:,} rows of each file of "
    return (rows + ", ".join(check.bounded),) if check.bounded else ()


def _model_key(recipe: Recipe) -> Key:
    return ("model", recipe.model.origin)


# The checkpoint's reader --------------------------------------------------------------------------


def _judge_reader(check: _DataCheck) -> TokenizerFiles | None:
    """Report a tokenizer or image processor that cannot prepare the data; returns the tokenizer."""
    recipe, directory = check.recipe, check.directory
    try:
        check_reader(recipe.model.family, directory, TASKS[recipe.task.name].processor(recipe.task))
        if PIXELS in check.family.INPUTS or not check.family.INPUTS:
            return None
        tokenizer = read_tokenizer(directory, recipe.model.family)
    except (ModelError, OSError) as error:
        fix = error.fix if isinstance(error, ModelError) else "check the permissions of the model's files"
        check.add(_model_key(recipe), error.message if isinstance(error, ModelError) else str(error), fix)
        return None
    if tokenizer is not None:
        _judge_special_tokens(check, tokenizer)
    return tokenizer


def _judge_special_tokens(check: _DataCheck, tokenizer: TokenizerFiles) -> None:
    """Report a missing padding token, and special tokens beyond the embedding table."""
    key, padded = _model_key(check.recipe), check.recipe.task.name != "causal-lm"
    if padded and tokenizer.pads is False:
        check.add(
            key,
            "the tokenizer has no padding token, and a batch of sequences of several lengths needs one",
            "set `pad_token` in tokenizer_config.json",
        )
    rows = _table_rows(check)
    inserted = {token: "a token of every sequence" for token in tokenizer.inserted}
    if padded and "pad_token" in tokenizer.special:
        inserted[tokenizer.special["pad_token"]] = "the padding token"
    for token, what in inserted.items():
        number = tokenizer.ids.get(token, -1)
        if number >= rows:
            message = f"{what}, {token!r}, has the id {number}, and {_table(rows)}"
            check.add(key, message, _resize(number + 1))


def _table_rows(check: _DataCheck) -> int:
    return int(chosen(check.recipe.model.family, check.directory)[0]["vocab_size"])


def _table(rows: int) -> str:
    return f"the embedding table has {rows} rows (ids 0 to {rows - 1})"


def _resize(rows: int) -> str:
    return (
        f"save the checkpoint again after model.resize_token_embeddings({rows}), or with the tokenizer that "
        "it was trained with"
    )


# Sections of the data -----------------------------------------------------------------------------


def _with_labels(check: _DataCheck) -> Any:
    """Task with the labels of the checkpoint; None if they do not fit."""
    recipe = check.recipe
    task = TASKS[recipe.task.name]
    config, tensors, _ = chosen(recipe.model.family, check.directory, recipe.model.blocks)
    try:
        head = settled_head(task.head(recipe.task), check.directory, config)
        config_of_task = check.family.task_config(config, tensors, head)
        return task.settled(recipe.task, config_of_task)
    except (ModelError, UsageError) as error:
        check.add(("task", "labels"), error.message, error.fix)
        return None


def _examine(check: _DataCheck, section: Key, data: TextData, task: Any) -> Examined | None:
    """Read a section; None, with its mistake reported, if it cannot be read."""
    if not check.document.sound(section, ("task",)):
        return None
    if data.dataset is not None and not check.whole and not os.path.isdir(check.base / data.dataset):
        return None
    most = None if check.whole else ROWS
    try:
        examined = TASKS[task.name].examine(data, check.base, task, most)
    except (MachineError, ModuleNotFoundError):
        return None
    except TwoReadingsError as error:
        key: Key = ("task", "labels_are")
        if not check.said(key):  # one edit fixes every section
            check.add(key, error.message, error.fix)
        return None
    except UsageError as error:
        check.add(_key_of(check.document, section, data, error), error.message, error.fix)
        return None
    if most is not None and examined.rows >= most:
        check.bounded.append(dotted(section))
    return examined


def _judge_readings(check: _DataCheck, sections: list[tuple[Key, TextData]], task: Any) -> None:
    """Report a whole number that is a different label in different sections."""
    if not isinstance(task, Labelled) or task.labels_are is not None or not labels_of(task).are_digits:
        return
    seen: dict[str, tuple[int, Key]] = {}
    for section, data in sections:
        cells = TASKS[task.name].label_cells(data, check.base, task, None if check.whole else ROWS)
        outputs = labels_of(task).read(cells, [""] * len(cells))
        for word, output in sorted(dict(zip(map(str, map(spelling, cells)), outputs, strict=True)).items()):
            first_output, first_section = seen.setdefault(word, (output, section))
            if output != first_output and not check.said(("task", "labels_are")):
                message = (
                    f"the label {word} is output {first_output} in {dotted(first_section)} and output "
                    f"{output} in {dotted(section)}: one column can only hold names, the other only indices"
                )
                fix = "write the labels of all data alike, or by name"
                check.add(("task", "labels_are"), message, fix)


def _key_of(document: Document, section: Key, data: TextData, error: UsageError) -> Key:
    """Recipe key of a mistake in the data, as deep as it is written."""
    if isinstance(error, ColumnError):
        keys: list[Key] = [(*section, "columns", error.role), (*section, error.role)]
        written = next((key for key in keys if key in document.places), None)
        if written is not None:
            return written
    return _origin(section, data)


def _origin(section: Key, data: TextData) -> Key:
    names = (*FILES, "folder", "dataset")
    return (*section, next(name for name in names if getattr(data, name) is not None))


def _judge_section(
    check: _DataCheck, section: Key, data: TextData, examined: Examined, tokenizer: TokenizerFiles | None
) -> None:
    if section == ("data", "train"):
        _judge_labels_to_train_on(check, data, examined)
    if section[1] == "evaluate":
        _judge_goals(check, str(section[2]), examined)
    if tokenizer is not None:
        _judge_tokens(check, section, data, examined, tokenizer)
    elif examined.size is not None and not check.said(_model_key(check.recipe)):
        _judge_size(check, section, data, examined.size)


def _judge_labels_to_train_on(check: _DataCheck, data: TextData, examined: Examined) -> None:
    recipe = check.recipe
    if examined.labelled or data.text is not None or recipe.task.running or not recipe.task.columns:
        return  # `text` for training, and a user's task, have rules of their own
    if not check.document.sound(("schedule",), ("objective",)) or not needs_labels(recipe):
        return
    phase = loss_phase(recipe)
    if phase is not None and recipe.export.graph is None:
        role = recipe.task.columns[-1]
        fix = f"name the column with `columns: {{{role}: ...}}`"
        message = f"has no labels, and the phase {phase} trains on them"
        check.add(_origin(("data", "train"), data), message, fix)


def _judge_goals(check: _DataCheck, name: str, examined: Examined) -> None:
    """Report goals on metrics that a set does not have; without labels it only has the agreement
    with float.
    """
    if check.recipe.task.running:
        return
    for goals in ("float_floor", "recovery", "regression"):
        for goal in getattr(check.recipe.gate, goals):
            section, _, metric = goal.partition("@")[0].rpartition(".")
            if section != name or (metric == AGREEMENT) != examined.labelled:
                continue
            if examined.labelled:
                what = "labels, and" if check.recipe.task.columns else "a metric, and"
                message = f"{name} has {what} {AGREEMENT} is measured where there are none"
                fix = f"write a metric of the task: {', '.join(check.recipe.task.metrics)}"
            else:
                message = f"{name} has no labels, so {metric} is not measured"
                fix = f"write {name}.{AGREEMENT}, or name the column of the labels under `columns`"
            check.add(("gate", goals, goal), message, fix)


def _judge_size(check: _DataCheck, section: Key, data: TextData, size: tuple[int, int]) -> None:
    """Report images of another size than the model's if nothing resizes them."""
    recipe = check.recipe
    processor = TASKS[recipe.task.name].processor(recipe.task)
    if not keeps_size(check.directory, processor):
        return
    wanted = image_size(recipe.model.family, check.directory, processor)
    if tuple(size) != wanted:
        message = f"holds images of {size[0]} x {size[1]}, nothing resizes them, and the model takes "
        fix = f"write `size: [{wanted[0]}, {wanted[1]}]`, `mean` and `std` under `task`"
        check.add(_origin(section, data), f"{message}{wanted[0]} x {wanted[1]}", fix)


def _judge_tokens(
    check: _DataCheck, section: Key, data: TextData, examined: Examined, tokenizer: TokenizerFiles
) -> None:
    """Report a text with a token id beyond the embedding table."""
    rows = _table_rows(check)
    beyond = tokenizer.beyond(rows)
    if not beyond:
        return
    texts = list(islice(_used(check, section, data, examined), None if check.whole else ENCODED))
    context = None if check.recipe.task.running else check.recipe.task.context
    try:
        located = first_with(tokenizer, texts, beyond, context)
    except ModuleNotFoundError:
        return
    if located is None or not check.document.sound(_model_key(check.recipe)):
        return
    row, token = located
    number = beyond[token]
    where = "the text" if check.recipe.task.running else f"example {row + 1}"
    message = f"{where} has the token {token!r} of the id {number}, and {_table(rows)}"
    check.add(_origin(section, data), message, _resize(max(beyond.values()) + 1))


def _used(check: _DataCheck, section: Key, data: TextData, examined: Examined) -> Iterator[Any]:
    """Texts of a section that a run uses."""
    texts: list[Any] = list(examined.texts)
    if check.recipe.task.running:
        yield from texts
    elif section[1] == "evaluate":
        yield from first(texts, check.recipe.verify.samples, data.limit)
    else:
        yield from spread(texts, data.limit)
