"""Choices of a first recipe and their reasons: task, labels, context, format, method, steps,
goals. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qcompress.cli.init.data import (
    Data,
    ImageData,
    TableData,
    TextData,
    is_whole,
    label_of,
    labels_in,
    likely_labels,
)
from qcompress.cli.init.goals import goals_of
from qcompress.cli.init.lengths import context_for, token_counts, window_for
from qcompress.cli.init.model import (
    EMBEDDING,
    RUNNING,
    Checkpoint,
    Fit,
    class_of,
    fit,
    fit_embedding,
    outputs_of_head,
    problem_of_head,
    reading_of,
)
from qcompress.cli.init.options import InitOptions, Mistakes
from qcompress.cli.init.splits import split_table, split_text
from qcompress.errors import ModelError
from qcompress.models.encoder import CLASSES
from qcompress.recipe.messages import choose as choose_word
from qcompress.schema.axes import METHODS, PHASES
from qcompress.schema.families import DISCOVERED, model_type_of
from qcompress.schema.formats import FORMAT_PRESETS
from qcompress.schema.targets import TARGETS
from qcompress.schema.tasks import ALIASES, READINGS
from qcompress.tasks import TASKS
from qcompress.tasks.labels import TwoReadingsError, named_outputs
from qcompress.tasks.sequence_classification import PROBLEMS
from qcompress.tasks.table import Row

EXAMPLES = {"--model": "--model DIR", "--data": "--data reviews.csv", "--target": "--target cpu"}

DECODERS = ("gpt2", "decoder")
"""Families of language models that continue text."""

CALIBRATION = 256
"""Number of examples or sequences for calibration."""

BATCH = 16
ROUNDS, LEAST_STEPS, MOST_STEPS = 8, 100, 3000
"""Epochs of fine-tuning a new head, and limits of the number of updates."""


@dataclass(frozen=True)
class Choice:
    """Values of the recipe; `why` has a reason for each choice, in the order in which they were made."""

    name: str
    task: str
    kind: str
    fit: Fit
    format: str
    compute: str
    method: str
    context: int | None
    opt: int | None
    """Tokens of a usual input, for which the engine is optimized."""
    batch: int
    steps: int
    """Updates of fine-tuning a new head."""
    train: list[Row] | str | None
    test: list[Row] | str | None
    """The two parts of the data; None for folders of images, which are already split."""
    goals: dict[str, Any]
    labels_are: str | None
    """`task.labels_are`, if the recipe must state it."""
    pooling: dict[str, Any] | None = None
    """`pooling` and `normalize` of feature-extraction."""
    notes: list[str] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)

    @property
    def head_is_new(self) -> bool:
        return self.fit.head != "its own"

    @property
    def trains(self) -> bool:
        """True if the method trains."""
        return bool(PHASES[METHODS[self.method]["schedule"]])


def check_words(options: InitOptions, mistakes: Mistakes) -> None:
    """Report missing options, and unknown targets, methods and formats."""
    needed = {"--model": options.model, "--data": options.data, "--target": options.target}
    for option, value in needed.items():
        if value is None:
            mistakes.add(
                option,
                "is not given, and stdin is not a terminal, so init cannot ask",
                f"write {EXAMPLES[option]}",
            )
    words: tuple[tuple[str, str | None, Sequence[str]], ...] = (
        ("--target", options.target, list(TARGETS)),
        ("--method", options.method, list(METHODS)),
        ("--format", options.format, list(FORMAT_PRESETS)),
        ("--labels-are", options.labels_are, READINGS),
        ("--task", options.task, [*TASKS, *ALIASES]),
    )
    for option, word, known in words:
        if word is not None and word not in known:
            mistakes.add(
                option, f"must be one of {', '.join(known)}, found {word!r}", choose_word(word, known)
            )


def choose(options: InitOptions, checkpoint: Checkpoint, data: Data, mistakes: Mistakes) -> Choice | None:
    """Make every choice; None, with mistakes reported, if model and data do not fit together."""
    task = _task(options, checkpoint, data, mistakes)
    if task is None:
        return None
    pooling, why_pooling = None, ""
    try:
        data, why_kind = _match_head(checkpoint, data, task)
        if isinstance(data, TableData) and _refuse_no_labels(data, mistakes):
            return None
        kind = data.kind if isinstance(data, TableData) else "single"
        labels = () if isinstance(data, TextData) else data.labels
        problem = {**PROBLEMS, "words": None}[kind] if task != "image-classification" else PROBLEMS["single"]
        reading = "names" if isinstance(data, ImageData) else options.labels_are
        if task == EMBEDDING:
            fitting, pooling, why_pooling = fit_embedding(checkpoint)
        else:
            fitting = fit(checkpoint, task, problem, labels, reading)
    except TwoReadingsError as error:
        mistakes.add("--labels-are", error.message, "say `--labels-are names` or `--labels-are indices`")
        return None
    except ModelError as error:
        mistakes.add("--model", error.message, error.fix or "name another checkpoint")
        return None
    if isinstance(data, TextData) and task not in RUNNING and fitting.head == "none":
        message = f"{data.file.name} has no labels, and the checkpoint has no head for {task} to be trained"
        mistakes.add("--data", message, "name a table with labels, or a fine-tuned checkpoint")
        return None
    why = {
        "family": f"config.json says model_type {model_type_of(checkpoint.family)}",
        "task": _why_task(task, data),
    }
    why["head"] = fitting.why
    why |= {"kind": why_kind} if why_kind else {}
    why |= {"pooling": why_pooling} if pooling else {}
    if isinstance(data, TableData):
        why |= data.why
    format_name, why["format"] = _format(options)
    method, why["method"] = _method(options, checkpoint, format_name)
    compute, why["compute"] = _compute(options)
    train, test = _split(data, task)
    context, opt, why["context"] = _context(checkpoint, data, fitting, task)
    if isinstance(data, TableData) and _refuse_one_sided(data, test, mistakes):
        return None
    steps, batch = _steps(train)
    goals, why["gate"] = goals_of(data, task, test)
    notes = [fitting.warning] if fitting.warning else []
    if isinstance(data, TableData) and data.unread and data.kind != "words":
        names = ", ".join(data.unread)
        fix = f"where examples are pairs, add --pair-column '{data.unread[0]}'"
        notes.append(f"the text of {names} is not read; {fix}")
    if isinstance(train, str) and not test:
        mistakes.add("--data", f"{options.data} is too short to be split in two", "name a longer text")
    names = fitting.labels or named_outputs(checkpoint.config)
    stated = reading or reading_of(labels, names) if isinstance(data, TableData) else None
    name = _slug(checkpoint, options, format_name)
    return Choice(name, task, kind, fitting, format_name, compute, method, context, opt, batch, steps, train,
                  test, goals, stated, pooling, notes, why)  # fmt: skip


def _task(options: InitOptions, checkpoint: Checkpoint, data: Data, mistakes: Mistakes) -> str | None:
    carried = checkpoint.tasks
    if isinstance(data, TableData):
        wanted = ["token-classification" if data.kind == "words" else "sequence-classification"]
        wanted += [EMBEDDING] if data.pair and _is_scored(data) else []
    elif isinstance(data, TextData):
        wanted = ["causal-lm", "sequence-classification", EMBEDDING, "fill-mask"]
        wanted.sort(key=lambda task: not _is_class_of(checkpoint.config, task))
    else:
        wanted = ["image-classification"]
    if options.task is not None:
        task = ALIASES.get(options.task, options.task)
        if task not in wanted:
            needs = f"; {EMBEDDING} takes a text file, or pairs of texts with a score" * (task == EMBEDDING)
            message = f"{options.task} does not fit {options.data.name}, which is for {' or '.join(wanted)}"
            mistakes.add("--task", message + needs, f"write --task {wanted[0]}, or name other data")
            return None
        wanted = [task]
    task = next((supported for supported in wanted if supported in carried), None)
    if task is None:
        needs = {
            "causal-lm": "a text file",
            "image-classification": "a folder with train/LABEL/ and test/LABEL/",
        }.get(carried[0], "a table of labelled texts")
        message = (
            f"a {checkpoint.family} model carries {', '.join(carried)}, and the data are for {wanted[0]}"
        )
        mistakes.add("--data", message, f"name {needs}, or another model")
    return task


def _is_class_of(config: dict[str, Any], task: str) -> bool:
    """True if config.json names the class of a task; the one without a head is that of embeddings."""
    named = class_of(config)
    return task in CLASSES and named.endswith(CLASSES[task]) and not named.endswith("LMHeadModel")


def _is_scored(data: TableData) -> bool:
    """True if every label is a number."""
    return data.kind == "regression" or all(is_whole(label) for label in data.labels)


def _match_head(checkpoint: Checkpoint, data: Data, task: str) -> tuple[Data, str]:
    """Reinterpret the data for the checkpoint's own head, with the reason: one label a row may be several
    labels of which one applies, and whole numbers may be a regression's. Numbers such as 1.0 are the labels
    of a classifier.
    """
    if isinstance(data, TableData) and task == EMBEDDING:
        return replace(data, kind="regression", labels=()), "a score of two texts is a number"
    if not isinstance(data, TableData) or task != "sequence-classification":
        return data, ""
    problem = problem_of_head(checkpoint, task)
    if data.kind == "regression":
        return _as_classes(data, problem, outputs_of_head(checkpoint, task))
    if data.kind != "single":
        return data, ""
    if problem == PROBLEMS["multi"]:
        return replace(data, kind="multi"), "config.json says multi_label_classification"
    if problem == PROBLEMS["regression"] and all(is_whole(label) for label in data.labels):
        return replace(data, kind="regression", labels=()), "the checkpoint's head gives a number"
    return data, ""


def _as_classes(data: TableData, problem: str | None, outputs: int | None) -> tuple[TableData, str]:
    """Read whole numbers with `.0` as a classifier's labels; without a head, 0.0 and 1.0 only. `outputs`:
    number of outputs of the checkpoint's own head.
    """
    cells = [row[data.label] for _, row in data.rows]
    kind = "multi" if problem == PROBLEMS["multi"] else "single"
    labels, counts = labels_in(cells, kind)
    classes = labels == ("0", "1") if outputs is None else problem != PROBLEMS["regression"]
    if not classes or not all(map(is_whole, labels)):
        return data, ""
    reason = f"the checkpoint's head has {outputs} outputs" if outputs else "there are two values, 0 and 1"
    return replace(data, kind=kind, labels=labels, counts=counts), f"{reason}: 1.0 is the label 1"


def _refuse_no_labels(data: TableData, mistakes: Mistakes) -> bool:
    """Refuse a label column with hardly any repeated value, such as texts or row numbers."""
    rows = sum(data.counts.values())
    if data.kind not in ("single", "multi") or len(data.counts) <= rows // 2:
        return False
    message = f"{data.label} has {len(data.counts)} different values in {rows} rows, so it is not a label"
    likely = likely_labels(data.header, data.rows, data.label)
    if data.text in likely[:1]:
        fix = f"write --label-column {data.text} --text-column {data.label}"
    elif likely:
        fix = f"write --label-column {likely[0]}"
    else:
        fix = "name a column whose values repeat themselves"
    mistakes.add("--label-column", message, fix)
    return True


def _refuse_one_sided(data: TableData, test: list[Row], mistakes: Mistakes) -> bool:
    """Refuse data with too few distinct texts to measure two labels."""
    name = data.file.name
    fix = "add rows with other texts: those of one text stay on one side of the split"
    if not test:
        mistakes.add("--data", f"{name} has one text alone, so nothing is left to measure on", fix)
        return True
    measured = {label_of(cells[data.label]) for _, cells in test} if data.kind == "single" else set()
    if len(measured) != 1:
        return False
    others = [f"{label} {data.counts[label]}" for label in data.labels if label not in measured]
    message = f"only the label {measured.pop()} of {name} has two different texts; rows of the others: "
    mistakes.add("--data", message + ", ".join(others[:3]) + (" ..." if others[3:] else ""),
                 "add rows of them: each label is trained on and measured on")  # fmt: skip
    return True


def _why_task(task: str, data: Data) -> str:
    if isinstance(data, TableData):
        return f"{len(data.rows)} rows of texts with " + (
            "numbers" if not data.labels else f"{len(data.labels)} labels"
        )
    return "a text file" if isinstance(data, TextData) else f"images of {len(data.labels)} labels"


def _format(options: InitOptions) -> tuple[str, str]:
    if options.format is not None:
        return options.format, "as asked"
    if options.method == "float":
        return "float", "the method float trains without rounding"
    return "w8a8", "int8 weights and inputs: every target multiplies them, and they lose least"


def _method(options: InitOptions, checkpoint: Checkpoint, format_name: str) -> tuple[str, str]:
    if options.method is not None:
        return options.method, "as asked"
    if format_name == "float":
        return "float", "nothing is rounded"
    if format_name == "ipq":
        return "ipq", "codebooks are trained stage by stage"
    if format_name == "ternary-a8":
        return "teacher-intervention", "ternary weights need a teacher"
    rounded = FORMAT_PRESETS[format_name]["activations"] != "float"
    if checkpoint.family in DECODERS and rounded:
        return (
            "quadapter",
            "decoders have outliers in their activations, which observed ranges do not survive",
        )
    if checkpoint.family in DECODERS:
        return "awq", "no training, and half the loss of ptq (SmolLM2, int4); needs nvidia-modelopt"
    if rounded and format_name != "w8a8":
        return "lsq", "fewer than 8 bits need training"
    return "ptq", "observed ranges alone, in a minute; where the gate refuses, `method: lsq` trains"


def _compute(options: InitOptions) -> tuple[str, str]:
    types = TARGETS[options.target].compute
    if "fp32" in types:
        return "fp32", "the strictest comparison; fp16 is faster on a GPU"
    return types[0], f"{options.target} does not compute in fp32"


def _split(data: Data, task: str) -> tuple[Any, Any]:
    if isinstance(data, TableData):
        return split_table(data)
    return split_text(data) if isinstance(data, TextData) else (None, None)


def _context(
    checkpoint: Checkpoint, data: Data, fitting: Fit, task: str
) -> tuple[int | None, int | None, str]:
    if isinstance(data, ImageData):
        return None, None, "images have the model's size"
    positions = fitting.architecture.context
    if task in RUNNING:
        counts, how = token_counts([split_text(data)[1]], checkpoint.directory)
        context = window_for(counts[0], positions)
        return context, max(1, context // 2), f"the measured text has {counts[0]} tokens ({how})"
    if isinstance(data, TableData):
        texts = data.texts_apart() if task == EMBEDDING else data.texts()
    else:
        texts = [line for line in data.text.split("\n") if line]
    counts, how = token_counts(texts, checkpoint.directory)
    context = context_for(counts, positions)
    cut = sum(count > context for count in counts)
    middle = min(context, -(-counts[len(counts) // 2] // 8) * 8)
    longest = f"the longest text has {counts[-1]} tokens, the middle one {counts[len(counts) // 2]} ({how})"
    return context, middle, longest + (f"; {cut} of {len(counts)} texts are cut" if cut else "")


def _steps(train: Any) -> tuple[int, int]:
    rows = len(train) if isinstance(train, list) else 1000
    batch = min(BATCH, max(1, rows // 4))
    return max(LEAST_STEPS, min(MOST_STEPS, ROUNDS * rows // batch)), batch


def _slug(checkpoint: Checkpoint, options: InitOptions, format_name: str) -> str:
    stem = Path(options.data.resolve().name).stem
    is_discovered = checkpoint.family in DISCOVERED.values()
    model = checkpoint.config["model_type"] if is_discovered else checkpoint.family
    words = re.sub(r"[^a-z0-9]+", "-", f"{model}-{stem}-{format_name}".lower()).strip("-")
    return words[:80].strip("-")
