#!/usr/bin/env python3
"""Measure an engine on the device that runs it. Needs numpy and tensorrt (or tensorrt_rtx), nothing else.

    python3 measure_engine.py --plan ../engine/model.plan --out engine.json
    qcompress verify RUN --engine engine.json                       (back on the machine that holds the run)

Runs every sample of inputs.npz, compares the first ones with the logits that ONNX Runtime gave for the same
graph (reference.npz), and writes engine.json: per-sample results of a language model, or the logits of any
other model, whose metrics are computed where the run is; distances; and the hashes that tie the measurement
to this run. With --onnx it measures the ONNX file through onnxruntime instead, on a device
without TensorRT.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import hashlib
import json
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
FORMAT = 1
PAST = "past_key_values."


class CudaError(RuntimeError):
    """A CUDA runtime call failed."""


class Cuda:
    """The five functions of the CUDA runtime that an engine needs, through ctypes."""

    def __init__(self):
        for name in (
            "libcudart.so",
            "libcudart.so.13",
            "libcudart.so.12",
            "cudart64_13.dll",
            "cudart64_12.dll",
        ):
            try:
                self.library = ctypes.CDLL(name)
                break
            except OSError:
                continue
        else:
            raise CudaError("no CUDA runtime (libcudart) found: install it or set LD_LIBRARY_PATH")

    def _check(self, code, what):
        if code != 0:
            self.library.cudaGetErrorString.restype = ctypes.c_char_p
            raise CudaError(f"{what}: {self.library.cudaGetErrorString(code).decode()}")

    def allocate(self, size):
        """Device memory of `size` bytes, as an address."""
        pointer = ctypes.c_void_p()
        self._check(
            self.library.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(max(size, 1))), "cudaMalloc"
        )
        return pointer

    def free(self, pointer):
        """Give device memory back."""
        self._check(self.library.cudaFree(pointer), "cudaFree")

    def upload(self, pointer, array):
        """Host to device."""
        source = ctypes.c_void_p(array.ctypes.data)
        self._check(self.library.cudaMemcpy(pointer, source, ctypes.c_size_t(array.nbytes), 1), "cudaMemcpy")

    def download(self, array, pointer):
        """Device to host."""
        target = ctypes.c_void_p(array.ctypes.data)
        self._check(self.library.cudaMemcpy(target, pointer, ctypes.c_size_t(array.nbytes), 2), "cudaMemcpy")

    def synchronize(self):
        """Wait for the device."""
        self._check(self.library.cudaDeviceSynchronize(), "cudaDeviceSynchronize")

    def stream(self):
        """A stream of its own: nothing can be captured on the default one."""
        stream = ctypes.c_void_p()
        self._check(self.library.cudaStreamCreate(ctypes.byref(stream)), "cudaStreamCreate")
        return stream

    def wait(self, stream):
        """Until all work of a stream is done."""
        self._check(self.library.cudaStreamSynchronize(stream), "cudaStreamSynchronize")

    def captured(self, stream, launch):
        """What `launch` puts onto the stream, as a graph that `replay` starts."""
        graph, made = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self.library.cudaStreamBeginCapture(stream, 2), "cudaStreamBeginCapture")
        launch()
        self._check(self.library.cudaStreamEndCapture(stream, ctypes.byref(graph)), "cudaStreamEndCapture")
        flags = ctypes.c_ulonglong(0)
        instantiate = self.library.cudaGraphInstantiateWithFlags
        self._check(instantiate(ctypes.byref(made), graph, flags), "cudaGraphInstantiateWithFlags")
        return made

    def replay(self, graph, stream):
        """Start a captured graph."""
        self._check(self.library.cudaGraphLaunch(graph, stream), "cudaGraphLaunch")


def no_past(rows, shape):
    """Keys or values of no tokens, for a graph with a key-value cache; shape [batch, heads, past, width]."""
    return np.zeros((rows, shape[1], 0, shape[3]), np.float32)


class Launcher:
    """An engine with its inputs on the device, to be run again and again."""

    def __init__(self, runner):
        self.runner, self.cuda = runner, runner.cuda
        self.stream, self.graph = self.cuda.stream(), None

    def _enqueue(self):
        if not self.runner.context.execute_async_v3(self.stream.value or 0):
            raise RuntimeError("the engine refused to run")

    def launch(self):
        """Run once, and wait."""
        self._enqueue()
        self.cuda.wait(self.stream)

    def capture(self):
        """Make a CUDA graph of a run."""
        self.graph = self.cuda.captured(self.stream, self._enqueue)

    def replay(self):
        """Run the graph, and wait."""
        self.cuda.replay(self.graph, self.stream)
        self.cuda.wait(self.stream)


class TensorRTRunner:
    """A plan: dict of arrays -> logits."""

    def __init__(self, plan, module, trusted, cuda=None):
        self.trt = __import__(module)
        self.module = module
        logger = self.trt.Logger(self.trt.Logger.WARNING)
        runtime = self.trt.Runtime(logger)
        runtime.engine_host_code_allowed = trusted  # a version-compatible plan holds a runtime of its own
        serialized = plan.read_bytes()
        self.plan_bytes = len(serialized)
        self.engine = runtime.deserialize_cuda_engine(serialized)
        if self.engine is None:
            raise RuntimeError(
                f"{module} {self.trt.__version__} cannot load {plan}: it was built for another "
                "version or another device"
            )
        self.context = self.engine.create_execution_context()
        self.cuda = cuda or Cuda()
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        is_input = self.trt.TensorIOMode.INPUT
        self.inputs = [name for name in names if self.engine.get_tensor_mode(name) == is_input]
        outputs = [name for name in names if name not in self.inputs]
        self.output = "logits" if "logits" in outputs else outputs[0]
        self.ignored = [name for name in outputs if name != self.output]
        self.past = [name for name in self.inputs if name.startswith(PAST)]
        self.profiles, self.shapes = [], []
        for index in range(self.engine.num_optimization_profiles):
            low, best, high = self.engine.get_tensor_profile_shape(self.tokens(), index)
            self.shapes.append((tuple(low), tuple(best), tuple(high)))
            if self.past and self.engine.get_tensor_profile_shape(self.past[0], index)[0][2]:
                high = [0] * len(high)  # only for what follows a prompt
            self.profiles.append((tuple(low), tuple(high)))

    def tokens(self):
        """The input whose shape chooses a profile."""
        return "input_ids" if "input_ids" in self.inputs else self.inputs[0]

    def version(self):
        """Backend and version."""
        return {self.module: self.trt.__version__}

    def largest_batch(self, length):
        """Most sequences of this length, or images, that some profile accepts; 0 if none does."""
        fits = [high[0] for low, high in self.profiles if len(low) > 2 or low[1] <= length <= high[1]]
        return max(fits or [0])

    def select(self, shape):
        """Switch to a profile that accepts the shape."""
        for index, (low, high) in enumerate(self.profiles):
            if np.all(np.less_equal(low, shape) & np.less_equal(shape, high)):
                if index != self.context.active_optimization_profile:
                    self.context.set_optimization_profile_async(index, 0)
                    self.cuda.synchronize()
                return
        raise RuntimeError(f"no profile of this engine accepts the shape {tuple(shape)}")

    def element(self, name):
        """numpy's type of an input or output."""
        return np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name)))

    @contextlib.contextmanager
    def _bound(self, feed):
        """The engine with its inputs uploaded; yields the array for the logits and where they will be."""
        rows = len(feed[self.tokens()])
        feed = {**feed, **{name: no_past(rows, self.engine.get_tensor_shape(name)) for name in self.past}}
        self.select(feed[self.tokens()].shape)
        pointers = []

        def place(name, array):
            pointer = self.cuda.allocate(max(array.nbytes, 1))  # an address also for nothing
            pointers.append(pointer)
            self.context.set_tensor_address(name, pointer.value)
            return pointer

        try:
            for name in self.inputs:
                array = np.ascontiguousarray(feed[name], dtype=self.element(name))
                if not self.context.set_input_shape(name, array.shape):
                    raise RuntimeError(f"{name}: the engine does not accept the shape {array.shape}")
                self.cuda.upload(place(name, array), array)
            for name in self.ignored:
                place(name, np.empty(tuple(self.context.get_tensor_shape(name)), self.element(name)))
            logits = np.empty(tuple(self.context.get_tensor_shape(self.output)), self.element(self.output))
            yield logits, place(self.output, logits)
        finally:
            for pointer in pointers:
                self.cuda.free(pointer)

    def __call__(self, feed):
        with self._bound(feed) as (logits, pointer):
            if not self.context.execute_async_v3(0):
                raise RuntimeError("the engine refused to run")
            self.cuda.synchronize()
            self.cuda.download(logits, pointer)
            return logits.astype(np.float32)

    @contextlib.contextmanager
    def held(self, feed):
        """A Launcher of these inputs."""
        with self._bound(feed):
            yield Launcher(self)


class OnnxRunner:
    """An ONNX file through onnxruntime: dict of arrays -> logits."""

    def __init__(self, file, disabled_optimizers=()):
        import onnxruntime

        self.runtime = onnxruntime
        self.session = onnxruntime.InferenceSession(
            str(file),
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(disabled_optimizers) or None,
        )

    def version(self):
        """Backend and version."""
        return {"onnxruntime": self.runtime.__version__}

    def largest_batch(self, length):
        """No profile limits an ONNX session."""
        return 8

    def __call__(self, feed):
        known = {item.name for item in self.session.get_inputs()}
        arrays = {
            name: array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
            for name, array in feed.items()
            if name in known
        }
        rows = len(next(iter(arrays.values())))
        elements = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
        for item in self.session.get_inputs():
            if item.name.startswith(PAST):
                arrays[item.name] = no_past(rows, item.shape).astype(elements[item.type])
        names = [item.name for item in self.session.get_outputs()]
        name = "logits" if "logits" in names else names[0]
        return self.session.run([name], arrays)[0].astype(np.float32)


def measure(logits, ids, first):
    """Summed negative log-likelihood and count of best tokens of one sample; logits [length, vocabulary]."""
    scores = logits[first - 1 : len(ids) - 1].astype(np.float64)
    targets = ids[first:]
    top = scores.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(scores - top).sum(axis=-1)) + top[:, 0]
    nll = (log_sum - scores[np.arange(len(targets)), targets]).sum()
    return float(nll), int((scores.argmax(axis=-1) == targets).sum())


def compare(reference, row):
    """Sums that make a distance; both [positions, vocabulary]."""
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
    """The fields of parity.json from the sums of all compared samples."""
    total = {key: sum(part[key] for part in parts) for key in parts[0]}
    norm, error = math.sqrt(total["rr"] * total["ss"]), total["ee"]
    return {
        "to": "onnx",
        "max_abs": max(part["max_abs"] for part in parts),
        "mean_abs": total["absolute"] / total["count"],
        "range": max(part["high"] for part in parts) - min(part["low"] for part in parts),
        "cosine": total["dot"] / norm if norm else math.nan,
        "snr_db": decibels(total["rr"], error),
        # one logit is always the best: a regression has no agreement
        "top1_agreement": total["agree"] / total["positions"]
        if total["count"] > total["positions"]
        else None,
        "positions": total["positions"],
    }


def decibels(signal, error):
    """10 log10 of a ratio of squares; None where nothing differs, NaN where there is no signal."""
    if error == 0:
        return None
    return 10 * math.log10(signal / error) if signal else math.nan


def sha256(file):
    """Digest of a file's content."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 22), b""):
            digest.update(chunk)
    return digest.hexdigest()


def batches(lengths, runner, limit):
    """Row indices in groups of one length that the engine accepts."""
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
    """All samples: results in the order of inputs.npz, the distance, and seconds spent in the engine."""
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
        for place, row in enumerate(rows):
            one, two = measure(logits[place], block[place].astype(np.int64), int(first[row]))
            nll.append(one)
            correct.append(two)
            if row < len(reference):
                known = positions[positions < length]
                parts.append(compare(reference[row, : len(known)], logits[place][known]))
    return nll, correct, distance(parts), seconds


def cut(array, length):
    """Sequences [rows, longest] as long as they are; images [rows, ...] are whole."""
    return array[:, :length] if array.ndim == 2 else array


def run_logits(runner, inputs, reference, positions, limit):
    """All samples of a model that is no language model: its logits, the distance, and seconds in the engine.

    Logits of a sample: [labels], or [longest, labels] with zeros behind the sample's length.
    """
    lengths = inputs["length"]
    names = [name for name in inputs if name.startswith("input.")]
    found, parts, seconds = None, [], 0.0
    for rows in batches(lengths, runner, limit):
        length = int(lengths[rows[0]])
        feed = {name[len("input.") :]: cut(inputs[name][rows], length) for name in names}
        began = time.perf_counter()
        logits = runner(feed)
        seconds += time.perf_counter() - began
        if found is None:
            longest = (inputs[names[0]].shape[1],) if logits.ndim == 3 else ()
            found = np.zeros((len(lengths), *longest, logits.shape[-1]), np.float32)
        for place, row in enumerate(rows):
            whole = logits[place] if logits.ndim == 3 else logits[place][None]
            found[(row, slice(0, length)) if logits.ndim == 3 else row] = logits[place]
            if row < len(reference):
                known = positions[positions < len(whole)]
                parts.append(compare(reference[row, : len(known)], whole[known]))
    return found, distance(parts), seconds


def beside(runner, inputs):
    """Speed and self-consistency of an engine, and its device. The results do not depend on them: what fails
    is a reason.
    """
    sys.path.insert(0, str(HERE))
    import engine_speed

    found = {}
    for name in ("consistency", "speed", "device"):
        try:
            found[name] = getattr(engine_speed, name)(runner, inputs)
        except (RuntimeError, ValueError, OSError, AttributeError, MemoryError) as error:
            found[name] = {"reason": f"{type(error).__name__}: {error}"}
    return found


def packed(logits):
    """An array as JSON that keeps every bit."""
    data = np.ascontiguousarray(logits, dtype="<f4").tobytes()
    return {"shape": list(logits.shape), "float32": base64.b64encode(data).decode("ascii")}


def main(arguments=None, cuda=None):
    """Command line. `cuda`: device memory that stands in for the CUDA runtime, with the methods of `Cuda`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--plan", type=Path, help="the serialized engine")
    what.add_argument("--onnx", type=Path, help="an ONNX file, measured through onnxruntime")
    parser.add_argument(
        "--module", default=None, help="tensorrt or tensorrt_rtx; default: as the plan was built"
    )
    parser.add_argument(
        "--trust-plan", action="store_true", help="run the code that a version-compatible plan holds"
    )
    parser.add_argument("--no-speed", action="store_true", help="measure no latency")
    parser.add_argument("--batch", type=int, default=8, help="largest batch")
    parser.add_argument("--out", type=Path, default=Path("engine.json"))
    options = parser.parse_args(arguments)

    facts = json.loads((HERE / "probe.json").read_text())
    file = options.plan or options.onnx
    digest = sha256(file)
    expected = facts["plan_sha256"] if options.plan else facts["onnx_sha256"]
    if expected is not None and digest != expected:
        sys.exit(
            f"{file} is not the file that this probe belongs to (sha256 {digest[:12]}, expected "
            f"{expected[:12]}): copy probe/ and engine/ from the same run"
        )
    if options.onnx:
        runner = OnnxRunner(file, facts.get("disabled_optimizers", ()))
    else:
        runner = TensorRTRunner(file, options.module or facts["backend"], options.trust_plan, cuda)
    with np.load(HERE / "inputs.npz") as archive:
        inputs = {name: archive[name] for name in archive.files}
    reference = np.load(HERE / "reference.npz")
    compared = (reference["logits"], reference["positions"], options.batch)
    if facts["per_sample"] == "logits":
        logits, far, seconds = run_logits(runner, inputs, *compared)
        found = {"logits": packed(logits)}
    else:
        nll, correct, far, seconds = run(runner, inputs, *compared)
        found = {"nll": nll, "correct": correct}
    result = {
        "format": FORMAT,
        "measured": "plan" if options.plan else "onnx",
        "file_sha256": digest,
        "onnx_sha256": facts["onnx_sha256"],
        "inputs_sha256": sha256(HERE / "inputs.npz"),
        **found,
        "distance": far,
        "seconds": seconds,
        "versions": {**runner.version(), "numpy": np.__version__, "python": platform.python_version()},
        "machine": platform.machine(),
        **({} if options.onnx or options.no_speed else beside(runner, inputs)),
    }
    options.out.write_text(json.dumps(result, indent=1))
    words = [f"{len(inputs['length'])} samples"]
    if "nll" in found:
        tokens = int((inputs["length"] - inputs["first"]).sum())
        mean = sum(nll) / tokens  # of an engine gone astray, too large for exp
        words.append(f"perplexity {math.exp(mean) if mean < 700 else math.inf:.4f}")
    if far["top1_agreement"] is not None:
        words.append(f"top-1 agreement with ONNX {far['top1_agreement']:.5f}")
    words.append(f"largest difference to ONNX {far['max_abs']:.3g}")
    for entry in result.get("speed", ()) if isinstance(result.get("speed"), list) else ():
        latency = entry["latency_ms"]
        words.append(f"{entry['shape']}: {latency['median']:.3g} ms (p99 {latency['p99']:.3g})")
    print(", ".join(words) + f", {seconds:.1f} s -> {options.out}")


if __name__ == "__main__":
    main()
