"""Runners of a plan or an ONNX file on a device, for measure_engine.py: dict of arrays -> logits. Needs
numpy, and tensorrt, tensorrt_rtx or onnxruntime.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import re

import numpy as np

PAST = "past_key_values."


class CudaError(RuntimeError):
    """A CUDA runtime call failed."""


class Cuda:
    """CUDA runtime functions that an engine needs, through ctypes."""

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

    def _check(self, code, call):
        if code != 0:
            self.library.cudaGetErrorString.restype = ctypes.c_char_p
            raise CudaError(f"{call}: {self.library.cudaGetErrorString(code).decode()}")

    def allocate(self, size):
        """Allocate `size` bytes of device memory; returns the address."""
        pointer = ctypes.c_void_p()
        self._check(
            self.library.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(max(size, 1))), "cudaMalloc"
        )
        return pointer

    def free(self, pointer):
        """Free device memory."""
        self._check(self.library.cudaFree(pointer), "cudaFree")

    def upload(self, pointer, array):
        """Copy from host to device."""
        source = ctypes.c_void_p(array.ctypes.data)
        self._check(self.library.cudaMemcpy(pointer, source, ctypes.c_size_t(array.nbytes), 1), "cudaMemcpy")

    def download(self, array, pointer):
        """Copy from device to host."""
        target = ctypes.c_void_p(array.ctypes.data)
        self._check(self.library.cudaMemcpy(target, pointer, ctypes.c_size_t(array.nbytes), 2), "cudaMemcpy")

    def synchronize(self):
        """Wait for the device."""
        self._check(self.library.cudaDeviceSynchronize(), "cudaDeviceSynchronize")

    def stream(self):
        """Create a stream; CUDA graphs cannot be captured on the default one."""
        stream = ctypes.c_void_p()
        self._check(self.library.cudaStreamCreate(ctypes.byref(stream)), "cudaStreamCreate")
        return stream

    def wait(self, stream):
        """Wait until all work of a stream is done."""
        self._check(self.library.cudaStreamSynchronize(stream), "cudaStreamSynchronize")

    def captured(self, stream, launch):
        """Capture the work that `launch` puts on the stream as a CUDA graph for `replay`."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self.library.cudaStreamBeginCapture(stream, 2), "cudaStreamBeginCapture")
        launch()
        self._check(self.library.cudaStreamEndCapture(stream, ctypes.byref(graph)), "cudaStreamEndCapture")
        flags = ctypes.c_ulonglong(0)
        instantiate = self.library.cudaGraphInstantiateWithFlags
        self._check(instantiate(ctypes.byref(executable), graph, flags), "cudaGraphInstantiateWithFlags")
        return executable

    def replay(self, graph, stream):
        """Launch a captured graph."""
        self._check(self.library.cudaGraphLaunch(graph, stream), "cudaGraphLaunch")


def no_past(rows, shape):
    """Empty keys or values for a graph with a key-value cache; shape [batch, heads, past, width]."""
    return np.zeros((rows, shape[1], 0, shape[3]), np.float32)


def side_by_side(arrays, is_one):
    """The logits, fp32; several outputs [batch, ...] as one array [batch, values]."""
    if is_one:
        return arrays[0].astype(np.float32)
    return np.concatenate([array.reshape(len(array), -1).astype(np.float32) for array in arrays], axis=1)


class Launcher:
    """An engine with its inputs on the device, for repeated runs."""

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
        """Capture one run as a CUDA graph."""
        self.graph = self.cuda.captured(self.stream, self._enqueue)

    def replay(self):
        """Launch the CUDA graph, and wait."""
        self.cuda.replay(self.graph, self.stream)
        self.cuda.wait(self.stream)


class TensorRTRunner:
    """Runner of a plan: dict of arrays -> logits."""

    def __init__(self, plan, module, trusted, cuda=None, outputs=()):
        self.trt = __import__(module)
        self.module = module
        logger = self.trt.Logger(self.trt.Logger.WARNING)
        runtime = self.trt.Runtime(logger)
        runtime.engine_host_code_allowed = trusted  # a version-compatible plan contains its own runtime
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
        given = [name for name in names if name not in self.inputs]
        self.outputs = list(outputs) or ["logits" if "logits" in given else given[0]]
        self.ignored = [name for name in given if name not in self.outputs]
        self.is_one = not outputs
        self.past = [name for name in self.inputs if name.startswith(PAST)]
        self.profiles, self.shapes = [], []
        for index in range(self.engine.num_optimization_profiles):
            low, best, high = self.engine.get_tensor_profile_shape(self.tokens(), index)
            self.shapes.append((tuple(low), tuple(best), tuple(high)))
            if self.past and self.engine.get_tensor_profile_shape(self.past[0], index)[0][2]:
                high = [0] * len(high)  # this profile needs a non-empty cache
            self.profiles.append((tuple(low), tuple(high)))

    def tokens(self):
        """Name of the input whose shape selects a profile."""
        return "input_ids" if "input_ids" in self.inputs else self.inputs[0]

    def version(self):
        """Backend and its version."""
        return {self.module: self.trt.__version__}

    def largest_batch(self, length):
        """Largest number of sequences of this length, or of images, that a profile accepts; 0 if none
        does.
        """
        fits = [
            high[0]
            for low, high in self.profiles
            if len(low) != 2 or low[1] == high[1] or low[1] <= length <= high[1]
        ]
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
        """numpy type of an input or output."""
        return np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name)))

    @contextlib.contextmanager
    def _bound(self, feed):
        """Upload the inputs; yields a host array for each output and its device address."""
        rows = len(feed[self.tokens()])
        feed = {**feed, **{name: no_past(rows, self.engine.get_tensor_shape(name)) for name in self.past}}
        self.select(feed[self.tokens()].shape)
        pointers = []

        def place(name, array):
            pointer = self.cuda.allocate(max(array.nbytes, 1))  # an empty array needs an address too
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
            arrays = [
                np.empty(tuple(self.context.get_tensor_shape(name)), self.element(name))
                for name in self.outputs
            ]
            yield [(array, place(name, array)) for name, array in zip(self.outputs, arrays)]  # noqa: B905
        finally:
            for pointer in pointers:
                self.cuda.free(pointer)

    def __call__(self, feed):
        with self._bound(feed) as bound:
            if not self.context.execute_async_v3(0):
                raise RuntimeError("the engine refused to run")
            self.cuda.synchronize()
            for array, pointer in bound:
                self.cuda.download(array, pointer)
            return side_by_side([array for array, _ in bound], self.is_one)

    @contextlib.contextmanager
    def held(self, feed):
        """Context manager with a Launcher of these inputs."""
        with self._bound(feed):
            yield Launcher(self)


ELEMENTS = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}
"""numpy types of a session's inputs."""


EXACT = ("session.qdqisint8allowed", "1")
"""Entry of a session's options with which its products of 8-bit codes are exact on such a processor. They are
slower: MiniLM takes 5 to 6 times as long on an AMD EPYC 7003."""

X86 = ("x86_64", "AMD64")


def saturates(machine=None, listing=None):
    """True on x86-64 without VNNI instructions. ONNX Runtime turns signed activations into uint8 there, and
    its products of uint8 and int8 cut sums of two products at 16 bits without a message (VPMADDUBSW). False
    where the system does not list the instructions.

    >>> saturates("x86_64", "flags : avx2 fma"), saturates("x86_64", "flags : avx2 avx512_vnni")
    (True, False)
    """
    if (machine or platform.machine()) not in X86:
        return False
    if listing is None:
        try:
            with open("/proc/cpuinfo") as stream:
                listing = stream.read()
        except OSError:
            return False
    flags = re.search(r"^flags\s*:(.*)$", listing, re.MULTILINE)
    return flags is not None and "vnni" not in flags.group(1)


class OnnxRunner:
    """Runner of an ONNX file through onnxruntime: dict of arrays -> logits."""

    def __init__(self, file, disabled_optimizers=(), outputs=()):
        import onnxruntime

        self.runtime, self.outputs = onnxruntime, list(outputs)
        options = onnxruntime.SessionOptions()
        if saturates():
            options.add_session_config_entry(*EXACT)
        self.session = onnxruntime.InferenceSession(
            str(file),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(disabled_optimizers) or None,
        )

    def version(self):
        """Backend and its version."""
        return {"onnxruntime": self.runtime.__version__}

    def largest_batch(self, length):
        """Constant 8: no profile limits an ONNX session."""
        return 8

    def __call__(self, feed):
        kinds = {item.name: ELEMENTS[item.type] for item in self.session.get_inputs()}
        arrays = {name: array.astype(kinds[name]) for name, array in feed.items() if name in kinds}
        rows = len(next(iter(arrays.values())))
        for item in self.session.get_inputs():
            if item.name.startswith(PAST):
                arrays[item.name] = no_past(rows, item.shape).astype(kinds[item.name])
        names = [item.name for item in self.session.get_outputs()]
        wanted = self.outputs or ["logits" if "logits" in names else names[0]]
        return side_by_side(self.session.run(wanted, arrays), not self.outputs)
