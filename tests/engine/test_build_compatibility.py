"""Plans for other versions and other GPUs, and the timing cache.

TensorRT's libraries cannot be had here, so TensorRT-RTX's module stands in for it under its name: the same
calls go to real objects, and what they refuse shows that they were asked.
"""

from __future__ import annotations

import os
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from graphs import linear, save
from lines import cli

from qcompress.engine.plan_bytes import limit_bytes
from qcompress.errors import ExportError, UsageError
from qcompress.pipeline.stages.build import build_file, device_command
from qcompress.schema import targets
from qcompress.schema.recipe import Build
from qcompress.schema.targets import TARGETS, option_refusals
from qcompress.system.artifacts import read_json

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")

STAND_IN = "from tensorrt_rtx import *\n__version__ = '11.4.0.106'\n"

ALL = {
    "version_compatible": True,
    "hardware_compatibility": "same-compute-capability",
    "timing_cache": "timing.cache",
}
AMPERE_PLUS = {"hardware_compatibility": "ampere-plus"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save(linear(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `tensorrt` and an H100."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "tensorrt.py").write_text(STAND_IN)
    path = os.pathsep.join([str(tmp_path / "fake"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(targets, "compute_capability", lambda: 90)


# What a target cannot do --------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_each_target_says_which_options_it_has(name: str) -> None:
    target = TARGETS[name]
    everything = {f"build.{key}" for key in ALL}
    refused = {refusal.key for refusal in option_refusals(name, Build(target=name, **ALL))}
    if target.backend != "tensorrt":
        assert refused == everything
    elif name in ("orin-jp6", "orin-jp7", "thor"):
        assert refused == {"build.hardware_compatibility"}
    else:
        assert refused == set()
    older = {refusal.key for refusal in option_refusals(name, Build(target=name, **AMPERE_PLUS))}
    suits = name in ("a10", "a100", "l4", "l40s", "h100", "h200", "b200")
    assert older == (set() if suits else {"build.hardware_compatibility"})
    assert list(option_refusals(name, Build(target=name))) == []


def test_a_build_is_refused_before_anything_is_read(tmp_path: Path, out: Path) -> None:
    options = Build(target="rtx-ada", version_compatible=True)
    with pytest.raises(UsageError, match="build.version_compatible: TensorRT-RTX ships no lean runtime"):
        build_file(tmp_path / "nothing.onnx", options, out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["nowhere/timing.cache", "out"])
def test_a_timing_cache_that_cannot_be_written_is_refused_first(tmp_path: Path, out: Path, name: str) -> None:
    options = Build(target="h100", timing_cache=str(tmp_path / name))
    with pytest.raises(UsageError, match="build.timing_cache: .* cannot be written"):
        build_file(tmp_path / "nothing.onnx", options, out)


def test_the_command_for_the_device_says_all_of_it() -> None:
    options = Build(target="h100", **{**ALL, "timing_cache": "/some/where/timing.cache"})
    words = shlex.split(device_command(Path("model.onnx"), options))
    assert words[7:] == [
        "--version-compatible", "--hardware-compatibility", "same-compute-capability",
        "--timing-cache", "timing.cache",
    ]  # fmt: skip


def test_a_plan_with_a_runtime_of_its_own_may_be_larger() -> None:
    assert limit_bytes(1000, lean_runtime=True) - limit_bytes(1000) == 64 * 2**20


# The builder --------------------------------------------------------------------------------------


@needs_rtx
def test_the_builder_is_asked_for_later_versions(model: Path, out: Path, tensorrt: None) -> None:
    """TensorRT-RTX, which stands in, has the flag and lacks the runtime that would go into the plan."""
    with pytest.raises(ExportError, match="libnvinfer_lean"):
        build_file(model, Build(target="h100", version_compatible=True), out)
    build_file(model, Build(target="h100"), out)  # and without the flag it builds
    assert read_json(out / "build.json")["status"] == "built"


@needs_rtx
@pytest.mark.parametrize("level", ["ampere-plus", "same-compute-capability"])
def test_the_builder_is_asked_for_other_gpus(model: Path, out: Path, tensorrt: None, level: str) -> None:
    """TensorRT-RTX knows both levels by name, and takes neither."""
    words = f"hardware compatibility {level.upper().replace('-', '_')} was not accepted"
    with pytest.raises(ExportError, match=words):
        build_file(model, Build(target="h100", hardware_compatibility=level), out)
    assert list(out.iterdir()) == []


@needs_rtx
def test_a_timing_cache_is_made(model: Path, out: Path, tensorrt: None, tmp_path: Path) -> None:
    file = tmp_path / "timing.cache"
    build_file(model, Build(target="h100", timing_cache=str(file)), out)
    size = file.stat().st_size
    assert size > 0
    assert read_json(out / "build.json")["timing_cache"] == {"read": 0, "written": size}


@needs_rtx
def test_a_file_that_is_no_timing_cache_of_this_device_stays_as_it_is(
    model: Path, out: Path, tensorrt: None, tmp_path: Path
) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(b"something of mine" * 100)
    with pytest.raises(ExportError, match="notes.txt is not a timing cache of this version and this device"):
        build_file(model, Build(target="h100", timing_cache=str(file)), out)
    assert file.read_bytes() == b"something of mine" * 100
    assert list(out.iterdir()) == []


# Commands -----------------------------------------------------------------------------------------


def test_the_command_takes_all_options(model: Path, tmp_path: Path) -> None:
    every = ["--version-compatible", "--hardware-compatibility", "ampere-plus", "--timing-cache", "t.cache"]
    refused = cli("build", model, "--target", "rtx-ada", "--out", tmp_path / "a", *every)
    assert refused.code == 2 and "build.version_compatible" in refused.stderr
    wrong = cli(
        "build", model, "--target", "h100", "--out", tmp_path / "b", "--hardware-compatibility", "any"
    )
    assert wrong.code == 2
    assert "--hardware-compatibility: Input should be 'none', 'ampere-plus'" in wrong.stderr
    away = cli("build", model, "--target", "h100", "--out", tmp_path / "c", *every)
    assert away.code == 6 and "--hardware-compatibility ampere-plus --timing-cache t.cache" in away.stderr


def test_a_recipe_is_checked_and_its_file_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qcompress.pipeline import run

    options = Build(target="h100", timing_cache="caches/h100.bin")
    placed = run._placed(options, tmp_path)
    assert placed.timing_cache == str(tmp_path / "caches" / "h100.bin")
    assert run._placed(Build(), tmp_path) == Build()
