"""Measurements that need a GPU: the engine, and the graph on ONNX Runtime's GPU providers.

engine row        the plan, run by the probe kit's script (`engine/local_run.py`) here or on another device;
                  {"measured_on"} has its versions, latency, throughput and self-consistency
onnx["providers"] {"cuda" | "tensorrt": {"status", "reason", "nodes", "metrics", "distance"}}: the graph on
                  that provider, compared with the onnx row, and the number of nodes of each provider, since
                  the CPU runs the nodes that others refuse; only on a machine with a GPU, and only the
                  providers of this ONNX Runtime build. Goals check only that the values are finite.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from qcompress.engine.local_run import measure
from qcompress.engine.probe import EngineMeasurement, read_measurement
from qcompress.errors import MachineError
from qcompress.graph.ort_errors import ORT_ERRORS
from qcompress.parity.measure import Measured, Results, Samples, measure_row
from qcompress.parity.runners import OnnxRunner, assigned_nodes, graph_inputs_of, usable_providers
from qcompress.parity.sample_results import (
    fields_of,
    known_in,
    known_of,
    pack_samples,
    read_samples,
    results_of,
)
from qcompress.schema.recipe import AnyTask, Recipe
from qcompress.schema.tasks import Task
from qcompress.system.artifacts import Engine, OnnxModel, read_json, write_json
from qcompress.system.gpu import compute_capability
from qcompress.system.reporter import Reporter
from qcompress.tasks import TASKS

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""Names in parity.json, and in ONNX Runtime."""


def engine_row(
    measurement: EngineMeasurement, task: Task, known: Mapping[str, list[dict[str, Any]]],
    reference: Mapping[str, list[dict[str, Any]] | None],
) -> tuple[dict[str, Any], Results]:  # fmt: skip
    """Build the engine's row of parity.json, and the per-sample results.

    `task`: with the checkpoint's labels; `known`: row-independent fields of each sample, and `reference`: the
    float row's results, both by set.
    """
    module = TASKS[task.name]
    by_set = measurement.samples or {
        name: module.joined(module.results(known[name], logits, task), reference.get(name))
        for name, logits in measurement.logits.items()
    }
    metrics = {
        f"{name}.{metric}": value
        for name, results in by_set.items()
        for metric, value in module.metrics(results, task, reference.get(name)).items()
    }
    row = {
        "stage": "engine",
        "status": "measured",
        "reason": None,
        "metrics": metrics,
        "samples": sum(map(len, by_set.values())),
        "distance": measurement.distance,
        "measured_on": measurement.facts,
    }
    names = [f"{name}.{metric}" for name in by_set for metric in task.metrics]
    if isinstance(task, AnyTask) and not metrics.keys() >= set(names):
        row["elsewhere"] = names  # of the user's functions and data, which a device has not
    return row, by_set


def engine_here(
    engine: Engine, onnx: OnnxModel, samples: Samples, measured: Mapping[str, Measured], out: Path
) -> tuple[dict[str, Any], Measured | None]:
    """Measure the engine on this machine's GPU with the kit in `out`/probe. If the engine does not run, the
    row gives the reason and the results are None. `measured`: the previous rows.
    """
    measurement = measure(out / "probe", engine, onnx.file, out)
    if not isinstance(measurement, EngineMeasurement):
        return {"stage": "engine", "status": "not-run", "reason": measurement}, None
    module = TASKS[samples.task.name]
    known = {name: known_in(results, module.KNOWN) for name, results in measured["onnx"].samples.items()}
    if isinstance(samples.task, AnyTask):
        known = {name: module.known_of_samples(windows) for name, windows in samples.sets.items()}
    reference = measured["float"].samples if "float" in measured else {}
    row, results = engine_row(measurement, samples.task, known, reference)
    return row, Measured(row["metrics"], results, measurement.distance)


def provider_rows(
    recipe: Recipe, onnx: OnnxModel, samples: Samples, reference: Results | None, threads: int, out: Path,
    reporter: Reporter,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Measure the graph on each available GPU provider; the logits of the onnx row lie in `out`."""
    if compute_capability() is None:
        return {}
    rows: dict[str, dict[str, Any]] = {}
    for name, provider in PROVIDERS.items():
        if provider not in usable_providers():
            continue
        try:
            with redirect_stdout(sys.stderr):  # ONNX Runtime prints a provider's errors to stdout
                options = options_of(provider, onnx.file, recipe, samples)
                runner = OnnxRunner(onnx.file, recipe.model.family, threads, True, provider, options)
                nodes = assigned_nodes(runner.session)
                if nodes is not None and not nodes.get(provider):
                    raise MachineError(f"{provider} took no node of the graph")
                measured = measure_row(
                    f"onnx-{name}", runner, recipe, samples, reference, "onnx", out, reporter, keep=False
                )
        except (MachineError, *ORT_ERRORS) as error:
            reason = error.message if isinstance(error, MachineError) else f"{type(error).__name__}: {error}"
            rows[name] = {"status": "not-run", "reason": reason.splitlines()[0]}
            continue
        rows[name] = {"status": "measured", "reason": None, "nodes": nodes} | _shown(measured)
    return rows


def _shown(measured: Measured) -> dict[str, Any]:
    return {"metrics": measured.metrics, "distance": measured.distance}


def options_of(provider: str, file: Path, recipe: Recipe, samples: Samples) -> dict[str, str]:
    """A provider's options for this measurement. Raises MachineError for a graph that the provider cannot
    run.

    CUDA: no TF32, whose products have 10 bits. TensorRT: int8 from the graph's Q/DQ, and one profile from one
    sample to the largest batch, because the provider would build an engine for every new shape.
    """
    if provider == PROVIDERS["cuda"]:
        return {"use_tf32": "0"}
    longest = max(
        TASKS[recipe.task.name].length(sample) for windows in samples.sets.values() for sample in windows
    )
    sizes = {"batch": (1, recipe.verify.batch_size), "sequence": (1, longest)}
    return {"trt_int8_enable": "True", **_fp16(recipe), **profile_of(graph_inputs_of(file), sizes)}


def _fp16(recipe: Recipe) -> dict[str, str]:
    return {"trt_fp16_enable": "True"} if recipe.format.compute == "fp16" else {}


def profile_of(inputs: Mapping[str, list[int | str]], sizes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Minimum, optimum and maximum shapes of a graph's inputs, in the options of ONNX Runtime's TensorRT
    provider. Raises MachineError for an axis without a size.

    >>> profile_of({"x": ["batch", 3]}, {"batch": (1, 8)})["trt_profile_max_shapes"]
    'x:8x3'
    """
    free = {axis for axes in inputs.values() for axis in axes if isinstance(axis, str)} - sizes.keys()
    if free:
        raise MachineError(
            f"the axes {', '.join(sorted(free))} have no size in this measurement",
            fix="export without a key-value cache to measure the TensorRT provider",
        )

    def shapes(end: int) -> str:
        return ",".join(
            f"{name}:{'x'.join(str(sizes[axis][end] if isinstance(axis, str) else axis) for axis in axes)}"
            for name, axes in inputs.items()
        )

    low, high = shapes(0), shapes(1)
    return {
        "trt_profile_min_shapes": low,
        "trt_profile_opt_shapes": high,
        "trt_profile_max_shapes": high,
    }


def take_engine_row(run: Path, task: Task, measurement: Path) -> None:
    """Import a device's measurement into the engine row of a run's parity.json and samples.json.gz."""
    imported = read_measurement(measurement, run / "probe", run / "model.onnx")
    report = read_json(run / "parity.json")
    samples = read_samples(run / "samples.json.gz")
    module = TASKS[task.name]
    row, by_set = engine_row(
        imported,
        module.settled(task, read_json(run / "config.json")),
        {name: known_of(entry) for name, entry in samples.items()},
        {name: results_of(entry, "float") for name, entry in samples.items()},
    )
    report["rows"] = [row if old["stage"] == "engine" else old for old in report["rows"]]
    for name, results in by_set.items():
        samples[name]["rows"]["engine"] = fields_of(results, module.KNOWN)
    pack_samples(run / "samples.json.gz", samples)
    write_json(run / "parity.json", report)
