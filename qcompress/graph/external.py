"""Import of an external graph: an ONNX file that another tool made from a run's float model, in place of our
export.

An external graph is linted, measured, built and gated like an exported one. It has no certificate:
certification needs a folded model. The row `onnx` is compared with the row `float`. Functions import onnx:
every run imports this module, and few have an external graph.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.errors import ExportError
from qcompress.models import FAMILIES, graph_signature
from qcompress.models.architecture import Input
from qcompress.models.checkpoint_files import read_config
from qcompress.models.pooling import output_name
from qcompress.schema.targets import find_target
from qcompress.system.artifacts import graph_digests, read_object, sha256_file, write_json
from qcompress.system.child_process import command, environment

if TYPE_CHECKING:
    from onnx import ValueInfoProto

    from qcompress.graph.view import View

TRIAL_MIB, TRIAL_S = 16384, 600
"""Memory and time limit of the process that runs an external graph for the first time."""

REASON = "the graph is external"
"""Reason for the missing rows `trained` and `folded`, and for the incomplete certificate."""

TAKEN = {"int64": ("int64", "int32"), "float32": ("float32", "float16")}
"""Allowed types of a graph input, by the input type of the model family; values are cast before they are fed.
"""

MASK = "attention_mask"
"""The only input that may also have type bool."""

TYPES = {"INT64": "int64", "INT32": "int32", "BOOL": "bool", "FLOAT": "float32", "FLOAT16": "float16"}
"""numpy names of the supported input types, by ONNX's names."""


def files_of(graph: Path) -> dict[str, str]:
    """Digests of an ONNX file and its external data, by path relative to the file's folder."""
    from qcompress.graph.view import read

    view = read(graph)
    files = (view.file, *view.data_files)
    return {os.path.relpath(file, graph.parent): sha256_file(file) for file in files}


def check_unchanged(run: Path) -> None:
    """Raise ExportError if a run's graph files differ from the imported ones."""
    known = read_object(run / "certificate.json").get("files", {})
    changed = [name for name, digest in known.items() if sha256_file(run / name) != digest]
    if changed:
        raise ExportError(
            f"{run / changed[0]} is not the imported graph",
            fix="run the recipe again to put the graph back, or name the new one in `export.graph`",
        )


def adopt(
    graph: Path, checkpoint: Path, family: str, target: str, shape: Sequence[int | None], out: Path
) -> list[str]:
    """Import a graph as the result of the stage export. Writes the graph and its external data, lint.json,
    sizes.json, certificate.json (`complete` false, with the reason), and config.json and the tokenizer of
    `checkpoint`. Returns notes for the user.

    The graph reads the family's first input and any of its other inputs, with the axes of the family's
    signature and types that the inputs can be cast to. Its output `logits`, of a text encoder `embeddings`,
    has `shape`: (rows, tokens, vocabulary), (rows, labels) or (rows, width), None for sizes that depend on
    the inputs. Raises ExportError for other inputs or outputs, for a graph that the target refuses, and for
    one that ONNX Runtime cannot run.
    """
    import onnx

    from qcompress.graph.lint.lint import lint, refuse_errors
    from qcompress.graph.view import read

    view = read(graph)
    signature = graph_signature(FAMILIES[family], checkpoint)
    output = output_name(read_config(checkpoint))
    _check_signature(view, family, signature, output)
    findings = lint(graph, find_target(target))
    refuse_errors(findings, target, str(graph))
    without = _try(graph, _fed(view, signature), shape, output)
    file = out / "model.onnx"
    if view.data_files:
        model = onnx.load(str(graph))
        onnx.save(model, str(file), save_as_external_data=True, location=file.name + ".data")
    else:
        shutil.copyfile(graph, file)
    for name in checkpoint.iterdir():
        if name.suffix in (".json", ".txt", ".jinja") and name.name not in ("float.json", "manifest.json"):
            shutil.copyfile(name, out / name.name)
    write_json(out / "lint.json", {"target": target, "findings": [asdict(finding) for finding in findings]})
    certificate: dict[str, Any] = {"layers": [], "points": [], "expected": 0}
    certificate |= {"complete": False, "reason": REASON, "disabled_optimizers": without}
    certificate |= {"files": graph_digests(file)}
    write_json(out / "certificate.json", certificate)
    write_json(out / "sizes.json", _sizes(file))
    if not without:
        return []
    names = ", ".join(without)
    return [f"ONNX Runtime opens the graph only without {names}; the row `onnx` is measured without {names}"]


def _check_signature(view: View, family: str, signature: tuple[Input, ...], output: str) -> None:
    """Raise ExportError unless the graph's inputs belong to the family and it has the task's `output`."""
    known = {item.name: item for item in signature}
    names = [value.name for value in view.inputs]
    if signature[0].name not in names or not set(names) <= set(known):
        raise ExportError(
            f"{view.file} has the inputs {', '.join(names) or 'none'}, and a {family} model has "
            f"{', '.join(known)}",
            fix="name the inputs of the graph as transformers does, or leave out those that it does not read",
        )
    for value in view.inputs:
        _check_input(view, family, value, known[value.name])
    if output not in view.outputs:
        raise ExportError(
            f"{view.file} has the outputs {', '.join(sorted(view.outputs))}, and none is called `{output}`",
            fix=f"rename the output that is compared with the model's {output}",
        )


def _check_input(view: View, family: str, value: ValueInfoProto, wanted: Input) -> None:
    """Raise ExportError for an input of a wrong type, a wrong rank or a fixed size."""
    from qcompress.graph.tensors import type_word
    from qcompress.graph.view import dimensions

    kind = type_word(value.type.tensor_type.elem_type)
    taken = (*TAKEN[wanted.element], *(("bool",) if value.name == MASK else ()))
    if TYPES.get(kind) not in taken:
        raise ExportError(
            f"{view.file}: the input {value.name} is {kind.lower()}, and a {family} model's can "
            f"be {' or '.join(taken)}",
            fix=f"export the graph with an input of {wanted.element}, and cast inside of it",
        )
    shape, axes = dimensions(value), ", ".join(map(str, wanted.axes))
    if shape is None or len(shape) != len(wanted.axes):
        has = "has no shape" if shape is None else f"has {len(shape)} axes {list(shape)}"
        raise ExportError(
            f"{view.file}: the input {value.name} {has}, and a {family} model's has "
            f"{len(wanted.axes)}, [{axes}]",
            fix="name the inputs of the graph as transformers does, with the same axes",
        )
    fits = (not isinstance(size, int) or size == axis for size, axis in zip(shape, wanted.axes, strict=True))
    if not all(fits):
        sized = " of any size" if wanted.element == "int64" else ", the batch of any size"
        raise ExportError(
            f"{view.file}: the input {value.name} must be [{axes}]{sized}, and is {list(shape)}",
            fix="export the graph with dynamic axes",
        )


def _fed(view: View, signature: tuple[Input, ...]) -> dict[str, tuple[str, list[str | int]]]:
    """Type and axes of each graph input, by name."""
    from qcompress.graph.tensors import type_word

    axes = {item.name: list(item.axes) for item in signature}
    types = {value.name: TYPES[type_word(value.type.tensor_type.elem_type)] for value in view.inputs}
    return {name: (kind, axes[name]) for name, kind in types.items()}


def _try(
    graph: Path, fed: dict[str, tuple[str, list[str | int]]], shape: Sequence[int | None], output: str
) -> list[str]:
    """Run the graph once in a child process, which may crash; returns the optimizers to disable."""
    from qcompress.graph.trial import ROWS, TOKENS

    words = command("qcompress.graph.trial", str(graph.resolve()), json.dumps(fed), str(TRIAL_MIB), output)
    try:
        # in an empty folder, or Python would import modules from the folder of the graph
        with tempfile.TemporaryDirectory(prefix="qcompress-trial-") as folder:
            done = subprocess.run(
                words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=TRIAL_S
            )
    except subprocess.TimeoutExpired:
        raise ExportError(f"{graph}: ONNX Runtime did not finish {ROWS} rows within {TRIAL_S} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1][:1000] if lines else f"its process ended with {done.returncode}"
        raise ExportError(
            f"{graph}: ONNX Runtime cannot run it: {reason}", fix="try the graph with onnxruntime by itself"
        )
    logits = json.loads(done.stdout)
    tokens = f" of {TOKENS} tokens" if any("sequence" in axes for _, axes in fed.values()) else ""
    wanted = [ROWS, *((TOKENS,) if len(shape) == 3 else ()), shape[-1]]
    if logits["shape"] != wanted or logits["type"] not in ("float32", "float16"):
        raise ExportError(
            f"{graph}: the {output} of {ROWS} rows{tokens} are {logits['type']} {logits['shape']}, and this "
            f"model and task have floats {wanted}",
            fix="name a graph that was made from this model, with dynamic axes",
        )
    return logits["disabled_optimizers"]


def _sizes(file: Path) -> dict[str, Any]:
    """Content of sizes.json; its layers are the integer weights that `inspect` lists."""
    from qcompress.graph.inspect import INTEGERS, contents

    content = contents(file)
    layers = [
        {"weights": math.prod(weight["shape"])}
        | {key: weight[key] for key in ("name", "stored_bits", "information_bits", "bytes")}
        for weight in content["weights"]
        if weight["stored"].upper() in INTEGERS
    ]
    totals = content["totals"]
    return {
        "layers": layers,
        "initializer_bytes": totals["weights"] + totals["float"] + totals["other"],
        "quantized_bytes": sum(layer["bytes"] for layer in layers),
        "float_layer_bytes": 4 * totals["elements"],
        "file_bytes": sum(one.stat().st_size for one in file.parent.glob(file.name + "*")),
    }
