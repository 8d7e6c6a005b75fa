"""Allocations that fail: a sentence with the stage, its estimate and what is left, and exit code 6."""

from __future__ import annotations

import errno
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from attacked import attacked, refused
from lines import cli, finished
from onnxruntime.capi import onnxruntime_pybind11_state as native
from safetensors import SafetensorError

from qcompress.errors import ExportError, MachineError, UsageError
from qcompress.models import load_tokenizer
from qcompress.pipeline import run
from qcompress.schema.recipe import TextData
from qcompress.system import memory
from qcompress.tasks import causal_lm

pytestmark = pytest.mark.attack("allocations that fail")


def _raised(error: BaseException) -> Callable[[], Any]:
    def fail() -> None:
        raise error

    return fail


def _wrapped() -> None:
    """As `runners.py` makes an error of its own of ONNX Runtime's."""
    try:
        raise native.RuntimeException("[ONNXRuntimeError] : 6 : std::bad_alloc")
    except native.RuntimeException as error:
        raise ExportError(f"ONNX Runtime cannot run it: {error}") from None


def _export_error() -> None:
    """As torch.onnx makes an error of its own of any exception."""
    try:
        raise MemoryError
    except MemoryError as error:
        raise ValueError("Failed to export the model") from error


FAILURES: dict[str, Callable[[], Any]] = {
    "numpy": lambda: np.ones(10**15),
    "numpy, of a product": lambda: np.empty((10**6, 10**6)) + np.empty((1, 10**9)),
    "torch": lambda: torch.ones(10**15),
    "torch, of a clone": lambda: torch.ones(1).expand(10**14).clone(),
    "python, bytes": lambda: bytes(10**17),
    "python, a list": lambda: [None] * 10**17,
    "CUDA": _raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")),
    "CUDA, of cuBLAS": _raised(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")),
    "onnxruntime": _raised(native.Fail("[ONNXRuntimeError] : 1 : Failed to allocate memory")),
    "onnxruntime, bad_alloc": _raised(native.RuntimeException("[ONNXRuntimeError] : 6 : std::bad_alloc")),
    "onnxruntime, wrapped": _wrapped,
    "safetensors": _raised(SafetensorError("I/O error: Cannot allocate memory (os error 12)")),
    "the system": _raised(OSError(errno.ENOMEM, "Cannot allocate memory")),
    "a fork": _raised(BlockingIOError(errno.ENOMEM, "Cannot allocate memory")),
    "a thread": _raised(RuntimeError("can't start new thread")),
    "a library": _raised(ImportError("libtorch_cpu.so: failed to map segment from shared object")),
    "a DataLoader": _raised(RuntimeError("DefaultCPUAllocator: can't allocate memory")),
    "torch's exporter": _export_error,
    "an executor": _raised(native.EPFail("CUDA failure 2: out of memory ; GPU=0")),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_an_allocation_that_fails_is_a_sentence(name: str) -> None:
    needs = 5000 * memory.MIB
    with (
        pytest.raises(memory.AllocationError, match="the stage x ran out of memory") as found,
        memory.Allocations("the stage x", lambda: needs),
    ):
        FAILURES[name]()
    assert found.value.exit_code == 6 and "5,000 MiB" in found.value.message
    assert "are left" in found.value.message and "\n" not in found.value.message


OTHERS = {
    "a wrong shape": RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    "a defect": AssertionError("out of memory"),
    "a value": ValueError("bad_alloc"),
    "no space": OSError(errno.ENOSPC, "No space left on device"),
    "our own": UsageError("out of memory"),
    "a machine": MachineError("no CUDA"),
    "an exit": SystemExit(3),
    "an interrupt": KeyboardInterrupt(),
    "a key": KeyError("not enough memory"),
    "a module": ModuleNotFoundError("No module named 'torch'"),
    "the runtime": native.InvalidArgument("[ONNXRuntimeError] : 2 : unexpected input"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_error_passes_as_it_is(name: str) -> None:
    error = OTHERS[name]
    with pytest.raises(type(error)) as found, memory.Allocations("the stage x"):
        raise error
    assert found.value is error


@pytest.mark.parametrize("left, expected", [(1, memory.AllocationError), (memory.STARVED, SystemError)])
def test_a_strange_error_where_nothing_is_left_is_one_of_memory(
    left: int, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: (left, "the test"))
    with pytest.raises(expected), memory.Allocations("the stage x"):
        raise SystemError("error return without exception set")


@pytest.mark.parametrize("left", [1, 300])
def test_a_text_that_cannot_be_tokenized_in_the_memory_there_is(
    left: int, tiny_model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package `tokenizers` would end the process."""
    size = text_file.stat().st_size
    text = text_file.with_name("long.txt")
    text.write_text(text_file.read_text(encoding="utf-8") * (1 + 2_000_000 // size), encoding="utf-8")
    monkeypatch.setattr(memory, "available", lambda: (left * memory.MIB, "the test"))
    with pytest.raises(memory.AllocationError, match=f"tokenizing.* {left} MiB are left") as found:
        causal_lm.tokenize(TextData(text=[text.name]), text.parent, load_tokenizer(tiny_model))
    assert found.value.exit_code == 6


SIZES = (150, 250, 500, 800, 900, 1050, 1250, 1300, 1400, 1450, 1475, 1500, 1550, 2500)


@pytest.mark.slow
@pytest.mark.parametrize("mib", SIZES)
def test_a_run_under_a_limit_of_address_space(
    mib: int, tmp_path: Path, tiny_model: Path, text_file: Path
) -> None:
    project = finished(tiny_model, text_file)
    out = tmp_path / "runs"
    ended = attacked("run", project.recipe, "--out", out, address_space_mib=mib, timeout_s=300)
    if mib == max(SIZES):
        assert ended.code == 0, ended.text
    elif ended.code or mib < 1000:
        refused(ended, 6, "MiB", "ulimit -v")


def test_what_is_left_is_the_smallest_of_the_limits() -> None:
    left, _ = memory.available()
    assert left > 0
    with memory.bounded(300 * memory.MIB):
        bounded, origin = memory.available()
    assert bounded <= 300 * memory.MIB and "ulimit" in origin
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_container_is_asked_for_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text(f"{256 * memory.MIB}\n")
    (tmp_path / "current").write_text(f"{200 * memory.MIB}\n")
    monkeypatch.setattr(memory, "_groups", lambda: [(tmp_path / "max", tmp_path / "current")])
    assert memory.available() == (56 * memory.MIB, "the container's limit of 256 MiB")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["load", "train", "fold", "export", "build", "verify", "gate"])
def test_a_stage_that_runs_out_of_memory_keeps_what_is_done(
    stage: str, tmp_path: Path, tiny_model: Path, text_file: Path
) -> None:
    project = finished(tiny_model, text_file).copy(tmp_path / "project")
    shutil.rmtree(project.entry(stage))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run._Maker, f"_{stage}", lambda *_: torch.ones(10**15))
        done = cli(*project.command())
    assert done.code == 6, done
    assert f"error: the stage {stage} ran out of memory" in done.stderr
    assert stage == "gate" or "at the least" in done.stderr
    assert "continue with:\n  qcompress" in done.stderr
    assert project.run().verdict == "accept"


def test_the_names_of_the_libraries_are_those_that_are_matched() -> None:
    assert onnxruntime.__name__ == "onnxruntime" and native.Fail.__module__.startswith("onnxruntime")
    assert SafetensorError.__module__.partition(".")[0] in ("safetensors_rust", "safetensors")
