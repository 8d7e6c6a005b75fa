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
import torch.nn.functional as F
from lines import ENVIRONMENT, Project, cli, make_project
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from qcompress.errors import MachineError
from qcompress.models import load_tokenizer
from qcompress.quant.affine import Grid
from qcompress.quant.ranges import start_scale, weight_ratio
from qcompress.system.distributed import Processes, join
from qcompress.tasks import causal_lm
from qcompress.training.batches import batch_rows

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
    """LSQ, SGD, no dropout: what should not depend on how a batch is split. Clipping keeps the updates small,
    so that no code comes to lie on a tie, which the order of a sum would decide.
    """
    return {
        "method": "lsq", "stepper": {"clip_norm": 1.0},
        "train": {
            "device": "cpu", "batch_size": 4, "optimizer": "sgd", "checkpoint_every_s": 1,
            "lr": {"weight": 0.05, "other": 0.05, "scale": 1e-3}, "phases": {"finetune": {"steps": steps}},
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


def test_a_process_leaves_the_group_before_the_interpreter_ends(tmp_path: Path) -> None:
    """Left to the interpreter's end, the group's threads abort about one launch in twelve."""
    script = tmp_path / "meet.py"
    script.write_text(
        "import atexit\n"
        "import torch.distributed as distributed\n"
        "from qcompress.system.distributed import join\n"
        "found = join(cpu=True)\n"
        "assert (found.size, distributed.is_initialized()) == (2, True)\n"
        "distributed.barrier()\n"  # a process that leaves first closes connections of the other's start
        "atexit._run_exitfuncs()\n"
        "assert not distributed.is_initialized()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)],
        env={**os.environ, **ENVIRONMENT, "MASTER_PORT": "0"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_two_processes_make_the_updates_of_one(
    launcher: str, without_dropout: Path, text_file: Path, tmp_path: Path
) -> None:
    """Up to codes on a tie, which the order of a sum decides: what differs is 1 % of the movement."""
    values = {**sections(), "seed": 3}
    alone = make_project(tmp_path / "alone", without_dropout, text_file, **values)
    alone.run(until="train")
    project = make_project(tmp_path / "p", without_dropout, text_file, **values)
    process = launch(launcher, project, "--until", "train")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert out.count("unfinished") == 1  # one process speaks
    one, two = trained(alone), trained(project)
    assert one.keys() == two.keys() and len(one) > 20
    start = load_file(without_dropout / "model.safetensors")
    moved = max(float((one[name] - start[name]).abs().max()) for name in one if name in start)
    assert moved > 1e-2  # or equality would mean nothing
    begun = [name for name in one if name in start]
    apart, way = (
        float(torch.cat([(one[name] - other[name]).flatten() for name in begun]).norm())
        for other in (two, start)
    )
    assert apart <= 1e-2 * way


# Each process perturbs by itself ------------------------------------------------------------------------

UPDATES, RHO = 6, 0.5
RATES = {"weight": 0.05, "other": 0.05, "scale": 0.05}


def sharp(stepper: str, **options: object) -> dict[str, object]:
    """Attentions with 4-bit weights, all else float; plain SGD at a constant rate."""
    return {
        "method": stepper,
        "stepper": {"rho": RHO, "clip_norm": None, **options},
        "format": {"weights": {"bits": 4, "container": "int8"}, "layers": {"*.mlp.*": "float"}},
        "train": {
            "device": "cpu", "batch_size": 4, "optimizer": "sgd", "momentum": 0.0, "decay": "constant",
            "warmup": 0.0, "lr": RATES, "phases": {"finetune": {"steps": UPDATES}},
        },
    }  # fmt: skip


def batches(project: Project) -> list[Tensor]:
    """Token ids of the whole batch of each update."""
    recipe = api_recipe(project)
    tokenizer = load_tokenizer(project.folder / "model")
    data = causal_lm.examples(recipe.data.train, project.folder, tokenizer, recipe.task)
    size = recipe.train.batch_size
    rows = [batch_rows(data.lengths, size, step, recipe.seed) for step in range(UPDATES)]
    return [data.ids[some] for some in rows]


class ByHand:
    """Sharpness-aware updates of a stock GPT-2: LSQ's formulas on leaves of its own, and plain SGD on weights
    and on the scales themselves.

    Scales start where the library's do, to the last bit: a weight that is rounded the other way would count.
    """

    def __init__(self, checkpoint: Path, weights_only: bool, unperturbed_scales: bool) -> None:
        self.model = GPT2LMHeadModel.from_pretrained(checkpoint, attn_implementation="eager").eval()
        self.values = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
        self.starts = {}
        for name, weight in self.values.items():
            if name.endswith(("attn.c_attn.weight", "attn.c_proj.weight")):
                ratio = weight_ratio(weight, Grid(1), (-8, 7), "mse", 100.0)
                self.starts[name] = start_scale(weight.abs().amax(0), ratio, (-8, 7))
        self.scales = {name: start.clone() for name, start in self.starts.items()}
        shifted = [name for name in self.values if ".bias" in name or ".ln_" in name]
        assert len(self.starts) == 4 and len(shifted) == 18 and len(self.values) == 28
        self.ball = [*self.starts] if weights_only else [*self.starts, *shifted]
        self.unperturbed_scales = unperturbed_scales

    def quotient(self, name: str) -> Tensor:
        return self.values[name] / self.scales[name]

    def gradients(self, ids: Tensor, eps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the loss, by the rounded weights and by all that is not rounded, at eps from where they are."""
        leaves = {}
        for name, value in self.values.items():
            if name in self.starts:
                value = self.quotient(name).round().clamp(-8, 7) * self.scales[name]
            leaves[name] = (value + eps.get(name, 0.0)).requires_grad_()
        logits = torch.func.functional_call(self.model, leaves, (ids,)).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True))

    def update(self, shares: list[Tensor]) -> None:
        """Each share of the batch has an eps and a gradient of its own; the mean of the gradients moves."""
        totals = {name: torch.zeros_like(value) for name, value in self.values.items()}
        slopes = {name: torch.zeros_like(scale) for name, scale in self.scales.items()}
        for ids in shares:
            first = self.gradients(ids, {})
            norm = sum(first[name].double().square().sum() for name in self.ball).sqrt().float()
            second = self.gradients(ids, {name: RHO * first[name] / norm for name in self.ball})
            for name, gradient in second.items():
                if name in self.starts:
                    v = self.quotient(name)
                    inside = (v > -8) & (v < 7)
                    heard = (first if self.unperturbed_scales else second)[name]
                    terms = heard * torch.where(inside, v.round() - v, v.clamp(-8, 7))
                    slopes[name] += terms.sum(0) / (len(v) * 7) ** 0.5 / len(shares)
                    gradient = gradient * inside
                totals[name] += gradient / len(shares)
        for name, total in totals.items():
            self.values[name] -= RATES["weight"] * total
        for name, total in slopes.items():
            self.scales[name] -= RATES["scale"] * total
            assert bool((self.scales[name] > self.starts[name] / 2).all())  # far from any floor

    def result(self) -> dict[str, Tensor]:
        return self.values | {f"{name}.scale": scale for name, scale in self.scales.items()}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference in a tensor, relative to the tensor's largest value; of the worst tensor."""
    assert found.keys() >= expected.keys() and len(expected) == 32
    return max(
        float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items()
    )


@pytest.mark.parametrize(
    ("stepper", "options"),
    [("saq", {}), pytest.param("squat", {"alternate": "fused"}, marks=pytest.mark.slow)],
    ids=["saq", "fused squat"],
)
@pytest.mark.slow
def test_each_of_two_processes_perturbs_by_itself_and_the_mean_of_their_gradients_moves(
    stepper: str, options: dict[str, str], without_dropout: Path, text_file: Path, tmp_path: Path
) -> None:
    """Sums in another order leave 2e-7; one eps of the whole batch, which one process has, is far off."""
    sections = sharp(stepper, **options)
    two, one = (make_project(tmp_path / name, without_dropout, text_file, **sections) for name in "21")
    process = launch("torchrun", two, "--until", "train")
    one.run(until="train")
    expected = {}
    for count in (1, 2):
        made = ByHand(without_dropout, weights_only=bool(options), unperturbed_scales=bool(options))
        for ids in batches(one):
            made.update([ids[rank::count] for rank in range(count)])
        expected[count] = made.result()
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    assert furthest(trained(two), expected[2]) < 1e-5
    assert furthest(trained(one), expected[1]) < 1e-5
    assert furthest(expected[1], expected[2]) > 1e-3
    start = load_file(without_dropout / "model.safetensors")
    moved = [float((value - start[name]).abs().max()) for name, value in made.values.items()]
    assert min(moved) > 1e-3 and all(
        bool((made.scales[name] != value).any()) for name, value in made.starts.items()
    )


# Interruptions ------------------------------------------------------------------------------------------


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
    from qcompress.pipeline.stages.train import _accelerator

    recipe = api_recipe(calm)
    with pytest.raises(MachineError, match="batch_size is 4, which 3 processes cannot share"):
        _accelerator(recipe, Processes(0, 3))


def api_recipe(project: Project):
    from qcompress.recipe.load import load_recipe

    return load_recipe(project.recipe).recipe


def test_each_process_sees_its_share_of_a_batch() -> None:
    shares = [Processes(rank, 3).share([5, 9, 1, 7, 2, 4]) for rank in range(3)]
    assert shares == [[5, 7], [9, 2], [1, 4]]
    assert Processes().share([3, 1]) == [3, 1] and Processes().agree("x") == "x"
