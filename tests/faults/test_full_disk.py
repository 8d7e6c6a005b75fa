"""Disks of every size, from one that is full at once to one that is full at the very end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from attacked import attacked, refused
from lines import NAME, Project, finished

from qcompress import load
from qcompress.pipeline.stages.build import build
from qcompress.system import filesystem
from qcompress.system.artifacts import OnnxModel, sha256_file
from qcompress.system.filesystem import machine_errors

pytestmark = pytest.mark.attack("full disks")

FILES = ("model.onnx", "parity.json", "samples.json.gz", "verdict.json")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> Project:
    return finished(tiny_model, text_file).copy(tmp_path_factory.mktemp("full") / "project")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, which `resize` makes larger."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "qcompress-test", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def resize(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)


def fill(disk: Path, left_kib: int) -> None:
    free = shutil.disk_usage(disk).free
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - left_kib * 1024))


def taken_kib(project: Project) -> int:
    return sum(path.stat().st_size for path in project.out.rglob("*") if path.is_file()) // 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    "share", [0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
)
def test_a_run_on_a_disk_that_is_too_small_is_refused_and_goes_on_on_a_larger_one(
    project: Project, disk: Path, share: float
) -> None:
    resize(disk, int(share * taken_kib(project)))
    out = disk / "runs"
    full = attacked("run", project.recipe, "--out", out, timeout_s=300)
    refused(full, 6, "No space left on device", "MiB free", str(disk))
    resize(disk, 4 * taken_kib(project))
    again = attacked("run", project.recipe, "--out", out, timeout_s=300)
    assert again.code == 0, again.text
    for name in FILES:
        assert sha256_file(out / NAME / "latest" / name) == sha256_file(project.latest / name), name


@pytest.mark.slow
@pytest.mark.parametrize("left_kib", [0, 8, 64, 300])
@pytest.mark.parametrize("command", ["verify", "layers", "bundle", "report", "gate", "promote", "junit"])
def test_other_commands_on_a_full_disk_leave_what_was_there(
    project: Project, disk: Path, command: str, left_kib: int
) -> None:
    resize(disk, 16 * taken_kib(project) + 2048)
    run = disk / "run"
    shutil.copytree(project.latest, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    fill(disk, left_kib)
    arguments = {
        "verify": ["verify", run],
        "layers": ["verify", run, "--layers"],
        "bundle": ["bundle", run, "--format", "triton", "--out", disk / "models"],
        "report": ["report", run],
        "gate": ["gate", "--candidate", run],
        "promote": ["baseline", "promote", run, "--out", disk / "baseline.json"],
        "junit": ["gate", "--candidate", run, "--junit", disk / "junit.xml"],
    }[command]
    ended = attacked(*arguments, timeout_s=300)
    assert ended.code in (0, 6), ended.text
    if ended.code:
        refused(ended, 6, "No space left on device", str(disk))
        assert not list(disk.glob("models*")) and not (disk / "baseline.json").exists()
    for path, data in before.items():
        now = path.read_bytes()
        assert now == data or (now and path.suffix in (".json", ".xml", ".gz", ".html", ".jsonl")), path
    assert not [path for path in run.iterdir() if path.name.startswith((".layers", "tmp"))]
    (disk / "ballast").unlink()
    assert attacked("show", run).code == 0


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize("left_kib", [0, 16, 128])
def test_an_engine_that_the_builder_cannot_write(project: Project, disk: Path, left_kib: int) -> None:
    resize(disk, 1024)
    out = disk / "engine"
    out.mkdir()
    fill(disk, left_kib)
    recipe = load(project.latest).recipe
    with (
        pytest.raises(filesystem.MachineError, match=f"{out}.*No space left.*MiB free"),
        machine_errors(disk),
    ):
        build(OnnxModel(project.latest), recipe.build, out)
    assert not (out / "model.plan").exists()


def _map(folder: Path, size: int) -> None:
    from qcompress.parity.distance import keep_logits

    keep_logits(folder / "logits-float.npy", (size, 32, 1024), {0: np.ones((32, 1024), np.float32)})


@pytest.mark.parametrize("size", [1, 4, 100])
def test_mapped_logits_have_their_blocks_before_they_are_written(disk: Path, size: int) -> None:
    """A child process, because the defect is a SIGBUS."""
    pid = os.fork()
    if pid == 0:
        try:
            with machine_errors(disk):
                _map(disk, size)
        except filesystem.MachineError as error:
            os._exit(6 if str(disk) in str(error) and "MiB free" in str(error) else 1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 6, signal.Signals(-status).name if status < 0 else status
    assert not (disk / "logits-float.npy").exists()


@pytest.mark.parametrize("work", ["copyfile", "copy2", "copytree", "replace"])
def test_the_destination_is_named_and_its_space(project: Project, disk: Path, work: str) -> None:
    fill(disk, 4)
    source = project.latest / "model.onnx"
    with pytest.raises(filesystem.MachineError, match=f"{disk}.* MiB free"), machine_errors(disk):
        if work == "copytree":
            try:
                shutil.copytree(project.latest, disk / "run")
            except shutil.Error as error:
                raise OSError(28, error.args[0][0][2], str(source), None, str(disk / "run")) from None
        elif work == "replace":
            raise OSError(28, "No space left on device", str(source), None, str(disk / "x"))
        else:
            getattr(shutil, work)(source, disk / "model.onnx")
