"""Stage `verify`: every artifact -> ParityReport. Measures all rows on one data set; judges nothing.

Reads the five artifacts and the evaluation data. Writes parity.json (a row for each stage: metrics, and the
distance of its logits from the previous row; the main metrics of each set), samples.json.gz (per-sample
results with ids) and probe/ (the measurement kit for a device). Rows run one after another, so that one model
is in memory at a time; the logits that a distance needs lie on disk.

Two rows contain another measurement, {"metrics", "distance"}, with which no later row is compared:

    trained["dynamic"]   the model with dynamic ranges, if it was trained with them; its distance is to the
                         row itself, and the difference is the cost of static ranges
    onnx["deployed"]     the graph in ONNX Runtime's default session

A third one, onnx["held"], compares the graph with the folded model under forced codes, which distinguishes
rounding ties from defects (`layerwise.held_codes` lists its fields).
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qcompress.engine.local_run import why_not
from qcompress.engine.probe import KIT_BYTES, write_probe
from qcompress.engine.probe_kit.engine_runners import EXACT, saturates
from qcompress.errors import ContractError
from qcompress.graph.view import read
from qcompress.models.folded import assemble
from qcompress.models.plan import plans_from_json, points_from_json, rounded
from qcompress.models.rebuild import rebuild
from qcompress.parity.distance import Distance
from qcompress.parity.fold_flips import ForcedFold
from qcompress.parity.forced_codes import TIE, summary
from qcompress.parity.gpu import engine_here, provider_rows
from qcompress.parity.inputs import Artifacts, evaluation_samples
from qcompress.parity.layerwise import held_codes
from qcompress.parity.measure import Measured, Results, Samples, batches, measure_row
from qcompress.parity.runners import (
    OnnxRunner,
    Runner,
    complete,
    dynamic_runner,
    float_runner,
    folded_runner,
    made_static,
    trained_runner,
)
from qcompress.parity.sample_results import write_samples
from qcompress.parity.sharpness import trained_sharpness
from qcompress.schema.goals import PARITY
from qcompress.schema.recipe import ROWS, AnyTask, Recipe
from qcompress.schema.tasks import AGREEMENT, Task
from qcompress.system.artifacts import FoldedModel, read_json, sha256_file, write_json
from qcompress.system.collector import only_new
from qcompress.system.reporter import Reporter
from qcompress.tasks import TASKS

SATURATES = (
    "verify: this processor has no VNNI instructions: ONNX Runtime's own default session cuts sums of 8-bit "
    f"products here; the row deployed is measured with {'='.join(EXACT)}, as it must be served here"
)


@dataclass(frozen=True)
class _Job:
    """Inputs that all rows share."""

    recipe: Recipe
    base: Path
    artifacts: Artifacts
    samples: Samples
    out: Path
    reporter: Reporter
    device: torch.device

    def measure(
        self, row: str, runner: Runner, reference: Results | None, previous: str | None, keep: bool = True
    ) -> Measured:
        """Call `measure_row` on all samples."""
        return measure_row(
            row, runner, self.recipe, self.samples, reference, previous, self.out, self.reporter, keep
        )


@only_new()
def verify(recipe: Recipe, base: Path, artifacts: Artifacts, out: Path, reporter: Reporter) -> None:
    """Measure every row that can run on this machine."""
    _forget_logits(out)
    samples = evaluation_samples(recipe, base, artifacts)
    for name, windows in samples.sets.items():
        for note in TASKS[recipe.task.name].notes(windows):
            reporter.say(f"verify: {name}: {note}")
    for note in _without_value(samples):
        reporter.say(f"verify: {note}")
    job = _Job(recipe, base, artifacts, samples, out, reporter, _device(recipe))
    rows: list[dict[str, Any]] = []
    measured: dict[str, Measured] = {}
    previous: str | None = None
    for stage in ROWS:
        reason = _not_run(stage, artifacts, recipe)
        if stage == "engine" and reason is None:
            reporter.say("verify: the engine runs on this machine's GPU")
            row, result = engine_here(artifacts.engine, artifacts.onnx, samples, measured, out)
            measured |= {stage: result} if result is not None else {}
            rows.append(row)
            continue
        if reason is not None:
            rows.append({"stage": stage, **reason})
            continue
        gc.collect()  # frees the previous row's model, which has reference cycles
        reference = measured["float"].samples if "float" in measured else None
        result = job.measure(stage, _runner(job, stage), reference, previous)
        measured[stage] = result
        row = {"stage": stage, "status": "measured", "reason": None, "metrics": result.metrics}
        row |= {"samples": sum(map(len, result.samples.values())), "distance": result.distance}
        rows.append(row | _beside(job, stage, result, reference, previous))
        previous = stage
    _forget_logits(out)
    write_json(out / "parity.json", {"rows": rows, **_facts(job, rows)})
    results = {stage: result.samples for stage, result in measured.items()}
    write_samples(out / "samples.json.gz", results, TASKS[recipe.task.name].KNOWN, samples.slices)


def _runner(job: _Job, stage: str) -> Runner:
    artifacts, device = job.artifacts, job.device
    if stage == "float":
        return float_runner(artifacts.float_model, device)
    if stage == "trained":
        return trained_runner(artifacts.float_model, artifacts.trained, device)
    if stage == "folded":
        return folded_runner(artifacts.folded, device)
    return _onnx_runner(job, optimized=False)


def _onnx_runner(job: _Job, optimized: bool) -> Runner:
    family, threads = job.recipe.model.family, torch.get_num_threads()
    return OnnxRunner(job.artifacts.onnx.file, family, threads, optimized=optimized)


def _beside(
    job: _Job, stage: str, result: Measured, reference: Results | None, previous: str | None
) -> dict[str, Any]:
    """Additional fields of one stage's row."""
    recipe, artifacts, samples, reporter = job.recipe, job.artifacts, job.samples, job.reporter
    row: dict[str, Any] = {}
    if stage == "trained" and recipe.verify.sharpness is not None:
        sharpness = trained_sharpness(
            recipe, job.base, artifacts.float_model, artifacts.trained, job.device, reporter
        )
        row["metrics"] = result.metrics | sharpness
    if stage == "trained" and made_static(artifacts.trained):
        row["dynamic"] = _dynamic(job, reference)
    if stage == "folded":
        row |= _forced_fold(job)
    if stage == "folded" and (raised := _raised(read_json(artifacts.folded.path / "folded.json"))):
        row["raised"] = raised
    if stage == "onnx":
        row["deployed"] = _deployed(job, reference, previous)
        if wants_held(recipe, artifacts, result):
            row |= _held(recipe, artifacts, samples, reporter)
        threads = torch.get_num_threads()
        if on_gpu := provider_rows(recipe, artifacts.onnx, samples, reference, threads, job.out, reporter):
            row["providers"] = on_gpu
        _write_kit(job)
    return row


def _facts(job: _Job, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fields of parity.json that concern all rows."""
    recipe, samples, artifacts = job.recipe, job.samples, job.artifacts
    collate = TASKS[recipe.task.name].collate
    facts = {
        "sets": list(samples.sets),
        "main": _main_metrics(samples.task, rows),
        "inputs": {
            name: _digest(collate([sample]) for sample in windows) for name, windows in samples.sets.items()
        },
        "threads": torch.get_num_threads(),
        "device": str(job.device),
    }
    if artifacts.onnx is not None and artifacts.onnx.file.is_file():
        data = {file.name: sha256_file(file) for file in read(artifacts.onnx.file).data_files}
        facts["onnx"] = {"sha256": sha256_file(artifacts.onnx.file), "data": data}
    return facts


def _without_value(samples: Samples) -> Iterator[str]:
    """Warn about samples without a slice value."""
    for name, columns in samples.slices.items():
        for column, values in columns.items():
            if lacking := values.count(None):
                yield f"{name}: {lacking} of {len(values)} samples have no {column}, and no slice has them"


def _held(recipe: Recipe, artifacts: Artifacts, samples: Samples, reporter: Reporter) -> dict[str, Any]:
    """`held` of the onnx row; empty if the graph lacks a quantization point: the row is then judged by its
    own distance.
    """
    try:
        return {"held": held_codes(recipe, artifacts.folded, artifacts.onnx, samples, reporter)}
    except ContractError as error:
        reporter.say(f"verify: the codes of the graph were not compared: {error.message}")
        return {}


def wants_held(recipe: Recipe, artifacts: Artifacts, onnx: Measured) -> bool:
    """True if the graph is also compared under forced codes (`verify.held`)."""
    wanted, far = recipe.verify.held, onnx.distance
    if wanted == "never" or artifacts.folded is None or not _rounds_anything(artifacts.folded):
        return False
    limits = PARITY[recipe.format.compute]["onnx"]
    if wanted == "always" or far is None or far["to"] != "folded":
        return wanted == "always"
    within = far["mean_abs"] <= limits.mean_abs * far["range"]
    agrees = far["top1_agreement"] is None or far["top1_agreement"] >= limits.top1_agreement
    return not (within and agrees)


def _forced_fold(job: _Job) -> dict[str, Any]:
    """`flipped` and `held` of the folded row: codes that changed because batch norms were folded or scales
    were raised, on the first `distance_samples`. Empty if neither happened, when every bit must agree, or
    without the trained model. `held` is missing in bf16, and if the recipe says so.
    """
    recipe, artifacts, samples = job.recipe, job.artifacts, job.samples
    facts = read_json(artifacts.folded.path / "folded.json")
    norms = any(item.weights and item.layer.norm for item in plans_from_json(facts["plan"]))
    if not (norms or _raised(facts)) or None in (artifacts.float_model, artifacts.trained):
        return {}
    windows = samples.sets[samples.first][: recipe.verify.distance_samples]
    task, distance = TASKS[recipe.task.name], Distance(to="trained", ranked=recipe.task.ranked)
    limit = TIE.get(recipe.format.compute)
    models = rebuild(artifacts.float_model, artifacts.trained), assemble(artifacts.folded)
    both = ForcedFold(*models, limit or 0.5)
    with job.reporter.bar("verify fold", len(windows)) as bar:
        for rows in batches(task, windows, recipe.verify.batch_size):
            batch = [windows[row] for row in rows]
            inputs = {name: torch.from_numpy(array) for name, array in task.collate(batch).items()}
            for window, *pair in zip(batch, *both.run(inputs), strict=True):
                distance.add(*(task.compared(window, logits) for logits in pair))
                bar.advance(samples.first)
    if not both.places:
        return {"flipped": {"codes": 0, "flipped": 0, "samples": len(windows)}}
    held = {"samples": len(windows), **summary(both.places), "distance": distance.to_json()}
    row = {"flipped": {"codes": held["codes"], "flipped": held["differ"], "samples": len(windows)}}
    return row if limit is None or recipe.verify.held == "never" else {**row, "held": held}


def _raised(facts: Mapping[str, Any]) -> int:
    """Number of weight scales that fold raised. The folded model then differs from the trained one, even with
    float activations.
    """
    return sum(counts["scales"] for counts in facts.get("raised", {}).values())


def _forget_logits(out: Path) -> None:
    """Remove the logits that rows left on disk: at the end, and at the start those of a killed
    measurement.
    """
    for file in out.glob("logits-*.npy"):
        file.unlink()


def _main_metrics(task: Task, rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Metrics that the parity table shows for each set: the task's main metrics, or agreement without
    labels.
    """
    names = {name for row in rows for name in row.get("metrics", ())}
    sets = {name.rpartition(".")[0] for name in names}
    order = (*task.main, *task.metrics, AGREEMENT)
    available = {name: [metric for metric in order if f"{name}.{metric}" in names] for name in sets}
    shown = max(1, len(task.main))
    return {name: metrics[:shown] for name, metrics in available.items()}


def _write_kit(job: _Job) -> None:
    """Write the probe kit, with which a device repeats the measurement."""
    recipe, samples, artifacts, out = job.recipe, job.samples, job.artifacts, job.out
    task = TASKS[recipe.task.name]
    every = [sample for windows in samples.sets.values() for sample in windows]
    inputs = complete(recipe.model.family, task.collate(every))
    sizes = {name: len(windows) for name, windows in samples.sets.items()}
    outputs = [output.name for output in samples.task.outputs] if isinstance(samples.task, AnyTask) else []
    arrays = task.kit({name: tensor.numpy() for name, tensor in inputs.items()}, every)
    write_probe(out / "probe", sizes, arrays, out / "logits-onnx.npy", artifacts.onnx, artifacts.engine,
                samples.task.ranked, outputs)  # fmt: skip
    taken = sum(file.stat().st_size for file in (out / "probe").iterdir())
    if taken > KIT_BYTES:  # possible for images: all samples of a set are in the kit
        job.reporter.say(f"verify: the probe kit takes {taken / 1e6:.0f} MB: `verify.samples` limits it")


def _digest(samples: Iterable[dict[str, np.ndarray]]) -> str:
    """Digest of the model inputs of all samples of a set, by which runs are matched for comparison."""
    digest = hashlib.sha256()
    for inputs in samples:
        for name, array in sorted(inputs.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _dynamic(job: _Job, reference: Results | None) -> dict[str, Any]:
    """The trained model with dynamic ranges restored, compared with the trained row. Weights, samples and
    batches are equal: only the ranges differ.

    A dynamic range covers a whole batch, including padding. Unlike the row's numbers, these therefore depend
    on `verify.batch_size` and on the samples that share a batch, which have similar lengths.
    """
    gc.collect()  # as between rows
    artifacts, options = job.artifacts, job.recipe.quantizer.activations
    runner = dynamic_runner(artifacts.float_model, artifacts.trained, options, job.device)
    measured = job.measure("trained-dynamic", runner, reference, "trained", keep=False)
    return {"metrics": measured.metrics, "distance": measured.distance}


def _deployed(job: _Job, reference: Results | None, previous: str | None) -> dict[str, Any]:
    """The graph in ONNX Runtime's default session: int8 layers as integer GEMMs.

    It is compared with the folded model computed with integer sums as well; comparing integer sums with fp32
    products would show flipped rounding ties and nothing about the file. Without int8 activations there are
    no integer sums. An external graph has no folded model: it is compared with its own row `onnx`.
    """
    folded, samples = job.artifacts.folded, job.samples
    if folded is None:
        previous = "onnx"
    elif _rounds_activations(folded):
        runner = folded_runner(folded, job.device, integer=True)
        compared = samples.sets[samples.first][: samples.compared]
        first_set = replace(job, samples=replace(samples, sets={samples.first: compared}))
        first_set.measure("folded-integer", runner, None, None)
        previous = "folded-integer"
    runner = _onnx_runner(job, optimized=True)
    if folded is not None and _rounds_activations(folded) and saturates():
        job.reporter.say(SATURATES)
    measured = job.measure("onnx-deployed", runner, reference, previous, keep=False)
    extra = {"roundings": roundings} if folded is not None and (roundings := _own_roundings(folded)) else {}
    return {"metrics": measured.metrics, "distance": measured.distance, **extra}


def _own_roundings(folded: FoldedModel) -> list[str]:
    """Additional rounding in ONNX Runtime's default session.

    float-inputs: MatMulNBits rounds the float input of a layer with blocks to int8. conv-biases: the bias of
    a convolution becomes a multiple of input scale times weight scale, which is coarse below 8 bits.
    """
    plan = [item for item in plans_from_json(read_json(folded.path / "folded.json")["plan"]) if item.weights]
    blocked = any(item.block and not item.activations for item in plan)
    narrow = any(
        item.layer.kind == "conv"
        and item.activations is not None
        and item.integers
        and min(item.weights.bits, item.activations.bits) < 8
        for item in plan
    )
    return [name for name, there in (("float-inputs", blocked), ("conv-biases", narrow)) if there]


def _rounds_anything(folded: FoldedModel) -> bool:
    """True if any activation is quantized, in a layer or at a point."""
    points = points_from_json(read_json(folded.path / "folded.json").get("points", []))
    return _rounds_activations(folded) or bool(rounded(points))


def _rounds_activations(folded: FoldedModel) -> bool:
    plan = plans_from_json(read_json(folded.path / "folded.json")["plan"])
    return any(item.activations for item in plan)


def _not_run(stage: str, artifacts: Artifacts, recipe: Recipe) -> dict[str, Any] | None:
    """Status and reason of a row that cannot be measured here; None if it can."""
    if stage == "engine":
        if artifacts.engine is None:
            return {"status": "not-run", "reason": artifacts.missing.get("engine", "no engine was built")}
        facts = read_json(artifacts.engine.path / "build.json")
        if facts["status"] == "built":
            lacking = why_not(artifacts.engine)
            if lacking is None and _not_run("onnx", artifacts, recipe) is not None:
                lacking = "it is compared with the onnx row, which is not measured"
            return lacking and {"status": "not-run", "reason": lacking}
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
