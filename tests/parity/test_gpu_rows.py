"""What a machine with a GPU measures besides: the engine row, and ONNX Runtime's GPU providers.

No GPU is needed: the engine is played by ONNX Runtime in a process of its own (`played_engine.py`), and what
a provider does that does not start can be seen on any machine. What a real GPU gives is in tests/gpu.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lines import COMPARED, CONTEXT, SETS, Project, finished

from qcompress import api
from qcompress.engine import local_run
from qcompress.engine.local_run import TorchMemory
from qcompress.errors import MachineError
from qcompress.parity import gpu
from qcompress.parity.gpu import profile_of
from qcompress.parity.inputs import Artifacts, evaluation_samples
from qcompress.parity.runners import assigned_nodes
from qcompress.parity.sample_results import read_samples
from qcompress.report.ladder import ladder
from qcompress.system.artifacts import Engine, OnnxModel, read_json, write_json
from qcompress.system.reporter import Reporter
from qcompress.verdict.judge import judge

KIT = {
    "inputs.npz", "reference.npz", "probe.json", "measure_engine.py", "engine_runners.py", "engine_speed.py",
    "strict_json.py",
}  # fmt: skip
PLAYED = Path(__file__).parents[1] / "played_engine.py"


@pytest.fixture(scope="module")
def whole(tiny_model: Path, text_file: Path) -> Project:
    return finished(tiny_model, text_file)


@pytest.fixture
def plays(monkeypatch: pytest.MonkeyPatch, whole: Project) -> None:
    """The engine's process plays it."""
    play(monkeypatch, whole)


def play(patch: pytest.MonkeyPatch, project: Project) -> None:
    graph = str(project.latest / "model.onnx")

    def command(module: str, *arguments: str) -> list[str]:
        assert module == "qcompress.engine.local_run"
        return [sys.executable, str(PLAYED), graph, *arguments]

    patch.setattr(local_run, "command", command)


def rows_of(project: Project) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row for row in read_json(project.latest / "parity.json")["rows"]}


@dataclass(frozen=True)
class Seen:
    """A run that was measured again on a machine with a GPU."""

    project: Project
    verdict: dict[str, Any]

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return rows_of(self.project)

    def lines(self) -> list[str]:
        """First column of the ladder."""
        report = read_json(self.project.latest / "parity.json")
        return [str(cell) for cell in ladder(report).columns[0].cells]


def on_gpu(project: Project, providers: dict[str, str] | None = None) -> Seen:
    """`qcompress verify` in this process, where the driver finds a GPU; `providers` stand in for the real
    ones, without options.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        play(patch, project)
        patch.setattr(local_run, "compute_capability", lambda: 89)
        patch.setattr(gpu, "compute_capability", lambda: 89)
        if providers is not None:
            patch.setattr(gpu, "PROVIDERS", providers)
            patch.setattr(gpu, "options_of", lambda *_: {})
        return Seen(project, api.verify(project.latest))


@pytest.fixture(scope="module")
def seen(whole: Project, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """ONNX Runtime's CPU provider stands in for CUDA's, and one is not there."""
    project = whole.copy(tmp_path_factory.mktemp("seen") / "project")
    return on_gpu(project, {"cuda": "CPUExecutionProvider", "absent": "NoSuchProvider"})


# The engine row -----------------------------------------------------------------------------------


def test_without_a_gpu_the_engine_row_says_what_to_do(whole: Project) -> None:
    row = rows_of(whole)["engine"]
    assert row["status"] == "not-run"
    assert row["reason"] == "a tensorrt_rtx plan runs on its GPU: measure it with probe/measure_engine.py"


def test_with_a_gpu_verify_fills_the_engine_row(seen: Seen) -> None:
    row, onnx = seen.rows["engine"], seen.rows["onnx"]
    assert row["status"] == "measured" and row["reason"] is None
    assert row["samples"] == sum(SETS.values())
    assert row["metrics"].keys() == onnx["metrics"].keys() and len(row["metrics"]) >= len(SETS)
    for name, value in onnx["deployed"]["metrics"].items():  # ONNX Runtime's default session plays the engine
        assert row["metrics"][name] == pytest.approx(value, rel=1e-5)
    assert row["distance"]["to"] == "onnx"
    assert row["distance"]["positions"] == COMPARED * CONTEXT
    facts = row["measured_on"]
    assert facts["measured"] == "plan" and facts["versions"]["tensorrt_rtx"] == "0.played"
    assert facts["consistency"].keys() == {"repeated_rows_max_abs", "batches_max_abs"}
    (speed,) = facts["speed"]
    assert speed["shape"] == [2, 16] and 0 < speed["latency_ms"]["median"] <= speed["latency_ms"]["p99"]
    assert speed["cuda_graph"]["rows_per_s"] > 0
    assert "engine" not in seen.verdict["not_measured"]
    samples = read_samples(seen.project.latest / "samples.json.gz")
    for name, count in SETS.items():
        assert len(samples[name]["rows"]["engine"]["nll"]) == count
    assert not (seen.project.latest / "engine.json").exists()


def test_a_measurement_of_something_else_is_a_reason(whole: Project, tmp_path: Path, plays: None) -> None:
    kit, made, onnx, out = kit_of(whole, tmp_path, b"plan")
    other = tmp_path / "other.onnx"
    other.write_bytes(onnx.read_bytes() + b"\0")
    found = local_run.measure(kit, made, other, out)
    assert isinstance(found, str) and "measured on another graph" in found
    assert not (out / "engine.json").exists()


def kit_of(project: Project, folder: Path, plan: bytes) -> tuple[Path, Engine, Path, Path]:
    """What `engine.measure` takes, for a plan of this content."""
    shutil.copytree(project.latest / "probe", folder / "probe")
    shutil.copytree(project.latest / "engine", folder / "engine")
    facts = read_json(folder / "probe" / "probe.json")
    write_json(folder / "probe" / "probe.json", facts | {"plan_sha256": None})
    (folder / "engine" / "model.plan").unlink()
    (folder / "engine" / "model.plan").write_bytes(plan)
    return folder / "probe", Engine(folder / "engine"), project.latest / "model.onnx", folder


@pytest.mark.parametrize(
    ("plan", "said"),
    [(b"crash", "was not measured on this GPU (exit code -11)"), (b"broken", "cannot load")],
)
def test_an_engine_that_does_not_run_is_a_reason_and_no_error(
    plan: bytes, said: str, whole: Project, tmp_path: Path, plays: None
) -> None:
    found = local_run.measure(*kit_of(whole, tmp_path, plan))
    assert isinstance(found, str) and said in found
    assert "\n" not in found and "Traceback" not in found
    assert found.endswith(": measure it with probe/measure_engine.py")
    assert not (tmp_path / "engine.json").exists()
    assert {file.name for file in (tmp_path / "probe").iterdir()} == KIT  # no bytecode


def test_a_plan_that_hangs_ends(whole: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_run, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(
        local_run, "command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    found = local_run.measure(*kit_of(whole, tmp_path, b"plan"))
    assert found.startswith("the tensorrt_rtx plan did not end within 0.2 s on this GPU: measure it")


def test_an_engine_that_does_not_run_is_a_row_that_was_not_measured(
    whole: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "measure", lambda *_: "a reason")
    found = gpu.engine_here(Engine(tmp_path), OnnxModel(tmp_path), None, {}, tmp_path)
    assert found == ({"stage": "engine", "status": "not-run", "reason": "a reason"}, None)


def test_memory_keeps_every_byte(tmp_path: Path) -> None:
    memory = TorchMemory("cpu")
    for array in (
        np.arange(24, dtype=np.int64).reshape(2, 3, 4),
        np.float16([[1.5, -0.0]]),
        np.empty((2, 0)),
    ):
        pointer = memory.allocate(array.nbytes)
        assert isinstance(pointer, ctypes.c_void_p) and pointer.value
        memory.upload(pointer, array)
        assert ctypes.string_at(pointer, array.nbytes) == array.tobytes()
        back = np.full_like(array, 7)
        memory.download(back, pointer)
        assert back.tobytes() == array.tobytes()
        memory.free(pointer)
    assert not memory._held


# ONNX Runtime's providers -------------------------------------------------------------------------


def test_without_a_gpu_no_provider_is_named(whole: Project) -> None:
    assert "providers" not in rows_of(whole)["onnx"]


def test_a_provider_is_a_line_beside_the_onnx_row(seen: Seen) -> None:
    onnx = seen.rows["onnx"]
    (found,) = onnx["providers"].values()
    assert found["status"] == "measured" and found["metrics"] == onnx["deployed"]["metrics"]
    assert found["distance"]["to"] == "onnx" and found["distance"]["positions"] == COMPARED * CONTEXT
    assert seen.lines().index("  on cuda") == seen.lines().index("  deployed") + 1


@pytest.mark.skipif(local_run.compute_capability() is not None, reason="this machine has a GPU: tests/gpu")
def test_a_provider_that_falls_back_to_the_cpu_is_not_measured(whole: Project, tmp_path: Path) -> None:
    """ONNX Runtime goes on without a provider that does not start: the CPU's numbers under its name."""
    offered = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
    assert offered == gpu.PROVIDERS
    if not set(offered.values()) <= set(gpu.usable_providers()):
        pytest.skip("this ONNX Runtime was built without GPU providers")
    seen = on_gpu(whole.copy(tmp_path / "project"))
    providers = seen.rows["onnx"]["providers"]
    assert providers.keys() == offered.keys()
    for found in providers.values():
        assert found.keys() == {"status", "reason"} and found["status"] == "not-run"
        assert len(found["reason"]) > 30 and "\n" not in found["reason"]
    cuda = "ONNX Runtime's CUDAExecutionProvider does not start on this machine"
    assert providers["cuda"]["reason"] == cuda
    assert {"  on cuda", "  on tensorrt"} <= set(seen.lines())


def test_a_number_that_is_not_finite_on_a_provider_is_anomalous(whole: Project) -> None:
    loaded = api.load(whole.latest)
    report = loaded.parity
    onnx = next(row for row in report["rows"] if row["stage"] == "onnx")
    broken = dict.fromkeys(onnx["metrics"], math.nan)
    onnx["providers"] = {"cuda": {"status": "measured", "reason": None, "metrics": broken, "distance": None},
                         "tensorrt": {"status": "not-run", "reason": "it is not there"}}  # fmt: skip
    verdict = judge(report, loaded.recipe.gate, [], "fp32")
    assert verdict["verdict"] == "anomalous"
    assert any(reason.startswith("onnx (cuda): ") for reason in verdict["reasons"])
    assert not any("tensorrt" in reason for reason in verdict["reasons"])


def test_the_options_are_spelled_as_onnx_runtime_reads_them(whole: Project) -> None:
    """It takes True and False alone for a flag of its TensorRT provider, and says so only where that runs."""
    loaded = api.load(whole.latest)
    samples = evaluation_samples(
        loaded.recipe, whole.folder, Artifacts(None, None, None, OnnxModel(loaded.path), None, {})
    )
    found = gpu.options_of("TensorrtExecutionProvider", loaded.path / "model.onnx", loaded.recipe, samples)
    assert found["trt_int8_enable"] == "True" and "trt_fp16_enable" not in found
    assert found["trt_profile_max_shapes"].startswith(f"input_ids:4x{CONTEXT},")
    half = loaded.recipe.model_copy(
        update={"format": loaded.recipe.format.model_copy(update={"compute": "fp16"})}
    )
    found = gpu.options_of("TensorrtExecutionProvider", loaded.path / "model.onnx", half, samples)
    assert found["trt_fp16_enable"] == "True"
    assert gpu.options_of("CUDAExecutionProvider", Path(), half, samples) == {"use_tf32": "0"}


def test_profiles_go_from_one_sample_to_the_largest_batch() -> None:
    inputs = {"input_ids": ["batch", "sequence"], "pixel_values": ["batch", 3, 32, 32]}
    found = profile_of(inputs, {"batch": (1, 8), "sequence": (1, 64)})
    assert found == {
        "trt_profile_min_shapes": "input_ids:1x1,pixel_values:1x3x32x32",
        "trt_profile_opt_shapes": "input_ids:8x64,pixel_values:8x3x32x32",
        "trt_profile_max_shapes": "input_ids:8x64,pixel_values:8x3x32x32",
    }
    with pytest.raises(MachineError, match="the axes past have no size"):
        profile_of({"past_key_values.0.key": ["batch", 2, "past", 8]}, {"batch": (1, 8)})


def test_nodes_are_counted_by_the_provider_that_took_them() -> None:
    def part(name: str, nodes: int) -> SimpleNamespace:
        return SimpleNamespace(ep_name=name, get_nodes=lambda: [None] * nodes)

    parts = [
        part("CUDAExecutionProvider", 3),
        part("CPUExecutionProvider", 1),
        part("CUDAExecutionProvider", 2),
    ]
    session = SimpleNamespace(
        get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        get_provider_graph_assignment_info=lambda: parts,
    )
    assert assigned_nodes(session) == {"CUDAExecutionProvider": 5, "CPUExecutionProvider": 1}
    assert assigned_nodes(SimpleNamespace(get_providers=session.get_providers)) is None


def test_a_provider_that_took_no_node_is_not_measured(
    whole: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "compute_capability", lambda: 89)
    monkeypatch.setattr(gpu, "PROVIDERS", {"cuda": "CPUExecutionProvider"})
    monkeypatch.setattr(gpu, "options_of", lambda *_: {})
    monkeypatch.setattr(gpu, "assigned_nodes", lambda session: {"AnotherProvider": 7})
    loaded = api.load(whole.latest)
    found = gpu.provider_rows(
        loaded.recipe, OnnxModel(loaded.path), None, None, 1, tmp_path, Reporter(silent=True)
    )
    assert found == {
        "cuda": {"status": "not-run", "reason": "CPUExecutionProvider took no node of the graph"}
    }
