"""Speed, self-consistency, device and kernels of an engine, for measure_engine.py: latency and throughput of
each profile. Needs numpy; accepts any runner with the methods of TensorRTRunner.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import time

import numpy as np

WARM_UP, RUNS, SECONDS = 10, 200, 2.0
"""Warm-up runs, and the limits of measured runs and seconds, for each launch mode of a profile."""


def feed_of(inputs, rows, length, *image):
    """Build inputs of `rows` sequences of `length` tokens, or images of the shape (`length`, *image), by
    repeating the probe's samples. `inputs` as in inputs.npz.
    """
    if "ids" in inputs:
        ids = inputs["ids"]
        block = _grown(ids, rows, length)
        mask = np.ones_like(block)
        return {"input_ids": block, "attention_mask": mask, "position_ids": np.cumsum(mask, axis=1) - 1}
    names = [name for name in inputs if name.startswith("input.")]
    if "units" in inputs:  # samples of one size
        return {name[len("input.") :]: _grown(inputs[name], rows) for name in names}
    feed = {name[len("input.") :]: _grown(inputs[name], rows, length, *image) for name in names}
    if "attention_mask" in feed:  # no padding: every profile is measured at its own length
        feed["attention_mask"] = np.ones_like(feed["attention_mask"])
    return feed


def _grown(array, *shape):
    times = [-(-wanted // size) for wanted, size in zip(shape, array.shape)]  # noqa: B905 (Python 3.8)
    return np.ascontiguousarray(np.tile(array, times)[tuple(slice(size) for size in shape)])


def spread(milliseconds):
    """Median, 99th percentile and minimum."""
    return {
        "median": float(np.median(milliseconds)),
        "p99": float(np.percentile(milliseconds, 99)),
        "least": float(np.min(milliseconds)),
        "runs": len(milliseconds),
    }


def clocked(launch, clock=time.perf_counter):
    """Milliseconds of each run of `launch`, which returns when the device is done."""
    for _ in range(WARM_UP):
        launch()
    milliseconds, end = [], clock() + SECONDS
    while len(milliseconds) < RUNS and (not milliseconds or clock() < end):
        began = clock()
        launch()
        milliseconds.append(1e3 * (clock() - began))
    return milliseconds


def speed(runner, inputs):
    """Measure each profile at its optimal shape: latency without host copies, with a plain launch and, if the
    device supports it, as a CUDA graph.
    """
    entries = []
    for index, (_, best, _) in enumerate(runner.shapes):
        entry = {"profile": index, "shape": [int(size) for size in best]}
        with runner.held(feed_of(inputs, *best)) as launcher:
            plain = spread(clocked(launcher.launch))
            entry["latency_ms"], entry["rows_per_s"] = plain, 1e3 * best[0] / plain["median"]
            try:
                launcher.capture()
                graph = spread(clocked(launcher.replay))
                entry["cuda_graph"] = {"latency_ms": graph, "rows_per_s": 1e3 * best[0] / graph["median"]}
            except RuntimeError as error:
                entry["cuda_graph"] = {"reason": str(error)}
        entries.append(entry)
    return entries


def consistency(runner, inputs):
    """Largest difference of a row's logits, over all profiles: among the rows of a batch of copies, and
    between the smallest, the optimal and the largest batch. A single kernel gives 0, another kernel a few
    units in the last place.
    """
    repeated, shapes = 0.0, 0.0
    for low, best, high in runner.shapes:
        sample = feed_of(inputs, 1, *(int(size) for size in best[1:]))
        first = None
        for rows in sorted({int(low[0]), int(best[0]), int(high[0])}):
            logits = runner({name: np.repeat(array, rows, axis=0) for name, array in sample.items()})
            repeated = max(repeated, float(np.abs(logits - logits[:1]).max()))
            first = logits[0] if first is None else first
            shapes = max(shapes, float(np.abs(logits[0] - first).max()))
    return {"repeated_rows_max_abs": repeated, "batches_max_abs": shapes}


def device(runner, inputs):
    """Name of the GPU (None if unknown), and bytes that the engine needs there: its file, which is mostly
    weights, and the activations of one context.
    """
    engine = runner.engine
    context = getattr(engine, "device_memory_size_v2", None)  # of 64 bits, from TensorRT 10.1 on
    if context is None:
        context = engine.device_memory_size
    return {"gpu": gpu(), "memory_bytes": int(runner.plan_bytes + context)}


INTEGERS = ("int8", "int4")
"""Words for integers in the data types of an engine's tensors."""


def kernels(runner, inputs):
    """Count the layers of the engine that read integers, as its inspector lists them: `layers`, `integer`,
    and the names of these layers. An engine that was built without detailed profiling lists names only; then
    `integer` is None, with a reason. Source: TensorRT's documentation of IEngineInspector.
    """
    inspector = runner.engine.create_engine_inspector()
    text = inspector.get_engine_information(runner.trt.LayerInformationFormat.JSON)
    layers = json.loads(text).get("Layers", [])
    if not all(isinstance(layer, dict) for layer in layers):
        reason = (
            "built without detailed profiling: the inspector lists the names of the layers, not their types"
        )
        return {"layers": len(layers), "integer": None, "names": [], "reason": reason}
    names = [str(layer.get("Name")) for layer in layers if _reads_integers(layer)]
    return {"layers": len(layers), "integer": len(names), "names": names}


def _reads_integers(layer):
    """True if an input of the layer is int8 or int4, such as `Int8` or `Row major Int8 format`."""
    words = [str(tensor.get("Format/Datatype", "")) for tensor in layer.get("Inputs", [])]
    return any(kind in word.lower() for word in words for kind in INTEGERS)


BOARD = pathlib.Path("/proc/device-tree/model")
"""Name of a Jetson board, which has no nvidia-smi."""


def gpu():
    """Name of the first GPU, or of the board; None if unknown."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=30,
            check=True,
        )
        names = listing.stdout.decode("utf-8", "replace").split("\n")
        if names[0].strip():
            return names[0].strip()
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        return BOARD.read_bytes().decode("utf-8", "replace").strip("\0\n ") or None
    except OSError:
        return None
