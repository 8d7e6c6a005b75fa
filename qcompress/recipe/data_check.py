"""A recipe's data against its checkpoint: columns, labels, texts, images, ids of tokens. No torch.

`check` looks at the first `ROWS` rows of each file and answers in seconds; a run looks at all of them before
its first stage. Data that need a package which is not installed here are left to the stage that reads them.
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
from qcompress.models.readers import check_reader, image_size, keeps_size
from qcompress.models.tokenizer_files import TokenizerFiles, first_with, read_tokenizer
from qcompress.recipe.rules.data import also, sections_of
from qcompress.recipe.rules.values import TASK_LOSS_PHASES
from qcompress.recipe.yaml_file import Document, Key, dotted
from qcompress.schema.axes import PHASES
from qcompress.schema.data import FILES
from qcompress.schema.recipe import CausalLm, Recipe, TextData
from qcompress.schema.tasks import AGREEMENT
from qcompress.tasks import TASKS
from qcompress.tasks.examples import Examined
from qcompress.tasks.labels import TwoReadingsError, labels_of, spelling
from qcompress.tasks.padded import first, spread
from qcompress.tasks.table import ColumnError

ROWS = 50_000
"""Rows of each file that `check` looks at."""

ENCODED = 5_000
"""Texts of a section that `check` encodes, where some tokens are beyond the embedding table."""


@dataclass
class Looked:
    """A recipe, its checkpoint, and the sections of its data that were looked at."""

    recipe: Recipe
    document: Document
    base: Path
    directory: Path
    whole: bool
    """True: all rows are looked at, and data of the hub too."""
    wrong: dict[tuple[str, str], list[Key]] = field(default_factory=dict)
    """Keys of each mistake: a file that several sections name is one mistake."""
    bounded: list[str] = field(default_factory=list)
    """Sections of which only the first rows were looked at."""

    @property
    def family(self) -> Any:
        return FAMILIES[self.recipe.model.family]

    def said(self, key: Key) -> bool:
        """True where a mistake at this key was found here."""
        return any(key in keys for keys in self.wrong.values())

    def add(self, key: Key, message: str, fix: str) -> None:
        if self.document.sound(key):
            self.wrong.setdefault((message, fix), []).append(key)


def judge_data(
    recipe: Recipe, document: Document, base: Path, directory: Path, *, whole: bool
) -> tuple[str, ...]:
    """Report the mistakes in a recipe's data; returns what was looked at where that is not all."""
    looked = Looked(recipe, document, base, directory, whole)
    tokenizer = _judge_reader(looked)
    task = _settled(looked)
    if task is not None:
        readable = []
        for section, data in sections_of(recipe):
            examined = _examine(looked, section, data, task)
            if examined is not None:
                readable.append((section, data))
                _judge_section(looked, section, data, examined, tokenizer)
        _judge_readings(looked, readable, task)
    for (message, fix), keys in looked.wrong.items():
        document.report(keys[0], f"{message}{also(keys)}", fix)
    rows = f"the first {ROWS:,} rows of each file of "
    return (rows + ", ".join(looked.bounded),) if looked.bounded else ()


def _model_key(recipe: Recipe) -> Key:
    return ("model", "source" if recipe.model.source else "run")


# The checkpoint's reader --------------------------------------------------------------------------


def _judge_reader(looked: Looked) -> TokenizerFiles | None:
    """Report a tokenizer or image processor that cannot prepare the data; returns the tokenizer."""
    recipe, directory = looked.recipe, looked.directory
    try:
        check_reader(recipe.model.family, directory, TASKS[recipe.task.name].processor(recipe.task))
        if PIXELS in looked.family.INPUTS:
            return None
        tokenizer = read_tokenizer(directory, recipe.model.family)
    except (ModelError, OSError) as error:
        fix = error.fix if isinstance(error, ModelError) else "check the permissions of the model's files"
        looked.add(_model_key(recipe), error.message if isinstance(error, ModelError) else str(error), fix)
        return None
    if tokenizer is not None:
        _judge_special_tokens(looked, tokenizer)
    return tokenizer


def _judge_special_tokens(looked: Looked, tokenizer: TokenizerFiles) -> None:
    """The padding token, and the tokens that stand in every sequence, are rows of the embedding table."""
    key, padded = _model_key(looked.recipe), not isinstance(looked.recipe.task, CausalLm)
    if padded and tokenizer.pads is False:
        looked.add(
            key,
            "the tokenizer has no padding token, and a batch of sequences of several lengths needs one",
            "set `pad_token` in tokenizer_config.json",
        )
    rows = _table_rows(looked)
    inserted = {token: "a token of every sequence" for token in tokenizer.inserted}
    if padded and "pad_token" in tokenizer.special:
        inserted[tokenizer.special["pad_token"]] = "the padding token"
    for token, what in inserted.items():
        number = tokenizer.ids.get(token, -1)
        if number >= rows:
            message = f"{what}, {token!r}, has the id {number}, and {_table(rows)}"
            looked.add(key, message, _resize(number + 1))


def _table_rows(looked: Looked) -> int:
    return int(chosen(looked.recipe.model.family, looked.directory)[0]["vocab_size"])


def _table(rows: int) -> str:
    return f"the embedding table has {rows} rows (ids 0 to {rows - 1})"


def _resize(rows: int) -> str:
    return (
        f"save the checkpoint again after model.resize_token_embeddings({rows}), or with the tokenizer that "
        "it was trained with"
    )


# Sections of the data -----------------------------------------------------------------------------


def _settled(looked: Looked) -> Any:
    """The task with the labels of the checkpoint; None where they do not fit."""
    recipe = looked.recipe
    task = TASKS[recipe.task.name]
    config, tensors, _ = chosen(recipe.model.family, looked.directory, recipe.model.blocks)
    try:
        own = looked.family.task_config(config, tensors, task.head(recipe.task))
        return task.settled(recipe.task, own)
    except (ModelError, UsageError) as error:
        looked.add(("task", "labels"), error.message, error.fix)
        return None


def _examine(looked: Looked, section: Key, data: TextData, task: Any) -> Examined | None:
    """The content of a section; None, with its mistake reported, where it cannot be read."""
    if not looked.document.sound(section, ("task",)):
        return None
    if data.dataset is not None and not looked.whole and not os.path.isdir(looked.base / data.dataset):
        return None
    most = None if looked.whole else ROWS
    try:
        examined = TASKS[task.name].examine(data, looked.base, task, most)
    except (MachineError, ModuleNotFoundError):
        return None
    except TwoReadingsError as error:
        key: Key = ("task", "labels_are")
        if not looked.said(key):  # one line mends every section
            looked.add(key, error.message, error.fix)
        return None
    except UsageError as error:
        looked.add(_key_of(looked.document, section, data, error), error.message, error.fix)
        return None
    if most is not None and examined.rows >= most:
        looked.bounded.append(dotted(section))
    return examined


def _judge_readings(looked: Looked, sections: list[tuple[Key, TextData]], task: Any) -> None:
    """A whole number is the same label in every section, whatever the others hold."""
    if isinstance(task, CausalLm) or task.labels_are is not None or not labels_of(task).are_digits:
        return
    seen: dict[str, tuple[int, Key]] = {}
    for section, data in sections:
        cells = TASKS[task.name].label_cells(data, looked.base, task, None if looked.whole else ROWS)
        outputs = labels_of(task).read(cells, [""] * len(cells))
        for word, output in sorted(dict(zip(map(str, map(spelling, cells)), outputs, strict=True)).items()):
            first_output, first_section = seen.setdefault(word, (output, section))
            if output != first_output and not looked.said(("task", "labels_are")):
                message = (
                    f"the label {word} is output {first_output} in {dotted(first_section)} and output "
                    f"{output} in {dotted(section)}: one column can only hold names, the other only indices"
                )
                fix = "write the labels of all data alike, or by name"
                looked.add(("task", "labels_are"), message, fix)


def _key_of(document: Document, section: Key, data: TextData, error: UsageError) -> Key:
    """The recipe's key that a mistake in the data is about, as far down as it is written."""
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
    looked: Looked, section: Key, data: TextData, examined: Examined, tokenizer: TokenizerFiles | None
) -> None:
    if section == ("data", "train"):
        _judge_labels_to_train_on(looked, data, examined)
    if section[1] == "evaluate":
        _judge_goals(looked, str(section[2]), examined)
    if tokenizer is not None:
        _judge_tokens(looked, section, data, examined, tokenizer)
    elif examined.size is not None and not looked.said(_model_key(looked.recipe)):
        _judge_size(looked, section, data, examined.size)


def _judge_labels_to_train_on(looked: Looked, data: TextData, examined: Examined) -> None:
    recipe = looked.recipe
    if examined.labelled or data.text is not None or isinstance(recipe.task, CausalLm):
        return  # `text` to train on is refused by itself
    if not looked.document.sound(("schedule",)):
        return
    defaults = PHASES[recipe.schedule.name]
    steps = {name: recipe.train.phases.get(name, phase).steps for name, phase in defaults.items()}
    phase = next((name for name in defaults if name in TASK_LOSS_PHASES and steps[name]), None)
    if phase is not None and recipe.export.graph is None:
        role = "tags" if recipe.task.name == "token-classification" else "label"
        fix = f"name the column with `columns: {{{role}: ...}}`"
        message = f"has no labels, and the phase {phase} trains on them"
        looked.add(_origin(("data", "train"), data), message, fix)


def _judge_goals(looked: Looked, name: str, examined: Examined) -> None:
    """Goals are about metrics that the set has: without labels that is the agreement with float alone."""
    if isinstance(looked.recipe.task, CausalLm):
        return
    for goals in ("float_floor", "recovery", "regression"):
        for goal in getattr(looked.recipe.gate, goals):
            section, _, metric = goal.partition("@")[0].rpartition(".")
            if section != name or (metric == AGREEMENT) != examined.labelled:
                continue
            if examined.labelled:
                message = f"{name} has labels, and {AGREEMENT} is measured where there are none"
                fix = f"write a metric of the task: {', '.join(looked.recipe.task.metrics)}"
            else:
                message = f"{name} has no labels, so {metric} is not measured"
                fix = f"write {name}.{AGREEMENT}, or name the column of the labels under `columns`"
            looked.add(("gate", goals, goal), message, fix)


def _judge_size(looked: Looked, section: Key, data: TextData, size: tuple[int, int]) -> None:
    """Images that nothing resizes have the model's size."""
    recipe = looked.recipe
    processor = TASKS[recipe.task.name].processor(recipe.task)
    if not keeps_size(looked.directory, processor):
        return
    wanted = image_size(recipe.model.family, looked.directory, processor)
    if tuple(size) != wanted:
        message = f"holds images of {size[0]} x {size[1]}, nothing resizes them, and the model takes "
        fix = f"write `size: [{wanted[0]}, {wanted[1]}]`, `mean` and `std` under `task`"
        looked.add(_origin(section, data), f"{message}{wanted[0]} x {wanted[1]}", fix)


def _judge_tokens(
    looked: Looked, section: Key, data: TextData, examined: Examined, tokenizer: TokenizerFiles
) -> None:
    """Report a text with a token beyond the embedding table; such tokens may be in no text."""
    rows = _table_rows(looked)
    beyond = tokenizer.beyond(rows)
    if not beyond:
        return
    texts = list(islice(_used(looked, section, data, examined), None if looked.whole else ENCODED))
    context = None if isinstance(looked.recipe.task, CausalLm) else looked.recipe.task.context
    try:
        found = first_with(tokenizer, texts, beyond, context)
    except ModuleNotFoundError:
        return
    if found is None or not looked.document.sound(_model_key(looked.recipe)):
        return
    row, token = found
    number = beyond[token]
    where = "the text" if isinstance(looked.recipe.task, CausalLm) else f"example {row + 1}"
    message = f"{where} has the token {token!r} of the id {number}, and {_table(rows)}"
    looked.add(_origin(section, data), message, _resize(max(beyond.values()) + 1))


def _used(looked: Looked, section: Key, data: TextData, examined: Examined) -> Iterator[Any]:
    """The texts that a run takes of a section."""
    texts: list[Any] = list(examined.texts)
    if isinstance(looked.recipe.task, CausalLm):
        yield from texts
    elif section[1] == "evaluate":
        yield from first(texts, looked.recipe.verify.samples, data.limit)
    else:
        yield from spread(texts, data.limit)
