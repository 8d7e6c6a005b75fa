"""Checks of a recipe against its model and its target, from file headers alone. No torch.

Reads `config.json` and the safetensors header, and reports in milliseconds mistakes that would otherwise
appear after hours of training: patterns without layers, blocks that do not divide, formats that the target
refuses.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from qcompress.errors import Mistake, ModelError, RecipeError
from qcompress.models import FAMILIES, describe
from qcompress.models.architecture import Architecture, Head, Layer
from qcompress.models.config_checks import HeadError
from qcompress.models.layer_selection import BlocksError
from qcompress.models.plan import LayerPlan, PointPlan, matches, plan_layers, plan_points
from qcompress.recipe.data_check import judge_data
from qcompress.recipe.load import Resolved, base_of, examine, resolved
from qcompress.recipe.rules.adapters import judge_adapter
from qcompress.recipe.rules.codebooks import judge_codebooks
from qcompress.recipe.rules.points import judge_attentions, judge_cache, judge_kept, judge_points
from qcompress.recipe.rules.slices import judge_values
from qcompress.recipe.rules.values import judge_profiles
from qcompress.recipe.yaml_file import Document, Key
from qcompress.schema.axes import PHASES
from qcompress.schema.formats import INT2_OPSET, WeightFormat
from qcompress.schema.recipe import Recipe
from qcompress.tasks import TASKS

What = Literal["weights", "activations"]

SHOWN = 3
"""Number of layers named in one message."""

BLOCKS = get_args(get_args(WeightFormat.model_fields["block"].annotation)[0])
"""Allowed block sizes."""


@dataclass(frozen=True)
class Report:
    """Result of a check: the model's architecture, the plan of its layers and points, pattern matches."""

    architecture: Architecture
    plan: tuple[LayerPlan, ...]
    matches: dict[str, int]
    """Number of layers that each pattern of `format.layers` matches; of points if it matches no layer."""
    points: tuple[PointPlan, ...] = ()
    bounded: tuple[str, ...] = ()
    """Data of which only the first rows were read."""


def head_of(recipe: Recipe) -> Head:
    """Head that the recipe's task needs."""
    return TASKS[recipe.task.name].head(recipe.task)


def check_model(recipe: Resolved, directory: Path, *, whole: bool = True) -> Report:
    """Check a recipe against a checkpoint and its data. Raises RecipeError with every mistake, or ModelError.

    `whole`: read all rows of the data, not only the first ones of each file.
    """
    document = recipe.document()
    report = _describe_and_judge(recipe.recipe, document, directory, strict=True)
    if report is not None and not document.mistakes:
        judge_data(recipe.recipe, document, recipe.base, directory, whole=whole)
    judge_values(recipe.recipe, document, recipe.base, hub=whole)
    if document.mistakes or report is None:
        raise RecipeError(document.mistakes)
    return report


def all_mistakes(
    file: Path, overrides: Sequence[str] = (), directory: Path | None = None
) -> tuple[Resolved | None, Report | None, list[Mistake]]:
    """All mistakes of a recipe, by itself, with its model and for its target, in the order of the file.

    `directory` is the checkpoint's if `model.source` is a hub id or `model.run` is given; without it such a
    model is not checked. Recipe and report are returned if they have no mistakes.
    """
    document, recipe = examine(file, overrides)
    if recipe is None:
        return None, None, RecipeError(document.mistakes).mistakes
    whole = None if document.mistakes else resolved(document, recipe, file)
    report, bounded = None, ()
    if document.sound(("model", "family"), ("model", "source"), ("model", "run")):
        source = base_of(file) / recipe.model.source if recipe.model.source else None
        directory = directory or (source if source and os.path.isdir(source) else None)
        report = _describe_and_judge(recipe, document, directory) if directory else None
    if directory is not None and report is not None:
        bounded = judge_data(recipe, document, base_of(file), directory, whole=False)
    if () not in document.tainted:
        judge_values(recipe, document, base_of(file), hub=False)
    if document.mistakes:
        return whole, None, RecipeError(document.mistakes).mistakes
    return whole, report and replace(report, bounded=bounded), []


def _describe_and_judge(
    recipe: Recipe, document: Document, directory: Path, strict: bool = False
) -> Report | None:
    """Describe the model and check the recipe against it; None if the model cannot be read. `strict`: errors
    of the model are raised, not reported.
    """
    carried, task = FAMILIES[recipe.model.family].TASKS, recipe.task.name
    if task not in carried:
        key: Key = ("task", "name")
        if document.sound(key, ("model", "family")):
            message = f"a {recipe.model.family} model cannot carry the task {task}"
            document.report(key, message, f"write one of: {', '.join(carried)}")
        return None
    try:
        architecture = describe(recipe.model.family, directory, head_of(recipe), recipe.model.blocks)
    except (ModelError, OSError) as error:
        key = ("model", recipe.model.origin)
        key = ("model", "blocks") if isinstance(error, BlocksError) else key
        key = error.key if isinstance(error, HeadError) else key
        if strict and not isinstance(error, (BlocksError, HeadError)):
            raise
        fix = error.fix if isinstance(error, ModelError) else "check the permissions of the model's files"
        document.report(key, error.message if isinstance(error, ModelError) else str(error), fix)
        return None
    return _judge(recipe, document, architecture)


def _judge(recipe: Recipe, document: Document, architecture: Architecture) -> Report:
    counts = _patterns(recipe, document, architecture)
    plan, points = plan_layers(recipe, architecture), plan_points(recipe, architecture)
    settled = tuple(layer for layer in plan if _is_settled(recipe, document, layer.layer))
    _blocks(recipe, document, settled)
    _opset(recipe, document, settled)
    _tied(recipe, document, settled)
    _ternary(recipe, document, settled)
    judge_codebooks(recipe, document, settled, lambda item: _origin(recipe, document, item.layer, "weights"))
    _target(recipe, document, settled)
    _context(recipe, document, architecture)
    judge_attentions(recipe, document, architecture)
    judge_adapter(recipe, document, architecture, settled)
    _new_head(recipe, document, architecture)
    _layer_drop(recipe, document)
    judge_points(recipe, document, points)
    judge_cache(recipe, document)
    judge_kept(recipe, document, architecture)
    return Report(architecture, plan, counts, points)


def _is_settled(recipe: Recipe, document: Document, layer: Layer) -> bool:
    """True if the keys that determine a layer's formats have no mistakes."""
    section = layer.section
    patterns = [pattern for pattern in recipe.format.layers if matches(pattern, layer.name)]
    keys: list[Key] = [("format", key) for key in ("preset", "activations", section)]
    return document.sound(*keys, *(("format", "layers", pattern) for pattern in patterns))


def _patterns(recipe: Recipe, document: Document, architecture: Architecture) -> dict[str, int]:
    """Number of layers that each pattern matches; of points if it matches no layer."""
    names = [layer.name for layer in architecture.layers]
    points = [point.name for point in architecture.points]
    counts = {
        pattern: sum(matches(pattern, name) for name in names)
        or sum(matches(pattern, name) for name in points)
        for pattern in recipe.format.layers
    }
    for pattern, count in counts.items():
        key: Key = ("format", "layers", pattern)
        if not count and document.present(key):
            near = [*names, *points] if pattern.endswith("point") else names
            document.report(key, f"matches none of the {len(names)} layers", _nearest_pattern(pattern, near))
    return counts


def _nearest_pattern(pattern: str, names: list[str]) -> str:
    for meant in (f"*.{pattern}", pattern.removeprefix("*."), f"{pattern}.*", f"*.{pattern}.*"):
        if count := sum(matches(meant, name) for name in names):
            return (
                f"patterns match full layer names: did you mean {meant!r} ({count} layer{'s' * (count > 1)})?"
            )
    close = difflib.get_close_matches(pattern, names, n=SHOWN, cutoff=0.5) or names[-SHOWN:]
    return f"write a pattern of full layer names; similar are {', '.join(close)}"


def _origin(recipe: Recipe, document: Document, layer: Layer, what: What) -> Key:
    """Key that determines the format of a layer's weights or activations."""
    for pattern, exception in reversed(recipe.format.layers.items()):
        if getattr(exception, what) != "inherit" and matches(pattern, layer.name):
            return ("format", "layers", pattern)
    section = layer.section if what == "weights" else what
    defaults: tuple[Key, ...] = (("format", section), ("format", "preset"))
    return next((key for key in defaults if key in document.places), ("format",))


def _narrowed(origin: Key, what: What, option: str, document: Document) -> Key:
    """Key of one option of a format, as deep as the recipe writes it."""
    keys: list[Key] = [(*origin, option), (*origin, what, option), (*origin, what)]
    return next((key for key in keys if key in document.places), origin)


def _blocks(recipe: Recipe, document: Document, plan: tuple[LayerPlan, ...]) -> None:
    """Report blocks that do not divide the inputs of their layers, for any target."""
    wrong: dict[Key, list[LayerPlan]] = {}
    for layer in plan:
        if layer.block and layer.layer.kind != "conv" and layer.layer.in_features % layer.block:
            wrong.setdefault(_origin(recipe, document, layer.layer, "weights"), []).append(layer)
    for origin, layers in wrong.items():
        first = layers[0]
        key = _narrowed(origin, "weights", "block", document)
        best = [block for block in BLOCKS if not any(item.layer.in_features % block for item in layers)]
        if not best:
            fix = "give these layers a format without blocks, such as int8"
        elif key[-1] == "block":
            fix = f"write `block: {max(best)}`"
        else:
            fix = f"write {{bits: {first.weights.bits if first.weights else 8}, block: {max(best)}}}"
        more = f", and {len(layers) - 1} more" if len(layers) > 1 else ""
        inputs = f"the {first.layer.in_features} inputs of {first.name}{more}"
        document.report(key, f"blocks of {first.block} do not divide {inputs}", fix)


def _opset(recipe: Recipe, document: Document, plan: tuple[LayerPlan, ...]) -> None:
    """Report an opset without the type in which weights are stored."""
    integers = [layer for layer in plan if layer.integers]
    stored = [layer for layer in integers if layer.weights.stored_bits == 2]
    key: Key = ("export", "opset")
    if stored and recipe.export.opset < INT2_OPSET and document.sound(key):
        needs = f"{stored[0].name} is stored in int2, which requires opset {INT2_OPSET}"
        message = f"is {recipe.export.opset}, and {needs}"
        document.report(key, message, f"write `opset: {INT2_OPSET}`, or `container: int4`")


def _tied(recipe: Recipe, document: Document, plan: tuple[LayerPlan, ...]) -> None:
    """Tied layers must share a format. Reports the first conflict per recipe key."""
    by_name = {layer.name: layer for layer in plan}
    reported: set[Key] = set()
    for layer in plan:
        owner = by_name.get(layer.layer.tied_to or "")
        if owner is None or owner.weights == layer.weights:
            continue
        origins = [_origin(recipe, document, item.layer, "weights") for item in (layer, owner)]
        key = next((key for key in origins if key[:2] == ("format", "layers")), origins[0])
        formats = [f"{item.name} {item.weights or 'float'}" for item in (layer, owner)]
        message = f"gives one tensor two formats: {' and '.join(formats)} are tied, and stored once"
        if key not in reported:
            document.report(key, message, f"name both layers, or neither: {layer.name}, {owner.name}")
        reported.add(key)


def _layer_drop(recipe: Recipe, document: Document) -> None:
    """Report layer drop in families whose blocks change the shape of their inputs."""
    family, key = recipe.model.family, ("train", "layer_drop")
    if recipe.train.layer_drop and FAMILIES[family].DEPTH is None and document.sound(key):
        message = f"leaves out blocks, and those of a {family} change the shape of what they are given"
        document.report(key, message, "drop it")


def _ternary(recipe: Recipe, document: Document, plan: tuple[LayerPlan, ...]) -> None:
    """Report formats with more bits than the codes of the quantizer `ternary`."""
    if not document.sound(("quantizer",), ("method",)):
        return
    wrong: dict[Key, list[LayerPlan]] = {}
    for layer in plan:
        if layer.weight_quantizer.name == "ternary" and layer.weights and not layer.weights.ternary:
            wrong.setdefault(_origin(recipe, document, layer.layer, "weights"), []).append(layer)
    for origin, layers in wrong.items():
        role = layers[0].layer.section
        message = (
            f"is {layers[0].weights} for {layers[0].name}, and the quantizer `ternary` has the codes -1, 0, 1"
        )
        fix = f"write `ternary`, or another quantizer such as `quantizer: {{{role}: lsq}}`"
        document.report(_narrowed(origin, "weights", "bits", document), message, fix)


def _target(recipe: Recipe, document: Document, plan: tuple[LayerPlan, ...]) -> None:
    """Report formats that the target refuses, at the key that sets them; layers of one key count as one."""
    from qcompress.recipe.rules.targets import refusals

    if not document.sound(("build", "target")):
        return
    for what in get_args(What):
        origins: dict[Key, list[LayerPlan]] = {}
        for layer in plan:
            origins.setdefault(_origin(recipe, document, layer.layer, what), []).append(layer)
        for origin, layers in origins.items():
            for refusal in refusals(recipe.build.target, tuple(layers), recipe.format.compute):
                _, section, *option = refusal.key.split(".")
                asked = {"embeddings": "weights"}.get(section, section)
                key = _narrowed(origin, what, option[0], document) if asked == what else ("format", section)
                if asked in (what, "compute") and document.sound(key):
                    document.report(key, refusal.message, refusal.fix)


def _context(recipe: Recipe, document: Document, architecture: Architecture) -> None:
    """Report a context or profiles longer than the model's positions."""
    key: Key = ("task", "context")
    limit = architecture.context
    if recipe.task.context is None:
        return
    if not document.sound(key):
        judge_profiles(recipe, document, limit, f"the model has {limit} positions")
    elif recipe.task.context > limit:
        message = f"is {recipe.task.context} tokens, and the model has {limit} positions"
        document.report(key, message, f"write `context: {limit}` or less")


def _new_head(recipe: Recipe, document: Document, architecture: Architecture) -> None:
    """Report a recipe that starts from a randomly initialized head without training it."""
    if not architecture.new_head or not document.sound(("schedule",), ("train", "phases")):
        return
    defaults = PHASES[recipe.schedule.name]
    chosen = {name: recipe.train.phases.get(name, phase) for name, phase in defaults.items()}
    if any(chosen[name].steps and "weight" in phase.roles for name, phase in defaults.items()):
        return
    key: Key = ("model", recipe.model.origin)
    lacking = f"{architecture.new_head[0]} and {len(architecture.new_head) - 1} more"
    message = f"lacks the head of the task {recipe.task.name} ({lacking}), and no phase trains weights"
    document.report(key, message, "fine-tune first with `method: float`, and name that run under `model.run`")
