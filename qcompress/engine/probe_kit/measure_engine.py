#!/usr/bin/env python3
"""Measure an engine on the device that runs it. Needs numpy and tensorrt (or tensorrt_rtx), nothing else.

    python3 measure_engine.py --plan ../engine/model.plan --out engine.json
    qcompress verify RUN --engine engine.json                       (back on the machine that holds the run)

Runs every sample of inputs.npz, compares the first ones with ONNX Runtime's logits for the graph
(reference.npz), and writes engine.json: per-sample results of a language model, or the logits of any other
model, whose metrics are computed from the run; distances; and the hashes that tie the measurement to this
run. With --onnx it measures the ONNX file through onnxruntime instead, on a device without TensorRT.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # an isolated or safe-path interpreter leaves it out

import engine_speed  # noqa: E402
import strict_json  # noqa: E402
from engine_runners import OnnxRunner, TensorRTRunner  # noqa: E402

FORMAT = 1


def measure(logits, ids, first):
    """Summed negative log-likelihood and number of correct top-1 tokens of one sample; logits [length,
    vocabulary].
    """
    return measure_at(logits[first - 1 : len(ids) - 1], ids[first:])


def measure_at(logits, targets):
    """Results of positions with a target token each; logits [positions, vocabulary]."""
    scores = logits.astype(np.float64)
    top = scores.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(scores - top).sum(axis=-1)) + top[:, 0]
    nll = (log_sum - scores[np.arange(len(targets)), targets]).sum()
    return float(nll), int((scores.argmax(axis=-1) == targets).sum())


def compare(reference, row):
    """Partial sums of a distance; both [positions, vocabulary]."""
    reference, row = reference.astype(np.float64), row.astype(np.float64)
    error = np.abs(row - reference)
    return {
        "max_abs": error.max(),
        "absolute": error.sum(),
        "low": reference.min(),
        "high": reference.max(),
        "dot": (reference * row).sum(),
        "rr": (reference**2).sum(),
        "ss": (row**2).sum(),
        "ee": (error**2).sum(),
        "agree": int((reference.argmax(-1) == row.argmax(-1)).sum()),
        "positions": len(row),
        "count": row.size,
    }


def distance(parts):
    """Distance fields of parity.json, from the sums of all compared samples."""
    total = {key: sum(part[key] for part in parts) for key in parts[0]}
    norm, error = math.sqrt(total["rr"] * total["ss"]), total["ee"]
    return {
        "to": "onnx",
        "max_abs": max(part["max_abs"] for part in parts),
        "mean_abs": total["absolute"] / total["count"],
        "range": max(part["high"] for part in parts) - min(part["low"] for part in parts),
        "cosine": total["dot"] / norm if norm else math.nan,
        "snr_db": decibels(total["rr"], error),
        # a regression's single logit always ranks first: it has no agreement
        "top1_agreement": total["agree"] / total["positions"]
        if total["count"] > total["positions"]
        else None,
        "positions": total["positions"],
    }


def decibels(signal, error):
    """10 log10 of a ratio of squares; None for zero error, NaN for zero signal."""
    if error == 0:
        return None
    return 10 * math.log10(signal / error) if signal else math.nan


def sha256(file):
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 22), b""):
            digest.update(chunk)
    return digest.hexdigest()


def batches(lengths, runner, limit):
    """Row indices in groups of equal length that the engine accepts."""
    order, start = list(range(len(lengths))), 0
    while start < len(order):
        length = lengths[order[start]]
        size = min(limit, runner.largest_batch(int(length)))
        if size == 0:
            raise RuntimeError(f"no profile of this engine accepts a sequence of {length} tokens")
        end = start + 1
        while end < len(order) and end - start < size and lengths[order[end]] == length:
            end += 1
        yield order[start:end]
        start = end


def run(runner, inputs, reference, positions, limit):
    """Run all samples of a language model: results in the order of inputs.npz, the distance, and seconds
    spent in the engine.
    """
    ids, lengths, first = inputs["ids"], inputs["length"], inputs["first"]
    nll, correct, parts, seconds = [], [], [], 0.0
    for rows in batches(lengths, runner, limit):
        length = int(lengths[rows[0]])
        block = ids[rows, :length]
        mask = np.ones_like(block)
        feed = {"input_ids": block, "attention_mask": mask, "position_ids": np.cumsum(mask, axis=1) - 1}
        began = time.perf_counter()
        logits = runner(feed)
        seconds += time.perf_counter() - began
        for index, row in enumerate(rows):
            sample_nll, sample_correct = measure(
                logits[index], block[index].astype(np.int64), int(first[row])
            )
            nll.append(sample_nll)
            correct.append(sample_correct)
            if row < len(reference):
                known = positions[positions < length]
                parts.append(compare(reference[row, : len(known)], logits[index][known]))
    return nll, correct, distance(parts), seconds


def run_masked(runner, inputs, reference, positions, limit):
    """Run all samples of a model of masked tokens; returns as `run`."""
    lengths, targets = inputs["length"], inputs["targets"]
    names = [name for name in inputs if name.startswith("input.")]
    nll, correct, parts, seconds = [], [], [], 0.0
    for rows in batches(lengths, runner, limit):
        length = int(lengths[rows[0]])
        feed = {name[len("input.") :]: inputs[name][rows, :length] for name in names}
        began = time.perf_counter()
        logits = runner(feed)
        seconds += time.perf_counter() - began
        for index, row in enumerate(rows):
            masked = np.flatnonzero(targets[row, :length] >= 0)
            sample_nll, sample_correct = measure_at(logits[index][masked], targets[row, masked])
            nll.append(sample_nll)
            correct.append(sample_correct)
            if row < len(reference):
                known = positions[positions < length]
                parts.append(compare(reference[row, : len(known)], logits[index][known]))
    return nll, correct, distance(parts), seconds


def cut(array, length):
    """Sequences [rows, longest] cut to `length`; images [rows, ...] unchanged."""
    return array[:, :length] if array.ndim == 2 else array


def run_logits(runner, inputs, reference, positions, limit):
    """Run all samples of any other model: its logits, the distance, and seconds spent in the engine.

    Logits of a sample: [labels], or [longest, labels] with zeros behind the sample's length. With `units`
    [values] among the inputs samples have one size, and outputs are compared in these units.
    """
    lengths, units = inputs["length"], inputs.get("units")
    names = [name for name in inputs if name.startswith("input.")]
    all_logits, parts, seconds = None, [], 0.0
    for rows in batches(lengths, runner, limit):
        length = int(lengths[rows[0]])
        feed = {name[len("input.") :]: inputs[name][rows] for name in names}
        if units is None:
            feed = {name: cut(array, length) for name, array in feed.items()}
        began = time.perf_counter()
        logits = runner(feed)
        seconds += time.perf_counter() - began
        if all_logits is None:
            longest = (inputs[names[0]].shape[1],) if logits.ndim == 3 else ()
            all_logits = np.zeros((len(lengths), *longest, logits.shape[-1]), np.float32)
        for index, row in enumerate(rows):
            whole = logits[index] if logits.ndim == 3 else logits[index][None]
            whole = whole if units is None else whole / units
            all_logits[(row, slice(0, length)) if logits.ndim == 3 else row] = logits[index]
            if row < len(reference):
                known = positions[positions < len(whole)]
                parts.append(compare(reference[row, : len(known)], whole[known]))
    return all_logits, distance(parts), seconds


def beside(runner, inputs):
    """Speed, self-consistency, device and kernels of an engine. They are optional: a failure is recorded as a
    reason.
    """
    measurements = {}
    for name in ("consistency", "speed", "device", "kernels"):
        try:
            measurements[name] = getattr(engine_speed, name)(runner, inputs)
        except (RuntimeError, ValueError, OSError, AttributeError, MemoryError) as error:
            measurements[name] = {"reason": f"{type(error).__name__}: {error}"}
    return measurements


def packed(logits):
    """Encode an array as JSON without loss."""
    data = np.ascontiguousarray(logits, dtype="<f4").tobytes()
    return {"shape": list(logits.shape), "float32": base64.b64encode(data).decode("ascii")}


def read_options(arguments):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--plan", type=Path, help="the serialized engine")
    source.add_argument("--onnx", type=Path, help="an ONNX file, measured through onnxruntime")
    parser.add_argument(
        "--module", default=None, help="tensorrt or tensorrt_rtx; default: as the plan was built"
    )
    parser.add_argument(
        "--trust-plan", action="store_true", help="run the code that a version-compatible plan holds"
    )
    parser.add_argument("--no-speed", action="store_true", help="measure no latency")
    parser.add_argument("--batch", type=int, default=8, help="largest batch")
    parser.add_argument("--out", type=Path, default=Path("engine.json"))
    return parser.parse_args(arguments)


def own_file(options, facts):
    """The file to measure and its SHA-256; exits with a message if the kit belongs to another file."""
    file = options.plan or options.onnx
    digest = sha256(file)
    expected = facts["plan_sha256"] if options.plan else facts["onnx_sha256"]
    if expected is not None and digest != expected:
        sys.exit(
            f"{file} is not the file that this probe belongs to (sha256 {digest[:12]}, expected "
            f"{expected[:12]}): copy probe/ and engine/ from the same run"
        )
    return file, digest


def main(arguments=None, cuda=None):
    """Measure. `cuda`: replacement of the CUDA runtime, with the methods of `Cuda`."""
    options = read_options(arguments)
    facts = json.loads((HERE / "probe.json").read_text())
    file, digest = own_file(options, facts)
    outputs = facts.get("outputs", ())
    if options.onnx:
        runner = OnnxRunner(file, facts.get("disabled_optimizers", ()), outputs)
    else:
        module = options.module or facts["backend"]
        runner = TensorRTRunner(file, module, options.trust_plan, cuda, outputs)
    with np.load(HERE / "inputs.npz") as archive:
        inputs = {name: archive[name] for name in archive.files}
    reference = np.load(HERE / "reference.npz")
    compared = (reference["logits"], reference["positions"], options.batch)
    if facts["per_sample"] == "logits":
        logits, far, seconds = run_logits(runner, inputs, *compared)
        per_sample = {"logits": packed(logits)}
    else:
        measured = run_masked if "targets" in inputs else run
        nll, correct, far, seconds = measured(runner, inputs, *compared)
        per_sample = {"nll": nll, "correct": correct}
    result = {
        "format": FORMAT,
        "measured": "plan" if options.plan else "onnx",
        "file_sha256": digest,
        "onnx_sha256": facts["onnx_sha256"],
        "inputs_sha256": sha256(HERE / "inputs.npz"),
        **per_sample,
        "distance": far,
        "seconds": seconds,
        "versions": {**runner.version(), "numpy": np.__version__, "python": platform.python_version()},
        "machine": platform.machine(),
        **({} if options.onnx or options.no_speed else beside(runner, inputs)),
    }
    if not facts.get("ranked", True):
        far["top1_agreement"] = None  # the largest value of an embedding is not an answer
    options.out.write_text(strict_json.dumps(result, indent=1))
    print(", ".join(words(result, inputs)) + f", {seconds:.1f} s -> {options.out}")


def words(result, inputs):
    """Summary of a measurement, in parts."""
    yield f"{len(inputs['length'])} samples"
    if "nll" in result:
        masked = "targets" in inputs
        tokens = int((inputs["targets"] >= 0).sum() if masked else (inputs["length"] - inputs["first"]).sum())
        mean = sum(result["nll"]) / tokens  # of an engine gone astray, too large for exp
        yield f"{'pseudo-' if masked else ''}perplexity {math.exp(mean) if mean < 700 else math.inf:.4f}"
    far = result["distance"]
    if far["top1_agreement"] is not None:
        yield f"top-1 agreement with ONNX {far['top1_agreement']:.5f}"
    yield f"largest difference to ONNX {far['max_abs']:.3g}"
    speed = result.get("speed")
    for entry in speed if isinstance(speed, list) else ():
        latency = entry["latency_ms"]
        yield f"{entry['shape']}: {latency['median']:.3g} ms (p99 {latency['p99']:.3g})"


if __name__ == "__main__":
    main()
