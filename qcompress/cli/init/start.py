"""`qcompress init`: looks at model and data, chooses, writes the recipe and what it names, and checks it.

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

from qcompress.cli.init.asked import Ask, Asked, Mistakes
from qcompress.cli.init.choose import Choice, check_words, choose
from qcompress.cli.init.data import Found, TableFound, TextFound, look_at_data
from qcompress.cli.init.model import Checkpoint, look_at_model, write_without_head
from qcompress.cli.init.splits import split_files, table_text
from qcompress.cli.init.write import near, recipe_text
from qcompress.recipe.check import all_mistakes
from qcompress.recipe.json_schema import recipe_schema
from qcompress.system.filesystem import writes_to
from qcompress.system.places import place_errors


@dataclass(frozen=True)
class Begun:
    """What was written, found and chosen, and the commands that come next."""

    files: dict[str, Path]
    found: dict[str, Any]
    chosen: dict[str, Any]
    why: dict[str, str]
    notes: list[str]
    commands: list[str]


def begin(asked: Asked, ask: Ask | None = None) -> Begun:
    """Write a first recipe. Raises UsageError with every mistake; then nothing is written."""
    mistakes = Mistakes()
    check_words(asked, mistakes)
    checkpoint = look_at_model(asked.model, mistakes) if asked.model else None
    found = look_at_data(asked, mistakes, ask) if asked.data else None
    if not asked.out.parent.is_dir():
        mistakes.add("--out", f"{asked.out.parent} is no directory", "make it first")
    if asked.out.suffix not in (".yaml", ".yml"):
        mistakes.add("--out", f"{asked.out.name} does not end in .yaml", "name it recipe.yaml, or so")
    words = not mistakes.found or all(one.key == "--out" for one in mistakes.found)
    choice = choose(asked, checkpoint, found, mistakes) if words and checkpoint and found else None
    files = _files(asked, choice, found)
    splits = _splits(found, choice, files) if choice is not None and found is not None else {}
    certain = {what: file for what, file in files.items() if choice is not None or what not in PARTS}
    kept = _there_already(certain, splits, mistakes)
    mistakes.settle()
    with _all_or_nothing() as made, place_errors(asked.out.parent):
        _write(asked, checkpoint, found, choice, files, splits, kept, made)
        _check(asked, checkpoint, files, mistakes)
    notes = [*choice.notes, *(f"{files[part]} is there already, and is the same split" for part in kept)]
    return Begun(files, _found(checkpoint, found), _chosen(asked, choice, found), choice.why, notes,
                 _commands(asked, choice, files))  # fmt: skip


PARTS = ("train", "test")
"""Parts of the data, which are written beside the recipe."""


def _splits(found: Found, choice: Choice, files: dict[str, Path]) -> dict[str, str]:
    """The two parts of the data as the texts of their files; empty for images, which are two already."""
    if isinstance(found, TableFound):
        parts = (("train", choice.train), ("test", choice.test))
        return {part: table_text(found.header, rows, files[part].suffix) for part, rows in parts}
    return {"train": choice.train, "test": choice.test} if isinstance(found, TextFound) else {}


def _there_already(files: dict[str, Path], splits: dict[str, str], mistakes: Mistakes) -> list[str]:
    """Parts of the data that are there already as they would be written. Whatever else is there is a mistake:
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


def _files(asked: Asked, choice: Choice | None, found: Found | None) -> dict[str, Path]:
    """What will be written, by what it is."""
    files = {"recipe": asked.out}
    if asked.with_schema:
        files["schema"] = asked.out.with_name("recipe.schema.json")
    if isinstance(found, (TableFound, TextFound)):
        files["train"], files["test"] = split_files(asked.data, asked.out.parent)
    if choice is not None and choice.head_is_new and choice.method != "float":
        files["float"] = asked.out.with_name(f"{asked.out.stem}-float{asked.out.suffix}")
    if choice is not None and choice.fit.head == "of other labels":
        files["model"] = asked.out.with_name(f"{asked.out.stem}-model")
    return files


@contextmanager
def _all_or_nothing() -> Iterator[list[Path]]:
    """A list to put in what is being made; all of that is removed where the writing ends early."""
    made: list[Path] = []
    done = False
    try:
        yield made
        done = True
    finally:
        for path in () if done else made:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def _write(
    asked: Asked,
    checkpoint: Checkpoint,
    found: Found,
    choice: Choice,
    files: dict[str, Path],
    splits: dict[str, str],
    kept: list[str],
    made: list[Path],
) -> None:
    texts = {part: text for part, text in splits.items() if part not in kept}
    if "model" in files:
        files["model"].mkdir()
        made.append(files["model"])
        write_without_head(checkpoint, choice.fit, files["model"])
    if "schema" in files:
        texts["schema"] = json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"
    folder = asked.out.parent
    source = {"source": near(files.get("model", checkpoint.directory), folder)}
    if "float" in files:
        run = near(Path("runs") / f"{choice.name}-float" / "latest", folder)
        texts["float"] = recipe_text(asked, choice, found, source, files, as_float=True)
        texts["recipe"] = recipe_text(asked, choice, found, {"run": run}, files, as_float=False)
    else:
        as_float = choice.method == "float"
        texts["recipe"] = recipe_text(asked, choice, found, source, files, as_float=as_float)
    for what, text in texts.items():
        with writes_to(files[what]), files[what].open("x", encoding="utf-8", newline="") as stream:
            made.append(files[what])
            stream.write(text)


OPTIONS = {"format": "--format", "method": "--method", "build": "--target"}
"""Options that sections of a recipe come from."""


def _check(asked: Asked, checkpoint: Checkpoint, files: dict[str, Path], mistakes: Mistakes) -> None:
    """What `check` says of the recipes. One that starts from a run which is not made yet is held against the
    checkpoint that the run will start from.
    """
    source = near(files.get("model", checkpoint.directory), asked.out.parent)
    instead = f"model={json.dumps({'family': checkpoint.family, 'source': source})}"
    found = all_mistakes(files["recipe"], [instead] if "float" in files else [])[2]
    if "float" in files:  # its own head is what the checkpoint lacks, and the run will have it
        found = [one for one in found if one.key != "model.source"]
    found += all_mistakes(files["float"])[2] if "float" in files else []
    for one in found:
        option = OPTIONS.get(one.key.split(".")[0])
        message = f"{one.key}: {one.message}" if option else one.message
        mistakes.add(option or one.key, message, one.fix or "choose another")
    mistakes.settle()


def _found(checkpoint: Checkpoint, found: Found) -> dict[str, Any]:
    model = {
        "family": checkpoint.family,
        "architectures": checkpoint.config.get("architectures"),
        "labels": checkpoint.config.get("id2label"),
    }
    if isinstance(found, TextFound):
        return {"model": model, "data": {"kind": "text", "characters": len(found.text)}}
    if isinstance(found, TableFound):
        data = {"kind": found.kind, "rows": len(found.rows), "columns": list(found.header),
                "labels": dict(sorted(found.counts.items())), "header": not found.headless}  # fmt: skip
        return {"model": model, "data": data}
    return {"model": model, "data": {"kind": "images", "labels": list(found.labels)}}


def _chosen(asked: Asked, choice: Choice, found: Found) -> dict[str, Any]:
    architecture = choice.fit.architecture
    columns: dict[str, Any] = {}
    if isinstance(found, TableFound):
        columns = {"text_column": found.text, "pair_column": found.pair, "label_column": found.label}
    return {
        **columns,
        "name": choice.name,
        "family": architecture.family,
        "parameters": architecture.parameters,
        "positions": architecture.context,
        "task": choice.task,
        "kind": choice.kind,
        "head": choice.fit.head,
        "labels": choice.fit.labels,
        "context": choice.context,
        "format": choice.format,
        "compute": choice.compute,
        "method": choice.method,
        "target": asked.target,
        "gate": choice.goals,
    }


def _commands(asked: Asked, choice: Choice, files: dict[str, Path]) -> list[str]:
    first = files.get("float", asked.out)
    commands = [f"qcompress check {first}", f"qcompress run {first} --smoke"]
    if "float" in files:
        commands += [f"qcompress run {first}", f"qcompress check {asked.out}"]
    return [*commands, f"qcompress run {asked.out}"]
