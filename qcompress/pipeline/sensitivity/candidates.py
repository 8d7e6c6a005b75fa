"""Candidate weight formats of a layer, their bytes, and recipes with them. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qcompress.encodings import encoding_of
from qcompress.errors import UsageError
from qcompress.models.architecture import Layer
from qcompress.models.plan import LayerPlan, sharers
from qcompress.recipe.load import Resolved
from qcompress.schema.adapters import NoAdapter
from qcompress.schema.formats import WEIGHT_WORDS, AnyWeightFormat, WeightFormat
from qcompress.schema.goals import Gate
from qcompress.schema.method_options import Calibrate, PlainStepper, TaskObjective
from qcompress.schema.quantizers import Quantizers
from qcompress.schema.recipe import LayerFormat, Train, Verify

Form = AnyWeightFormat | None
"""Format of a weight; None is float."""

PATTERN = re.compile(r"int(8|4|3|2)(?:-(?:g(32|64|128)|(channel)))?")


def parse_format(word: str) -> WeightFormat:
    """Parse the name of a weight format: a recipe's name, or one with a group size or `channel`. Raises
    UsageError.

    >>> [str(parse_format(word)) for word in ("int4", "int4-g32", "int4-channel")]
    ['int4-g128', 'int4-g32', 'int4']
    """
    form = WEIGHT_WORDS.get(word)
    if isinstance(form, WeightFormat):
        return form
    if match := PATTERN.fullmatch(word):
        bits, block, _ = match.groups()
        return WeightFormat(bits=int(bits), block=int(block) if block else None)
    known = [name for name, form in WEIGHT_WORDS.items() if isinstance(form, WeightFormat)]
    raise UsageError(
        f"unknown weight format {word!r}",
        fix=f"write {', '.join(known)}, intN-channel, or intN-gBLOCK with a block of 32, 64 or 128",
    )


def stored_bytes(layer: Layer, form: Form, compute: str) -> int:
    """Bytes of a weight in the ONNX file: its codes and scales, or its floats. Zero points are not counted:
    int8 matmuls have them, one byte for each channel, and layers of equal shape share them.

    >>> layer = Layer("q", "linear", in_features=256, out_features=10)
    >>> [stored_bytes(layer, parse_format(word), "fp16") for word in ("int8", "int4", "int4-g32")]
    [2580, 1320, 1440]
    >>> stored_bytes(layer, None, "fp16")
    5120
    """
    number = 4 if compute == "fp32" else 2
    if form is None:
        return layer.weights * number
    return encoding_of(form).stored_bytes(layer, form, number)


def groups_of(plan: Sequence[LayerPlan]) -> dict[str, list[str]]:
    """Quantized weights by the name of the owning layer, each with all layers that share it."""
    shared = sharers(tuple(plan))
    return {
        item.name: sorted({item.name, *shared.get(item.name, ())})
        for item in plan
        if item.weights is not None and item.layer.tied_to is None
    }


def with_formats(
    resolved: Resolved, weights: Form | None = None, layers: Mapping[str, Form] | None = None
) -> Resolved:
    """The recipe with method ptq, and with another format of all its weights or of single layers."""
    recipe = resolved.recipe
    form = recipe.format.model_copy(update={} if weights is None else {"weights": weights})
    if layers:
        exceptions = {name: LayerFormat(weights=chosen) for name, chosen in layers.items()}
        form = form.model_copy(update={"layers": {**form.layers, **exceptions}})
    changes: dict[str, Any] = {
        "name": f"{recipe.name}-sensitivity",
        "method": "ptq",
        "format": form,
        "quantizer": Quantizers(),
        "adapter": NoAdapter(),
        "objective": TaskObjective(),
        "stepper": PlainStepper(),
        "schedule": Calibrate(),
        "train": Train(batch_size=recipe.train.batch_size, device=recipe.train.device),
        "verify": Verify(batch_size=recipe.verify.batch_size),
        "gate": Gate(),
    }
    return replace(resolved, recipe=recipe.model_copy(update=changes))


def spelled(form: Form) -> Any:
    """Shortest recipe value of a weight format."""
    if form is None:
        return "float"
    for word, known in WEIGHT_WORDS.items():
        if known == form:
            return word
    return form.model_dump(exclude_defaults=True) | (
        {"bits": form.bits} if isinstance(form, WeightFormat) else {}
    )
