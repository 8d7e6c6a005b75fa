"""What a checkpoint is, from config.json and the headers of its weights, and how its labels and those of the
data fit. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qcompress.cli.init.asked import Mistakes
from qcompress.errors import ModelError, UsageError
from qcompress.models import FAMILIES, describe, renamed_tensors
from qcompress.models.architecture import Architecture, Head
from qcompress.models.checkpoint_files import copy_tensors, read_config, read_tensors
from qcompress.models.config_checks import HeadError, is_named, problem_of
from qcompress.models.readers import READER_FILES
from qcompress.recipe.messages import nearest
from qcompress.schema.tasks import LabelsAre
from qcompress.tasks.labels import Labels, TwoReadingsError, named_outputs, settle


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a known family."""

    directory: Path
    family: str
    config: dict[str, Any]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(FAMILIES[self.family].TASKS)


REGRESSION = "regression"

HeadKind = Literal["its own", "none", "of other labels"]


@dataclass(frozen=True)
class Fit:
    """How a checkpoint carries a task. `labels`: what `task.labels` must say, None where config.json does."""

    architecture: Architecture
    head: HeadKind
    labels: tuple[str, ...] | None
    why: str
    warning: str = ""


def look_at_model(directory: Path, mistakes: Mistakes) -> Checkpoint | None:
    """The checkpoint of `--model`; None, with its mistakes reported, where it is none of a known family."""
    if not directory.is_dir():
        fix = "name a local directory with config.json, model.safetensors and the tokenizer"
        mistakes.add("--model", f"{directory} is no directory", fix)
        return None
    try:
        config = read_config(directory)
        read_tensors(directory)
    except (ModelError, OSError) as error:
        mistakes.add("--model", str(getattr(error, "message", error)), getattr(error, "fix", "") or "mend it")
        return None
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        close = nearest(family, FAMILIES)
        message = f"config.json says model_type {family!r}; known families: {', '.join(FAMILIES)}"
        fix = "choose a checkpoint of one of them" + (f"; the nearest is {close}" if close else "")
        mistakes.add("--model", message, fix)
        return None
    return Checkpoint(directory, family, config)


def problem_of_head(checkpoint: Checkpoint, task: str) -> str | None:
    """transformers' problem type of the checkpoint's own head for a task; None where it has no such head, or
    does not say; a broken checkpoint is left to `fit`.
    """
    try:
        return problem_of(checkpoint.config, outputs_of_head(checkpoint, task))
    except ModelError:
        return None


def outputs_of_head(checkpoint: Checkpoint, task: str) -> int | None:
    """Outputs of the checkpoint's own head for a task; None where it has no such head, or is broken."""
    try:
        architecture = describe(checkpoint.family, checkpoint.directory, Head(task, None, None))
    except ModelError:
        return None
    return None if architecture.new_head else len(named_outputs(checkpoint.config))


def fit(
    checkpoint: Checkpoint, task: str, problem: str | None, found: Sequence[str],
    labels_are: LabelsAre | None = None,
) -> Fit:  # fmt: skip
    """How the checkpoint's head and the labels of the data fit. Raises ModelError for a broken checkpoint,
    TwoReadingsError where the labels are the checkpoint's by name and by index.

    `problem`: what transformers calls it; `found`: the labels of the data, none for a number.
    """
    family, directory, config = checkpoint.family, checkpoint.directory, checkpoint.config
    if task == "causal-lm":
        return Fit(describe(family, directory), "its own", None, "a language model has its head")
    wanted = ("score",) if problem == REGRESSION else _in_its_order(found, config, labels_are)
    other = ""
    try:
        architecture = None if wanted is None else describe(family, directory, Head(task, wanted, problem))
    except HeadError as error:
        architecture, other = None, error.message if wanted == named_outputs(config) else ""
    except ModelError:
        architecture = None  # broken: then the next one raises
    if architecture is None:
        own = named_outputs(config)
        why = f"the checkpoint's head is for {', '.join(own)}, the data have {', '.join(found) or 'a number'}"
        why += f" (the head {other})" if other else ""
        architecture = describe(family, directory, Head(task, None, None))
        return Fit(architecture, "of other labels", tuple(found) or None, f"{why}: {ANEW}")
    if architecture.new_head:
        return Fit(architecture, "none", wanted if found else None, f"the checkpoint has none: {ANEW}")
    named = is_named(named_outputs(config))
    if not found or named or list(found) == [str(index) for index in range(len(found))]:
        return Fit(architecture, "its own", None, "the labels of the data are the checkpoint's")
    warning = (
        "nobody named the outputs of this checkpoint: the recipe takes the labels in alphabetical order "
        f"({', '.join(wanted)}); turn `task.labels` round where the float row is bad"
    )
    return Fit(architecture, "its own", wanted, "the checkpoint has as many outputs, without names", warning)


ANEW = "a new one is drawn, and must be trained first"


def _in_its_order(
    found: Sequence[str], config: dict[str, Any], labels_are: LabelsAre | None
) -> tuple[str, ...] | None:
    """The labels in the order of the checkpoint's outputs, those of the data where it names none; None where
    they are others.
    """
    own = named_outputs(config)
    if config.get("id2label") or config.get("num_labels"):
        try:
            Labels(own, None, labels_are).read(found, ["the data"] * len(found))
            return own
        except TwoReadingsError:
            raise
        except UsageError:
            pass  # then names of the recipe's may stand for LABEL_0, LABEL_1...
    try:
        return tuple(settle(list(found), config))
    except UsageError:
        return None


def reading_of(found: Sequence[str], own: Sequence[str]) -> LabelsAre | None:
    """The reading of the labels that a recipe should state, because a part of the data could be read in the
    other way; None where it could not. `own`: names of the outputs.

    >>> reading_of(["1", "2", "3"], ["1", "2", "3"]), reading_of(["0", "1", "2"], ["1", "2", "3"])
    ('names', 'indices')
    """
    differ = [label for label in found if label in own and label.isdigit() and own.index(label) != int(label)]
    if not differ:
        return None
    return "names" if all(label in own for label in found) else "indices"


def write_without_head(checkpoint: Checkpoint, fitting: Fit, out: Path) -> None:
    """The checkpoint without its head into an empty folder, its weights byte for byte.

    Raises ModelError where no tensor has the family's name, which tells the body from the head.
    """
    tensors = read_tensors(checkpoint.directory)
    renamed = renamed_tensors(checkpoint.family, checkpoint.config, tensors)
    names = {name: renamed.get(name, name) for name in tensors}
    if not fitting.architecture.new_head:  # else only config.json speaks of labels
        body = f"{checkpoint.family}."
        names = {name: own for name, own in names.items() if own.startswith(body)}
        if not names:
            raise ModelError(
                f"{checkpoint.directory} has no tensors called {body}*, so its head cannot be told",
                fix="start from a checkpoint without a head, or of the labels of the data",
            )
    copy_tensors(checkpoint.directory, out / "model.safetensors", names.get)
    dropped = ("id2label", "label2id", "num_labels", "architectures", "problem_type")
    config = {key: value for key, value in checkpoint.config.items() if key not in dropped}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in READER_FILES:
        if (checkpoint.directory / name).is_file():
            (out / name).write_bytes((checkpoint.directory / name).read_bytes())
