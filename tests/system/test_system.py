"""Functions of the operating system: locks that end with their process, full disks."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qcompress.errors import BusyError, MachineError, UsageError
from qcompress.system import digests, filesystem, locks, workspace
from qcompress.system.workspace import Workspace, stage_key, would_reuse

PARTS = {"recipe": "r", "values": {"format": {"weights": 8}}}
ROOT = os.name == "posix" and os.geteuid() == 0


def open_space(folder: Path, key: str = "key") -> Workspace:
    return Workspace(folder / "runs", folder / "cache", "recipe", key)


def entry_of(folder: Path) -> Path:
    return folder / "cache" / "train" / stage_key("train", PARTS)


def write(**files: str) -> Callable[[Path], None]:
    def make(partial: Path) -> None:
        for name, text in files.items():
            (partial / name).write_text(text)

    return make


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.02)
    return path.read_text()


# Locks ----------------------------------------------------------------------------------------------


def hold(folder: Path, without_fcntl: bool = False) -> None:
    """Child process: hold the run until killed, with a forked child of its own that stays behind."""
    if without_fcntl:
        locks.fcntl = None
    space = open_space(folder)
    grandchild = os.fork()
    if grandchild == 0:
        time.sleep(60)
        os._exit(0)
    (folder / "holding.tmp").write_text(str(grandchild))
    os.replace(folder / "holding.tmp", folder / "holding")
    time.sleep(60)
    space.close()


@pytest.mark.parametrize("without_fcntl", [False, True])
def test_a_run_is_refused_while_another_lives_and_free_after_sigkill(
    tmp_path: Path, without_fcntl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without_fcntl:
        monkeypatch.setattr(locks, "fcntl", None)
    child = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path, without_fcntl))
    child.start()
    grandchild = int(wait_for(tmp_path / "holding"))
    try:
        with pytest.raises(BusyError, match=rf"process {child.pid} on .*, since 20\d\d-") as refusal:
            open_space(tmp_path)
        assert refusal.value.exit_code == 7
        assert f"kill {child.pid}" in refusal.value.fix
        child.kill()
        child.join()  # with a timeout it would wait for the grandchild
        assert child.exitcode == -signal.SIGKILL
        os.kill(grandchild, 0)  # still there, and yet:
        with open_space(tmp_path) as space:
            assert not space.step("fold", PARTS, write(a="1")).reused
    finally:
        os.kill(grandchild, signal.SIGKILL)


@pytest.mark.parametrize("without_fcntl", [False, True])
def test_a_closed_run_can_be_opened_again_and_an_open_one_cannot(
    tmp_path: Path, without_fcntl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without_fcntl:
        monkeypatch.setattr(locks, "fcntl", None)
    first = open_space(tmp_path)
    with pytest.raises(BusyError, match=f"process {os.getpid()} on"):
        open_space(tmp_path)
    open_space(tmp_path, "other").close()
    first.close()
    first.close()
    with open_space(tmp_path):
        pass


def test_a_released_lock_is_free_even_if_a_child_still_has_a_copy(tmp_path: Path) -> None:
    first, second = locks.Lock(tmp_path / "lock"), locks.Lock(tmp_path / "lock")
    assert first.take()
    copy = os.dup(first._fd)  # what a child has that a library forked behind Python's back
    first.release()
    assert second.take()
    second.release()
    os.close(copy)


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with pytest.raises(MachineError, match="has no locks"):
        open_space(tmp_path)


# The machine refuses ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "qcompress-test", str(disk)]
    if not (sys.platform == "linux" and ROOT) or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_named_keeps_finished_stages_and_lets_the_stage_go_on(small_disk: Path) -> None:
    size = 700 << 10

    def make(partial: Path) -> None:
        (partial / "checkpoint").write_text("seen")
        (partial / "model.bin").write_bytes(b"x" * size)

    with open_space(small_disk) as space:
        done = space.step("load", PARTS, write(a="1"))
        with pytest.raises(MachineError, match=r"\.partial.*No space left.*0 MiB free") as refusal:
            space.step("train", PARTS, make)
    assert refusal.value.exit_code == 6
    assert "free some space" in refusal.value.fix
    assert would_reuse(small_disk / "cache", "load", PARTS) == (True, "")
    assert (done.path / "a").read_text() == "1"
    partial = entry_of(small_disk).with_name(entry_of(small_disk).name + ".partial")
    assert (partial / "checkpoint").read_text() == "seen"
    size = 1 << 10
    with open_space(small_disk) as space:
        done = space.step("train", PARTS, make)
    assert sorted(path.name for path in done.path.iterdir()) == ["manifest.json", "model.bin"]


def test_a_read_only_disk_still_serves_what_is_finished(small_disk: Path, tmp_path: Path) -> None:
    with open_space(small_disk) as space:
        space.step("load", PARTS, write(a="1"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(MachineError, match=f"{small_disk}.*Read-only file system"):
        open_space(small_disk)
    with Workspace(tmp_path / "runs", small_disk / "cache", "recipe", "key") as space:
        assert space.step("load", PARTS, write(a="2"), place={"a": "a"}).reused
        with pytest.raises(MachineError, match=f"{small_disk}.*Read-only file system"):
            space.step("fold", PARTS, write(a="1"))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "MiB free"),
        (errno.EDQUOT, "MiB free"),
        (errno.EACCES, "Permission denied"),
        (errno.EPERM, "Operation not permitted"),
        (errno.EROFS, "Read-only file system"),
    ],
)
@pytest.mark.parametrize("culprit", ["make", "sha256_file", "write_sealed"])
def test_refusals_of_the_machine_become_machine_errors_wherever_they_happen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str, culprit: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    with open_space(tmp_path) as space:
        if culprit != "make":
            monkeypatch.setattr(digests if culprit == "sha256_file" else workspace, culprit, refuse)
        with pytest.raises(MachineError, match=rf"\.partial: .*{words}") as refusal:
            space.step("train", PARTS, refuse if culprit == "make" else write(a="1"))
    assert refusal.value.fix
    assert entry_of(tmp_path).with_name(entry_of(tmp_path).name + ".partial").is_dir()


def test_a_full_disk_is_named_for_a_folder_that_could_not_even_be_made(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"a/b: .* MiB free"), filesystem.machine_errors(tmp_path / "a/b"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [OSError("no number"), OSError(errno.EIO, "broken"), KeyError("x")])
def test_other_errors_pass_as_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error.args[-1])) as found, filesystem.machine_errors(tmp_path):
        raise error
    assert found.value is error


@pytest.mark.skipif(ROOT, reason="root may write everywhere; the read-only disk is root's test")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(mode=0o500)
    with pytest.raises(MachineError, match="runs.*Permission denied"):
        open_space(tmp_path)


def test_a_run_that_could_not_be_set_up_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(filesystem.os, "write", refuse)
        with pytest.raises(MachineError, match="No space left"):
            open_space(tmp_path)
    open_space(tmp_path).close()


def test_a_file_in_the_way_of_a_folder_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UsageError, match="a file is where a folder should be"):
        open_space(tmp_path)
