"""Ctrl-C, SIGTERM and SIGHUP: exit code, one sentence and no traceback, from the first import on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lines import Project, environment, finished, make_project, python, start

pytestmark = [
    pytest.mark.attack("signals: exit code and last words"),
    pytest.mark.skipif(os.name != "posix", reason="signals of POSIX"),
]

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}

STAGES = ("train", "export", "verify")


def words(process: subprocess.Popen[str], code: int) -> str:
    """Output of a process that ended with `code` and without a traceback."""
    stdout, stderr = process.communicate(timeout=120)
    assert "Traceback" not in stderr and "Exception ignored" not in stderr, stderr
    assert process.returncode == code, (process.returncode, stderr)
    assert stderr.count("interrupted") == 1, stderr
    return stderr


def wait_for(project: Project, pattern: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not any(project.cache.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, text_file: Path) -> Project:
    return make_project(tmp_path / "project", tiny_model, text_file)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGHUP))],
)
def test_while_training(project: Project, number: int) -> None:
    process = start(project.command())
    wait_for(project, "train/*.partial/checkpoint.safetensors", process)
    process.send_signal(number)
    assert f"continue with:\n  qcompress run {project.recipe} --out {project.out}" in words(
        process, CODES[number]
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("stage", ["load", "fold", "export", "build", "verify"])
def test_in_every_stage(project: Project, stage: str, number: int) -> None:
    process = start(project.command())
    wait_for(project, f"{stage}/*.partial", process)
    process.send_signal(number)
    assert "continue with:" in words(process, CODES[number])


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.1, 0.2, 0.3])
def test_while_modules_are_imported(project: Project, command: str, number: int, after_s: float) -> None:
    """Counted from the moment when the process hears signals, which Python's own start does not."""
    process = start([command, str(project.recipe), "--out", str(project.out)])
    wait_until_heard(process.pid)
    time.sleep(after_s)
    process.send_signal(number)
    assert ("continue with:" in words(process, CODES[number])) is (command == "run")


def wait_until_heard(pid: int) -> None:
    """Until SIGTERM has a handler: bit 14 of SigCgt."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:") and int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
                return
        time.sleep(0.002)
    raise AssertionError("the process never heard signals")


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [
    (signal.SIGINT, signal.SIGINT, signal.SIGINT),
    (signal.SIGTERM, signal.SIGTERM),
    (signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    (signal.SIGHUP, signal.SIGTERM, signal.SIGTERM, signal.SIGINT),
])  # fmt: skip
@pytest.mark.parametrize("pause_s", [0.0, 0.05, 0.4])
def test_several_signals_end_with_the_code_of_the_first(
    project: Project, numbers: tuple[int, ...], pause_s: float
) -> None:
    process = start(project.command())
    wait_for(project, "train/*.partial/checkpoint.safetensors", process)
    for number in numbers:
        process.send_signal(number)
        time.sleep(max(pause_s, 0.002))  # signals that wait together come in the order of their numbers
    assert "continue with:" in words(process, CODES[numbers[0]])


@pytest.mark.slow
def test_nohup_is_heard_no_more_than_elsewhere(project: Project) -> None:
    def deaf() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    command = [sys.executable, "-m", "qcompress", *project.command("--until", "train")]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=deaf
    )
    wait_for(project, "train/*.partial/checkpoint.safetensors", process)
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("layers", [True, False])
def test_measuring_again_that_is_stopped_leaves_the_run_as_it_was(
    tiny_model: Path, text_file: Path, tmp_path: Path, number: int, layers: bool
) -> None:
    done = finished(tiny_model, text_file).copy(tmp_path / "copy")
    before = {path: path.read_bytes() for path in done.latest.rglob("[!.]*") if path.is_file()}
    process = start(["verify", str(done.latest), *(["--layers"] if layers else [])])
    wait_until_heard(process.pid)
    deadline = time.monotonic() + 120
    while not list(done.latest.glob(".layers*" if layers else "tmp*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    words(process, CODES[number])
    after = {path: path.read_bytes() for path in done.latest.rglob("*") if path.is_file()}
    changed = [path.name for path in before if after.get(path) != before[path]]
    assert changed == [] or changed == ["certificate.json"]
    assert not [path for path in done.latest.iterdir() if path.name.startswith((".layers", "tmp"))]


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_trackers_are_closed_as_killed(
    tmp_path: Path, tiny_model: Path, text_file: Path, number: int, to_all: bool
) -> None:
    """Slurm sends the signal to every process of a job, the trackers too."""
    sqlite3 = pytest.importorskip("sqlite3")
    pytest.importorskip("mlflow")
    project = make_project(tmp_path / "project", tiny_model, text_file, tracking=["mlflow"])
    process = start(project.command())
    wait_for(project, "train/*.partial/checkpoint.safetensors", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (database,) = _databases(project, process)
    for pid in children if to_all else ():
        os.kill(int(pid), number)
    process.send_signal(number)
    words(process, CODES[number])
    with sqlite3.connect(database) as found:
        assert found.execute("select status from runs").fetchall() == [("KILLED",)]


def _databases(project: Project, process: subprocess.Popen[str]) -> list[Path]:
    """Of the tracker, once its run is in there."""
    import sqlite3

    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        files = list(project.out.rglob("mlflow.db"))
        for file in files:
            try:
                with sqlite3.connect(file) as found:
                    if found.execute("select count(*) from runs").fetchone()[0]:
                        return files
            except sqlite3.OperationalError:
                pass
        time.sleep(0.05)
    raise AssertionError("the tracker never began")


LATE = """
import os, signal, sys
from qcompress.system.stopping import Stoppable
class Late:
    def __init__(self):
        self.kill, self.pid, self.number = os.kill, os.getpid(), int(sys.argv[1])
    def __del__(self):
        self.kill(self.pid, self.number)
late = Late()
with Stoppable():
    print("done")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_interpreter_shuts_down_leaves_the_exit_code(number: int) -> None:
    ended = python(LATE, str(int(number)))
    assert (ended.code, ended.stdout.strip()) == (0, "done"), ended
