"""Calibration of a recipe through the stages of a run, and the cost of its rounding on calibration data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.pipeline import run as pipeline
from qcompress.pipeline.key_scope import NO_RESULT, versions_of
from qcompress.pipeline.keys import prepare
from qcompress.pipeline.sensitivity.candidates import groups_of
from qcompress.pipeline.sensitivity.sampling import Sampling
from qcompress.recipe.load import Resolved
from qcompress.schema.data import FILES
from qcompress.system.artifacts import FloatModel, TrainedModel
from qcompress.system.digests import SEAL, read_sealed, write_sealed
from qcompress.system.filesystem import make_folder
from qcompress.system.fingerprint import code_digest, stage_key
from qcompress.system.gpu import device_kind
from qcompress.system.host import threads
from qcompress.system.reporter import Reporter
from qcompress.system.workspace import Step
from qcompress.tasks.text import fingerprint

if TYPE_CHECKING:
    from qcompress.models.prepare import Prepared
    from qcompress.pipeline.sensitivity.measure import Cost, Costs, Kind


@dataclass(frozen=True)
class Place:
    """Folders of runs and of the cache, and the reporter."""

    out: Path
    cache: Path
    reporter: Reporter


@dataclass(frozen=True)
class LayerCosts:
    """Costs of one format, each as [mean, standard error] over `samples`, in `unit`."""

    all: list[float]
    alone: dict[str, list[float]]
    wins: dict[str, list[float]] | None
    """Reduction of the total cost if a layer stays float; None: not measured."""
    weight_errors: dict[str, float]
    samples: int
    unit: str


@dataclass(frozen=True)
class WholeCost:
    """Cost of a whole recipe, sample by sample."""

    cost: Cost
    fresh: bool
    """True if the samples did not take part in choosing the mixture."""


def measure_layers(
    resolved: Resolved, place: Place, sampling: Sampling, title: str, wins: bool
) -> LayerCosts:
    """Measure the costs of each layer on the choosing samples; cached by model, samples and settings."""
    steps = _calibrate(resolved, place)
    file = place.cache / "sensitivity" / f"{_key(resolved, steps, sampling, wins)}.json"
    if (cached := read_sealed(file)) is not None:
        place.reporter.say(f"{title}: costs reused from the cache")
        return LayerCosts(**{name: value for name, value in cached.items() if name != SEAL})
    if file.is_file():
        place.reporter.say(f"{title}: damaged: {file}; its costs are measured again")
    from qcompress.pipeline.sensitivity.measure import weight_errors

    ready = _prepare(resolved, steps, sampling)
    costs = ready.costs(ready.choosing, place.reporter, title, each=True, wins=wins)
    layer_costs = LayerCosts(
        all=costs.all.to_json(),
        alone={name: cost.to_json() for name, cost in costs.alone.items()},
        wins={name: cost.to_json() for name, cost in costs.wins.items()} if wins else None,
        weight_errors=weight_errors(ready.prepared, ready.groups),
        samples=len(ready.choosing),
        unit="squared difference" if ready.kind == "regression" else "nats",
    )
    make_folder(file.parent)
    write_sealed(file, asdict(layer_costs))
    return layer_costs


def measure_whole(resolved: Resolved, place: Place, sampling: Sampling, title: str) -> WholeCost:
    """Measure the cost of the whole recipe on the judging samples or, with fewer than two of them, on the
    choosing ones.
    """
    ready = _prepare(resolved, _calibrate(resolved, place), sampling)
    fresh = len(ready.judging) > 1
    windows = ready.judging if fresh else ready.choosing
    return WholeCost(ready.costs(windows, place.reporter, title, each=False, wins=False).all, fresh)


def _calibrate(resolved: Resolved, place: Place) -> dict[str, Step]:
    run = pipeline.run(resolved, place.out, place.cache, place.reporter, until="train")
    return {step.stage: step for step in run.steps}


def _key(resolved: Resolved, steps: Mapping[str, Step], sampling: Sampling, wins: bool) -> str:
    """Cache key of a measurement: the calibrated model, the samples, and the settings."""
    recipe = resolved.recipe
    data = recipe.data.calibration or recipe.data.train
    parts = {
        "inputs": {stage: steps[stage].digest for stage in ("load", "train")},
        "values": {
            "task": recipe.task.model_dump(mode="json"),
            "data": data.model_dump(mode="json", exclude={*FILES, "folder"}),
            "batch_size": recipe.verify.batch_size,
            "sampling": {"choosing": sampling.choosing, "seed": sampling.seed},
            "wins": wins,
        },
        "data": fingerprint(data, resolved.base),
        "code": code_digest(
            ["qcompress.pipeline.sensitivity.measure", "qcompress.pipeline.sensitivity.sampling"],
            leave_out=NO_RESULT,
        ),
        "versions": versions_of("train", recipe),
        "device": {"kind": device_kind(recipe.train.device), "threads": threads()},
    }
    return stage_key("sensitivity", parts)


@dataclass(frozen=True)
class _Ready:
    """A calibrated model with its samples."""

    prepared: Prepared
    groups: Mapping[str, Collection[str]]
    task: Any
    kind: Kind
    choosing: list[Any]
    judging: list[Any]
    batch_size: int
    device: str

    def costs(self, windows: list[Any], reporter: Reporter, title: str, each: bool, wins: bool) -> Costs:
        import torch

        from qcompress.pipeline.sensitivity.measure import measure_costs

        return measure_costs(
            self.prepared, self.groups, self.task, windows, self.batch_size, torch.device(self.device),
            reporter, title, self.kind, each, wins,
        )  # fmt: skip


def _prepare(resolved: Resolved, steps: Mapping[str, Step], sampling: Sampling) -> _Ready:
    from qcompress.models.rebuild import rebuild
    from qcompress.parity.inputs import Artifacts, evaluation_samples
    from qcompress.tasks import TASKS

    recipe = resolved.recipe
    model = FloatModel.of(steps["load"].path, steps["load"].digest, prepare(resolved).directory)
    trained = TrainedModel(steps["train"].path, steps["train"].digest)
    data = {"evaluate": {"calibration": recipe.data.calibration or recipe.data.train}}
    changes = {
        "data": recipe.data.model_copy(update=data),
        "verify": recipe.verify.model_copy(update={"samples": sampling.limit}),
    }
    artifacts = Artifacts(model, trained, None, None, None, {})
    samples = evaluation_samples(recipe.model_copy(update=changes), resolved.base, artifacts)
    choosing, judging = sampling.parts(samples.sets["calibration"])
    prepared = rebuild(model, trained)
    return _Ready(
        prepared, groups_of(prepared.plan), TASKS[recipe.task.name], getattr(samples.task, "kind", "single"),
        choosing, judging, recipe.verify.batch_size, device_kind(recipe.train.device),
    )  # fmt: skip
