"""Loads a recipe file as frozen values, or reports all mistakes in it at once. No torch.

    file, `extends`, `--set`  ->  yaml_file.py  plain values, each with its line
                              ->  validate.py   the schema's types (messages: messages.py)
                              ->  rules/        rules between values
                              ->  check.py      rules of the model and the target

Paths in a recipe are relative to the file that writes them; those of `--set` are relative to the recipe.

A file is merged over the one that it `extends`, and `--set` over both. Mappings are merged, other values are
replaced:

* a new choice of an axis, a format or an origin removes the options of the old choice: `adapter: none` over
  `adapter: {name: quadapter, bound: 50}` has no `bound`, `source: x` has no `revision` of another model, and
  one kind of goal replaces the other;
* a short form is expanded to its mapping: `format: {compute: fp16}` over `format: w8a8` is w8a8 in fp16, and
  `adapter: {bound: 50}` over `adapter: quadapter` is a quadapter;
* an empty value over a mapping removes it: `--set train.phases=` returns to the schedule's own steps;
* a layer pattern written again moves to the end of `format.layers`, where the last match wins.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcompress.errors import Mistake, RecipeError
from qcompress.recipe.rules.data import LOCAL
from qcompress.recipe.rules.values import is_hub_id, judge
from qcompress.recipe.validate import validate
from qcompress.recipe.yaml_file import (
    Document,
    Key,
    Place,
    dotted,
    dump_yaml,
    parse_value,
    read_yaml,
    split_key,
)
from qcompress.schema.axes import AXES, PHASES
from qcompress.schema.data import FILES
from qcompress.schema.formats import as_mapping
from qcompress.schema.quantizers import Quantizers, named, quantizers
from qcompress.schema.recipe import LEARNING_RATES, PhaseOptions, Recipe
from qcompress.schema.tasks import task_named
from qcompress.system.artifacts import read_json

SET = "--set"
"""File name shown in the mistakes of an override."""

RESOLVED = "recipe.resolved.yaml"
"""Name of the resolved recipe in a run directory."""

CHAIN_LIMIT = 16
"""Largest number of files in a chain of `extends`."""

CHOICES: tuple[tuple[tuple[str, ...], tuple[str, ...] | None], ...] = (
    (("name",), None),
    (("bits",), None),
    (("source", "run"), ("source", "run", "revision", "blocks")),
    (
        ("text", "folder", "dataset"),
        (
            "text",
            "table",
            "npz",
            "folder",
            "columns",
            "slices",
            "dataset",
            "config",
            "split",
            "revision",
            "column",
        ),
    ),
    (("table",), ("text", "npz", "folder", "dataset", "config", "split", "revision", "column")),
    (("npz",), ("text", "table", "folder", "dataset", "config", "split", "revision", "column")),
    (
        ("threshold", "max-degradation", "percent-max-degradation", "min-recovery"),
        ("threshold", "max-degradation", "percent-max-degradation", "min-recovery"),
    ),
)
"""Keys that choose the kind of a mapping, and the keys removed when another choice is merged over it; None:
all keys.
"""

FREE: tuple[Key, ...] = (
    (),
    ("data", "evaluate"),
    ("format", "layers"),
    ("gate", "float_floor"),
    ("gate", "recovery"),
    ("gate", "regression"),
    ("train", "phases"),
)
"""Mappings whose keys are the user's names, and the recipe itself: no key in them is a choice."""


@dataclass(frozen=True)
class Resolved:
    """A recipe with the line of each of its keys."""

    recipe: Recipe
    file: Path
    base: Path
    """Directory of the recipe's relative paths."""
    places: Mapping[Key, Place]
    smoke: bool = False
    """Reduced by `run --smoke`: the model is not judged."""

    @property
    def lines(self) -> dict[str, int]:
        """Line of each written key, by dotted key; 0 for a key of `--set`."""
        return {dotted(key): place.line for key, place in self.places.items() if key}

    def document(self) -> Document:
        """Document with the places only, for reporting further mistakes."""
        return Document({}, dict(self.places))


def load_recipe(file: Path, overrides: Sequence[str] = ()) -> Resolved:
    """Load a recipe file with `a.b=c` overrides. Raises RecipeError with every mistake."""
    document, recipe = examine(file, overrides)
    if document.mistakes or recipe is None:
        raise RecipeError(document.mistakes)
    return resolved(document, recipe, file)


def examine(file: Path, overrides: Sequence[str] = ()) -> tuple[Document, Recipe | None]:
    """Check a recipe without its model; returns the document with its mistakes, and the recipe.

    If there are mistakes, the recipe contains stand-ins: use only keys that `document.sound` accepts.
    """
    document = read(file, overrides)
    recipe = validate(document)
    if recipe is not None:
        judge(recipe, document, base_of(file))
    return document, recipe


def resolved(document: Document, recipe: Recipe, file: Path) -> Resolved:
    """Resolved recipe of a document without mistakes."""
    return Resolved(written_out(recipe), file, base_of(file), document.places)


def written_out(recipe: Recipe) -> Recipe:
    """Write out the steps of every phase of the schedule and the learning rate of every trained role, so that
    recipe.resolved.yaml depends on no default.
    """
    train, phases = recipe.train, PHASES[recipe.schedule.name]
    trained = {role for phase in phases.values() for role in phase.roles}
    rates = {role: train.lr.get(role, rate) for role, rate in LEARNING_RATES.items() if role in trained}
    steps = {name: train.phases.get(name, PhaseOptions(steps=phase.steps)) for name, phase in phases.items()}
    return recipe.model_copy(update={"train": train.model_copy(update={"lr": rates, "phases": steps})})


def base_of(file: Path) -> Path:
    """Directory of a file's relative paths, with links resolved, because `..` follows the link's target. For
    the recipe of a run directory it is the original recipe's, from the run's manifest.
    """
    if file.name == RESOLVED and file.with_name("manifest.json").is_file():
        base = read_json(file.with_name("manifest.json")).get("base")
        if isinstance(base, str) and os.path.isdir(base):
            return Path(base)
    return Path(os.path.realpath(file.parent))


def dump_recipe(recipe: Recipe) -> str:
    """YAML with all defaults written out; loads as an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json", by_alias=True))


# Files and overrides ------------------------------------------------------------------------------


def read(file: Path, overrides: Sequence[str] = ()) -> Document:
    """Read the values of a recipe, merged with extended files and overrides; not yet validated."""
    document = _read_chain(file, str(file), base_of(file), ())
    for override in overrides:
        document = _set(document, override)
    return document


def _read_chain(file: Path, shown: str, base: Path, below: tuple[str, ...]) -> Document:
    """Read a file merged over the files that it extends; `below` has the real paths of the files that led
    here.
    """
    document = read_yaml(file, shown)
    _move_paths(document.value, base_of(file), base)
    wanted = document.value.pop("extends", None)
    if ("extends",) not in document.places:
        return document
    chain = (*below, os.path.realpath(file))
    problem = _wrong_extends(wanted, file.parent, chain)
    if problem is None:
        under = _read_chain(file.parent / wanted, os.path.join(os.path.dirname(shown), wanted), base, chain)
        merged = _merge_documents(under, document)
        merged.places[()] = document.places[()]
        return merged
    if document.present(("extends",)):
        document.report(("extends",), *problem)
    document.tainted.add(())  # keys that this file lacks may be in the extended file
    return document


def _wrong_extends(wanted: Any, folder: Path, chain: tuple[str, ...]) -> tuple[str, str] | None:
    """Message and fix for an invalid value of `extends`; None if it is valid."""
    if not isinstance(wanted, str) or not wanted:
        return "must be the name of a file", "write `extends: other.yaml`, or drop the line"
    if os.path.realpath(folder / wanted) in chain:
        return f"{wanted} extends itself", "extend a file that does not extend this one"
    if len(chain) >= CHAIN_LIMIT:
        return f"{wanted} is a chain of over {CHAIN_LIMIT} files", "extend fewer files"
    if not os.path.isfile(folder / wanted):
        what = "is not a file" if os.path.exists(folder / wanted) else "does not exist"
        return f"{wanted} {what}", "check the path; it is relative to this file"
    return None


def _set(document: Document, override: str) -> Document:
    """Merge one `a.b=c` over a document."""
    split = split_key(override)
    if split is None or not split[1].startswith("="):
        message, fix = "is not of the form key=value", "write it like `--set train.batch_size=4`"
    elif any(isinstance(part, int) for part in split[0]):
        message, fix = "names an item of a list", "set the whole list, such as `--set export.dynamic=[batch]`"
    elif split[0] == ("extends",):
        message, fix = "cannot be overridden", "write `extends` into the recipe"
    else:
        key, text = split[0], split[1][1:]
        merged = _merge_documents(document, parse_value(text, key, SET))
        section: Any = document.value
        for length in range(len(key)):  # an existing section keeps its place
            if isinstance(section, dict):
                merged.places[key[:length]] = document.place(key[:length])
                section = section.get(key[length])
        return merged
    return replace(document, mistakes=[*document.mistakes, Mistake(SET, 0, override, message, fix)])


PATHS = (
    ("model", "run"), ("model", "python"), ("task", "score"), ("task", "error"), ("task", "loss"),
    ("export", "graph"), ("build", "timing_cache"),
)  # fmt: skip
"""Keys of one path, or of FILE:FUNCTION."""


def _move_paths(values: dict[str, Any], folder: Path, base: Path) -> None:
    """Rewrite a file's relative paths relative to another directory."""
    if folder == base:
        return
    way = os.path.relpath(folder, base)
    model, data = _mapping(values.get("model")), _mapping(values.get("data"))
    if isinstance(model.get("source"), str) and model["source"]:
        local = os.path.isdir(folder / model["source"]) or not is_hub_id(model["source"])
        model["source"] = os.path.join(way, model["source"]) if local else model["source"]
    for section, key in PATHS:
        options = _mapping(values.get(section))
        if isinstance(options.get(key), str) and options[key]:
            options[key] = os.path.join(way, options[key])
    for section in (data.get("train"), data.get("calibration"), *_mapping(data.get("evaluate")).values()):
        texts = _mapping(section)
        for origin in FILES:
            if isinstance(texts.get(origin), list):
                texts[origin] = [
                    os.path.join(way, name) if isinstance(name, str) and name else name
                    for name in texts[origin]
                ]
        if isinstance(texts.get("folder"), str) and texts["folder"]:
            texts["folder"] = os.path.join(way, texts["folder"])
        dataset = texts.get("dataset")
        if not isinstance(dataset, str) or not dataset:
            continue
        if dataset.startswith(LOCAL) or os.path.isdir(folder / dataset):
            moved = os.path.join(way, dataset)
            texts["dataset"] = moved if moved.startswith(LOCAL) else f"./{moved}"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# Merging ------------------------------------------------------------------------------------------


def _merge_documents(below: Document, above: Document) -> Document:
    """Merge `above` over `below`, with the mistakes of both."""
    values = _merge(below.value, above.value, ())
    places = {**below.places, **above.places}
    return Document(
        value=values,
        places={key: place for key, place in places.items() if _is_in(key, values)},
        mistakes=[*below.mistakes, *above.mistakes],
        tainted=below.tainted | above.tainted,
    )


def _merge(below: dict[str, Any], above: dict[str, Any], key: Key) -> dict[str, Any]:
    values = dict(below)
    for name, new in above.items():
        at = (*key, name)
        old = _expand_short_form(at, values.get(name), new) if isinstance(new, dict) else values.get(name)
        if key == ("format", "layers"):
            values.pop(name, None)
        if isinstance(new, dict) and isinstance(old, dict):
            values[name] = _merge(_without_old_choice(at, old, new), new, at)
        elif new is None and isinstance(old, dict):
            values.pop(name, None)
        else:
            values[name] = new
    return values


def _expand_short_form(key: Key, old: Any, new: dict[str, Any]) -> Any:
    """Expand a short form to its mapping if a mapping is merged over it; other values are
    returned unchanged.
    """
    if key == ("quantizer",) and new.keys() & Quantizers.model_fields.keys():
        return quantizers(old)
    if key == ("format",):
        return {"preset": old} if isinstance(old, str) else old
    if len(key) == 2 and key[0] == "format":
        return as_mapping(str(key[1]), old)
    if key == ("task",):
        return task_named(old)
    if (len(key) == 1 and key[0] in AXES) or (len(key) == 2 and key[0] == "quantizer"):
        return named(old)
    return old


def _without_old_choice(key: Key, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    if key in FREE:
        return old
    if key == ("task",):
        new = task_named(new)
    for choosers, gone in CHOICES:
        if any(name in new and new[name] != old.get(name) for name in choosers):
            return {name: value for name, value in old.items() if gone is not None and name not in gone}
    return old


def _is_in(key: Key, values: Any) -> bool:
    """True if the values contain the key; `extends` counts, although it has been removed."""
    if key == ("extends",):
        return True
    for step in key:
        if isinstance(step, int) != isinstance(values, list) or not isinstance(values, (dict, list)):
            return False
        if step not in (range(len(values)) if isinstance(values, list) else values):
            return False
        values = values[step]
    return True
