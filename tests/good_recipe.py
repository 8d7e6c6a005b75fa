"""A recipe without a mistake, and what tests do to it."""

from __future__ import annotations

import re
from pathlib import Path

from qcompress.errors import RecipeError
from qcompress.recipe.load import load_recipe

TRAINED = """\
method: quadapter
train:
  batch_size: 4
  lr: {adapter: 1.0e-3, scale: 2e-4}
  phases:
    calibrate: {steps: 2}
    finetune: {steps: 3, lr: {scale: 1e-5}}
"""
"""Method and training of the good recipe."""

GOOD = (
    """\
name: good
seed: 0
model: {family: gpt2, source: model}
task: {name: causal-lm, context: 64, stride: 32}
data:
  train: {text: [train.txt], limit: 8}
  calibration: {text: [train.txt]}
  evaluate:
    test: {text: [test.txt]}
    other: {text: [other.txt]}
format:
  weights: int8
  activations: int8
  embeddings: int8
  compute: fp16
  layers:
    "transformer.h.0.*": float
    transformer.h.1.mlp.c_fc: {weights: {bits: 4, container: int8}}
"""
    + TRAINED
    + """\
export: {opset: 21, dynamic: [batch, sequence]}
build: {target: rtx-ada, profiles: [{batch: [1, 1, 2], sequence: [1, 8, 64]}]}
verify: {require: [float, trained, folded, onnx], samples: 16}
gate:
  float_floor: {test.perplexity: 40}
  recovery: {test.perplexity: {percent-max-degradation: 2}}
  parity: {onnx: {mean_abs: 1.0e-4}}
"""
)

FOREIGN = re.compile(
    r"pydantic|input should|validation|https?:|value error|Options|Format\b|Recipe\b|TextData|Quantizers"
    r"|<class|another value|None|NoneType|\bdict\b|function-"
)
"""What a user has not written and need not know."""


def prepare(folder: Path) -> Path:
    """Put down the files that the good recipe names; the model is an empty folder."""
    (folder / "model").mkdir()
    for name in ("train.txt", "test.txt", "other.txt"):
        (folder / name).write_text("text\n")
    return folder


def write(folder: Path, text: str = GOOD, name: str = "recipe.yaml") -> Path:
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(text)
    return folder / name


def mistakes(file: Path, *overrides: str) -> list[str]:
    """Every mistake as `file:line: key: message (fix: ...)`, the file without its folder."""
    try:
        load_recipe(file, overrides)
    except RecipeError as error:
        assert error.mistakes and error.exit_code == 2
        for mistake in error.mistakes:
            assert not FOREIGN.search(f"{mistake.message} {mistake.fix}"), mistake
        return [str(mistake).replace(f"{file.parent}/", "") for mistake in error.mistakes]
    return []


def edited(old: str, new: str, text: str = GOOD) -> str:
    assert text.count(old) == 1, (old, text.count(old))
    return text.replace(old, new)
