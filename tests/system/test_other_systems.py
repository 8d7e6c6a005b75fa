"""Windows and macOS, simulated: what only Linux has is left out of Python, and commands still work."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lines import environment, make_project

from qcompress.system import filesystem, gpu, host

WITHOUT = """
import ctypes, os
for name in ("sched_getaffinity", "sched_setaffinity"):
    delattr(os, name)
real = ctypes.CDLL
def library(name, *arguments, **options):
    if name is None:
        raise TypeError("bad argument type for built-in operation")
    return real(name, *arguments, **options)
ctypes.CDLL = library
from qcompress.system import filesystem, locks
locks.fcntl = filesystem.resource = None
from qcompress.cli.main import main
main()
"""


@pytest.fixture(params=["win32", "darwin"])
def elsewhere(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """This process as on another system."""
    for name in ("sched_getaffinity", "sched_setaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.delattr(os, "uname")
    monkeypatch.setattr(sys, "platform", request.param)
    monkeypatch.setattr(filesystem, "resource", None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def library(name: str | None, *arguments: object) -> object:
        raise TypeError("bad argument type") if name is None and request.param == "win32" else OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", library)
    return request.param


def test_threads_are_the_processors_of_the_machine(elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert host.threads() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert host.threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert host.threads() == 3


def test_there_is_no_gpu_without_a_driver(elsewhere: str) -> None:
    assert gpu.cuda_devices() == [] and gpu.device_kind("auto") == "cpu"
    assert host.describe_host()["gpu"] == {"sm": []}


def test_memory_is_measured_or_is_0(elsewhere: str) -> None:
    filesystem.reset_peak()
    assert filesystem.peak_mib() >= 0


def test_the_driver_has_its_name_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def library(name: str) -> object:
        asked.append(name)
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", library)
    assert gpu.cuda_devices() == []
    monkeypatch.setattr(sys, "platform", "win32")
    assert gpu.cuda_devices() == []
    assert asked == ["libcuda.so.1", "nvcuda.dll"]


def test_a_library_without_the_drivers_functions_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert gpu.cuda_devices() == []


@pytest.mark.parametrize("until", ["fold", pytest.param("", marks=pytest.mark.slow)])
def test_a_run_without_what_only_linux_has(
    tiny_model: Path, text_file: Path, tmp_path: Path, until: str
) -> None:
    """In a process of its own. sys.platform stays Linux's: numpy and torch ask it for their binaries."""
    untrained = {"method": "ptq", "train": {"device": "cpu", "batch_size": 4}, "build": {"target": "cpu"}}
    project = make_project(tmp_path / "p", tiny_model, text_file, **untrained)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *project.command(*("--until", until)[: 2 * bool(until)])],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("accept" in done.stdout) is (not until)
    assert (project.cache / "fold").is_dir()
