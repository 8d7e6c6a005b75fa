"""Text of a first recipe: YAML with comments on values that users often change. No torch."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from qcompress.cli.init.choose import CALIBRATION, Choice
from qcompress.cli.init.data import Data, ImageData, TableData, TextData
from qcompress.cli.init.model import EMBEDDING, RUNNING
from qcompress.cli.init.options import InitOptions
from qcompress.schema.axes import METHODS, PHASES
from qcompress.schema.formats import FORMAT_PRESETS

PLAIN = re.compile(r"[A-Za-z_./][\w./-]*( [\w./-]+)*")
WORDS = {"true", "false", "null", "yes", "no", "on", "off", "none", "nan", "inf", "y", "n"}

WINDOWS = 256
"""Number of sequences for the measurement of a language model."""

TAUGHT = ("distillation", "teacher-intervention")
"""Objectives for which the float model's embeddings are enough, and texts need no scores."""

WIDE = 768
"""Width from which a model is fine-tuned with a lower learning rate."""


def flow(value: Any) -> str:
    """Format a value as one line of YAML.

    >>> flow({"table": ["a b.csv"], "columns": {"label": "yes"}, "limit": 8})
    '{table: [a b.csv], columns: {label: "yes"}, limit: 8}'
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.casefold() not in WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


def recipe_text(
    options: InitOptions,
    choice: Choice,
    data: Data,
    origin: dict[str, str],
    files: dict[str, Path],
    as_float: bool,
) -> str:
    """Text of the recipe; `as_float`: of the recipe that first fine-tunes a float model. `origin`: `source`
    or `run`.
    """
    folder = options.out.parent
    name = f"{choice.name}-float" if as_float and "float" in files else choice.name
    method = "float" if as_float else choice.method
    lines = _head(options, choice, data, files, as_float)
    lines += [f"name: {name}", "seed: 0"]
    lines.append(f"model: {flow({'family': choice.fit.architecture.family, **origin})}")
    lines += _task(choice)
    lines += _data(choice, data, folder, files, method)
    lines += _format(choice, as_float)
    if not as_float:
        lines.append(f"# {choice.why['method']}")
    lines.append(f"method: {method}")
    lines += _adapter(choice, method)
    lines += _train(choice, method)
    if as_float:
        lines.append("build: {here: never}    # the quantized model is what is built")
    else:
        lines += _build(options, choice)
    lines.append(f"verify: {flow({'batch_size': 32 if choice.context and choice.context <= 128 else 8})}")
    return "\n".join([*lines, *_gate(choice, as_float)]) + "\n"


def _head(
    options: InitOptions, choice: Choice, data: Data, files: dict[str, Path], as_float: bool
) -> list[str]:
    lines = [f"# yaml-language-server: $schema={files['schema'].name}"] if "schema" in files else []
    what = "fine-tuned in float" if as_float else f"in the format {choice.format}"
    about = options.data.name if not options.data.is_dir() else options.data.resolve().name
    lines.append(f"# {choice.fit.architecture.family} on {about}, {what}; made by `qcompress init`.")
    if choice.head_is_new and as_float:
        then = f", and {options.out.name} quantizes its run" if "float" in files else ""
        lines += _wrapped(f"Head: {choice.fit.why}. That is this recipe{then}.")
        lines += _wrapped(
            "Read: `float` is the checkpoint with the untrained head; `trained` is what counts."
        )
    elif choice.head_is_new:
        lines += _wrapped(f"Model: the run of {files['float'].name}, which must come first.")
    for note in choice.notes:
        lines += _wrapped(f"Note: {note}.")
    return [*lines, "#"]


def _wrapped(text: str) -> list[str]:
    lines, line = [], "#"
    for word in text.split():
        if len(line) + len(word) > 105:
            lines.append(line)
            line = "#  "
        line += f" {word}"
    return [*lines, line]


def _task(choice: Choice) -> list[str]:
    task: dict[str, Any] = {"name": choice.task}
    if choice.task == "sequence-classification" and choice.kind != "single":
        task["kind"] = choice.kind
    if choice.fit.labels is not None and choice.kind != "regression":
        task["labels"] = list(choice.fit.labels)
    if choice.labels_are is not None and choice.kind != "regression":
        task["labels_are"] = choice.labels_are
    task |= choice.pooling or {}
    if choice.context is not None:
        task["context"] = choice.context
    return [f"# {choice.why['context']}", f"task: {flow(task)}"]


def _data(choice: Choice, data: Data, folder: Path, files: dict[str, Path], method: str) -> list[str]:
    train, test = _origins(choice, data, folder, files)
    calibration = {**train, "limit": CALIBRATION}
    lines = [f"# {_about_data(choice, data)}", "data:"]
    taught = choice.task == EMBEDDING and METHODS[method].get("objective") in TAUGHT
    if not isinstance(data, TextData) or choice.task in RUNNING or taught:
        about = "" if PHASES[METHODS[method]["schedule"]] else "    # for methods that train"
        lines.append(f"  train: {flow(train)}{about}")
    if method != "float":
        lines.append(f"  calibration: {flow(calibration)}")
    return [*lines, "  evaluate:", f"    test: {flow(test)}"]


def _origins(
    choice: Choice, data: Data, folder: Path, files: dict[str, Path]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Data sources of the two parts."""
    if isinstance(data, ImageData):
        return {"folder": near(data.train, folder)}, {"folder": near(data.test, folder)}
    key = "table" if isinstance(data, TableData) else "text"
    columns: dict[str, Any] = {}
    if isinstance(data, TableData) and data.kind == "words":
        columns = {"columns": {"tokens": data.text, "tags": data.label}}
    elif isinstance(data, TableData) and choice.task == EMBEDDING:
        columns = {"columns": {"text": data.text, "text_pair": data.pair, "score": data.label}}
    elif isinstance(data, TableData):
        pair = {"pair": data.pair} if data.pair else {}
        columns = {"columns": {"text": data.text, **pair, "label": data.label}}
    most = {"limit": WINDOWS} if choice.task in RUNNING else {}
    train, test = [files["train"].name], [files["test"].name]
    return {key: train, **columns}, {key: test, **columns, **most}


def _about_data(choice: Choice, data: Data) -> str:
    if isinstance(data, ImageData):
        return "A folder of an image is its label."
    if isinstance(data, TableData):
        return (f"{data.file.name}, split by label: {len(choice.train)} rows to train and calibrate on, "
                f"{len(choice.test)} to measure on.")  # fmt: skip
    return f"{data.file.name}, split in two: its last tenth is measured on."


def _format(choice: Choice, as_float: bool) -> list[str]:
    if as_float or choice.format == "float":
        return ["format: float"]
    form: dict[str, Any] = {"preset": choice.format}
    if choice.compute != "fp32":
        form["compute"] = choice.compute
    head = next((layer.name for layer in choice.fit.architecture.layers if layer.kind == "head"), None)
    rounded = FORMAT_PRESETS[choice.format]["activations"] != "float"
    if head and choice.task in RUNNING:
        form |= {"layers": {head: {"activations": "float"}}} if rounded else {}
    elif head and choice.format != "ipq":
        form["layers"] = {head: "float"}
    about = ["# the head's rounding would go straight into the answers"] if "layers" in form else []
    return [*about, f"format: {flow(form)}"]


def _adapter(choice: Choice, method: str) -> list[str]:
    """All proven sites of a discovered decoder: those behind values and up projections gain most."""
    adapter = METHODS[method].get("adapter")
    if adapter is None or choice.fit.architecture.family != "decoder":
        return []
    return [f"adapter: {flow({'name': adapter, 'sites': 'all'})}"]


def _train(choice: Choice, method: str) -> list[str]:
    phases = PHASES[METHODS[method]["schedule"]]
    if not phases:
        return []
    train: dict[str, Any] = {"batch_size": choice.batch if choice.task not in RUNNING else 8}
    steps = {name: {"steps": phase.steps} for name, phase in phases.items()}
    if method == "float" and choice.head_is_new:
        width = choice.fit.architecture.layers[0].in_features
        rate = 5e-5 if width >= WIDE else 1e-4
        train["lr"] = {"weight": rate, "other": rate}
        steps = {"finetune": {"steps": choice.steps}}
    train["phases"] = steps
    return [f"train: {flow(train)}"]


def _build(options: InitOptions, choice: Choice) -> list[str]:
    build: dict[str, Any] = {"target": options.target}
    if options.target == "cpu":
        return [f"build: {flow(build)}"]
    profile: dict[str, Any] = {"batch": [1, 8, 32] if choice.task not in RUNNING else [1, 4, 8]}
    if choice.context is not None:
        profile["sequence"] = [1, choice.opt, choice.context]
    build["profiles"] = [profile]
    return ["# [smallest, usual, largest] of each axis; the engine is fastest at the usual one",
            f"build: {flow(build)}"]  # fmt: skip


def _gate(choice: Choice, as_float: bool) -> list[str]:
    goals = choice.goals
    if as_float:  # the head of its row `float` is untrained: the floor is a limit of the trained model
        floors = goals.get("float_floor", {})
        goals = {"recovery": {metric: {"threshold": least} for metric, least in floors.items()}}
        lines = ["# what comes out must be better than answers without reading"] if floors else []
        return [*lines, *([f"gate: {flow(goals)}"] if floors else [])]
    lines = [f"# {choice.why['gate']}", "gate:"]
    about = {"recovery": "against the float model", "regression": "later runs: `qcompress gate --baseline`"}
    for key, value in goals.items():
        note = f"    # {about[key]}" if key in about else ""
        lines.append(f"  {key}: {flow(value)}{note}")
    return lines


def near(path: Path, folder: Path) -> str:
    """Path relative to `folder`; absolute if that would go up more than two folders."""
    way = os.path.relpath(path, folder)
    return way if way.count("..") <= 2 else str(path.resolve())
