"""`run --smoke`: all stages on two blocks of the model and a few samples, in about a minute. No torch.

It tests whether a recipe runs from end to end on this machine (data, tokenizer, target, builder) before hours
of training. The checkpoint's first two blocks are copied into the cache as a separate checkpoint, and all
later stages are an ordinary run, under the name `<recipe>-smoke`.

Results of two blocks on a few hundred tokens are meaningless: neither goals nor parity are judged. The
verdict is `unjudged` (exit code 0) if all stages finish, and `latest` does not move.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from qcompress.errors import UsageError
from qcompress.models import first_blocks
from qcompress.models.checkpoint_files import copy_tensors
from qcompress.models.layer_selection import Blocks
from qcompress.models.plan import matches
from qcompress.models.readers import READER_FILES
from qcompress.pipeline.stages.load import fingerprint, locate
from qcompress.recipe.check import check_model, head_of
from qcompress.recipe.load import Resolved
from qcompress.schema.axes import PHASES
from qcompress.schema.recipe import Data, PhaseOptions, Recipe
from qcompress.system.filesystem import machine_errors
from qcompress.system.fingerprint import stage_key

BLOCKS = 2
CONTEXT = 128
SEQUENCES = 8
"""Samples of each section of the data, and of each evaluation set."""
BATCH = 4
STEPS = 2
"""Updates of each phase (of each block)."""


def smoke(resolved: Resolved, cache: Path) -> Resolved:
    """Shrink the recipe to two blocks and a few samples; a module of `model.python` stays whole. The whole
    recipe is checked first (RecipeError). Raises UsageError for an external graph.
    """
    recipe = resolved.recipe
    if recipe.export.graph is not None:
        raise UsageError("--smoke takes two blocks of the model, and `export.graph` has all of them",
                         fix="run the recipe without --smoke")  # fmt: skip
    source = locate(recipe.model, resolved.base)
    check_model(resolved, source)
    if recipe.model.python is None:
        source = shorten(recipe.model.family, source, cache / "smoke", recipe.model.blocks)
    return replace(resolved, recipe=_small(recipe, source), smoke=True)


def shorten(family: str, source: Path, folder: Path, picked: Blocks | None = None) -> Path:
    """Write a checkpoint with the first `BLOCKS` blocks of another one, or of the blocks `picked` from it;
    cached by content.
    """
    values = {"blocks": BLOCKS} | ({} if picked is None else {"picked": picked})
    whole = folder / stage_key("smoke", {"inputs": fingerprint(source), "values": values})[:16]
    if (whole / "config.json").is_file():
        return whole
    config, names = first_blocks(family, source, BLOCKS, picked)
    partial = whole.with_name(f"{whole.name}.{os.getpid()}.tmp")
    with machine_errors(folder):
        partial.mkdir(parents=True, exist_ok=True)
        copy_tensors(source, partial / "model.safetensors", names)
        for name in READER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        try:
            os.rename(partial, whole)
        except OSError:  # another process wrote an equal folder first
            shutil.rmtree(partial)
            if not (whole / "config.json").is_file():
                raise
    return whole


def _small(recipe: Recipe, source: Path) -> Recipe:
    """The recipe on the shortened checkpoint, with few samples and steps."""
    from qcompress.models import describe

    context = min(recipe.task.context or CONTEXT, CONTEXT)
    architecture = describe(recipe.model.family, source, head_of(recipe))
    names = [item.name for item in (*architecture.layers, *architecture.points)]
    patterns = {
        pattern: form
        for pattern, form in recipe.format.layers.items()
        if any(matches(pattern, name) for name in names)
    }
    short = {"source": str(source.absolute()), "revision": None, "run": None, "blocks": None}
    sections: dict[str, Any] = {
        "name": f"{recipe.name[:94].rstrip('.-')}-smoke",
        "model": {} if recipe.model.python else short,
        "task": recipe.task.within(CONTEXT),
        "format": {"layers": patterns},
        "train": {"batch_size": min(recipe.train.batch_size, BATCH), "phases": _phases(recipe)},
        "build": {"profiles": [_within(profile, context) for profile in recipe.build.profiles]},
        "verify": {"samples": min(recipe.verify.samples or SEQUENCES, SEQUENCES)},
        "gate": {"float_floor": {}, "recovery": {}, "regression": {}, "parity": {}},
    }
    update: dict[str, Any] = {"data": _little(recipe.data)}
    for section, values in sections.items():
        old = getattr(recipe, section)
        update[section] = old.model_copy(update=values) if isinstance(values, dict) else values
    return recipe.model_copy(update=update)


def _little(data: Data) -> Data:
    def few(part):
        # few samples need not have a value of every slice
        least = {"limit": min(part.limit or SEQUENCES, SEQUENCES), "slices": None} if part else {}
        return part and part.model_copy(update=least)

    evaluate = {name: few(part) for name, part in data.evaluate.items()}
    return Data(train=few(data.train), calibration=few(data.calibration), evaluate=evaluate)


def _phases(recipe: Recipe) -> dict[str, PhaseOptions]:
    phases = {}
    for name in PHASES[recipe.schedule.name]:
        phase = recipe.train.phases.get(name, PhaseOptions(steps=STEPS))
        phases[name] = phase.model_copy(update={"steps": min(phase.steps, STEPS)})
    return phases


def _within(profile, context: int):
    limits = {"sequence": context, "past": context - 1}
    return profile.model_copy(
        update={axis: [min(size, most) for size in getattr(profile, axis)] for axis, most in limits.items()}
    )
