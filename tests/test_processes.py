"""Several processes: they train what one trains, and a launch that is not what it seems is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lines import ENVIRONMENT, Project, cli, make_project
from safetensors import safe_open
from safetensors.torch import load_file

from qcompress.errors import MachineError
from qcompress.processes import Processes, join

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "qcompress"],
    "accelerate": [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "-m",
        "qcompress",
    ],
}


def sections(steps: int = 20) -> dict[str, object]:
    """LSQ, SGD, no dropout: what should not depend on how a batch is split."""
    return {
        "method": "lsq",
        "train": {
            "device": "cpu", "batch_size": 4, "optimizer": "sgd", "checkpoint_every_s": 1,
            "lr": {"weight": 0.05, "other": 0.05, "scale": 0.01}, "phases": {"finetune": {"steps": steps}},
        },
    }  # fmt: skip


def launch(launcher: str, project: Project, *words: str) -> subprocess.Popen[str]:
    """`qcompress run` in two processes."""
    return subprocess.Popen(
        [sys.executable, *LAUNCHERS[launcher], *project.command(*words)],
        env={**os.environ, **ENVIRONMENT, "MASTER_PORT": "0"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def trained(project: Project) -> dict[str, torch.Tensor]:
    """The finished train stage's tensors."""
    return load_file(project.entry("train") / "trained.safetensors")


@pytest.fixture(scope="module")
def calm(without_dropout: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The run of one process."""
    project = make_project(tmp_path_factory.mktemp("one") / "p", without_dropout, text_file, **sections())
    project.run(until="train")
    return project


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_two_processes_make_the_updates_of_one(
    launcher: str, calm: Project, without_dropout: Path, text_file: Path, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "p", without_dropout, text_file, **sections())
    process = launch(launcher, project, "--until", "train")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert out.count("unfinished") == 1  # one process speaks
    one, two = trained(calm), trained(project)
    assert one.keys() == two.keys() and len(one) > 20
    start = load_file(without_dropout / "model.safetensors")
    moved = max(float((one[name] - start[name]).abs().max()) for name in one if name in start)
    assert moved > 1e-2  # or equality would mean nothing
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5)


def updates(checkpoint: Path) -> int:
    """Updates that a checkpoint holds."""
    with safe_open(checkpoint, framework="np") as stream:
        return json.loads(stream.metadata()["position"])["step"]


@pytest.mark.slow
def test_two_processes_that_were_killed_go_on(without_dropout: Path, text_file: Path, tmp_path: Path) -> None:
    whole = make_project(tmp_path / "whole", without_dropout, text_file, **sections(steps=400))
    process = launch("torchrun", whole, "--until", "train")
    assert process.communicate(timeout=300) and process.returncode == 0
    broken = make_project(tmp_path / "broken", without_dropout, text_file, **sections(steps=400))
    process = launch("torchrun", broken, "--until", "train")
    while not any(updates(file) for file in broken.cache.glob("train/*.partial/checkpoint.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2  # each in a session of its own
    for pid in (process.pid, *map(int, workers)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    again = launch("torchrun", broken, "--until", "train")
    assert "resuming" in again.communicate(timeout=300)[1]
    one, two = trained(whole), trained(broken)
    assert all(torch.equal(one[name], two[name]) for name in one)


# A launch that is not what it seems -------------------------------------------------------------------


def test_a_launcher_that_started_one_process_of_two_is_refused(
    calm: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    done = cli(*calm.command("--until", "train"))
    assert done.code == 6 and "started this one alone" in done.stderr and "torchrun" in done.stderr


def test_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(MachineError, match="FSDP"):
        join(cpu=True)


def test_processes_that_do_not_meet_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stranger:
        num_processes, process_index = 1, 0

    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("accelerate.PartialState", lambda **options: Stranger())
    with pytest.raises(MachineError, match="2 processes were started and 1 met"):
        join(cpu=True)


def test_a_batch_that_cannot_be_shared_is_refused(calm: Project) -> None:
    from qcompress.stages.train import _accelerator

    recipe = api_recipe(calm)
    with pytest.raises(MachineError, match="batch_size is 4, which 3 processes cannot share"):
        _accelerator(recipe, Processes(0, 3))


def api_recipe(project: Project):
    from qcompress.recipe import load_recipe

    return load_recipe(project.recipe).recipe


def test_each_process_sees_its_share_of_a_batch() -> None:
    shares = [Processes(rank, 3).share([5, 9, 1, 7, 2, 4]) for rank in range(3)]
    assert shares == [[5, 7], [9, 2], [1, 4]]
    assert Processes().share([3, 1]) == [3, 1] and Processes().agree("x") == "x"
