"""What only a GPU can measure: the engine, and the graph on ONNX Runtime's GPU providers.

engine row        the plan, run by the probe kit's own script (`engine.py`), or taken in from a device that
                  ran it; {"measured_on"} has its versions, latency, throughput and self-consistency
onnx["providers"] {"cuda" | "tensorrt": {"status", "reason", "nodes", "metrics", "distance"}}: the same graph
                  on that provider, compared with the onnx row, and how many nodes each provider took, since
                  the CPU takes what the others leave; only on a machine with a GPU, and only those providers
                  that this ONNX Runtime was built with. No goal judges them but that they must be finite.
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
from qcompress.parity.measure import Measured, Results, Samples, measure_row
from qcompress.parity.runners import ORT_ERRORS, OnnxRunner, assigned_nodes, graph_inputs_of, usable_providers
from qcompress.parity.sample_results import (
    fields_of,
    known_in,
    known_of,
    pack_samples,
    read_samples,
    results_of,
)
from qcompress.schema.recipe import Recipe
from qcompress.schema.tasks import Task
from qcompress.system.artifacts import Engine, OnnxModel, read_json, write_json
from qcompress.system.gpu import compute_capability
from qcompress.system.reporter import Reporter
from qcompress.tasks import TASKS

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""Names in parity.json, and ONNX Runtime's."""


def engine_row(
    found: EngineMeasurement, task: Task, known: Mapping[str, list[dict[str, Any]]],
    reference: Mapping[str, list[dict[str, Any]] | None],
) -> tuple[dict[str, Any], Results]:  # fmt: skip
    """The row of parity.json, and the results of each sample.

    `task`: with the checkpoint's labels; `known`: what is known of each sample whatever the row, and
    `reference`: the float row's results, both by set.
    """
    module = TASKS[task.name]
    by_set = found.samples or {
        name: module.results(known[name], logits, task) for name, logits in found.logits.items()
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
        "distance": found.distance,
        "measured_on": found.facts,
    }
    return row, by_set


def engine_here(
    engine: Engine, onnx: OnnxModel, samples: Samples, measured: Mapping[str, Measured], out: Path
) -> tuple[dict[str, Any], Measured | None]:
    """The row as this machine's GPU gives it, with the kit in `out`/probe; without results where the engine
    does not run, and the row says why. `measured`: the rows before.
    """
    found = measure(out / "probe", engine, onnx.file, out)
    if not isinstance(found, EngineMeasurement):
        return {"stage": "engine", "status": "not-run", "reason": found}, None
    names = TASKS[samples.task.name].KNOWN
    known = {name: known_in(results, names) for name, results in measured["onnx"].samples.items()}
    reference = measured["float"].samples if "float" in measured else {}
    row, results = engine_row(found, samples.task, known, reference)
    return row, Measured(row["metrics"], results, found.distance)


def provider_rows(
    recipe: Recipe, onnx: OnnxModel, samples: Samples, reference: Results | None, threads: int, out: Path,
    reporter: Reporter,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The graph on each GPU provider that is here; the logits of the onnx row wait in `out`."""
    if compute_capability() is None:
        return {}
    rows: dict[str, dict[str, Any]] = {}
    for name, provider in PROVIDERS.items():
        if provider not in usable_providers():
            continue
        try:
            with redirect_stdout(sys.stderr):  # ONNX Runtime prints what goes wrong with a provider
                options = options_of(provider, onnx.file, recipe, samples)
                runner = OnnxRunner(onnx.file, recipe.model.family, threads, True, provider, options)
                nodes = assigned_nodes(runner.session)
                if nodes is not None and not nodes.get(provider):
                    raise MachineError(f"{provider} took no node of the graph")
                found = measure_row(
                    f"onnx-{name}", runner, recipe, samples, reference, "onnx", out, reporter, keep=False
                )
        except (MachineError, *ORT_ERRORS) as error:
            said = error.message if isinstance(error, MachineError) else f"{type(error).__name__}: {error}"
            rows[name] = {"status": "not-run", "reason": said.splitlines()[0]}
            continue
        rows[name] = {"status": "measured", "reason": None, "nodes": nodes} | _shown(found)
    return rows


def _shown(found: Measured) -> dict[str, Any]:
    return {"metrics": found.metrics, "distance": found.distance}


def options_of(provider: str, file: Path, recipe: Recipe, samples: Samples) -> dict[str, str]:
    """A provider's options for this measurement. Raises MachineError for a graph that it cannot take.

    CUDA: no TF32, whose products have 10 bits. TensorRT: int8 from the graph's Q/DQ, and one profile from one
    sample to the largest batch, since it would build an engine for every new shape.
    """
    if provider == PROVIDERS["cuda"]:
        return {"use_tf32": "0"}
    longest = max(
        TASKS[recipe.task.name].length(sample) for found in samples.sets.values() for sample in found
    )
    sizes = {"batch": (1, recipe.verify.batch_size), "sequence": (1, longest)}
    return {"trt_int8_enable": "True", **_fp16(recipe), **profile_of(graph_inputs_of(file), sizes)}


def _fp16(recipe: Recipe) -> dict[str, str]:
    return {"trt_fp16_enable": "True"} if recipe.format.compute == "fp16" else {}


def profile_of(inputs: Mapping[str, list[int | str]], sizes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Least, likeliest and largest shapes of a graph's inputs, as ONNX Runtime's TensorRT provider reads
    them.

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
    """Fill the engine row of a run's parity.json and samples.json.gz from what a device measured."""
    found = read_measurement(measurement, run / "probe", run / "model.onnx")
    report = read_json(run / "parity.json")
    samples = read_samples(run / "samples.json.gz")
    module = TASKS[task.name]
    row, by_set = engine_row(
        found,
        module.settled(task, read_json(run / "config.json")),
        {name: known_of(entry) for name, entry in samples.items()},
        {name: results_of(entry, "float") for name, entry in samples.items()},
    )
    report["rows"] = [row if old["stage"] == "engine" else old for old in report["rows"]]
    for name, results in by_set.items():
        samples[name]["rows"]["engine"] = fields_of(results, module.KNOWN)
    pack_samples(run / "samples.json.gz", samples)
    write_json(run / "parity.json", report)
