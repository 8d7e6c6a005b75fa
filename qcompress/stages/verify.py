"""Stage `verify`: every artifact -> ParityReport. Measures all rows on the same data; judges nothing.

Reads the five artifacts and the evaluation text. Writes parity.json (a row for each stage: metrics, and the
distance of its logits to the row before), samples.json.gz (per-sample results with ids) and probe/ (the same
measurement for a device). Rows run one after another, so that one model is in memory at a time; the logits
that a distance needs wait on disk.
"""

from __future__ import annotations

import gc
import gzip
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qcompress.artifacts import (
    Engine,
    FloatModel,
    FoldedModel,
    OnnxModel,
    TrainedModel,
    read_json,
    write_json,
)
from qcompress.distance import Distance
from qcompress.errors import UsageError
from qcompress.models import load_tokenizer
from qcompress.plan import plans_from_json
from qcompress.probe import read_measurement, write_probe
from qcompress.progress import Reporter
from qcompress.runners import OnnxRunner, Runner, float_runner, folded_runner, trained_runner
from qcompress.schema import ROWS, Recipe
from qcompress.tasks import TASKS

LOGIT_BYTES = 2**30
"""Most bytes of logits that wait on disk for the next row."""


@dataclass(frozen=True)
class Artifacts:
    """What there is to measure; None is a stage that did not run, with its reason in `missing`."""

    float_model: FloatModel | None
    trained: TrainedModel | None
    folded: FoldedModel | None
    onnx: OnnxModel | None
    engine: Engine | None
    missing: dict[str, str]


@dataclass(frozen=True)
class Samples:
    """Evaluation windows by set, and how many of the first set are compared logit by logit."""

    sets: dict[str, list[Any]]
    compared: int
    positions: int
    """Most positions of one sample that have logits."""

    @property
    def first(self) -> str:
        return next(iter(self.sets))


@dataclass(frozen=True)
class _Measured:
    """One row: metrics, per-sample results by set, distance to the row before, and where its logits wait."""

    metrics: dict[str, float]
    samples: dict[str, list[dict[str, float]]]
    distance: dict[str, object] | None


def verify(recipe: Recipe, base: Path, artifacts: Artifacts, out: Path, reporter: Reporter) -> None:
    """Measure every row that can run."""
    samples = evaluation_samples(recipe, base, artifacts)
    device = _device(recipe)
    threads = torch.get_num_threads()
    family = recipe.model.family
    factories: dict[str, Callable[[], Runner]] = {
        "float": lambda: float_runner(artifacts.float_model, device),
        "trained": lambda: trained_runner(artifacts.float_model, artifacts.trained, device),
        "folded": lambda: folded_runner(artifacts.folded, device),
        "onnx": lambda: OnnxRunner(artifacts.onnx.file, family, threads, optimized=False),
    }
    rows: list[dict[str, Any]] = []
    measured: dict[str, _Measured] = {}
    previous: str | None = None
    for stage in ROWS:
        reason = _not_run(stage, artifacts, recipe)
        if reason is not None:
            rows.append({"stage": stage, **reason})
            continue
        gc.collect()  # the row before is not needed any more, and a model refers to itself
        result = _measure(stage, factories[stage](), recipe, samples, previous, out, reporter)
        measured[stage] = result
        row = {"stage": stage, "status": "measured", "reason": None, "metrics": result.metrics}
        row |= {"samples": sum(map(len, samples.sets.values())), "distance": result.distance}
        if stage == "onnx":
            row["deployed"] = _deployed(recipe, artifacts, samples, previous, out, reporter, device)
            logits = out / "logits-onnx.npy"
            write_probe(out / "probe", samples.sets, logits, artifacts.onnx, artifacts.engine)
        rows.append(row)
        previous = stage
    for file in out.glob("logits-*.npy"):
        file.unlink()
    task = TASKS[recipe.task.name]
    inputs = {
        name: _digest(task.collate([sample]) for sample in found) for name, found in samples.sets.items()
    }
    facts = {"sets": list(samples.sets), "inputs": inputs, "threads": threads, "device": str(device)}
    write_json(out / "parity.json", {"rows": rows, **facts})
    write_samples(out / "samples.json.gz", {stage: result.samples for stage, result in measured.items()})


def _digest(samples: Iterable[dict[str, np.ndarray]]) -> str:
    """Of the model inputs of all samples of a set: what runs that are compared have in common."""
    digest = hashlib.sha256()
    for inputs in samples:
        for name, array in sorted(inputs.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _deployed(
    recipe: Recipe, artifacts: Artifacts, samples: Samples, previous: str | None, out: Path,
    reporter: Reporter, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """The graph as ONNX Runtime runs it by default: int8 layers as integer GEMMs.

    It is compared with the folded model computed the same way where that is there; comparing integer sums
    with fp32 products shows flipped roundings and nothing about the file. Without int8 activations there are
    no integer sums.
    """
    if artifacts.folded is not None and _rounds_activations(artifacts.folded):
        runner = folded_runner(artifacts.folded, device, integer=True)
        compared = samples.sets[samples.first][: samples.compared]
        few = Samples({samples.first: compared}, samples.compared, samples.positions)
        _measure("folded-integer", runner, recipe, few, None, out, reporter)
        previous = "folded-integer"
    runner = OnnxRunner(artifacts.onnx.file, recipe.model.family, torch.get_num_threads(), optimized=True)
    found = _measure("onnx-deployed", runner, recipe, samples, previous, out, reporter, keep=False)
    return {"metrics": found.metrics, "distance": found.distance}


def _rounds_activations(folded: FoldedModel) -> bool:
    plan = plans_from_json(read_json(folded.path / "folded.json")["plan"])
    return any(item.activations for item in plan)


def evaluation_samples(recipe: Recipe, base: Path, artifacts: Artifacts) -> Samples:
    """What is measured, and how much of it is compared."""
    task = TASKS[recipe.task.name]
    folder = _checkpoint(artifacts)
    tokenizer = load_tokenizer(folder)
    sets = {
        name: task.samples(data, base, tokenizer, recipe.task, recipe.verify.samples)
        for name, data in recipe.data.evaluate.items()
    }
    first = next(iter(sets.values()))
    positions, logits = task.logits_of(recipe.task, read_json(folder / "config.json"))
    affordable = max(1, LOGIT_BYTES // (positions * logits * 4))
    return Samples(sets, min(recipe.verify.distance_samples, affordable, len(first)), positions)


def _checkpoint(artifacts: Artifacts) -> Path:
    """A folder with config.json and the tokenizer: every artifact but the trained one carries them."""
    for artifact in (artifacts.float_model, artifacts.folded, artifacts.onnx):
        if artifact is not None:
            return artifact.path
    raise UsageError("nothing is left to measure: the float, the folded and the ONNX model are gone")


def _not_run(stage: str, artifacts: Artifacts, recipe: Recipe) -> dict[str, Any] | None:
    """Status and reason of a row that cannot be measured here, None if it can."""
    if stage == "engine":
        if artifacts.engine is None:
            return {"status": "not-run", "reason": artifacts.missing.get("engine", "no engine was built")}
        facts = read_json(artifacts.engine.path / "build.json")
        if facts["status"] == "built":
            reason = f"a {facts['backend']} plan runs on its GPU: measure it with probe/measure_engine.py"
            return {"status": "not-run", "reason": reason}
        status = "deferred" if facts["status"] == "deferred" else "not-run"
        return {"status": status, "reason": facts["reason"], "command": facts.get("command")}
    if getattr(artifacts, {"float": "float_model"}.get(stage, stage)) is None:
        return {"status": "not-run", "reason": artifacts.missing.get(stage, "its artifact is gone")}
    if stage == "trained" and artifacts.float_model is None:
        return {"status": "not-run", "reason": "the float model, whose weights it shares, is gone"}
    if stage == "onnx" and recipe.format.compute == "bf16":
        return {"status": "not-run", "reason": "ONNX Runtime's CPU provider has no bf16 kernels"}
    return None


def _device(recipe: Recipe) -> torch.device:
    wanted = recipe.train.device
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _measure(
    stage: str, runner: Runner, recipe: Recipe, samples: Samples, previous: str | None, out: Path,
    reporter: Reporter, keep: bool = True,
) -> _Measured:  # fmt: skip
    """Run all samples; compare the first ones with the logits that the row before left on disk."""
    task, size = TASKS[recipe.task.name], recipe.verify.batch_size
    distance = Distance(to=previous) if previous else None
    results: dict[str, list[dict[str, float]]] = {}
    total = sum(-(-len(windows) // size) for windows in samples.sets.values())
    with reporter.bar(f"verify {stage}", total) as bar:
        for name, windows in samples.sets.items():
            results[name] = []
            for start in range(0, len(windows), size):
                batch = windows[start : start + size]
                logits = runner(task.collate(batch))
                results[name] += task.measure(batch, logits)
                bar.advance(name)
                few = batch[: max(0, samples.compared - start)] if name == samples.first else []
                pairs = zip(few, logits, strict=False)
                found = [task.compared(sample, sample_logits) for sample, sample_logits in pairs]
                if distance is not None:
                    _compare(distance, out / f"logits-{previous}.npy", start, found)
                if keep:
                    shape = (samples.compared, samples.positions, logits.shape[-1])
                    _keep(out / f"logits-{stage}.npy", shape, start, found)
    metrics = {
        f"{name}.{metric}": value
        for name, found in results.items()
        for metric, value in task.metrics(found).items()
    }
    return _Measured(metrics, results, distance.to_json() if distance else None)


def _compare(distance: Distance, file: Path, start: int, found: list[np.ndarray]) -> None:
    """Hold some logits against those on disk. The file is opened each time: mapped pages count as memory."""
    if found:
        reference = np.load(file, mmap_mode="r")
        for place, logits in enumerate(found):
            distance.add(reference[start + place, : len(logits)], logits)


def _keep(file: Path, shape: tuple[int, ...], start: int, found: list[np.ndarray]) -> None:
    """Leave some logits on disk for the next row."""
    if not found:
        return
    if start == 0:
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    kept = np.lib.format.open_memmap(file, mode="r+")
    for place, logits in enumerate(found):
        kept[start + place, : len(logits)] = logits


def take_engine_row(run: Path, task: str, measurement: Path) -> None:
    """Fill the engine row of a run's parity.json and samples.json.gz from what a device measured."""
    found = read_measurement(measurement, run / "probe", run / "model.onnx")
    report = read_json(run / "parity.json")
    samples = read_samples(run / "samples.json.gz")
    metrics = TASKS[task].metrics
    row = {
        "stage": "engine",
        "status": "measured",
        "reason": None,
        "metrics": {
            f"{name}.{metric}": value
            for name, results in found.samples.items()
            for metric, value in metrics(results).items()
        },
        "samples": sum(map(len, found.samples.values())),
        "distance": found.distance,
        "measured_on": found.facts,
    }
    report["rows"] = [row if old["stage"] == "engine" else old for old in report["rows"]]
    for name, results in found.samples.items():
        samples[name]["rows"]["engine"] = {
            "nll": [result["nll"] for result in results],
            "correct": [result["correct"] for result in results],
        }
    (run / "samples.json.gz").write_bytes(_pack(samples))
    write_json(run / "parity.json", report)


def write_samples(file: Path, rows: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """Per-sample results: {set: {"ids": [...], "tokens": [...], "rows": {stage: {"nll", "correct"}}}}."""
    sets: dict[str, dict[str, Any]] = {}
    for stage, by_set in rows.items():
        for name, found in by_set.items():
            entry = sets.setdefault(
                name,
                {
                    "ids": [f"{name}:{index}" for index in range(len(found))],
                    "tokens": [sample["tokens"] for sample in found],
                    "rows": {},
                },
            )
            entry["rows"][stage] = {
                "nll": [sample["nll"] for sample in found],
                "correct": [sample["correct"] for sample in found],
            }
    file.write_bytes(_pack(sets))


def _pack(sets: dict[str, dict[str, Any]]) -> bytes:
    return gzip.compress(json.dumps({"sets": sets}, sort_keys=True).encode(), mtime=0)


def read_samples(file: Path) -> dict[str, dict[str, Any]]:
    """Inverse of `write_samples`: the sets."""
    return json.loads(gzip.decompress(file.read_bytes()))["sets"]
