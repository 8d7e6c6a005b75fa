from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from graphs import linear, save
from tensorrt_api import NAMES

from qcompress.engine import build_engine
from qcompress.engine.build_engine import Phases
from qcompress.schema.targets import TARGETS

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
TREE = ast.parse(Path(build_engine.__file__).read_text(encoding="utf-8"))

HOLDERS = {
    "trt": "module",
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "flag": "BuilderFlag",
    "flags": "NetworkDefinitionCreationFlag",
}
"""Variables of build_engine.py that hold objects of TensorRT, and their classes."""

OTHERS = {
    "around", "backend", "channel", "errors", "fault", "file", "importlib", "json", "os", "partial", "path",
    "phase", "phases", "re", "resource", "self", "severity", "shapes", "status", "sys",
}  # fmt: skip
"""Variables that hold anything else, or (`severity`) an enumeration that Python itself reads."""

ONLY_RTX = {
    ("module", "ComputeCapability"),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
}


def attributes(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Every `variable.attribute`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.value.id, node.attr


def calls(tree: ast.AST = TREE) -> set[tuple[str, str]]:
    """Class and attribute of everything that is asked of TensorRT."""
    return {(HOLDERS[name], attribute) for name, attribute in attributes(tree) if name in HOLDERS}


def said_by_python(code: str) -> str:
    """Output of a process of its own: TensorRT stays out of this one."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_every_object_of_tensorrt_is_known_by_its_variable() -> None:
    names = {name for name, _ in attributes(TREE)}
    assert names - HOLDERS.keys() <= OTHERS
    assert HOLDERS.keys() <= names
    assert len(calls()) == 39


@needs_rtx
def test_tensorrt_rtx_has_everything_that_the_builder_asks_for() -> None:
    names = json.loads(
        said_by_python(
            "import tensorrt_rtx as trt, json\n"
            "names = {name: dir(getattr(trt, name)) for name in dir(trt)}\n"
            "print(json.dumps(names | {'module': dir(trt)}))"
        )
    )
    assert not [call for call in calls() if call[1] not in names[call[0]]]


@pytest.mark.parametrize("version", NAMES)
def test_tensorrt_has_everything_that_the_builder_asks_for_outside_its_rtx_part(version: str) -> None:
    missing = {call for call in calls() if call[1] not in NAMES[version][call[0]].split()}
    assert missing == ONLY_RTX


def test_what_only_rtx_has_stands_in_one_function() -> None:
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    users = {node.name for node in functions if calls(node) & ONLY_RTX}
    assert users == {"_set_capability"}
    assert len(functions) > 10


@needs_rtx
def test_tensorrt_rtx_knows_the_compute_capability_of_every_rtx_target() -> None:
    known = said_by_python("import tensorrt_rtx as trt; print(*dir(trt.ComputeCapability))")
    wanted = {f"SM{target.sm}" for target in TARGETS.values() if target.backend == "tensorrt_rtx"}
    assert len(wanted) == 4
    assert wanted <= set(known.split())


def test_there_is_a_backend_for_every_target() -> None:
    assert set(build_engine.BACKENDS) == {target.backend for target in TARGETS.values()} - {None}
    assert [name for name, backend in build_engine.BACKENDS.items() if backend.cross] == ["tensorrt_rtx"]


# Progress -----------------------------------------------------------------------------------------


def test_phases_inside_a_phase_are_a_step_of_it() -> None:
    phases = Phases()
    phases.start("all", None, 4)
    phases.step("all", 0)
    assert phases.fraction == 1 / 4
    phases.start("inner", "all", 2)
    phases.start("innermost", "inner", 10)
    phases.step("innermost", 4)
    assert phases.fraction == (1 + (0 + 5 / 10) / 2) / 4
    phases.step("inner", 0)
    assert phases.fraction == (1 + 1 / 2) / 4
    for step in (1, 2, 3):
        phases.step("all", step)
    assert phases.fraction == 1


def test_progress_never_falls_and_never_passes_one() -> None:
    phases, seen = Phases(), []
    phases.start("all", None, 2)
    for _ in range(3):  # a name is used again once its phase is over
        phases.start("part", "all", 3)
        for step in range(5):  # more steps than announced
            phases.step("part", step)
            seen.append(phases.fraction)
    phases.step("all", 0)
    phases.step("all", 7)
    seen.append(phases.fraction)
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert len(seen) == 16


def test_phases_that_go_in_circles_or_were_never_started_are_survived() -> None:
    phases = Phases()
    phases.start("a", "b", 2)
    phases.start("b", "a", 2)
    phases.start("c", "c", 2)
    for name in ("a", "b", "c", "unknown"):
        phases.step(name, 0)
    assert 0 < phases.fraction <= 1


# The process --------------------------------------------------------------------------------------


def run_builder(folder: Path, **changes: object) -> tuple[list[dict], subprocess.CompletedProcess]:
    """Events of the builder on a small graph."""
    spec = {
        "onnx": str(save(linear(), folder / "model.onnx")),
        "plan": str(folder / "model.plan"),
        "backend": "tensorrt_rtx",
        "versions": [["1.5", "2"]],
        "sm": 89,
        "profiles": [{"x": [[1, 128], [4, 128], [8, 128]]}],
        "memory_mib": 1024,
        "version_compatible": False,
        "hardware_compatibility": "none",
        "timing_cache": None,
        **changes,
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "qcompress.engine.build_engine", str(folder / "spec.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return [json.loads(line) for line in run.stdout.splitlines()], run


@needs_rtx
def test_a_build_says_how_far_it_is_and_describes_the_engine(tmp_path: Path) -> None:
    events, run = run_builder(tmp_path)
    assert run.returncode == 0
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "done"
    fractions = [event["fraction"] for event in events if event["event"] == "progress"]
    assert len(fractions) > 5
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert events[-1]["inputs"] == {"x": {"shape": [-1, 128], "type": "FLOAT"}}
    assert events[-1]["outputs"] == {"y": {"shape": [-1, 64], "type": "FLOAT"}}
    assert (tmp_path / "model.plan").stat().st_size > 10_000
    assert not list(tmp_path.glob("*.tmp"))


@needs_rtx
@pytest.mark.parametrize(
    ("changes", "event", "words"),
    [
        ({"versions": [["0.1", "0.2"]]}, "unavailable", "does not build for this target"),
        ({"backend": "tensorrt"}, "unavailable", "tensorrt cannot be imported"),
        ({"sm": 90}, "refused", "does not build for SM90"),
        ({"profiles": [{"x": [[4, 128], [1, 128], [8, 128]]}]}, "refused", "profile 0"),
        ({"profiles": [{"x": [[1, 64], [1, 64], [1, 64]]}]}, "refused", "128"),
        ({"profiles": []}, "refused", "profile"),
    ],
)
def test_what_cannot_be_built_ends_in_one_event_with_its_reason(
    tmp_path: Path, changes: dict, event: str, words: str
) -> None:
    if changes.get("backend") == "tensorrt" and find_spec("tensorrt"):
        pytest.skip("tensorrt is installed")
    events, _ = run_builder(tmp_path, **changes)
    last = events[-1]
    assert last["event"] == event
    texts = [last["reason"]] if event == "unavailable" else [error["text"] for error in last["errors"]]
    assert any(words in text for text in texts), texts
    assert not (tmp_path / "model.plan").exists()


@needs_rtx
def test_a_refused_node_is_named(tmp_path: Path) -> None:
    model = linear()
    zero = next(tensor for tensor in model.graph.initializer if tensor.name == "x.input.zero")
    zero.raw_data = b"\x03"
    events, _ = run_builder(tmp_path, onnx=str(save(model, tmp_path / "broken.onnx")))
    assert events[-1]["event"] == "refused"
    assert events[-1]["stage"] == "parse"
    error = events[-1]["errors"][0]
    assert (error["node"], error["op"]) == ("x.q", "QuantizeLinear")
    assert "zero point" in error["text"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits private memory")
@pytest.mark.parametrize(("taken_mib", "fits"), [(32, True), (256, False)])
def test_memory_is_limited_beyond_what_is_in_use(taken_mib: int, fits: bool) -> None:
    code = (
        "from qcompress.system.memory import limit_memory\n"
        "before = bytearray(200 * 2**20)\n"  # stands for the libraries
        "limit_memory(128)\n"
        f"more = bytearray({taken_mib} * 2**20)\n"
        "print('fits')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ("fits" in run.stdout) is fits
    assert ("MemoryError" in run.stderr) is not fits


def test_native_prints_do_not_disturb_the_events(tmp_path: Path) -> None:
    code = (
        "import os\n"
        "from qcompress.engine.build_engine import Channel\n"
        "channel = Channel()\n"
        "os.write(1, b'printed by a library')\n"
        "print('printed by Python', flush=True)\n"
        "channel.say('done', x=1)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert json.loads(run.stdout) == {"event": "done", "x": 1}
    assert "printed by a library" in run.stderr
    assert "printed by Python" in run.stderr
