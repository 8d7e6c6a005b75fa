"""Reader of `init --model`: config.json and weight headers of a checkpoint, and how its head fits the labels
of the data. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qcompress.cli.init.options import Mistakes
from qcompress.errors import ModelError, UsageError
from qcompress.models import FAMILIES, describe, renamed_tensors
from qcompress.models.architecture import Architecture, Head
from qcompress.models.checkpoint_files import copy_tensors, read_config, read_tensors
from qcompress.models.config_checks import HeadError, is_named, problem_of
from qcompress.models.pooling import KEY, POOLING_FILE, EmbeddingHead, pooling_of
from qcompress.models.readers import READER_FILES
from qcompress.recipe.messages import nearest
from qcompress.schema.families import family_of
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

RUNNING = ("causal-lm", "fill-mask")
"""Tasks on a text as a whole."""

HeadKind = Literal["its own", "none", "of other labels"]


@dataclass(frozen=True)
class Fit:
    """Fit of a checkpoint to a task. `labels`: value of `task.labels`, None if config.json has them."""

    architecture: Architecture
    head: HeadKind
    labels: tuple[str, ...] | None
    why: str
    warning: str = ""


def look_at_model(directory: Path, mistakes: Mistakes) -> Checkpoint | None:
    """Read `--model`; None, with mistakes reported, if it is not a checkpoint of a known family."""
    if not directory.is_dir():
        fix = "name a local directory with config.json, model.safetensors and the tokenizer"
        mistakes.add("--model", f"{directory} is not a directory", fix)
        return None
    try:
        config = read_config(directory)
        read_tensors(directory)
    except (ModelError, OSError) as error:
        mistakes.add(
            "--model", str(getattr(error, "message", error)), getattr(error, "fix", "") or "repair it"
        )
        return None
    model_type = str(config.get("model_type"))
    family = family_of(model_type)
    if family not in FAMILIES:
        family = _discovered_family(config) or family
    if family not in FAMILIES:
        close = nearest(family, FAMILIES)
        message = f"config.json says model_type {model_type!r}; known families: {', '.join(FAMILIES)}"
        fix = "name the class under `architectures` in config.json, such as ...ForCausalLM, or choose another"
        fix += f"; the nearest is {close}" if close else ""
        mistakes.add("--model", message, fix)
        return None
    return Checkpoint(directory, family, config)


def class_of(config: dict[str, Any]) -> str:
    """Name of the class in a config.json; empty without one."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


ENDINGS = {
    "ForCausalLM": "decoder",
    "LMHeadModel": "decoder",
    "ForImageClassification": "image-model",
    "ForMaskedLM": "text-model",
    "ForQuestionAnswering": "text-model",
    "ForSequenceClassification": "text-model",
    "ForTokenClassification": "text-model",
}
"""Ends of class names -> the family that discovers such an architecture."""


def _discovered_family(config: dict[str, Any]) -> str | None:
    """Family of a checkpoint of another type, by the class in its config.json; of a model without a head by
    what it reads. None for other classes.
    """
    name = class_of(config)
    family = next((family for end, family in ENDINGS.items() if name.endswith(end)), None)
    if family or not name.endswith("Model"):
        return family
    return "text-model" if "vocab_size" in config else "image-model" if "num_channels" in config else None


def problem_of_head(checkpoint: Checkpoint, task: str) -> str | None:
    """Problem type (as in transformers) of the checkpoint's own head for a task; None without such a head,
    without a stated type, or for a broken checkpoint, which `fit` reports.
    """
    try:
        return problem_of(checkpoint.config, outputs_of_head(checkpoint, task))
    except ModelError:
        return None


def outputs_of_head(checkpoint: Checkpoint, task: str) -> int | None:
    """Number of outputs of the checkpoint's own head for a task; None without such a head, or if it is
    broken.
    """
    try:
        architecture = describe(checkpoint.family, checkpoint.directory, Head(task, None, None))
    except ModelError:
        return None
    return None if architecture.new_head else len(named_outputs(checkpoint.config))


def fit(
    checkpoint: Checkpoint, task: str, problem: str | None, data_labels: Sequence[str],
    labels_are: LabelsAre | None = None,
) -> Fit:  # fmt: skip
    """Decide how the checkpoint's head fits the labels of the data. Raises ModelError for a broken
    checkpoint, TwoReadingsError if the labels are the checkpoint's both by name and by index.

    `problem`: the problem type of transformers; `data_labels`: labels of the data, empty for a number.
    """
    family, directory, config = checkpoint.family, checkpoint.directory, checkpoint.config
    if task in RUNNING:
        architecture = describe(family, directory, Head(task))
        return Fit(architecture, "its own", None, "a language model has its head")
    wanted = ("score",) if problem == REGRESSION else _in_output_order(data_labels, config, labels_are)
    head_problem = ""
    try:
        architecture = None if wanted is None else describe(family, directory, Head(task, wanted, problem))
    except HeadError as error:
        architecture, head_problem = None, error.message if wanted == named_outputs(config) else ""
    except ModelError:
        architecture = None  # broken: the call below raises
    if architecture is None:
        output_names = named_outputs(config)
        wanted_text = ", ".join(data_labels) or "a number"
        why = f"the checkpoint's head is for {', '.join(output_names)}, the data have {wanted_text}"
        why += f" (the head {head_problem})" if head_problem else ""
        architecture = describe(family, directory, Head(task, None, None))
        return Fit(architecture, "of other labels", tuple(data_labels) or None, f"{why}: {ANEW}")
    if architecture.new_head:
        return Fit(architecture, "none", wanted if data_labels else None, f"the checkpoint has none: {ANEW}")
    named = is_named(named_outputs(config))
    if not data_labels or named or list(data_labels) == [str(index) for index in range(len(data_labels))]:
        return Fit(architecture, "its own", None, "the labels of the data are the checkpoint's")
    warning = (
        "the outputs of this checkpoint have no names: the recipe takes the labels in alphabetical order "
        f"({', '.join(wanted)}); turn `task.labels` round where the float row is bad"
    )
    return Fit(architecture, "its own", wanted, "the checkpoint has as many outputs, without names", warning)


EMBEDDING = "feature-extraction"

USUAL = {"pooling": "mean", "normalize": True}
"""Pooling of a checkpoint that does not say its own."""


def fit_embedding(checkpoint: Checkpoint) -> tuple[Fit, dict[str, Any], str]:
    """Fit of a checkpoint to feature-extraction, its pooling as {"pooling", "normalize"}, and the reason.
    Raises ModelError for a broken checkpoint, HeadError for a pooling that is not supported.
    """
    directory, stated = checkpoint.directory, checkpoint.config.get(KEY)
    pooled = stated or pooling_of(directory)
    why = f"as {'config.json' if stated else POOLING_FILE} says"
    if pooled is None:
        pooled, why = USUAL, f"the checkpoint has no {POOLING_FILE}: the usual one"
    head = EmbeddingHead(EMBEDDING, None, REGRESSION, **pooled)
    architecture = describe(checkpoint.family, directory, head)
    return Fit(architecture, "its own", None, "an embedding is pooled, and needs no head"), pooled, why


ANEW = "a new one is drawn, and must be trained first"


def _in_output_order(
    data_labels: Sequence[str], config: dict[str, Any], labels_are: LabelsAre | None
) -> tuple[str, ...] | None:
    """Labels in the order of the checkpoint's outputs, or those of the data if the outputs have no names;
    None if they do not match.
    """
    output_names = named_outputs(config)
    if config.get("id2label") or config.get("num_labels"):
        try:
            Labels(output_names, None, labels_are).read(data_labels, ["the data"] * len(data_labels))
            return output_names
        except TwoReadingsError:
            raise
        except UsageError:
            pass  # names in the recipe may replace LABEL_0, LABEL_1...
    try:
        return tuple(settle(list(data_labels), config))
    except UsageError:
        return None


def reading_of(data_labels: Sequence[str], output_names: Sequence[str]) -> LabelsAre | None:
    """Value of `task.labels_are` that a recipe must state, because a part of the data would fit the other
    reading; None if it would not. `output_names`: names of the outputs.

    >>> reading_of(["1", "2", "3"], ["1", "2", "3"]), reading_of(["0", "1", "2"], ["1", "2", "3"])
    ('names', 'indices')
    """
    differ = [
        label
        for label in data_labels
        if label in output_names and label.isdigit() and output_names.index(label) != int(label)
    ]
    if not differ:
        return None
    return "names" if all(label in output_names for label in data_labels) else "indices"


def write_without_head(checkpoint: Checkpoint, fitting: Fit, out: Path) -> None:
    """Write the checkpoint without its head into an empty folder, keeping the bytes of its weights.

    Raises ModelError if no tensor name begins with the prefix of the body, which separates it from the head.
    """
    tensors = read_tensors(checkpoint.directory)
    renamed = renamed_tensors(checkpoint.family, checkpoint.config, tensors)
    names = {name: renamed.get(name, name) for name in tensors}
    if not fitting.architecture.new_head:  # else only config.json names labels
        discovered = getattr(FAMILIES[checkpoint.family], "prefix", None)
        body = discovered(checkpoint.config) if discovered else f"{checkpoint.family}."
        names = {name: own for name, own in names.items() if own.startswith(body)}
        if not names:
            raise ModelError(
                f"{checkpoint.directory} has no tensors called {body}*, so its head cannot be identified",
                fix="start from a checkpoint without a head, or of the labels of the data",
            )
    copy_tensors(checkpoint.directory, out / "model.safetensors", names.get)
    dropped = ("id2label", "label2id", "num_labels", "architectures", "problem_type")
    config = {key: value for key, value in checkpoint.config.items() if key not in dropped}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in READER_FILES:
        if (checkpoint.directory / name).is_file():
            (out / name).write_bytes((checkpoint.directory / name).read_bytes())
