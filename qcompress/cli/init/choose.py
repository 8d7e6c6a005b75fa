"""What a first recipe says, and why: task, labels, context, format, method, steps, goals. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qcompress.cli.init.asked import Asked, Mistakes
from qcompress.cli.init.data import (
    Found,
    ImagesFound,
    TableFound,
    TextFound,
    is_whole,
    label_of,
    labels_in,
    likely_labels,
)
from qcompress.cli.init.lengths import context_for, token_counts, window_for
from qcompress.cli.init.model import Checkpoint, Fit, fit, outputs_of_head, problem_of_head, reading_of
from qcompress.cli.init.splits import split_table, split_text
from qcompress.errors import ModelError
from qcompress.recipe.messages import choose as choose_word
from qcompress.schema.axes import METHODS, PHASES
from qcompress.schema.formats import FORMAT_PRESETS
from qcompress.schema.targets import TARGETS
from qcompress.schema.tasks import READINGS
from qcompress.tasks.labels import TwoReadingsError, named_outputs
from qcompress.tasks.sequence_classification import PROBLEMS
from qcompress.tasks.table import Row

EXAMPLES = {"--model": "--model DIR", "--data": "--data reviews.csv", "--target": "--target cpu"}

CALIBRATION = 256
"""Examples or sequences that ranges are observed on."""

BATCH = 16
ROUNDS, LEAST_STEPS, MOST_STEPS = 8, 100, 3000
"""How often fine-tuning a new head sees each example, between these counts of updates."""

LOSS = 0.02
"""Of accuracy, F1, correlation: what the quantized model may lose, but at least `LOST` samples."""
LOST = 3
PERPLEXITY_PERCENT = 3
AGREEMENT = 0.97


@dataclass(frozen=True)
class Choice:
    """The values of the recipe; `why` has a reason for each choice, in the order in which they were made."""

    name: str
    task: str
    kind: str
    fit: Fit
    format: str
    compute: str
    method: str
    context: int | None
    opt: int | None
    """Tokens of a usual input, which the engine is tuned for."""
    batch: int
    steps: int
    """Updates of fine-tuning a new head."""
    train: list[Row] | str | None
    test: list[Row] | str | None
    """The two parts of the data; None of folders of images, which are two already."""
    goals: dict[str, Any]
    labels_are: str | None
    """`task.labels_are`, where the recipe must say it."""
    notes: list[str] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)

    @property
    def head_is_new(self) -> bool:
        return self.fit.head != "its own"

    @property
    def trains(self) -> bool:
        """Whether the method itself trains."""
        return bool(PHASES[METHODS[self.method]["schedule"]])


def check_words(asked: Asked, mistakes: Mistakes) -> None:
    """What is not given at all, and names of targets, methods and formats."""
    needed = {"--model": asked.model, "--data": asked.data, "--target": asked.target}
    for option, value in needed.items():
        if value is None:
            mistakes.add(
                option, "is not given, and stdin is no terminal to ask at", f"write {EXAMPLES[option]}"
            )
    words: tuple[tuple[str, str | None, Sequence[str]], ...] = (
        ("--target", asked.target, list(TARGETS)),
        ("--method", asked.method, list(METHODS)),
        ("--format", asked.format, list(FORMAT_PRESETS)),
        ("--labels-are", asked.labels_are, READINGS),
    )
    for option, word, known in words:
        if word is not None and word not in known:
            mistakes.add(
                option, f"must be one of {', '.join(known)}, found {word!r}", choose_word(word, known)
            )


def choose(asked: Asked, checkpoint: Checkpoint, found: Found, mistakes: Mistakes) -> Choice | None:
    """Every choice; None, with its mistakes reported, where model and data do not go together."""
    task = _task(checkpoint, found, mistakes)
    if task is None:
        return None
    try:
        found, why_kind = _of_the_heads_kind(checkpoint, found, task)
        if isinstance(found, TableFound) and _refuse_no_labels(found, mistakes):
            return None
        kind = found.kind if isinstance(found, TableFound) else "single"
        labels = () if isinstance(found, TextFound) else found.labels
        problem = {**PROBLEMS, "words": None}[kind] if task != "image-classification" else PROBLEMS["single"]
        reading = "names" if isinstance(found, ImagesFound) else asked.labels_are
        fitting = fit(checkpoint, task, problem, labels, reading)
    except TwoReadingsError as error:
        mistakes.add("--labels-are", error.message, "say `--labels-are names` or `--labels-are indices`")
        return None
    except ModelError as error:
        mistakes.add("--model", error.message, error.fix or "name another checkpoint")
        return None
    if isinstance(found, TextFound) and task != "causal-lm" and fitting.head == "none":
        message = f"{found.file.name} has no labels, and the checkpoint has no head for {task} to be trained"
        mistakes.add("--data", message, "name a table with labels, or a fine-tuned checkpoint")
        return None
    why = {"family": f"config.json says model_type {checkpoint.family}", "task": _why_task(task, found)}
    why["head"] = fitting.why
    why |= {"kind": why_kind} if why_kind else {}
    if isinstance(found, TableFound):
        why |= found.why
    form, why["format"] = _format(asked)
    method, why["method"] = _method(asked, checkpoint, form)
    compute, why["compute"] = _compute(asked)
    train, test = _parts(found, task)
    context, opt, why["context"] = _context(checkpoint, found, fitting, task)
    if isinstance(found, TableFound) and _refuse_one_sided(found, test, mistakes):
        return None
    steps, batch = _steps(train)
    goals, why["gate"] = _goals(found, task, test)
    notes = [fitting.warning] if fitting.warning else []
    if isinstance(found, TableFound) and found.unread and found.kind != "words":
        names = ", ".join(found.unread)
        fix = f"where examples are pairs, add --pair-column '{found.unread[0]}'"
        notes.append(f"the text of {names} is not read; {fix}")
    if isinstance(train, str) and not test:
        mistakes.add("--data", f"{asked.data} is too short to be split in two", "name a longer text")
    names = fitting.labels or named_outputs(checkpoint.config)
    stated = reading or reading_of(labels, names) if isinstance(found, TableFound) else None
    return Choice(_slug(checkpoint, asked, form), task, kind, fitting, form, compute, method, context, opt,
                  batch, steps, train, test, goals, stated, notes, why)  # fmt: skip


def _task(checkpoint: Checkpoint, found: Found, mistakes: Mistakes) -> str | None:
    carried = checkpoint.tasks
    if isinstance(found, TableFound):
        wanted = ["token-classification" if found.kind == "words" else "sequence-classification"]
    elif isinstance(found, TextFound):
        wanted = ["causal-lm", "sequence-classification"]
    else:
        wanted = ["image-classification"]
    task = next((one for one in wanted if one in carried), None)
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


def _of_the_heads_kind(checkpoint: Checkpoint, found: Found, task: str) -> tuple[Found, str]:
    """The data as the checkpoint's own head answers them, and why, where that is not what they look like: one
    label a row may be several labels of which one applies, and whole numbers may be a regression's. Numbers
    such as 1.0 are the labels of a classifier.
    """
    if not isinstance(found, TableFound) or task != "sequence-classification":
        return found, ""
    problem = problem_of_head(checkpoint, task)
    if found.kind == "regression":
        return _as_classes(found, problem, outputs_of_head(checkpoint, task))
    if found.kind != "single":
        return found, ""
    if problem == PROBLEMS["multi"]:
        return replace(found, kind="multi"), "config.json says multi_label_classification"
    if problem == PROBLEMS["regression"] and all(is_whole(label) for label in found.labels):
        return replace(found, kind="regression", labels=()), "the checkpoint's head gives a number"
    return found, ""


def _as_classes(found: TableFound, problem: str | None, outputs: int | None) -> tuple[TableFound, str]:
    """Whole numbers with `.0` as the labels that a classifier reads; without a head, 0.0 and 1.0 alone.
    `outputs`: those of the checkpoint's own head.
    """
    cells = [row[found.label] for _, row in found.rows]
    kind = "multi" if problem == PROBLEMS["multi"] else "single"
    labels, counts = labels_in(cells, kind)
    classes = labels == ("0", "1") if outputs is None else problem != PROBLEMS["regression"]
    if not classes or not all(map(is_whole, labels)):
        return found, ""
    said = f"the checkpoint's head has {outputs} outputs" if outputs else "there are two values, 0 and 1"
    return replace(found, kind=kind, labels=labels, counts=counts), f"{said}: 1.0 is the label 1"


def _refuse_no_labels(found: TableFound, mistakes: Mistakes) -> bool:
    """Refuse a column of labels whose values hardly repeat themselves, such as texts or numbers of rows."""
    rows = sum(found.counts.values())
    if found.kind not in ("single", "multi") or len(found.counts) <= rows // 2:
        return False
    message = f"{found.label} has {len(found.counts)} different values in {rows} rows, so it is not a label"
    likely = likely_labels(found.header, found.rows, found.label)
    if found.text in likely[:1]:
        fix = f"write --label-column {found.text} --text-column {found.label}"
    elif likely:
        fix = f"write --label-column {likely[0]}"
    else:
        fix = "name a column whose values repeat themselves"
    mistakes.add("--label-column", message, fix)
    return True


def _refuse_one_sided(found: TableFound, test: list[Row], mistakes: Mistakes) -> bool:
    """Refuse rows of which too few different texts are there to measure two labels on."""
    name = found.file.name
    fix = "add rows with other texts: those of one text stay on one side of the split"
    if not test:
        mistakes.add("--data", f"{name} has one text alone, so nothing is left to measure on", fix)
        return True
    there = {label_of(cells[found.label]) for _, cells in test} if found.kind == "single" else set()
    if len(there) != 1:
        return False
    others = [f"{label} {found.counts[label]}" for label in found.labels if label not in there]
    message = f"only the label {there.pop()} of {name} has two different texts; rows of the others: "
    mistakes.add("--data", message + ", ".join(others[:3]) + (" ..." if others[3:] else ""),
                 "add rows of them: each label is trained on and measured on")  # fmt: skip
    return True


def _why_task(task: str, found: Found) -> str:
    if isinstance(found, TableFound):
        return f"{len(found.rows)} rows of texts with " + (
            "numbers" if not found.labels else f"{len(found.labels)} labels"
        )
    return "a text file" if isinstance(found, TextFound) else f"images of {len(found.labels)} labels"


def _format(asked: Asked) -> tuple[str, str]:
    if asked.format is not None:
        return asked.format, "as asked"
    if asked.method == "float":
        return "float", "the method float trains without rounding"
    return "w8a8", "int8 weights and inputs: every target multiplies them, and they lose least"


def _method(asked: Asked, checkpoint: Checkpoint, form: str) -> tuple[str, str]:
    if asked.method is not None:
        return asked.method, "as asked"
    if form == "float":
        return "float", "nothing is rounded"
    if form == "ipq":
        return "ipq", "codebooks are trained stage by stage"
    if form == "ternary-a8":
        return "teacher-intervention", "ternary weights need a teacher"
    rounded = FORMAT_PRESETS[form]["activations"] != "float"
    if checkpoint.family == "gpt2" and rounded:
        return "quadapter", "GPT-2 has outliers in its activations, which observed ranges do not survive"
    if rounded and form != "w8a8":
        return "lsq", "fewer than 8 bits need training"
    return "ptq", "observed ranges alone, in a minute; where the gate refuses, `method: lsq` trains"


def _compute(asked: Asked) -> tuple[str, str]:
    types = TARGETS[asked.target].compute
    if "fp32" in types:
        return "fp32", "the strictest comparison; fp16 is faster on a GPU"
    return types[0], f"{asked.target} multiplies no fp32"


def _parts(found: Found, task: str) -> tuple[Any, Any]:
    if isinstance(found, TableFound):
        return split_table(found)
    return split_text(found) if isinstance(found, TextFound) else (None, None)


def _context(
    checkpoint: Checkpoint, found: Found, fitting: Fit, task: str
) -> tuple[int | None, int | None, str]:
    if isinstance(found, ImagesFound):
        return None, None, "images have the model's size"
    positions = fitting.architecture.context
    if task == "causal-lm":
        counts, how = token_counts([split_text(found)[1]], checkpoint.directory)
        context = window_for(counts[0], positions)
        return context, max(1, context // 2), f"the measured text has {counts[0]} tokens ({how})"
    texts = (
        found.texts() if isinstance(found, TableFound) else [line for line in found.text.split("\n") if line]
    )
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


def _goals(found: Found, task: str, test: Any) -> tuple[dict[str, Any], str]:
    """`gate` of the recipe."""
    if task == "causal-lm":
        goal = {"test.perplexity": {"percent-max-degradation": PERPLEXITY_PERCENT}}
        goals = {"recovery": goal, "regression": goal}
        return goals, f"{PERPLEXITY_PERCENT} % of perplexity; state a floor once it is known"
    if isinstance(found, TextFound):
        goal = {"test.agreement": {"threshold": AGREEMENT}}
        goals = {"recovery": goal, "regression": goal}
        return goals, "there are no labels: the answers must be the float model's"
    metric, floor, about = _metric(found, test)
    count = len(test) if test else 0
    loss = max(LOSS, -(-LOST * 1000 // count) / 1000) if count else LOSS
    goal = {f"test.{metric}": {"max-degradation": loss}}
    goals = {"float_floor": {f"test.{metric}": floor}, "recovery": goal, "regression": goal}
    return goals, f"{about}; a loss of {loss:g}" + (
        f" is {loss * count:.0f} of {count} samples" if count else ""
    )


def _metric(found: TableFound | ImagesFound, test: Any) -> tuple[str, float, str]:
    """The metric of the goals, and what a float model that has learned something must reach."""
    if isinstance(found, ImagesFound):
        count = len(found.labels)
        if count == 2:
            return "accuracy", 0.75, "the float model must be halfway between chance and no mistake"
        return "accuracy", round(2 / count, 3), "the float model must be twice as good as chance"
    if found.kind == "regression":
        return "spearman", 0.3, "the float model must have learned something"
    if found.kind == "multi":
        return "f1_micro", 0.3, "the float model must have learned something"
    if found.kind == "words":
        most = max(found.counts.values()) / sum(found.counts.values())
        return "token_accuracy", _floor(most), "the float model must beat the commonest tag"
    labels = [label_of(cells[found.label]) for _, cells in test]
    most = max(labels.count(label) for label in found.labels) / len(labels)
    return "accuracy", _floor(most), "the float model must beat always saying the commonest label"


def _floor(share: float) -> float:
    """A share of less than 1 to three digits, and still less than 1."""
    return math.floor(share * 1000) / 1000


def _slug(checkpoint: Checkpoint, asked: Asked, form: str) -> str:
    stem = Path(asked.data.resolve().name).stem
    words = re.sub(r"[^a-z0-9]+", "-", f"{checkpoint.family}-{stem}-{form}".lower()).strip("-")
    return words[:80].strip("-")
