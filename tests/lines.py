"""Whole runs of the line on a tiny model, and graphs exported from it in many formats.

`finished` makes one run for all tests that only look at one; `Project.copy` gives a test a run of its own,
with its cache, to break. A run that reuses all its stages takes a fraction of a second, an export some five.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import yaml
from once import once
from tiny import make_recipe, start_line
from typer.testing import CliRunner

from qcompress import api
from qcompress.cli.main import app
from qcompress.engine.probe_kit.engine_runners import EXACT, saturates
from qcompress.models.plan import LayerPlan, plans_from_json
from qcompress.pipeline import keys
from qcompress.pipeline import run as pipeline
from qcompress.pipeline.stages.export import export
from qcompress.system.artifacts import FoldedModel, read_json

NAME = "tiny"
SETS = {"test": 12, "other": 5}
"""Evaluation sets and their samples, in the recipe's order, which is not the alphabet's."""

CONTEXT = 32
COMPARED = 6

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
"""Another number of threads gives other bits, and is part of a stage's key."""


def values(**sections: Any) -> dict[str, Any]:
    """A recipe that ends with `accept`; `sections` replace whole sections."""
    return {
        "name": NAME,
        "model": {"family": "gpt2", "source": "model"},
        "task": {"name": "causal-lm", "context": CONTEXT},
        "data": {
            "train": {"text": ["text.txt"], "limit": 64},
            "calibration": {"text": ["text.txt"], "limit": 12},
            "evaluate": {name: {"text": ["text.txt"], "limit": limit} for name, limit in SETS.items()},
        },
        "format": "w8a8",
        "method": "quadapter",
        "train": {
            "device": "cpu",
            "batch_size": 4,
            "checkpoint_every_s": 1,
            "phases": {"calibrate": {"steps": 40}, "finetune": {"steps": 40}},
        },
        "build": {"target": "rtx-ada", "profiles": [{"batch": [1, 2, 4], "sequence": [1, 16, CONTEXT]}]},
        "verify": {"batch_size": 4, "distance_samples": COMPARED},
        # random weights: flipped roundings cascade, so the default limits say nothing about this model
        "gate": {
            "float_floor": {"test.perplexity": 10_000},
            "recovery": {"test.perplexity": {"percent-max-degradation": 50}},
            "parity": {"onnx": {"mean_abs": 0.05}},
        },
        **sections,
    }


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """The one JSON document that stdout is; a second one is an error."""
        return json.loads(self.stdout)


@dataclass(frozen=True)
class Project:
    """A folder with recipe.yaml, the model and the text it names, and the runs made from it."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def out(self) -> Path:
        return self.folder / "runs"

    @property
    def cache(self) -> Path:
        return self.out / ".cache"

    @property
    def latest(self) -> Path:
        """The run that finished last."""
        return (self.out / NAME / "latest").resolve()

    def run(self, *overrides: str, **options: Any) -> pipeline.Run:
        """The recipe through the Python API."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ENVIRONMENT.items():
                patch.setenv(name, value)
            return api.run(self.recipe, self.out, overrides=overrides, **options)

    def copy(self, folder: Path) -> Project:
        """The same in another folder, runs and cache too; run once, so that its manifest is its own."""
        shutil.copytree(self.folder, folder, symlinks=True)
        project = Project(folder)
        assert all(step.reused for step in project.run().steps)
        return project

    def command(self, *arguments: str | Path) -> list[str]:
        """`qcompress run` on the recipe, as a command line."""
        return ["run", str(self.recipe), "--out", str(self.out), *map(str, arguments)]

    def entry(self, stage: str) -> Path:
        """The only finished entry of a stage in the cache."""
        (found,) = [path for path in (self.cache / stage).iterdir() if path.is_dir() and not path.suffix]
        return found


def make_project(folder: Path, checkpoint: Path, text: Path, **sections: Any) -> Project:
    """A project that was never run."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(checkpoint, folder / "model")
    shutil.copyfile(text, folder / "text.txt")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values(**sections), sort_keys=False))
    return Project(folder)


@functools.cache
def finished(model: Path, text: Path) -> Project:
    """A project with one finished run, the same for all tests. Read only: take a `copy` to change it."""

    def make(folder: Path) -> None:
        assert make_project(folder, model, text).run().verdict == "accept"

    return Project(once(model.parent / f"{model.name}-project", make))


# Exported graphs ----------------------------------------------------------------------------------

MIXED = {
    "preset": "w8a8",
    "layers": {
        "*.0.attn.c_attn": "float",
        "*.0.attn.c_proj": {"weights": {"bits": 4, "container": "int8"}},
        "*.0.mlp.c_fc": {"weights": {"bits": 4, "block": 32}, "activations": "float"},
        "*.1.mlp.c_fc": {"activations": "float"},
        "*.1.attn.c_attn": {"activations": "int4"},
        "*.1.attn.c_proj": {
            "weights": {"bits": 2, "ternary": True, "granularity": "tensor", "container": "int8"}
        },
    },
}
"""Every kind of layer in one graph, and the rest W8A8."""

FORMATS: dict[str, object] = {
    "mixed": MIXED,
    "w8a8": "w8a8",
    "w8a16": "w8a16",
    "w4a16": "w4a16-g32",
    "w4a8": "w4a8",
    "w4a4": "w4a4",
    "w2a2": {"weights": {"bits": 2, "container": "int8"}, "activations": "int2", "embeddings": "int8"},
    "w3a8": "w3a8",
    "w2a8": "w2a8",
    "w3a16": {"weights": {"bits": 3, "block": 32}, "embeddings": "int8"},
    "w2a16": {"weights": "int2", "embeddings": "int2"},
    "w2a16-int2": {
        "weights": {"bits": 2, "block": 32, "container": "int2"},
        "embeddings": {"bits": 2, "container": "int2"},
        "layers": {"*.0.mlp.c_fc": {"weights": {"bits": 2, "ternary": True, "container": "int2"}}},
    },
    "ternary-a8": "ternary-a8",
    "w4a8-blocks": {"weights": {"bits": 4, "block": 32}, "activations": "int8", "embeddings": "int8"},
    "float-table": {"weights": "int8", "activations": "int8"},
    "float": "float",
}


BOOK = {"codebook": "gather", "centroids": 16, "block": 8}

CODEBOOKS = {
    "weights": BOOK,
    "embeddings": {**BOOK, "block": 4},
    "layers": {
        "*.0.mlp.c_proj": {"weights": {**BOOK, "table": "int8"}},
        "*.1.attn.c_proj": {"weights": {**BOOK, "table": "int8"}, "activations": "int8"},
        "*.1.mlp.c_fc": {
            "weights": {**BOOK, "table": "int8", "codebook": "decode-int8"},
            "activations": "int8",
        },
        "*.1.mlp.c_proj": {"weights": "int8", "activations": "int8"},
        "*.wpe": {"weights": {**BOOK, "table": "int8"}},
    },
}
"""Every kind of codebook in one graph, and integers beside them. `test_codebooks.py` looks at it."""

METHODS: dict[str, dict[str, object]] = {"ternary-a8": {"quantizer": "ternary"}}
"""What a format needs besides observed ranges; ternary brings dynamic activations along."""


@dataclass(frozen=True)
class Kind:
    """What to export: a format, and what else shapes the graph."""

    format: str
    compute: str = "fp32"
    opset: int = 21
    tied: bool = True

    def __str__(self) -> str:
        return f"{self.format}-{self.compute}-{self.opset}-{'tied' if self.tied else 'untied'}"


ONNX_ONLY = {"w4a8-blocks": 21, "w2a16-int2": 25}
"""What ONNX Runtime computes and no TensorRT does, and the first opset that has it: int4 blocks times int8
activations, and int2.
"""

QUICK = (Kind("mixed"), Kind("mixed", "fp16", 23, tied=False))
SLOW = tuple(
    kind
    for name in FORMATS
    for least in [ONNX_ONLY.get(name, 21)]
    for kind in (Kind(name, opset=least), Kind(name, "fp16", max(least, 23), tied=False))
    if kind not in QUICK
)


@dataclass(frozen=True)
class Exported:
    """An exported graph and what it was made from."""

    kind: Kind
    folded: FoldedModel
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def plan(self) -> tuple[LayerPlan, ...]:
        return plans_from_json(read_json(self.folded.path / "folded.json")["plan"])


@functools.cache
def exported(kind: Kind, model: Path, text: Path) -> Exported:
    """A checkpoint (tied as `kind` says), quantized with observed ranges, folded and exported. Read only."""
    folder = once(model.parent / f"{model.name}-{kind}", functools.partial(_export, kind, model, text))
    return Exported(kind, FoldedModel(folder / "fold"), folder / "export")


def _export(kind: Kind, model: Path, text: Path, folder: Path) -> None:
    form = CODEBOOKS if kind.format == "codebook" else FORMATS[kind.format]
    sections = {"format": form, "method": "ptq", **METHODS.get(kind.format, {})}
    if kind.format == "float":
        sections = {"format": "float", "method": "float", "train": {"phases": {"finetune": {"steps": 0}}}}
    recipe = make_recipe(text, **sections)
    recipe = recipe.model_copy(update={"format": recipe.format.model_copy(update={"compute": kind.compute})})
    line = start_line(folder, model, text, recipe).train().fold()
    options = recipe.export.model_copy(update={"opset": kind.opset})
    target = "cpu" if kind.format in ONNX_ONLY else "rtx-ada"
    (folder / "export").mkdir()
    export(line.folded, options, target, keys.provenance(recipe), folder / "export")


# Processes ----------------------------------------------------------------------------------------


def cli(*arguments: str | Path, environment: Mapping[str, str] = {}) -> Result:
    """A command in this process, whose output goes to no terminal of a known width."""
    variables = {**ENVIRONMENT, "COLUMNS": None, **environment}
    found = CliRunner().invoke(app, [str(word) for word in arguments], env=variables)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return Result(found.exit_code, found.stdout, found.stderr)


def environment(**more: str) -> dict[str, str]:
    """Environment of a process of ours."""
    return {**os.environ, **ENVIRONMENT, "PYTHONWARNINGS": "ignore", **more}


def start(arguments: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """A command in a process of its own, which Ctrl-C reaches: a job in the background ignores it, and its
    children would, too.
    """

    def hear_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-m", "qcompress", *arguments],
        env=environment(),
        preexec_fn=hear_interrupts,
        **{**pipes, **options},
    )


def python(source: str, *arguments: str, folder: Path | None = None, **variables: str) -> Result:
    """A piece of Python in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-c", source, *arguments],
        env=environment(**variables),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return Result(found.returncode, found.stdout, found.stderr)


def exact_options() -> onnxruntime.SessionOptions:
    """Options of a session whose 8-bit products are exact on this processor, too."""
    options = onnxruntime.SessionOptions()
    if saturates():
        options.add_session_config_entry(*EXACT)
    return options


def plain_session(file: Path, *, optimized: bool = False) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session that computes the graph node by node, or as ONNX Runtime likes."""
    options = exact_options()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
