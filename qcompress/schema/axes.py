"""The five axes of a method: values, presets, phases, and illegal combinations. No torch.

The options of each value are in `method_options.py`; `methods/` has the class that implements it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompress.schema.adapters import AwqOptions, NoAdapter, QuadapterOptions, SmoothQuantOptions
from qcompress.schema.formats import Options
from qcompress.schema.method_options import (
    BlockwiseThenEndToEnd,
    Calibrate,
    Distillation,
    PlainSchedule,
    PlainStepper,
    Saq,
    Squat,
    Staged,
    TaskObjective,
    TeacherIntervention,
    TwoStep,
)
from qcompress.schema.quantizers import QUANTIZERS, Quantizers, named, quantizers


@dataclass(frozen=True)
class PhaseDefaults:
    """Default steps of a phase, and the roles that it trains."""

    steps: int
    roles: tuple[str, ...]


PHASES: dict[str, dict[str, PhaseDefaults]] = {
    "calibrate": {},
    "plain": {"finetune": PhaseDefaults(steps=300, roles=("weight", "scale", "centroid", "other"))},
    "blockwise-then-end-to-end": {
        "calibrate": PhaseDefaults(steps=200, roles=("adapter", "scale")),
        "finetune": PhaseDefaults(steps=300, roles=("adapter", "scale")),
    },
    "two-step": {
        "intervention": PhaseDefaults(steps=60, roles=("weight", "scale", "centroid", "other")),
        "finetune": PhaseDefaults(steps=240, roles=("weight", "scale", "centroid", "other")),
    },
    "staged": {
        "finetune": PhaseDefaults(steps=300, roles=("weight", "scale", "other")),
        **{
            name: PhaseDefaults(steps=100, roles=("weight", "scale", "centroid", "other"))
            for name in ("ffn", "embeddings", "attention", "rest")
        },
    },
}
"""Phases of each schedule, in order: default steps and the roles that train."""

METHODS: dict[str, dict[str, Any]] = {
    "float": {"schedule": "plain"},
    "ptq": {"quantizer": "minmax", "schedule": "calibrate"},
    "smoothquant": {"quantizer": "minmax", "adapter": "smoothquant", "schedule": "calibrate"},
    "awq": {"quantizer": "minmax", "adapter": "awq", "schedule": "calibrate"},
    "lsq": {"quantizer": "lsq", "stepper": {"name": "plain", "clip_norm": None}, "schedule": "plain"},
    "teacher-intervention": {
        "quantizer": "ternary",
        "objective": "teacher-intervention",
        "schedule": "two-step",
    },
    "distillation": {"quantizer": "lsq", "objective": "distillation", "schedule": "plain"},
    "quadapter": {
        "quantizer": "lsq",
        "adapter": "quadapter",
        "schedule": "blockwise-then-end-to-end",
    },
    "quant-noise": {"quantizer": {"name": "minmax", "noise": {"p": 0.5}}, "schedule": "plain"},
    "ipq": {
        "quantizer": {"name": "minmax", "noise": {"p": 0.1, "form": "zero"}},
        "schedule": "staged",
    },
    "saq": {"quantizer": "lsq", "stepper": "saq", "schedule": "plain"},
    "squat": {"quantizer": "lsq", "stepper": "squat", "schedule": "plain"},
}
"""Axes of each method: a paper is a row of this table. Axes written in the recipe override it."""

AXES: dict[str, tuple[type[Options], ...]] = {
    "quantizer": QUANTIZERS,
    "adapter": (NoAdapter, QuadapterOptions, SmoothQuantOptions, AwqOptions),
    "objective": (TaskObjective, Distillation, TeacherIntervention),
    "stepper": (PlainStepper, Saq, Squat),
    "schedule": (Calibrate, PlainSchedule, BlockwiseThenEndToEnd, TwoStep, Staged),
}
"""Values of each axis. The implementing classes are in `methods/`; a test compares the two tables."""

_NOTHING = "calibration trains nothing, so it would never be used: use `schedule: plain`, or drop it"

ILLEGAL: tuple[tuple[dict[str, str], str], ...] = (
    (
        {"adapter": "none", "schedule": "blockwise-then-end-to-end"},
        "this schedule trains an adapter block by block, and the recipe has none: set `adapter: quadapter`",
    ),
    *(
        (
            {"adapter": "quadapter", "schedule": schedule},
            "this schedule trains the weights, which would move together with the adapter's scales: "
            "use `schedule: blockwise-then-end-to-end` or `schedule: calibrate`",
        )
        for schedule in ("plain", "two-step", "staged")
    ),
    *(
        (
            {"adapter": adapter, "schedule": "blockwise-then-end-to-end"},
            "this schedule trains the adapter's scales, and these are fixed: use `adapter: quadapter`, whose "
            "start is SmoothQuant's scale, or `schedule: calibrate` or `schedule: plain`",
        )
        for adapter in ("smoothquant", "awq")
    ),
    *(
        (
            {"adapter": adapter, "schedule": "staged"},
            "this schedule makes tables of vectors of the weights, which no scale divides: "
            "use `schedule: calibrate` or `schedule: plain`",
        )
        for adapter in ("smoothquant", "awq")
    ),
    *(
        (
            {"adapter": adapter, "objective": "teacher-intervention"},
            "the teacher's signals stand in for the student's, whose channels are rescaled: use "
            "`objective: distillation`, or drop the adapter",
        )
        for adapter in ("smoothquant", "awq")
    ),
    *(
        (
            {"objective": "teacher-intervention", "schedule": schedule},
            "this schedule has no phase in which the teacher intervenes: "
            "use `schedule: two-step`, or `objective: distillation`",
        )
        for schedule in ("plain", "blockwise-then-end-to-end", "staged")
    ),
    *(
        (
            {"objective": objective, "schedule": "two-step"},
            "the first of the two steps is the teacher's intervention, and this objective has none: "
            "use `schedule: plain`, or `objective: teacher-intervention`",
        )
        for objective in ("task", "distillation")
    ),
    *(
        ({"objective": objective, "schedule": "calibrate"}, _NOTHING)
        for objective in ("distillation", "teacher-intervention")
    ),
    *(({"stepper": stepper, "schedule": "calibrate"}, _NOTHING) for stepper in ("saq", "squat")),
    (
        {"stepper": "squat", "schedule": "blockwise-then-end-to-end"},
        "this schedule trains no weight, and SQuAT's sharpness objective moves nothing else: "
        "use `stepper: plain` or `stepper: saq`",
    ),
)
"""Illegal combinations of axis values, each with the reason, a colon, and the fix."""


def beside_preset(axis: str, preset: object, written: object) -> object:
    """Merge the axis value in a recipe over the value in its method's preset.

    Options without a name go to the preset's value, so that `method: quadapter` with `adapter: {bound: 50}`
    is a quadapter. The name of the preset's value alone keeps the preset's options. A quantizer for one role
    leaves the preset's other roles unchanged.

    >>> beside_preset("adapter", "quadapter", {"bound": 50.0})
    {'name': 'quadapter', 'bound': 50.0}
    >>> beside_preset("quantizer", "lsq", {"weights": "minmax"})
    {'weights': 'minmax', 'activations': 'lsq'}
    """
    if axis == "quantizer" and isinstance(written, (str, dict)):
        return _beside_quantizers(quantizers(preset), written, preset)
    below, over = named(preset), named(written)
    if not isinstance(over, dict) or over.get("name", below.get("name")) != below.get("name"):
        return written
    return {**below, **over}


def _beside_quantizers(below: dict[str, object], written: str | dict[str, object], preset: object) -> object:
    """Merge quantizers over a preset's. Without `noise` the preset's noise is kept; a share alone changes the
    preset's share.

    >>> preset = {"name": "minmax", "noise": {"p": 0.1, "form": "zero"}}
    >>> beside_preset("quantizer", preset, {"noise": 0.2})["noise"]
    {'p': 0.2, 'form': 'zero'}
    """
    by_role = (
        isinstance(written, dict)
        and written.keys() & Quantizers.model_fields.keys()
        and "name" not in written
    )
    if isinstance(written, dict) and not by_role and "name" not in written:
        written = {**named(preset), **written}
    over = quantizers(written)
    noise = over.get("noise", below.get("noise"))
    if isinstance(noise, int | float) and not isinstance(noise, bool):
        noise = {"p": float(noise)}
    if isinstance(noise, dict) and isinstance(below.get("noise"), dict):
        noise = {**below["noise"], **noise}
    merged = {**below, **over} if by_role else dict(over)
    return {**merged, "noise": noise} if noise is not None or "noise" in over else merged
