"""`qcompress init`: reads model and data, chooses, writes the recipe and its files, and checks it.

Nothing is overwritten, and a recipe that `check` refuses is not left behind. No torch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompress.cli.init.choose import Choice, check_words, choose
from qcompress.cli.init.data import Data, TableData, TextData, look_at_data
from qcompress.cli.init.model import Checkpoint, look_at_model, write_without_head
from qcompress.cli.init.options import Ask, InitOptions, Mistakes
from qcompress.cli.init.splits import split_files, table_text
from qcompress.cli.init.write import near, recipe_text
from qcompress.recipe.check import all_mistakes
from qcompress.recipe.json_schema import recipe_schema
from qcompress.system.filesystem import writes_to
from qcompress.system.places import place_errors


@dataclass(frozen=True)
class InitResult:
    """Files written, facts, choices with reasons, notes, and the next commands."""

    files: dict[str, Path]
    found: dict[str, Any]
    chosen: dict[str, Any]
    why: dict[str, str]
    notes: list[str]
    commands: list[str]


def begin(options: InitOptions, ask: Ask | None = None) -> InitResult:
    """Write a first recipe. Raises UsageError with all mistakes; then nothing is written."""
    mistakes = Mistakes()
    check_words(options, mistakes)
    checkpoint = look_at_model(options.model, mistakes) if options.model else None
    data = look_at_data(options, mistakes, ask) if options.data else None
    if not options.out.parent.is_dir():
        mistakes.add("--out", f"{options.out.parent} is not a directory", "make it first")
    if options.out.suffix not in (".yaml", ".yml"):
        mistakes.add("--out", f"{options.out.name} does not end in .yaml", "name it recipe.yaml, or so")
    words = not mistakes.collected or all(mistake.key == "--out" for mistake in mistakes.collected)
    choice = choose(options, checkpoint, data, mistakes) if words and checkpoint and data else None
    files = _files(options, choice, data)
    splits = _splits(data, choice, files) if choice is not None and data is not None else {}
    certain = {what: file for what, file in files.items() if choice is not None or what not in PARTS}
    kept = _kept_parts(certain, splits, mistakes)
    mistakes.settle()
    with _all_or_nothing() as written, place_errors(options.out.parent):
        _write(options, checkpoint, data, choice, files, splits, kept, written)
        _check(options, checkpoint, files, mistakes)
    notes = [*choice.notes, *(f"{files[part]} exists already, with the same split" for part in kept)]
    return InitResult(files, _facts(checkpoint, data), _chosen(options, choice, data), choice.why, notes,
                 _commands(options, choice, files))  # fmt: skip


PARTS = ("train", "test")
"""Parts of the data, which are written beside the recipe."""


def _splits(data: Data, choice: Choice, files: dict[str, Path]) -> dict[str, str]:
    """Texts of the two data files; empty for images, which are already split."""
    if isinstance(data, TableData):
        parts = (("train", choice.train), ("test", choice.test))
        return {name: table_text(data.header, rows, files[name].suffix) for name, rows in parts}
    return {"train": choice.train, "test": choice.test} if isinstance(data, TextData) else {}


def _kept_parts(files: dict[str, Path], splits: dict[str, str], mistakes: Mistakes) -> list[str]:
    """Parts of the data that exist with the content to be written. Any other existing file is a mistake:
    nothing is overwritten.
    """
    kept = []
    for what, file in files.items():
        if not os.path.lexists(file):
            continue
        if what in splits and file.is_file() and file.read_bytes() == splits[what].encode("utf-8"):
            kept.append(what)
            continue
        holds = " with other content than the split of --data" if what in splits else ""
        option = "--data" if what in PARTS else "--out"
        mistakes.add(option, f"{file} exists{holds}, and nothing is overwritten",
                     "remove it, or name another --out in another folder")  # fmt: skip
    return kept


def _files(options: InitOptions, choice: Choice | None, data: Data | None) -> dict[str, Path]:
    """Paths of the files to write, by kind."""
    files = {"recipe": options.out}
    if options.with_schema:
        files["schema"] = options.out.with_name("recipe.schema.json")
    if isinstance(data, (TableData, TextData)):
        files["train"], files["test"] = split_files(options.data, options.out.parent)
    if choice is not None and choice.head_is_new and choice.method != "float":
        files["float"] = options.out.with_name(f"{options.out.stem}-float{options.out.suffix}")
    if choice is not None and choice.fit.head == "of other labels":
        files["model"] = options.out.with_name(f"{options.out.stem}-model")
    return files


@contextmanager
def _all_or_nothing() -> Iterator[list[Path]]:
    """Context with a list of written paths, which are removed if the block does not finish."""
    written: list[Path] = []
    done = False
    try:
        yield written
        done = True
    finally:
        for path in () if done else written:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def _write(
    options: InitOptions,
    checkpoint: Checkpoint,
    data: Data,
    choice: Choice,
    files: dict[str, Path],
    splits: dict[str, str],
    kept: list[str],
    written: list[Path],
) -> None:
    texts = {name: text for name, text in splits.items() if name not in kept}
    if "model" in files:
        files["model"].mkdir()
        written.append(files["model"])
        write_without_head(checkpoint, choice.fit, files["model"])
    if "schema" in files:
        texts["schema"] = json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"
    folder = options.out.parent
    source = {"source": near(files.get("model", checkpoint.directory), folder)}
    if "float" in files:
        run = near(Path("runs") / f"{choice.name}-float" / "latest", folder)
        texts["float"] = recipe_text(options, choice, data, source, files, as_float=True)
        texts["recipe"] = recipe_text(options, choice, data, {"run": run}, files, as_float=False)
    else:
        as_float = choice.method == "float"
        texts["recipe"] = recipe_text(options, choice, data, source, files, as_float=as_float)
    for what, text in texts.items():
        with writes_to(files[what]), files[what].open("x", encoding="utf-8", newline="") as stream:
            written.append(files[what])
            stream.write(text)


OPTIONS = {"format": "--format", "method": "--method", "build": "--target"}
"""The `init` option that determines each section of a recipe."""


def _check(options: InitOptions, checkpoint: Checkpoint, files: dict[str, Path], mistakes: Mistakes) -> None:
    """Check the written recipes. A recipe that starts from a run not yet made is checked against the
    checkpoint from which that run starts.
    """
    source = near(files.get("model", checkpoint.directory), options.out.parent)
    instead = f"model={json.dumps({'family': checkpoint.family, 'source': source})}"
    mistakes_of_check = all_mistakes(files["recipe"], [instead] if "float" in files else [])[2]
    if "float" in files:  # the checkpoint lacks the head that the run will train
        mistakes_of_check = [mistake for mistake in mistakes_of_check if mistake.key != "model.source"]
    mistakes_of_check += all_mistakes(files["float"])[2] if "float" in files else []
    for mistake in mistakes_of_check:
        option = OPTIONS.get(mistake.key.split(".")[0])
        message = f"{mistake.key}: {mistake.message}" if option else mistake.message
        mistakes.add(option or mistake.key, message, mistake.fix or "choose another")
    mistakes.settle()


def _facts(checkpoint: Checkpoint, data: Data) -> dict[str, Any]:
    model = {
        "family": checkpoint.family,
        "architectures": checkpoint.config.get("architectures"),
        "labels": checkpoint.config.get("id2label"),
    }
    if isinstance(data, TextData):
        return {"model": model, "data": {"kind": "text", "characters": len(data.text)}}
    if isinstance(data, TableData):
        table_facts = {"kind": data.kind, "rows": len(data.rows), "columns": list(data.header),
                "labels": dict(sorted(data.counts.items())), "header": not data.headless}  # fmt: skip
        return {"model": model, "data": table_facts}
    return {"model": model, "data": {"kind": "images", "labels": list(data.labels)}}


def _chosen(options: InitOptions, choice: Choice, data: Data) -> dict[str, Any]:
    architecture = choice.fit.architecture
    columns: dict[str, Any] = {}
    if isinstance(data, TableData):
        columns = {"text_column": data.text, "pair_column": data.pair, "label_column": data.label}
    return {
        **columns,
        "name": choice.name,
        "family": architecture.family,
        "parameters": architecture.parameters,
        "positions": architecture.context,
        "task": choice.task,
        "kind": choice.kind,
        **({"pooling": choice.pooling} if choice.pooling else {}),
        "head": choice.fit.head,
        "labels": choice.fit.labels,
        "context": choice.context,
        "format": choice.format,
        "compute": choice.compute,
        "method": choice.method,
        "target": options.target,
        "gate": choice.goals,
    }


def _commands(options: InitOptions, choice: Choice, files: dict[str, Path]) -> list[str]:
    first = files.get("float", options.out)
    commands = [f"qcompress check {first}", f"qcompress run {first} --smoke"]
    if "float" in files:
        commands += [f"qcompress run {first}", f"qcompress check {options.out}"]
    return [*commands, f"qcompress run {options.out}"]
