"""SIGKILL and SIGTERM at random moments of a run, half of them in training, and the run that goes on.

A run is started, ended by the signal, and started again, up to `IN_A_ROW` times; then it may finish. Its
files must be those of a run that nobody ended.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lines import NAME, Project, make_project, start

from qcompress.system.artifacts import sha256_file

pytestmark = [pytest.mark.slow, pytest.mark.attack("signals at random moments of a run")]

IN_A_ROW = 5
LATEST_S = 14.0
"""After this time a run is at its end."""

TRAINING_S = 5.0
FILES = (
    "model.onnx",
    "certificate.json",
    "parity.json",
    "samples.json.gz",
    "verdict.json",
    "engine/build.json",
)

LONG = {
    "train": {
        "device": "cpu",
        "batch_size": 4,
        "checkpoint_every_s": 1,
        "phases": {"calibrate": {"steps": 300}, "finetune": {"steps": 300}},
    }
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> dict[str, str]:
    """Digests of a run that nobody ended."""
    project = make_project(tmp_path_factory.mktemp("whole") / "project", tiny_model, text_file, **LONG)
    assert ended(start(project.command())) == 0
    return digests(project)


def digests(project: Project) -> dict[str, str]:
    return {name: sha256_file(project.latest / name) for name in FILES}


def ended(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=300)
    return process.returncode


def end_at_random(
    process: subprocess.Popen[str], project: Project, number: int, chance: random.Random
) -> None:
    """Send the signal at some time, or at some time of the training."""
    training = chance.random() < 0.5
    deadline = time.monotonic() + LATEST_S
    while training and process.poll() is None and time.monotonic() < deadline:
        if any(project.cache.glob("train/*.partial/checkpoint.safetensors")):
            break
        time.sleep(0.01)
    pause = time.monotonic() + chance.uniform(0, TRAINING_S if training else LATEST_S)
    while process.poll() is None and time.monotonic() < pause:
        time.sleep(0.01)
    process.send_signal(number)


@pytest.mark.parametrize(
    ("number", "seed", "times"),
    [*((signal.SIGKILL, seed, 20) for seed in range(5)), (signal.SIGTERM, 5, 20), (signal.SIGHUP, 6, 5)],
)
def test_a_run_that_was_ended_again_and_again_ends_as_one_that_was_not(
    number: int, seed: int, times: int, whole: dict[str, str],
    tmp_path: Path, tiny_model: Path, text_file: Path, tried: Callable[[int], None],
) -> None:  # fmt: skip
    chance, done, rounds = random.Random(seed), 0, 0
    tried(times)
    while done < times:
        rounds += 1
        project = make_project(tmp_path / f"round-{rounds}", tiny_model, text_file, **LONG)
        for _ in range(IN_A_ROW):
            process = start(project.command())
            end_at_random(process, project, number, chance)
            stdout, stderr = process.communicate(timeout=300)
            if process.returncode == 0:
                break  # it was over before the signal
            assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), stderr
            assert "Traceback" not in stderr and "in use" not in stderr, stderr
            done += 1
            if number != signal.SIGKILL:
                assert f"interrupted by {signal.Signals(number).name}; continue with:" in stderr
            if (project.out / NAME / "latest").exists():  # it was writing its page
                assert digests(project) == whole
        assert ended(start(project.command())) == 0
        assert digests(project) == whole
        assert not list(project.cache.glob("*/*.partial"))
