"""Tables of `qcompress list`: names, each with a line of description. No torch."""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import qcompress

if TYPE_CHECKING:
    from qcompress.schema.targets import Target

WIDTH = 80
"""Largest width of a list, in columns."""

ABOUT_METHODS: dict[str, str] = {
    "float": "Fine-tunes the float model; nothing is rounded.",
    "ptq": "Post-training quantization: ranges from calibration data, no training.",
    "smoothquant": "Post-training, after SmoothQuant has moved outlying channels of activations into the "
    "weights (arXiv:2211.10438).",
    "awq": "Post-training, after AWQ has scaled up the weights that read large channels; for weight-only "
    "formats (arXiv:2306.00978).",
    "lsq": "Quantization-aware training with learned step sizes (arXiv:1902.08153).",
    "teacher-intervention": "Ternary weights; in a first phase signals of the float model replace the "
    "student's (arXiv:2302.11812).",
    "distillation": "Learned step sizes, trained to give the float model's answers, attention and hidden "
    "states (arXiv:2009.12812).",
    "quadapter": "Learned channel scales that are folded away; no weight is trained (arXiv:2211.16912).",
    "quant-noise": "Training that rounds a random part of the weights in each pass (arXiv:2004.07320).",
    "ipq": "Product quantization: weights as tables of vectors, one set of layers after another "
    "(arXiv:2004.07320).",
    "saq": "Learned step sizes; each update looks for a flat minimum near the rounded weights "
    "(arXiv:2111.12273).",
    "squat": "Learned step sizes; sharpness of the weights and the task's loss in turn (arXiv:2210.07171).",
}
"""Description of each method, in the order of `METHODS`."""


def _methods() -> list[tuple[str, str]]:
    return list(ABOUT_METHODS.items())


def _formats() -> list[tuple[str, str]]:
    """Presets of `format`, and the values of `format.weights` and `format.activations`."""
    from qcompress.schema.formats import ACTIVATION_WORDS, FORMAT_PRESETS, WEIGHT_WORDS

    presets = [(name, _about_preset(preset)) for name, preset in FORMAT_PRESETS.items()]
    words = [
        ("weights", "Words of `format.weights` and `format.embeddings`: " + ", ".join(WEIGHT_WORDS)),
        ("activations", "Words of `format.activations`: " + ", ".join(ACTIVATION_WORDS)),
    ]
    return presets + words


def _about_preset(preset: dict[str, Any]) -> str:
    weights, activations, tables = (preset[key] for key in ("weights", "activations", "embeddings"))
    if weights == "float":
        return "Nothing is rounded."
    inputs = "floating-point activations" if activations == "float" else f"{_bits(activations)} activations"
    sentence = f"{_weights(weights)}, {inputs}, {_weights(tables, 'embedding tables')}."
    return sentence[0].upper() + sentence[1:]


def _weights(form: Any, what: str = "weights") -> str:
    if isinstance(form, str):
        return f"{_bits(form)} {what}"
    if "codebook" in form:
        return f"{what} as indices into a table of vectors"
    kind = "ternary" if form.get("ternary") else f"{form['bits']}-bit"
    scale = f" with a scale for each {form['block']} inputs" if "block" in form else ""
    stored = f" (stored in {form['container']})" if "container" in form else ""
    return f"{kind} {what}{scale}{stored}"


def _bits(word: str) -> str:
    return f"{word.removeprefix('int')}-bit"


def _axes() -> list[tuple[str, str]]:
    from qcompress.schema.axes import AXES

    return [
        (f"{axis}: {options.model_fields['name'].default}", _first_paragraph(options))
        for axis, values in AXES.items()
        for options in values
    ]


def _models() -> list[tuple[str, str]]:
    from qcompress.models import FAMILIES

    return [(name, _first_paragraph(module)) for name, module in FAMILIES.items()]


def _tasks() -> list[tuple[str, str]]:
    from qcompress.schema.tasks import Task

    options = get_args(get_args(Task)[0])
    return [(item.model_fields["name"].default, _first_paragraph(item)) for item in options]


def _targets() -> list[tuple[str, str]]:
    """Description of each device, and whether this machine builds for it or the command that does so on the
    device.
    """
    from qcompress.schema.targets import TARGETS

    return [(name, f"{target.note} {_builder(target)}") for name, target in TARGETS.items()]


def _builder(target: Target) -> str:
    from importlib.util import find_spec

    from qcompress.schema.targets import lacks

    if target.backend is None:
        return "There is nothing to build."
    types = [*target.compute, *(f"int{bits}" for bits in target.weight_bits)]
    about = f"SM{target.sm}, {', '.join(types)}; {target.requirement}"
    if lacks(target):
        command = f"qcompress build model.onnx --target {target.name} --out engine"
        return f"{about}; on the device: {command}"
    missing = find_spec(target.backend) is None
    return f"{about}; " + (f"here, after pip install {target.backend}" if missing else "builds here")


def _recipes() -> list[tuple[str, str]]:
    here = Path(qcompress.__file__).parent
    folder = next((place for place in (here / "recipes", here.parent / "recipes") if place.is_dir()), None)
    if folder is None:
        return []
    files = sorted(folder.glob("*.yaml"))
    shown = Path(os.path.relpath(folder)) if folder.is_relative_to(Path.cwd()) else folder
    return [(str(shown / file.name), _first_comment(file)) for file in files]


def _first_comment(file: Path) -> str:
    """First line of the comment at the top of a recipe."""
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.startswith("#")]
    return lines[0].lstrip("# ") if lines else ""


def lines(rows: list[tuple[str, str]]) -> Iterator[str]:
    """Format rows as text of at most `WIDTH` columns: names in a column, or above their text if they are
    long. Text is wrapped, never cut, so that names can be copied.
    """
    longest = max((len(name) for name, _ in rows), default=0)
    if longest > WIDTH // 3:
        for name, about in rows:
            yield name
            yield from _wrapped(about, "    ", "    ")
        return
    indent = " " * (longest + 2)
    for name, about in rows:
        yield from _wrapped(about, name.ljust(len(indent)), indent)


def _wrapped(about: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        about, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip


def _first_paragraph(value: object) -> str:
    return " ".join(inspect.cleandoc(value.__doc__ or "").split("\n\n")[0].split())


LISTS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "methods": _methods,
    "axes": _axes,
    "formats": _formats,
    "models": _models,
    "tasks": _tasks,
    "targets": _targets,
    "recipes": _recipes,
}
