"""Rules between a recipe's values that need no model. No torch.

Each rule reads some keys and is skipped if one of them is tainted: its finding would follow from another
mistake. A rule taints the keys of its own mistakes, so rules are ordered from cause to effect. Names that the
user chose are checked even if their value is wrong, because a stand-in keeps the name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from qcompress.recipe.messages import choose, describe_value, nearest
from qcompress.recipe.rules.data import (
    FORMATS,
    also,
    judge_directory,
    judge_files,
    judge_graph,
    judge_origins,
)
from qcompress.recipe.rules.own_task import judge_own_task
from qcompress.recipe.rules.slices import judge_slices
from qcompress.recipe.rules.training import TASK_LOSS_PHASES, judge_training
from qcompress.recipe.yaml_file import Document, Key
from qcompress.schema.axes import AXES, ILLEGAL, PHASES
from qcompress.schema.goals import METRICS, RESOURCES, ParityGoal
from qcompress.schema.recipe import HUB_ID, Format, Profile, Recipe
from qcompress.schema.tasks import AGREEMENT

SLUG = re.compile(r"[a-z0-9][a-z0-9-]*(\.[a-z0-9-]+)*")
"""Pattern of names that become part of a path or of a metric's name."""


def judge(recipe: Recipe, document: Document, base: Path) -> None:
    """Report all mistakes of a recipe that need no model; `base` is the directory of its relative paths."""
    if () in document.tainted:
        return  # a file of the recipe could not be read, and may contain the missing keys
    if recipe.export.graph is not None:
        judge_graph(recipe, document, base)
    else:
        _axes(recipe, document)
        _float(recipe, document)
        judge_training(recipe, document)
        _training_data(recipe, document)
        _calibration_data(recipe, document)
    _evaluation_sets(recipe, document)
    judge_origins(recipe, document)
    judge_own_task(recipe, document, base)
    _metrics(recipe, document)
    judge_slices(recipe, document)
    _target(recipe, document)
    _build(recipe, document, base)
    _rows(recipe, document)
    _export(recipe, document)
    _profile_axes(recipe, document)
    if recipe.task.context is not None and document.sound(("task", "context")):
        judge_profiles(recipe, document, recipe.task.context, f"`task.context` is {recipe.task.context}")
    _model(recipe, document, base)
    judge_files(recipe, document, base)


def is_hub_id(source: str) -> bool:
    """True if a text has the form `organisation/name` of a hub."""
    return HUB_ID.fullmatch(source) is not None


def quantizes(number_format: Format) -> bool:
    """True if a format quantizes any weight. The input of a float layer stays float."""
    exceptions = [exception.weights for exception in number_format.layers.values()]
    return any(
        weights not in (None, "inherit")
        for weights in [number_format.weights, number_format.embeddings, *exceptions]
    )


def quantizes_activations(number_format: Format) -> bool:
    """True if a format quantizes the input of any layer, or any point."""
    exceptions = [exception.activations for exception in number_format.layers.values()]
    formats = [
        number_format.activations,
        number_format.attention,
        number_format.cache,
        number_format.residual,
    ]
    return any(value not in (None, "inherit") for value in [*formats, *exceptions])


# Method -------------------------------------------------------------------------------------------


def _axes(recipe: Recipe, document: Document) -> None:
    for combination, reason in ILLEGAL:
        keys: list[Key] = [(axis,) for axis in combination]
        names = {axis: getattr(recipe, axis).name for axis in combination}
        if names == combination and document.sound(*keys):
            written = [key for key in keys if key in document.places]
            message = " with ".join(f"`{axis}: {name}`" for axis, name in combination.items())
            why, _, fix = reason.partition(": ")
            document.report(written[0] if written else ("method",), f"{message}: {why}", fix)
            document.tainted.update(keys)


def _float(recipe: Recipe, document: Document) -> None:
    if not document.sound(("method",), *FORMATS):
        return
    if recipe.method == "float" and (quantizes(recipe.format) or quantizes_activations(recipe.format)):
        message = "`method: float` trains the float model, and the format quantizes it"
        document.report(("method",), message, "write `format: float`, or a method such as lsq")
        document.tainted |= {(axis,) for axis in AXES if (axis,) not in document.places}
    if recipe.method != "float" and not quantizes(recipe.format):
        message = f"`method: {recipe.method}` quantizes, and the format leaves every weight float"
        document.report(("format",), message, "write a format such as `format: w8a8`, or `method: float`")


# Data ---------------------------------------------------------------------------------------------


def _evaluation_sets(recipe: Recipe, document: Document) -> None:
    for name in recipe.data.evaluate:
        key: Key = ("data", "evaluate", name)
        if not (SLUG.fullmatch(name) and len(name) <= 100) and document.present(key[:-1]):
            slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "test"
            message = f"the name of an evaluation set must be a slug, {describe_value(name)}"
            document.report(key, message, f"rename it, such as {slug[:100]}")


def _metrics(recipe: Recipe, document: Document) -> None:
    """Report goals on unknown metrics; a set that does not exist is one mistake, whatever the number of
    goals.
    """
    if not document.present(("data", "evaluate")):
        return
    known = [f"{name}.{metric}" for name in recipe.data.evaluate for metric in _measured(recipe, document)]
    wrong: dict[str, list[Key]] = {}
    for goals in ("float_floor", "recovery", "regression"):
        for name in getattr(recipe.gate, goals):
            key: Key = ("gate", goals, name)
            metric = name.partition("@")[0] if goals == "regression" else name
            if goals == "regression" and name in RESOURCES:
                continue
            if metric not in known and document.present(key[:-1]):
                section = metric.rpartition(".")[0]
                wrong.setdefault(name if section in recipe.data.evaluate else section, []).append(key)
    for keys in wrong.values():
        message = f"is not a metric of an evaluation set (`<set>.<metric>`){also(keys)}"
        document.report(keys[0], message, choose(keys[0][-1], known, these=", ".join(known[:6])))


def _measured(recipe: Recipe, document: Document) -> list[str]:
    """Metrics of the task; all metrics if the task itself is wrong."""
    if not document.sound(("task",)):
        return list(METRICS)
    return [*recipe.task.metrics, *([] if recipe.task.running else [AGREEMENT])]


def _steps(recipe: Recipe, phase: str) -> int:
    """Steps of a phase in the recipe's schedule; 0 for a phase that the schedule does not have."""
    options, defaults = recipe.train.phases.get(phase), PHASES[recipe.schedule.name].get(phase)
    return 0 if defaults is None else options.steps if options else defaults.steps


def _training_data(recipe: Recipe, document: Document) -> None:
    if recipe.data.train is not None or not document.sound(
        ("schedule",), ("train", "phases"), ("data", "train")
    ):
        return
    for phase in TASK_LOSS_PHASES:
        if steps := _steps(recipe, phase):
            message = f"is missing: the phase {phase} trains {steps} steps with the task's loss"
            fix = f"write `data.train`, or set `train.phases.{phase}.steps` to 0"
            document.report(("data", "train"), message, fix)
            return


def _calibration_data(recipe: Recipe, document: Document) -> None:
    """Report missing calibration data. Training data replaces it; without both, nothing can be observed."""
    keys: list[Key] = [("data", "calibration"), ("data", "train"), ("method",), ("adapter",), *FORMATS]
    if recipe.data.calibration is not None or recipe.data.train is not None or not document.sound(*keys):
        return
    if quantizes_activations(recipe.format):
        reason = "the ranges of the activations are observed on it"
    elif recipe.adapter.name != "none":
        reason = f"the adapter `{recipe.adapter.name}` is fitted to it"
    else:
        return
    document.report(
        ("data", "calibration"), f"is missing: {reason}", "write `data.calibration`, or `data.train`"
    )


# Stages -------------------------------------------------------------------------------------------


def _target(recipe: Recipe, document: Document) -> None:
    from qcompress.schema.targets import TARGETS

    key: Key = ("build", "target")
    if recipe.build.target not in TARGETS and document.sound(key):
        message = f"is not a target, {describe_value(recipe.build.target)}"
        fix = choose(recipe.build.target, list(TARGETS), these="`qcompress list targets`")
        document.report(key, message, fix)


def _build(recipe: Recipe, document: Document, base: Path) -> None:
    from qcompress.schema.targets import TARGETS, option_refusals

    if recipe.build.target not in TARGETS or not document.sound(("build", "target")):
        return
    for refusal in option_refusals(recipe.build.target, recipe.build):
        key: Key = ("build", refusal.key.partition(".")[2])
        if document.sound(key):
            document.report(key, refusal.message, refusal.fix)
            document.tainted.add(key)
    key = ("build", "timing_cache")
    if recipe.build.timing_cache is not None and document.sound(key):
        file = base / recipe.build.timing_cache
        if file.is_dir() or not file.parent.is_dir():
            message = f"{recipe.build.timing_cache[:200]!r} cannot be written"
            document.report(key, message, "name a file in an existing folder")


def _rows(recipe: Recipe, document: Document) -> None:
    """Report rows that are required or have limits and that no run of this recipe can measure."""
    lacking = _unmeasurable(recipe, document)
    required = [row for row in recipe.verify.require if row in lacking]
    key: Key = ("verify", "require")
    if required and document.sound(key):
        why, fix = lacking[required[0]]
        index = recipe.verify.require.index(required[0])
        document.report((*key, index), f"requires the row `{required[0]}`, and {why}", fix)
    for row, limits in recipe.gate.parity.items():
        key = ("gate", "parity", row)
        if row in lacking and limits != ParityGoal() and document.sound(key):
            why, fix = lacking[row]
            document.report(key, f"has limits on the row `{row}`, and {why}", fix)


def _unmeasurable(recipe: Recipe, document: Document) -> dict[str, tuple[str, str]]:
    """Rows that this recipe never measures, each with reason and fix."""
    lacking: dict[str, tuple[str, str]] = {}
    if recipe.build.target == "cpu" and document.sound(("build", "target")):
        fix = "drop `engine`, or set `build.target` to a GPU"
        lacking["engine"] = ("the target `cpu` builds no engine", fix)
    if recipe.export.graph is not None and document.sound(("export", "graph")):
        lacking |= dict.fromkeys(("trained", "folded"), ("an external graph has none", "drop it"))
    elif recipe.format.compute == "bf16" and document.sound(("format", "compute")) and _has_bf16(recipe):
        reason = "ONNX Runtime's CPU provider has no bf16 kernels"
        lacking |= dict.fromkeys(("onnx", "deployed"), (reason, "drop it, or set `compute: fp16`"))
    return lacking


def _has_bf16(recipe: Recipe) -> bool:
    """True if the target computes in bf16; if not, that is reported elsewhere."""
    from qcompress.schema.targets import TARGETS

    return recipe.build.target in TARGETS and "bf16" in TARGETS[recipe.build.target].compute


def _export(recipe: Recipe, document: Document) -> None:
    export = recipe.export
    key: Key = ("export", "keep_fp32")
    idle = export.keep_fp32 and recipe.format.compute == "fp32" and export.graph is None
    if idle and document.sound(key, ("format", "compute")):
        message = "has no effect: `format.compute` is fp32, and everything computes in it"
        document.report(key, message, "drop it, or set `format.compute` to fp16 or bf16")
    if not document.sound(("export", "cache"), ("export", "dynamic")):
        return
    if not export.cache and "past" in export.dynamic:
        key = ("export", "dynamic", export.dynamic.index("past"))
        document.report(key, "without a key-value cache the graph has no axis `past`", "drop `past`")
    lacking = [axis for axis in ("sequence", "past") if axis not in export.dynamic]
    if export.cache and lacking:
        message = f"a prompt and its continuation have other lengths, and {' and '.join(lacking)} is fixed"
        document.report(("export", "dynamic"), message, "drop the line, or add the axis")


def _profile_axes(recipe: Recipe, document: Document) -> None:
    """Report axes in `build.profiles` that an exported graph does not have, or has with a fixed size."""
    export = recipe.export
    if export.graph is not None or not document.sound(("export", "dynamic"), ("export", "cache"), ("task",)):
        return
    tokens = recipe.task.context is not None
    exists = {"batch": True, "sequence": tokens, "past": export.cache}
    known = [axis for axis in export.dynamic if exists[axis]]
    for index, profile in enumerate(recipe.build.profiles):
        # a resolved recipe spells out the defaults
        written = [axis for axis in exists if getattr(profile, axis) != Profile.model_fields[axis].default]
        places: dict[str, Key] = {axis: ("build", "profiles", index, axis) for axis in written}
        places |= {axis: ("build", "profiles", index, "axes", axis) for axis in profile.axes}
        for axis, key in places.items():
            if axis not in known and document.sound(key):
                close = nearest(axis, known)
                message = f"gives a range to the axis {axis!r}, and the graph has no such dynamic axis"
                axes = f"the axes are {', '.join(known)}" if known else "every axis has a fixed size"
                document.report(key, message, f"did you mean `{close}`?" if close else f"drop it; {axes}")


def judge_profiles(recipe: Recipe, document: Document, limit: int, reason: str) -> None:
    """Report profiles of more tokens than `limit`, including the default one. The target cpu uses none."""
    if recipe.build.target == "cpu" or not document.sound(("build", "target")):
        return
    cached = recipe.export.cache and "past" in recipe.export.dynamic
    axes = {"sequence": limit} | ({"past": limit - 1} if cached else {})
    for index, profile in enumerate(recipe.build.profiles):
        for axis, most in axes.items():
            key: Key = ("build", "profiles", index, axis)
            low, opt, longest = profile.ranges[axis]
            if longest > most and document.sound(key):
                fix = f"write `{axis}: [{min(low, most)}, {min(opt, most)}, {most}]`"
                document.report(key, f"goes to {longest} tokens, and {reason}", fix)


# Files --------------------------------------------------------------------------------------------


def _model(recipe: Recipe, document: Document, base: Path) -> None:
    model = recipe.model
    if model.run is not None and document.sound(("model", "run")):
        judge_directory(("model", "run"), model.run, "the directory of an earlier run", document, base)
    if model.source is None or not document.sound(("model", "source")):
        return
    is_directory = os.path.isdir(base / model.source)
    if is_directory and model.revision is not None and document.sound(("model", "revision")):
        message = "belongs to a hub id, and `source` is a directory"
        document.report(("model", "revision"), message, "drop it")
    if not is_directory and not is_hub_id(model.source):
        judge_directory(("model", "source"), model.source, "a directory or a hub id", document, base)
