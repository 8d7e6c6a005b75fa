"""Latency, throughput and self-consistency of an engine, on one that is played: a table in host memory,
behind the names that TensorRT and the CUDA runtime have.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from played_engine import HostMemory

from qcompress.engine.probe import SCRIPT
from qcompress.system import strict_json

TOKENS, WIDTH = 50, 7
PROFILES = (((1, 1), (2, 8), (4, 16)), ((1, 16), (1, 32), (2, 32)))
TABLE = np.random.default_rng(0).normal(size=(TOKENS, WIDTH)).astype(np.float32)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    monkeypatch.setitem(sys.modules, "strict_json", strict_json)
    spec = importlib.util.spec_from_file_location("measure_engine", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys.modules["engine_runners"], "Cuda", HostCuda)
    return module


class HostCuda(HostMemory):
    """Counts what was waited for; its device may take no graph."""

    captures = True

    def __init__(self) -> None:
        super().__init__()
        self.launched = 0

    @property
    def live(self) -> dict[int, Any]:
        """What was allocated and not given back."""
        return self._held

    def wait(self, stream: ctypes.c_void_p) -> None:
        super().wait(stream)
        self.launched += 1

    def captured(self, stream: ctypes.c_void_p, launch: Any) -> Any:
        if not self.captures:
            raise RuntimeError("cudaStreamEndCapture: operation not permitted")
        return super().captured(stream, launch)


class Context:
    """logits = TABLE[ids], plus what `drift` adds to the rows of larger batches."""

    def __init__(self, drift: float) -> None:
        self.drift, self.active_optimization_profile = drift, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.places: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> None:
        self.active_optimization_profile = index

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = PROFILES[self.active_optimization_profile]
        self.shapes[name] = tuple(shape)
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (*self.shapes["input_ids"], WIDTH) if name == "logits" else self.shapes[name]

    def set_tensor_address(self, name: str, place: int) -> None:
        self.places[name] = place

    def execute_async_v3(self, stream: int) -> bool:
        shape = self.shapes["input_ids"]
        source = (ctypes.c_int64 * int(np.prod(shape))).from_address(self.places["input_ids"])
        logits = TABLE[np.frombuffer(source, np.int64).reshape(shape)]
        logits = logits + self.drift * np.arange(shape[0], dtype=np.float32)[:, None, None]
        ctypes.memmove(self.places["logits"], np.ascontiguousarray(logits).ctypes.data, logits.nbytes)
        return True


def tensorrt(drift: float = 0.0) -> SimpleNamespace:
    """As much of the module as the script asks for."""
    mode = SimpleNamespace(INPUT="in", OUTPUT="out")
    engine = SimpleNamespace(
        num_io_tensors=2,
        num_optimization_profiles=len(PROFILES),
        get_tensor_name=lambda index: ("input_ids", "logits")[index],
        get_tensor_mode=lambda name: mode.INPUT if name == "input_ids" else mode.OUTPUT,
        get_tensor_dtype=lambda name: np.int64 if name == "input_ids" else np.float32,
        get_tensor_profile_shape=lambda name, index: PROFILES[index],
        create_execution_context=lambda: Context(drift),
    )
    logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: engine, engine_host_code_allowed=False)
    return SimpleNamespace(
        __version__="11.4",
        Logger=logger,
        Runtime=lambda log: runtime,
        TensorIOMode=mode,
        nptype=lambda kind: kind,
    )


def runner(script: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, drift: float = 0.0) -> Any:
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt(drift))
    (folder / "model.plan").write_bytes(b"plan")
    return script.TensorRTRunner(folder / "model.plan", "tensorrt", False)


INPUTS = {
    "ids": np.arange(30, dtype=np.int32).reshape(3, 10),
    "length": np.array([10] * 3),
    "first": np.ones(3),
}


def test_the_played_engine_computes(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = runner(script, monkeypatch, tmp_path)
    ids = np.array([[3, 4, 5], [6, 7, 8]])
    assert np.array_equal(made({"input_ids": ids}), TABLE[ids])
    assert made.cuda.live == {}  # everything was given back


def test_every_profile_is_measured_at_its_optimal_shape(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = runner(script, monkeypatch, tmp_path)
    found = script.beside(made, INPUTS)["speed"]
    assert [(entry["profile"], entry["shape"]) for entry in found] == [(0, [2, 8]), (1, [1, 32])]
    for entry in found:
        for one in (entry, entry["cuda_graph"]):
            latency = one["latency_ms"]
            assert 0 < latency["least"] <= latency["median"] <= latency["p99"] and latency["runs"] == 200
            assert one["rows_per_s"] == pytest.approx(1e3 * entry["shape"][0] / latency["median"])
    assert made.cuda.launched == 2 * 2 * (10 + 200)
    assert made.cuda.live == {} and made.context.active_optimization_profile == 1


def test_an_engine_that_cannot_be_captured_says_why(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = runner(script, monkeypatch, tmp_path)
    made.cuda.captures = False
    for entry in script.beside(made, INPUTS)["speed"]:
        assert entry["cuda_graph"] == {"reason": "cudaStreamEndCapture: operation not permitted"}
        assert entry["latency_ms"]["runs"] == 200


def test_an_engine_that_agrees_with_itself_has_no_difference(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = script.beside(runner(script, monkeypatch, tmp_path), INPUTS)["consistency"]
    assert found == {"repeated_rows_max_abs": 0.0, "batches_max_abs": 0.0}


def test_rows_that_depend_on_their_place_are_found(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Row 3 of a batch of 4 is off by 3 drifts; row 0 never is."""
    found = script.beside(runner(script, monkeypatch, tmp_path, drift=0.25), INPUTS)["consistency"]
    assert found["repeated_rows_max_abs"] == pytest.approx(0.75, rel=1e-5) and found["batches_max_abs"] == 0.0


def test_what_fails_beside_the_results_is_a_reason(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = runner(script, monkeypatch, tmp_path)
    made.shapes = [((1, 1), (9, 9), (9, 9))]  # no profile takes it
    found = script.beside(made, INPUTS)
    assert "no profile of this engine accepts the shape" in found["speed"]["reason"]
    assert "no profile" in found["consistency"]["reason"]


def test_samples_begin_again_where_they_end_and_nothing_is_padded(script: Any) -> None:
    speed = script.engine_speed
    feed = speed.feed_of(INPUTS, 5, 12)
    assert feed["input_ids"].shape == (5, 12)
    assert feed["input_ids"][3, :10].tolist() == list(range(10)) and feed["input_ids"][0, 10:].tolist() == [
        0,
        1,
    ]
    assert feed["position_ids"][4].tolist() == list(range(12))
    other = {"input.input_ids": INPUTS["ids"], "input.attention_mask": np.zeros((3, 10), np.int32)}
    feed = speed.feed_of(other, 2, 4)
    assert feed["attention_mask"].all() and feed["input_ids"].tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]


def test_images_are_whole(script: Any) -> None:
    speed = script.engine_speed
    images = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    feed = speed.feed_of({"input.pixel_values": images}, 3, 3, 4, 5)
    assert feed["pixel_values"].dtype == np.float32 and feed["pixel_values"].shape == (3, 3, 4, 5)
    assert np.array_equal(feed["pixel_values"], images[[0, 1, 0]])
    assert np.array_equal(script.cut(images, 1), images)
    assert np.array_equal(script.cut(INPUTS["ids"], 4), INPUTS["ids"][:, :4])
    runner = script.TensorRTRunner.__new__(script.TensorRTRunner)
    runner.profiles = [((1, 3, 4, 5), (8, 3, 4, 5)), ((1, 3, 4, 5), (32, 3, 4, 5))]
    assert runner.largest_batch(1) == 32


def test_the_clock_stops_after_its_seconds(script: Any) -> None:
    speed = script.engine_speed
    ticks = iter(range(1000))
    found = speed.clocked(lambda: None, clock=lambda: next(ticks) * 0.5)
    assert 1 <= len(found) <= 4 and set(found) == {500.0}
    assert speed.spread([1.0, 2.0, 3.0, 100.0]) == {
        "median": 2.5,
        "p99": pytest.approx(97.09),
        "least": 1.0,
        "runs": 4,
    }


def test_an_engine_takes_its_file_and_one_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from qcompress.engine.probe_kit import engine_speed

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(engine_speed, "BOARD", tmp_path / "model")
    for sizes in ({"device_memory_size_v2": 5, "device_memory_size": 1}, {"device_memory_size": 5}):
        runner = SimpleNamespace(engine=SimpleNamespace(**sizes), plan_bytes=7)
        assert engine_speed.device(runner, {}) == {"gpu": None, "memory_bytes": 12}
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson Orin\0")
    assert engine_speed.gpu() == "NVIDIA Jetson Orin"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA H200\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert engine_speed.gpu() == "NVIDIA H200"


# The engine inspector ------------------------------------------------------------------------------

DETAILED = """{"Layers": [
  {"Name": "h.0.attn", "LayerType": "gemm", "Inputs": [{"Name": "q", "Format/Datatype": "Int8"}]},
  {"Name": "h.0.norm", "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32"}]},
  {"Name": "h.0.mlp", "Inputs": [{"Format/Datatype": "FP32"}, {"Format/Datatype": "Row major Int8 format"}]},
  {"Name": "h.1.mlp", "Inputs": [{"Format/Datatype": "Half"}, {"Format/Datatype": "INT4"}]},
  {"Name": "noop"}
], "Bindings": ["input_ids", "logits"]}"""


def inspected(text: str) -> SimpleNamespace:
    """A runner whose engine inspector answers with `text`."""

    def information(form: str) -> str:
        assert form == "json"
        return text

    engine = SimpleNamespace(
        create_engine_inspector=lambda: SimpleNamespace(get_engine_information=information)
    )
    return SimpleNamespace(
        engine=engine, trt=SimpleNamespace(LayerInformationFormat=SimpleNamespace(JSON="json"))
    )


def test_the_inspector_counts_the_layers_that_read_integers(script: Any) -> None:
    answer = script.engine_speed.kernels(inspected(DETAILED), {})
    assert answer == {"layers": 5, "integer": 3, "names": ["h.0.attn", "h.0.mlp", "h.1.mlp"]}


def test_an_engine_without_detailed_profiling_tells_names_only(script: Any) -> None:
    answer = script.engine_speed.kernels(inspected('{"Layers": ["a + b", "c"], "Bindings": []}'), {})
    assert (answer["layers"], answer["integer"], answer["names"]) == (2, None, [])
    assert answer["reason"].startswith("built without detailed profiling")


def test_an_inspector_that_fails_is_a_reason(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = runner(script, monkeypatch, tmp_path)  # the played engine has no inspector
    assert "create_engine_inspector" in script.beside(made, INPUTS)["kernels"]["reason"]
    monkeypatch.setattr(script.engine_speed, "speed", lambda runner, inputs: [])
    made.engine.create_engine_inspector = inspected("").engine.create_engine_inspector
    made.trt.LayerInformationFormat = SimpleNamespace(JSON="json")
    assert script.beside(made, INPUTS)["kernels"]["reason"].startswith("JSONDecodeError")


def test_the_inspector_has_the_names_of_the_installed_tensorrt() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    assert rtx.LayerInformationFormat.JSON is not None
    assert callable(rtx.EngineInspector.get_engine_information)
    assert callable(rtx.ICudaEngine.create_engine_inspector)
