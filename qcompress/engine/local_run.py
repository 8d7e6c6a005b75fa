"""Engine measurement on this machine's GPU, by the probe kit's script in a separate process.

A device without torch runs that script from the kit. Here torch's CUDA tensors are the engine's memory
(`TorchMemory`), so that torch is the only CUDA library needed, and CUDA graphs are torch's. A failure of the
process becomes the reason of a row that is not measured, never an error.

`python -m qcompress.engine.local_run KIT ARGUMENT...`: the arguments are those of measure_engine.py.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from qcompress.engine.probe import SCRIPT, EngineMeasurement, read_measurement
from qcompress.errors import UsageError
from qcompress.system.artifacts import Engine, read_json
from qcompress.system.child_process import command, environment
from qcompress.system.gpu import compute_capability

HINT = "measure it with probe/measure_engine.py"
"""Advice for an engine that was not measured here."""

TIMEOUT_S = 1800
"""Time limit for loading, all samples and the latency measurement; TensorRT-RTX first compiles the plan
for the GPU.
"""


class TorchMemory:
    """Device memory as torch tensors, with the methods of the script's `Cuda`. Addresses are ctypes
    pointers, as in `Cuda`.
    """

    def __init__(self, device: str = "cuda") -> None:
        self.device = torch.device(device)
        self._held: dict[int, torch.Tensor] = {}
        self._streams: dict[int, torch.cuda.Stream] = {}

    def allocate(self, size: int) -> ctypes.c_void_p:
        """Allocate `size` bytes of device memory; returns the address."""
        tensor = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
        self._held[tensor.data_ptr()] = tensor
        return ctypes.c_void_p(tensor.data_ptr())

    def free(self, pointer: ctypes.c_void_p) -> None:
        """Free device memory."""
        del self._held[pointer.value]

    def upload(self, pointer: ctypes.c_void_p, array: np.ndarray) -> None:
        """Copy from host to device."""
        source = torch.from_numpy(_bytes_of(array))
        self._held[pointer.value][: source.numel()].copy_(source)

    def download(self, array: np.ndarray, pointer: ctypes.c_void_p) -> None:
        """Copy from device to host."""
        target = torch.from_numpy(_bytes_of(array))
        target.copy_(self._held[pointer.value][: target.numel()])

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)

    def stream(self) -> ctypes.c_void_p:
        """Create a stream; CUDA graphs cannot be captured on the default one."""
        stream = torch.cuda.Stream(self.device)
        self._streams[stream.cuda_stream] = stream
        return ctypes.c_void_p(stream.cuda_stream)

    def wait(self, stream: ctypes.c_void_p) -> None:
        """Wait until all work of a stream is done."""
        self._streams[stream.value].synchronize()

    def captured(self, stream: ctypes.c_void_p, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Capture the work that `launch` puts on the stream as a CUDA graph for `replay`."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._streams[stream.value], capture_error_mode="relaxed"):
            launch()
        return graph

    def replay(self, graph: torch.cuda.CUDAGraph, stream: ctypes.c_void_p) -> None:
        """Launch a captured graph."""
        with torch.cuda.stream(self._streams[stream.value]):
            graph.replay()


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """View of the array's memory as bytes [size]."""
    return array.reshape(-1).view(np.uint8)


def why_not(engine: Engine) -> str | None:
    """Reason why this machine cannot run an engine, known before anything is started; None if it can."""
    facts = read_json(engine.path / "build.json")
    if compute_capability() is None:
        return f"a {facts['backend']} plan runs on its GPU: {HINT}"
    return None


def measure(kit: Path, engine: Engine, onnx: Path, out: Path) -> EngineMeasurement | str:
    """Measure an engine with its kit; returns the measurement, or the reason why there is none.

    `onnx`: the graph of the engine; `out`: a folder for a temporary engine.json.
    """
    facts = read_json(engine.path / "build.json")
    file = out / "engine.json"
    arguments = [str(kit.resolve()), "--plan", str(engine.plan.resolve()), "--out", str(file.resolve())]
    if facts["version_compatible"]:
        arguments.append("--trust-plan")  # built by this run
    try:
        done = subprocess.run(
            command("qcompress.engine.local_run", *arguments),
            stdin=subprocess.DEVNULL,
            cwd=out,
            env=environment() | {"PYTHONDONTWRITEBYTECODE": "1"},  # keep bytecode out of the kit
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
        )
        if done.returncode != 0 or not file.is_file():
            last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            return f"the {facts['backend']} plan was not measured on this GPU ({last}): {HINT}"
        return read_measurement(file, kit, onnx)
    except subprocess.TimeoutExpired:
        return f"the {facts['backend']} plan did not end within {TIMEOUT_S} s on this GPU: {HINT}"
    except UsageError as error:
        return f"{error.message}: {HINT}"
    finally:
        file.unlink(missing_ok=True)


def main(arguments: list[str]) -> None:
    """Run the kit's script on torch's memory or, if torch has no CUDA, on the CUDA runtime that the script
    finds.
    """
    kit, *script_arguments = arguments
    sys.path.insert(0, kit)  # for the modules beside the script
    spec = importlib.util.spec_from_file_location("measure_engine", Path(kit) / SCRIPT.name)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(script_arguments, TorchMemory() if torch.cuda.is_available() else None)


if __name__ == "__main__":
    main(sys.argv[1:])
