"""`run --smoke`: the whole line on two blocks of the model and a handful of data, in a minute. No torch.

It answers whether a recipe runs from end to end on this machine (data, tokenizer, target, builder) before
hours of training. The two blocks are the checkpoint's first, copied into the cache as a checkpoint of their
own, so everything after that is an ordinary run, under the name `<recipe>-smoke`.

Two blocks on a few hundred tokens say nothing about the model: neither goals nor parity are judged. The
verdict is `unjudged` (exit code 0) where the line ran to its end, and `latest` does not move.
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
"""Of each part of the data, and of each evaluation set."""
BATCH = 4
STEPS = 2
"""Updates of each phase (of each block)."""


def smoke(resolved: Resolved, cache: Path) -> Resolved:
    """The same recipe for two blocks and little data. The whole recipe is checked first (RecipeError)."""
    recipe = resolved.recipe
    if recipe.export.graph is not None:
        raise UsageError("--smoke takes two blocks of the model, and `export.graph` has all of them",
                         fix="run the recipe whole")  # fmt: skip
    source = locate(recipe.model, resolved.base)
    check_model(resolved, source)
    short = shorten(recipe.model.family, source, cache / "smoke", recipe.model.blocks)
    return replace(resolved, recipe=_small(recipe, short), smoke=True)


def shorten(family: str, source: Path, folder: Path, picked: Blocks | None = None) -> Path:
    """A checkpoint with the first `BLOCKS` blocks of another one, or of those `picked` from it; made once for
    each content.
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
        except OSError:  # another process was faster; what it made is the same
            shutil.rmtree(partial)
            if not (whole / "config.json").is_file():
                raise
    return whole


def _small(recipe: Recipe, source: Path) -> Recipe:
    """The recipe on that checkpoint, with little of everything."""
    from qcompress.models import describe

    context = min(recipe.task.context or CONTEXT, CONTEXT)
    architecture = describe(recipe.model.family, source, head_of(recipe))
    names = [item.name for item in (*architecture.layers, *architecture.points)]
    patterns = {
        pattern: form
        for pattern, form in recipe.format.layers.items()
        if any(matches(pattern, name) for name in names)
    }
    sections: dict[str, Any] = {
        "name": f"{recipe.name[:94].rstrip('.-')}-smoke",
        "model": {"source": str(source.absolute()), "revision": None, "run": None, "blocks": None},
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
        # a handful of samples need not have a value of every slice
        least = {"limit": min(part.limit or SEQUENCES, SEQUENCES), "slices": None} if part else {}
        return part and part.model_copy(update=least)

    evaluate = {name: few(part) for name, part in data.evaluate.items()}
    return Data(train=few(data.train), calibration=few(data.calibration), evaluate=evaluate)


def _phases(recipe: Recipe) -> dict[str, PhaseOptions]:
    found = {}
    for name in PHASES[recipe.schedule.name]:
        phase = recipe.train.phases.get(name, PhaseOptions(steps=STEPS))
        found[name] = phase.model_copy(update={"steps": min(phase.steps, STEPS)})
    return found


def _within(profile, context: int):
    limits = {"sequence": context, "past": context - 1}
    return profile.model_copy(
        update={axis: [min(size, most) for size in getattr(profile, axis)] for axis, most in limits.items()}
    )
