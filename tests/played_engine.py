"""`python played_engine.py ONNX ARGUMENT...`: what `python -m qcompress.engine.local_run ARGUMENT...` does,
on an engine that is played: ONNX Runtime on the graph ONNX, behind TensorRT's names, in host memory.

A plan that begins with `crash` ends the process as native code does; one that begins with `broken` is not
loaded.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import torch
from lines import plain_session

from qcompress.engine import local_run

LARGEST = (4, 32)
TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32}


class HostMemory(local_run.TorchMemory):
    """torch's tensors on the CPU, which has no streams."""

    def __init__(self) -> None:
        super().__init__("cpu")

    def synchronize(self) -> None:
        pass

    def stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(1)

    def wait(self, stream: ctypes.c_void_p) -> None:
        assert stream.value == 1

    def captured(self, stream: ctypes.c_void_p, launch: object) -> object:
        launch()
        return launch

    def replay(self, graph: object, stream: ctypes.c_void_p) -> None:
        graph()


class Context:
    """Shapes and addresses as TensorRT takes them; ONNX Runtime computes."""

    active_optimization_profile = 0

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.places: dict[str, int] = {}
        self.width = session.get_outputs()[0].shape[-1]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return all(size <= most for size, most in zip(shape, LARGEST, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (*self.shapes["input_ids"], self.width) if name == "logits" else self.shapes[name]

    def set_tensor_address(self, name: str, place: int) -> None:
        self.places[name] = place

    def execute_async_v3(self, stream: int) -> bool:
        feed = {}
        for name, shape in self.shapes.items():
            content = ctypes.string_at(self.places[name], 8 * int(np.prod(shape)))
            feed[name] = np.frombuffer(content, np.int64).reshape(shape)
        logits = np.ascontiguousarray(self.session.run(["logits"], feed)[0])
        ctypes.memmove(self.places["logits"], logits.ctypes.data, logits.nbytes)
        return True


def tensorrt(onnx: Path) -> SimpleNamespace:
    """As much of the module as the kit's script asks for."""
    mode = SimpleNamespace(INPUT="in", OUTPUT="out")

    def load(content: bytes) -> SimpleNamespace | None:
        if content.startswith(b"crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if content.startswith(b"broken"):
            return None
        session = plain_session(str(onnx), optimized=True)
        inputs = {item.name: TYPES[item.type] for item in session.get_inputs()}
        names = [*inputs, "logits"]
        return SimpleNamespace(
            num_io_tensors=len(names),
            num_optimization_profiles=1,
            get_tensor_name=names.__getitem__,
            get_tensor_mode=lambda name: mode.OUTPUT if name == "logits" else mode.INPUT,
            get_tensor_dtype=lambda name: inputs.get(name, np.float32),
            get_tensor_profile_shape=lambda name, index: ((1, 1), (2, 16), LARGEST),
            create_execution_context=lambda: Context(session),
        )

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: object) -> None:
            self.deserialize_cuda_engine = load

    logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    return SimpleNamespace(__version__="0.played", TensorIOMode=mode, Logger=logger, Runtime=Runtime,
                           nptype=lambda element: element)  # fmt: skip


if __name__ == "__main__":
    sys.modules["tensorrt_rtx"] = tensorrt(Path(sys.argv[1]))
    local_run.TorchMemory = HostMemory
    torch.cuda.is_available = lambda: True
    local_run.main(sys.argv[2:])
