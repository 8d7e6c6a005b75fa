"""Inputs of a parity measurement: the artifacts to measure, and the samples that all rows share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qcompress.errors import ContractError, UsageError
from qcompress.parity.measure import Samples
from qcompress.recipe.rules.slices import slices_of
from qcompress.schema.recipe import Recipe
from qcompress.system.artifacts import Engine, FloatModel, FoldedModel, OnnxModel, TrainedModel, read_json
from qcompress.tasks import TASKS

LOGIT_BYTES = 2**30
"""Upper limit of bytes of logits kept on disk for the next row."""


@dataclass(frozen=True)
class Artifacts:
    """Artifacts of a run; None for a stage that did not run, with its reason in `missing`."""

    float_model: FloatModel | None
    trained: TrainedModel | None
    folded: FoldedModel | None
    onnx: OnnxModel | None
    engine: Engine | None
    missing: dict[str, str]


def evaluation_samples(recipe: Recipe, base: Path, artifacts: Artifacts) -> Samples:
    """Read the evaluation samples, and choose how many of them are compared logit by logit."""
    task = TASKS[recipe.task.name]
    folder = _checkpoint(artifacts)
    reader, config = task.reader(folder), read_json(folder / "config.json")
    options = task.settled(recipe.task, config)
    sets = {
        name: task.samples(data, base, reader, options, recipe.verify.samples)
        for name, data in recipe.data.evaluate.items()
    }
    slices = {
        name: slices_of(recipe, data, base) for name, data in recipe.data.evaluate.items() if data.slices
    }
    for name, columns in slices.items():
        if any(len(cells) != task.rows(sets[name]) for cells in columns.values()):
            raise ContractError(
                f"{name}: {task.rows(sets[name])} samples, but a slice column has another number of values"
            )
    first = next(iter(sets.values()))
    positions, logits = task.logits_of(options, config)
    affordable = max(1, LOGIT_BYTES // (positions * logits * 4))
    # a classifier's sample is one position: among few samples a single flip would look like a regression
    wanted = recipe.verify.distance_samples if positions > 1 else len(first)
    return Samples(options, sets, min(wanted, affordable, len(first)), positions, slices)


def _checkpoint(artifacts: Artifacts) -> Path:
    """Folder with config.json and the tokenizer or image processor: any artifact but the trained one. Raises
    UsageError without one.
    """
    for artifact in (artifacts.float_model, artifacts.folded, artifacts.onnx):
        if artifact is not None:
            return artifact.path
    raise UsageError("nothing to measure: the float, the folded and the ONNX model are missing")
