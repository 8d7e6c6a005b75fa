"""Laws of the build stage. TensorRT-RTX builds for real where it is installed; a fake module, which the child
process imports in its place, plays its crashes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import GPT2_SMALL, Shape, decoder, linear, save

from qcompress.engine import build_process
from qcompress.engine.plan_bytes import check_plan, limit_bytes, predicted_bytes
from qcompress.engine.plan_content import float_copies
from qcompress.errors import ExportError, MachineError, UsageError
from qcompress.graph.view import read
from qcompress.pipeline.stages import build as stage
from qcompress.pipeline.stages.build import build, build_file, device_command
from qcompress.schema import targets
from qcompress.schema.recipe import Build, Profile
from qcompress.schema.targets import TARGETS
from qcompress.system.artifacts import Engine, OnnxModel, read_json, sha256_file

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")

SHORT = Profile(batch=[1, 1, 2], sequence=[1, 16, 32])
HEAVY = Shape(blocks=2, width=768, vocabulary=16384, context=64)
"""27 MB in int8, more than the memory that a test gives to the builder."""

MEDIUM = Shape(blocks=2, width=512, vocabulary=8192, context=64)
"""11 MB in int8 and 42 MB in float, which stands out against the 12 MiB that every engine is allowed."""

KEYS = {
    "status", "reason", "command", "target", "backend", "versions", "plan", "onnx", "predicted_bytes",
    "limit_bytes", "profiles", "inputs", "outputs", "messages", "version_compatible",
    "hardware_compatibility", "timing_cache", "warnings",
}  # fmt: skip
"""What the artifact promises of build.json."""


def options(target: str = "rtx-ada", **changes: object) -> Build:
    return Build(**{"target": target, "profiles": [SHORT], **changes})


def exported(folder: Path, model: onnx.ModelProto, external: bool = False) -> OnnxModel:
    """An artifact of the export stage, as far as a build is concerned."""
    folder.mkdir()
    save(model, folder / "model.onnx", external=external)
    return OnnxModel(folder)


@pytest.fixture
def model(tmp_path: Path) -> OnnxModel:
    return exported(tmp_path / "export", decoder())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "build"
    folder.mkdir()
    return folder


def record(engine: Engine) -> dict:
    return read_json(engine.path / "build.json")


# Engines that are built ---------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize("target", ["rtx-ampere", "rtx-ada", "rtx-blackwell"])
def test_an_engine_for_rtx_is_built_without_a_gpu(model: OnnxModel, out: Path, target: str) -> None:
    engine = build(model, options(target), out)
    found = record(engine)
    assert set(found) == KEYS
    assert (found["status"], found["target"], found["backend"]) == ("built", target, "tensorrt_rtx")
    assert TARGETS[target].accepts(found["versions"]["tensorrt_rtx"])
    assert engine.plan == out / "model.plan"
    assert found["plan"] == {"sha256": sha256_file(engine.plan), "bytes": engine.plan.stat().st_size}
    assert found["onnx"]["sha256"] == sha256_file(model.file)
    assert found["predicted_bytes"] == predicted_bytes(model.file)
    assert found["plan"]["bytes"] <= found["limit_bytes"] == limit_bytes(found["predicted_bytes"])
    assert found["profiles"] == [{"batch": [1, 1, 2], "sequence": [1, 16, 32]}]
    assert found["inputs"]["input_ids"] == {"shape": [-1, -1], "type": "INT64"}
    assert found["outputs"] == {"logits": {"shape": [-1, -1, 1024], "type": "FLOAT"}}
    assert any("Int64 binding" in message["text"] for message in found["messages"])
    assert sorted(file.name for file in out.iterdir()) == ["build.json", "model.plan"]


@needs_rtx
def test_turing_builds_in_fp16_and_not_in_fp32(tmp_path: Path, out: Path) -> None:
    half = exported(tmp_path / "half", linear(compute="fp16"))
    assert record(build(half, options("rtx-turing"), out))["status"] == "built"
    single = exported(tmp_path / "single", linear())
    with pytest.raises(ExportError, match="(?s)builder refused .*FP32 GEMM is not supported"):
        build(single, options("rtx-turing"), out)


@needs_rtx
def test_several_profiles_become_several_profiles(model: OnnxModel, out: Path) -> None:
    profiles = [SHORT, Profile(batch=[1, 1, 1], sequence=[1, 1, 1])]
    found = record(build(model, options(profiles=profiles), out))
    assert found["status"] == "built"
    assert len(found["profiles"]) == 2


@needs_rtx
def test_the_data_beside_the_graph_are_recorded(tmp_path: Path, out: Path) -> None:
    model = exported(tmp_path / "export", decoder(), external=True)
    found = record(build(model, options(), out))
    data = model.path / "model.onnx.data"
    assert found["onnx"]["data"] == {"model.onnx.data": sha256_file(data)}
    assert found["onnx"]["bytes"] == model.file.stat().st_size + data.stat().st_size


@needs_rtx
def test_progress_rises_to_one(model: OnnxModel, out: Path) -> None:
    seen: list[tuple[str, float]] = []
    build(model, options(), out, lambda phase, fraction: seen.append((phase, fraction)))
    fractions = [fraction for _, fraction in seen]
    assert len(seen) > 10
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


@needs_rtx
def test_an_error_in_the_progress_ends_the_builder(model: OnnxModel, out: Path) -> None:
    def stop(phase: str, fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(model, options(), out, stop)
    assert children() == []


def children() -> list[int]:
    """Builders that are still alive below this process."""
    alive = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line, status = (entry / "cmdline").read_bytes(), (entry / "status").read_text()
        except OSError:
            continue
        parent = re.search(r"PPid:\s+(\d+)", status)
        if b"qcompress.engine.build_engine" in line and parent and int(parent[1]) == os.getpid():
            alive.append(int(entry.name))
    return alive


@needs_rtx
def test_any_file_can_be_built_from_a_relative_path(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(linear(), tmp_path / "other.onnx")
    monkeypatch.chdir(tmp_path)
    engine = build_file(Path("other.onnx"), options(), Path("build"))
    assert record(engine)["status"] == "built"
    assert (out / "model.plan").is_file()


@needs_rtx
def test_modules_in_the_users_folder_are_not_imported(
    model: OnnxModel, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    assert record(build(model, options(), out))["status"] == "built"


# Engines that are not built here ------------------------------------------------------------------


@pytest.mark.parametrize("here", ["auto", "required", "never"])
def test_a_processor_needs_no_engine(model: OnnxModel, out: Path, here: str) -> None:
    engine = build(model, options("cpu", here=here), out)
    found = record(engine)
    assert set(found) == KEYS
    assert (found["status"], found["backend"], found["command"], found["plan"]) == ("none", None, None, None)
    assert "cpu" in found["reason"]
    assert engine.plan is None


@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if target.backend])
def test_a_build_that_must_not_happen_here_is_deferred(model: OnnxModel, out: Path, target: str) -> None:
    engine = build(model, options(target, here="never"), out)
    found = record(engine)
    assert set(found) == KEYS
    assert (found["status"], found["reason"]) == ("deferred", "build.here is `never`")
    assert found["command"].startswith(f"qcompress build model.onnx --target {target} --out engine")
    assert engine.plan is None


@pytest.mark.parametrize(("gpu", "words"), [(None, "no CUDA device"), (89, "a GPU of SM89")])
def test_an_engine_of_tensorrt_is_deferred_to_its_device(
    model: OnnxModel, out: Path, monkeypatch: pytest.MonkeyPatch, gpu: int | None, words: str
) -> None:
    monkeypatch.setattr(targets, "compute_capability", lambda: gpu)
    found = record(build(model, options("h100"), out))
    assert found["status"] == "deferred"
    assert "SM90" in found["reason"]
    assert words in found["reason"]
    assert found["predicted_bytes"] == predicted_bytes(model.file)


def test_the_command_says_what_the_recipe_said() -> None:
    default = device_command(Path("run/model.onnx"), Build(target="thor"))
    assert default == "qcompress build model.onnx --target thor --out engine"
    words = shlex.split(device_command(Path("model.onnx"), options("thor")))
    assert words[-2] == "--profiles"
    assert [Profile(**profile) for profile in json.loads(words[-1])] == [SHORT]


def test_a_device_that_has_the_gpu_but_no_tensorrt_is_told_what_to_install(
    model: OnnxModel, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(targets, "compute_capability", lambda: 90)
    fake(
        monkeypatch,
        tmp_path,
        "tensorrt",
        "raise ImportError('libnvinfer.so.11: cannot open shared object file')",
    )
    found = record(build(model, options("h100"), out))
    assert found["status"] == "deferred"
    assert "libnvinfer.so.11" in found["reason"]
    assert "tensorrt >=11,<12" in found["reason"]


def test_another_version_of_tensorrt_is_as_good_as_none(
    model: OnnxModel, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(targets, "compute_capability", lambda: 110)
    fake(monkeypatch, tmp_path, "tensorrt", "__version__ = '11.4.0.106'")
    found = record(build(model, options("thor"), out))
    assert found["status"] == "deferred"
    assert "tensorrt 11.4.0.106 does not build for this target; the target needs" in found["reason"]


@pytest.mark.parametrize("target", ["h100", "rtx-ada"])
def test_a_required_engine_that_cannot_be_built_here_is_an_error(
    model: OnnxModel, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str
) -> None:
    monkeypatch.setattr(targets, "compute_capability", lambda: None)
    fake(monkeypatch, tmp_path, "tensorrt_rtx", "raise ImportError('not here')")
    with pytest.raises(MachineError, match="(?s)cannot build for .*qcompress build model.onnx") as error:
        build(model, options(target, here="required"), out)
    assert error.value.exit_code == 6
    assert list(out.iterdir()) == []


def test_mistakes_of_a_recipe_are_told_before_anything_is_deferred(model: OnnxModel, out: Path) -> None:
    with pytest.raises(UsageError, match="unknown target 'rtx-pascal'"):
        build(model, options("rtx-pascal"), out)
    with pytest.raises(UsageError, match="goes to 65 tokens, and the model has 64 positions"):
        build(model, options("h100", here="never", profiles=[Profile(sequence=[1, 1, 65])]), out)


# Builders that fail -------------------------------------------------------------------------------


@needs_rtx
def test_the_parsers_errors_name_node_and_operator(tmp_path: Path, out: Path) -> None:
    broken = linear()
    zero = next(tensor for tensor in broken.graph.initializer if tensor.name == "x.input.zero")
    zero.raw_data = b"\x03"
    with pytest.raises(ExportError, match=r"(?s)node x.q \(QuantizeLinear\): .*zero point") as error:
        build(exported(tmp_path / "export", broken), options(), out)
    assert error.value.exit_code == 5
    assert "qcompress lint model.onnx --target rtx-ada" in error.value.fix
    assert list(out.iterdir()) == []


@needs_rtx
def test_the_builders_errors_are_told(tmp_path: Path, out: Path) -> None:
    model = exported(tmp_path / "export", decoder(Shape(blocks=1), 4))
    with pytest.raises(ExportError, match=r"(?s)TensorRT's builder refused .*is_constant\(\)"):
        build(model, options(), out)


@needs_rtx
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits private memory")
def test_a_builder_without_memory_is_told_to_take_more(tmp_path: Path, out: Path) -> None:
    model = exported(tmp_path / "export", decoder(HEAVY, None, False, None))
    with pytest.raises(ExportError, match="(?s)builder refused .*(OutOfMemory|bad_alloc)") as error:
        build(model, options(memory_mib=256), out)
    assert "raise build.memory_mib, now 256" in error.value.fix
    assert list(out.iterdir()) == []


def fake(monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, code: str) -> None:
    """A module that the builder imports instead of the real one."""
    place = folder / "fake"
    place.mkdir(exist_ok=True)
    (place / f"{module}.py").write_text(textwrap.dedent(code))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")]))


def alive_until(end: str) -> str:
    """A TensorRT that says something when it starts, and then comes to this end."""
    return f"""
        import os, time
        __version__ = "1.7.0"
        class ILogger:
            def __init__(self): pass
        class Severity:
            name = "ERROR"
        def Builder(logger):
            logger.log(Severity, "last words of the builder")
            {end}
    """


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL"])
def test_death_by_a_signal_is_told_with_the_last_words(
    model: OnnxModel, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    end = f"os.kill(os.getpid(), {int(getattr(signal, name))})"
    fake(monkeypatch, tmp_path, "tensorrt_rtx", alive_until(end))
    with pytest.raises(ExportError, match=f"(?s)killed by {name}.*last words of the builder") as error:
        build(model, options(), out)
    assert error.value.exit_code == 5
    assert ("memory" in error.value.fix) is (name == "SIGKILL")


def test_an_unexpected_end_is_told_with_what_was_printed(
    model: OnnxModel, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake(monkeypatch, tmp_path, "tensorrt_rtx", alive_until("raise SystemError('internal error 42')"))
    with pytest.raises(ExportError, match="(?s)exit code 1.*last words.*internal error 42"):
        build(model, options(), out)


def test_a_builder_that_does_not_come_back_is_stopped(
    model: OnnxModel, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake(monkeypatch, tmp_path, "tensorrt_rtx", alive_until("time.sleep(60)"))
    started = time.monotonic()
    with pytest.raises(ExportError, match="(?s)stopped after 2 s.*last words") as error:
        build(model, options(timeout_s=2), out)
    assert time.monotonic() - started < 20
    assert "build.timeout_s" in error.value.fix
    assert children() == []


def test_a_builder_that_cannot_start_is_as_good_as_none(
    model: OnnxModel, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake(monkeypatch, tmp_path, "tensorrt_rtx", alive_until("raise TypeError('returned nullptr')"))
    found = record(build(model, options(), out))
    assert found["status"] == "deferred"
    assert "does not start (last words of the builder)" in found["reason"]


def test_python_memory_that_runs_out_is_a_refusal(
    model: OnnxModel, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake(monkeypatch, tmp_path, "tensorrt_rtx", alive_until("bytearray(2**40)"))
    with pytest.raises(ExportError, match="out of memory(.|\n)*raise build.memory_mib"):
        build(model, options(), out)


def test_a_flood_of_messages_is_kept_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flood = "[logger.log(Severity, f'message {i}') for i in range(3000)]; raise TypeError('end')"
    fake(monkeypatch, tmp_path, "tensorrt_rtx", alive_until(flood))
    spec = {"backend": "tensorrt_rtx", "versions": [["1", "2"]], "memory_mib": 512, "onnx": "model.onnx"}
    outcome = build_process.run_builder(spec, 60)
    assert [message["text"] for message in outcome.messages] == [f"message {i}" for i in range(2800, 3000)]


def test_half_a_line_of_a_dying_builder_is_left_out(
    model: OnnxModel, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The fake finds the pipe to the parent as the lowest free descriptor that is one."""
    half = "pipe = next(fd for fd in range(3, 50) if os.path.realpath(f'/proc/self/fd/{fd}').count('pipe:'))"
    end = half + """; os.write(pipe, b'{"event": "do'); os.abort()"""
    fake(monkeypatch, tmp_path, "tensorrt_rtx", alive_until(end))
    with pytest.raises(ExportError, match="(?s)killed by SIGABRT.*last words"):
        build(model, options(), out)


# Sizes --------------------------------------------------------------------------------------------


def dequantized(quantized: Path, folder: Path) -> OnnxModel:
    """The same model with every weight in float, worked out by numpy."""
    model = onnx.load(quantized)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kept, weights = [], []
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            codes, scale = (tensors[name].astype(np.float32) for name in node.input[:2])
            axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
            block = next((item.i for item in node.attribute if item.name == "block_size"), 0)
            scale = scale.repeat(block, axis) if block else np.expand_dims(scale, 1 - axis)
            weights.append(onnx.numpy_helper.from_array(codes * scale, node.output[0]))
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(weights)
    used = {name for node in kept for name in node.input}
    rest = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(rest)
    return exported(folder, model, external=True)


def check_sizes(shape: Shape, tmp_path: Path) -> None:
    """int8 and int4 engines pass; the engine of the same weights in float fails."""
    profile = Profile(batch=[1, 1, 1], sequence=[1, 8, 16])
    plans: dict[str, int] = {}
    for name, arguments in {"int8": (8, True), "int4": (4, False)}.items():
        model = exported(tmp_path / name, decoder(shape, *arguments), external=True)
        (tmp_path / f"{name}-build").mkdir()
        engine = build(model, options(profiles=[profile]), tmp_path / f"{name}-build")
        plans[name], predicted = record(engine)["plan"]["bytes"], predicted_bytes(model.file)
        # TensorRT-RTX 1.7 stores a tied table once or twice, as shapes and profiles will have it.
        assert 0.95 * (model.path / "model.onnx.data").stat().st_size < plans[name]
        assert plans[name] < 1.05 * predicted + 2**21
        assert record(engine)["warnings"] == [] and float_copies(engine.plan, read(model.file)) == {}
        planted = dequantized(model.file, tmp_path / f"{name}-float")
        (tmp_path / f"{name}-float-build").mkdir()
        engine = build(planted, options(profiles=[profile]), tmp_path / f"{name}-float-build")
        with pytest.raises(ExportError, match="the engine holds float weights"):
            check_plan(engine.plan, predicted, read(model.file))
        assert engine.plan.stat().st_size > 2 * plans[name]
    assert plans["int4"] < plans["int8"]


@needs_rtx
def test_engines_of_integers_pass_and_an_engine_of_floats_does_not(tmp_path: Path) -> None:
    check_sizes(MEDIUM, tmp_path)


@needs_rtx
@pytest.mark.slow
def test_the_sizes_of_gpt2_small_are_told_apart(tmp_path: Path) -> None:
    check_sizes(GPT2_SMALL, tmp_path)


def planting(monkeypatch: pytest.MonkeyPatch, planted: Path) -> None:
    """Let the builder build another graph than the one that it was given."""
    run = stage.run_builder
    monkeypatch.setattr(
        stage, "run_builder", lambda spec, *rest: run({**spec, "onnx": str(planted.resolve())}, *rest)
    )


@needs_rtx
def test_a_build_refuses_and_removes_an_engine_of_floats(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = exported(tmp_path / "int8", decoder(MEDIUM), external=True)
    planting(monkeypatch, dequantized(quantized.file, tmp_path / "float").file)
    with pytest.raises(ExportError, match=r"model.plan has [\d,]+ bytes .* the engine holds float weights"):
        build(quantized, options(), out)
    assert list(out.iterdir()) == []


@needs_rtx
def test_an_engine_that_is_large_for_another_reason_stays(
    model: OnnxModel, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A large constant that is not a quantized weight; of the graph itself nothing was predicted for it."""
    heavy = exported(tmp_path / "heavy", decoder(MEDIUM, None, False, None), external=True)
    planting(monkeypatch, heavy.file)
    engine = build(model, options(profiles=[SHORT]), out)
    found = record(engine)
    assert found["status"] == "built" and engine.plan.is_file()
    assert (
        len(found["warnings"]) == 1 and "no float copy of a quantized weight is in it" in found["warnings"][0]
    )
    assert found["plan"]["bytes"] > found["limit_bytes"]
