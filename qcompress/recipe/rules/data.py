"""Rules of a recipe's data: allowed sources per task, and existence of files. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from qcompress.recipe.yaml_file import Document, Key, dotted
from qcompress.schema.data import FILES, SUFFIXES
from qcompress.schema.method_options import Distillation, TeacherIntervention
from qcompress.schema.recipe import AnyTask, FeatureExtraction, ImageClassification, Recipe, TextData

FORMATS: tuple[Key, ...] = tuple(
    ("format", key)
    for key in (
        "preset",
        "weights",
        "activations",
        "embeddings",
        "attention",
        "cache",
        "residual",
        "layers",
    )  # fmt: skip
)
"""Keys that determine which tensors are quantized."""

LOCAL = ("/", "./", "../")
"""Prefixes of a dataset name that must be a directory."""


def judge_origins(recipe: Recipe, document: Document) -> None:
    """Report data sources that the task cannot use: language models read text, image tasks images, all others
    tables.
    """
    if not document.sound(("task", "name")):
        return
    task = recipe.task
    for section, data in sections_of(recipe):
        for key, message, fix in _misplaced(recipe, section, data):
            if document.present((*section, key)):
                document.report((*section, key), message, fix)
                document.tainted.add((*section, key))
        for index, name in enumerate(data.table or ()):
            key = (*section, "table", index)
            known = (*SUFFIXES, *task.suffixes)
            if "table" in task.sources and not name.endswith(known) and document.sound(key):
                message = f"{name} ends in none of {', '.join(known)}, so it is not known how to read it"
                document.report(key, message, "rename it, or write it as one of these")


def _misplaced(recipe: Recipe, section: Key, data: TextData) -> Iterator[tuple[str, str, str]]:
    """Keys of a data section that the task cannot use: key, message, fix."""
    task = recipe.task
    if data.augment is not None and not (section == ("data", "train") and "folder" in task.sources):
        yield "augment", "varies the images of `data.train` alone", "drop it"
    given = [key for key in (*FILES, "folder") if getattr(data, key) is not None]
    strange = [key for key in given if key not in task.sources]
    if strange:
        owner = {"npz": "image-classification", "folder": "image-classification"}.get(strange[0])
        owner = owner or ("a task of text" if isinstance(task, ImageClassification) else "a classification")
        fix = {
            "causal-lm": "write `text: [FILE, ...]`, or `dataset:` with `column:`",
            "fill-mask": "write `text: [FILE, ...]`, or `dataset:` with `column:`",
            "image-classification": "write `npz: [FILE, ...]`, `folder: DIR` or `dataset:`",
            "any": "write `npz: [FILE, ...]`, arrays [samples, ...] by the names of the model's inputs",
        }.get(task.name, "write `table: [FILE, ...]` (.tsv, .csv, .jsonl, .parquet) with `columns:`")
        yield strange[0], f"belongs to {owner}, and the task is {task.name}", fix
        return
    if task.running:
        if data.columns is not None:
            message = f"belongs to a classification, and the task is {task.name}"
            yield "columns", message, "write `text: [FILE, ...]`, or `dataset:` with `column:`"
        return
    if data.text is not None and section == ("data", "train") and needs_labels(recipe):
        message = f"has no labels, and {task.name} trains on them"
        yield "text", message, "write `table: [FILE, ...]` (.tsv, .csv, .jsonl, .parquet) with `columns:`"
    role = task.columns[0] if task.columns else ""
    if data.column != TextData.model_fields["column"].default:  # which a dumped recipe spells out
        yield "column", "belongs to causal-lm", f"write `columns: {{{role}: {data.column}}}`"
    for name, column in (data.columns.model_dump() if data.columns else {}).items():
        if column is not None and name not in task.columns:
            message = f"names the column `{name}`, and {task.name} reads {', '.join(task.columns) or 'none'}"
            yield "columns", message, f"drop `{name}`"


def needs_labels(recipe: Recipe) -> bool:
    """True if training needs labels. Embeddings and a user's module learn from the float model alone."""
    taught = isinstance(recipe.objective, Distillation | TeacherIntervention) and not recipe.objective.task
    return not (taught and isinstance(recipe.task, FeatureExtraction | AnyTask))


def sections_of(recipe: Recipe) -> Iterator[tuple[Key, TextData]]:
    """Sections of a recipe's data with their keys."""
    for name in ("train", "calibration"):
        if (text := getattr(recipe.data, name)) is not None:
            yield ("data", name), text
    for name, text in recipe.data.evaluate.items():
        yield ("data", "evaluate", name), text


def judge_files(recipe: Recipe, document: Document, base: Path) -> None:
    """Report missing and unreadable files; a file that several sets name is one mistake."""
    wrong: dict[str, tuple[str, list[Key]]] = {}
    for section, data in sections_of(recipe):
        origin = next((key for key in FILES if getattr(data, key) is not None), "")
        if data.folder is not None:
            judge_directory((*section, "folder"), data.folder, "a folder of images", document, base)
        for index, name in enumerate(data.files):
            key = (*section, origin, index)
            if document.sound(key) and (problem := _unreadable(base / name)) is not None:
                wrong.setdefault(os.path.normpath(base / name), (problem, []))[1].append(key)
        if data.dataset is not None and data.dataset.startswith(LOCAL):
            judge_directory(
                (*section, "dataset"), data.dataset, "a dataset's directory or name", document, base
            )
    for name, (problem, keys) in wrong.items():
        document.report(
            keys[0], f"{name} {problem}{also(keys)}", "check the path; it is relative to the recipe"
        )


def _unreadable(file: Path) -> str | None:
    """Reason why a file cannot be read; None if it can."""
    if not os.path.exists(file):
        return "does not exist"
    if not os.path.isfile(file):
        return "is a directory" if os.path.isdir(file) else "is not a regular file"
    return None if os.access(file, os.R_OK) else "cannot be read: no permission"


def judge_directory(key: Key, name: str, wanted: str, document: Document, base: Path) -> None:
    """Report a path that is not a directory; `wanted` describes valid values."""
    if os.path.isdir(base / name):
        return
    what = "is not a directory" if os.path.exists(base / name) else "does not exist"
    document.report(key, f"{name[:200]!r} {what}", f"write {wanted}; paths are relative to the recipe")


def also(keys: Sequence[Key]) -> str:
    """Suffix that lists the other keys of a mistake."""
    return f" (also {', '.join(dotted(key) for key in keys[1:])})" if keys[1:] else ""


def judge_graph(recipe: Recipe, document: Document, base: Path) -> None:
    """Check an external graph: the file exists, and no key is set that only affects exported graphs."""
    key: Key = ("export", "graph")
    graph = recipe.export.graph
    if document.sound(key) and not os.path.isfile(base / graph):
        what = "is not a file" if os.path.exists(base / graph) else "does not exist"
        fix = "write an ONNX file; paths are relative to the recipe"
        document.report(key, f"{graph[:200]!r} {what}", fix)
    idle = [key for key in IDLE if key in document.places and document.sound(key)]
    if not recipe.format.is_float and not any(key in document.places for key in FORMATS):
        idle.append(("format",))  # `format: w8a8`
    if idle:
        message = f"has no effect: `export.graph` is a graph that is made{also(idle)}"
        document.report(idle[0], message, "drop it")


IDLE: tuple[Key, ...] = (
    ("method",),
    ("quantizer",),
    ("adapter",),
    ("objective",),
    ("stepper",),
    ("schedule",),
    *FORMATS,
    *(("train", key) for key in ("batch_size", "lr", "phases", "optimizer", "layer_drop", "compile")),
    *(("data", key) for key in ("train", "calibration")),
    *(("export", key) for key in ("opset", "cache", "dynamic", "keep_fp32")),
    ("verify", "sharpness"),
)
"""Keys that only affect a graph exported by qcompress."""
