"""A training run that is killed and started again ends with the bytes of one that was not.

Children are killed with SIGKILL: no handler runs, no buffer is flushed. They come from a fork server that has
imported the stage once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import Line, make_recipe, start_line

import qcompress.pipeline.stages.train
import qcompress.training.checkpoint
from qcompress.schema.recipe import Recipe
from qcompress.training.checkpoint import Checkpoints, Position, restore
from qcompress.training.methods import STEPPERS

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL and a fork server")

CHILDREN = multiprocessing.get_context("forkserver")
if os.name == "posix":
    CHILDREN.set_forkserver_preload(
        [
            "qcompress.pipeline.stages.train",
            "transformers.models.gpt2.modeling_gpt2",
            "transformers.models.auto.tokenization_auto",
        ]
    )

Moment = tuple[str, int]
"""What happens, and at which of its occurrences the child dies."""


def kill_at(moment: Moment) -> None:
    """Arrange for this process to be killed."""
    what, occurrence = moment
    left = occurrence

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def killing(kind: type) -> type:
        class Killing(kind):
            def step(self, *arguments):
                report = super().step(*arguments)
                count()
                return report

        return Killing

    rename, save = os.replace, qcompress.training.checkpoint.save_tensors

    def dying_rename(source, target) -> None:
        if Path(target).name == qcompress.training.checkpoint.NAME:
            if what == "checkpoint written":
                count()
            rename(source, target)
            if what == "checkpoint in place":
                count()
        else:
            rename(source, target)

    def dying_save(file, tensors, metadata) -> None:
        save(file, tensors, metadata)
        with open(file, "r+b") as stream:
            stream.truncate(file.stat().st_size // 2)  # as far as the write had come
        count()
        save(file, tensors, metadata)

    if what == "update":
        STEPPERS.update({name: killing(kind) for name, kind in STEPPERS.items()})
    elif what == "half a checkpoint":
        qcompress.training.checkpoint.save_tensors = dying_save
    else:
        os.replace = dying_rename


def child(made: Line, moment: Moment | None, resuming: bool) -> None:
    torch.set_num_threads(1)
    if moment is not None:
        kill_at(moment)
    if resuming:

        def refuse(*arguments: object) -> None:
            raise AssertionError("a resumed run observes no ranges again")

        for name in ("observe_all", "initialise"):
            assert hasattr(qcompress.pipeline.stages.train, name)
            setattr(qcompress.pipeline.stages.train, name, refuse)
    made.train()


def run(made: Line, moment: Moment | None = None, resuming: bool = False) -> int:
    process = CHILDREN.Process(target=child, args=(made, moment, resuming))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def outcome(made: Line) -> dict[str, bytes]:
    names = ("trained.safetensors", "trained.json", "history.jsonl", "distributions.json")
    return {name: (made.trained.path / name).read_bytes() for name in names}


RECIPES = {
    "lsq": {"method": "lsq", "steps": 5, "train": {"lr": {"weight": 1e-3}}},
    "quadapter": {"method": "quadapter", "steps": 3, "train": {"lr": {"adapter": 0.05}}},
    "saq": {
        "method": "saq",
        "steps": 6,
        "stepper": {"every": 3, "rho": 0.5, "subset": 0.5},
        "train": {"lr": {"weight": 1e-3}},
    },
    "squat": {
        "method": "squat",
        "steps": 4,
        "stepper": {"alternate": "iteration", "rho": 0.5},
        "train": {"lr": {"weight": 1e-3}},
    },
}


def recipe(text_file: Path, method: str, every_s: int) -> Recipe:
    made = make_recipe(text_file, **RECIPES[method])
    # 0 is below what a recipe may say: a checkpoint after every update
    return made.model_copy(update={"train": made.train.model_copy(update={"checkpoint_every_s": every_s})})


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path
) -> Callable[[str], dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}

    def make(method: str) -> dict[str, bytes]:
        if method not in found:
            made = start_line(
                tmp_path_factory.mktemp(method) / "line",
                tiny_model,
                text_file,
                recipe(text_file, method, 3600),
            )
            assert run(made) == 0
            found[method] = outcome(made)
        return found[method]

    return make


@pytest.mark.parametrize(
    ("method", "every_s", "moments"),
    [
        ("lsq", 0, [("update", 1)]),
        ("lsq", 0, [("update", 4), ("update", 1)]),  # killed twice
        ("lsq", 0, [("checkpoint written", 3)]),
        ("lsq", 0, [("checkpoint in place", 6)]),  # the last update's
        ("lsq", 0, [("half a checkpoint", 4)]),
        ("lsq", 3600, [("update", 4)]),  # nothing but the calibration is in the checkpoint
        ("quadapter", 0, [("update", 2)]),  # first block
        ("quadapter", 0, [("update", 5)]),  # second block
        (
            "quadapter",
            0,
            [("checkpoint in place", 3), ("update", 2)],
        ),  # after the blocks, then in the model phase
        ("quadapter", 3600, [("checkpoint written", 4)]),  # leaving the first phase
        ("saq", 0, [("update", 2)]),  # its perturbation is used twice more
        ("saq", 0, [("update", 4), ("update", 1)]),  # at a new search, then between two
        ("squat", 0, [("update", 3)]),  # the scales' turn is next
    ],
    ids=str,
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    uninterrupted: Callable[[str], dict[str, bytes]], tmp_path: Path, tiny_model: Path, text_file: Path,
    method: str, every_s: int, moments: list[Moment],
) -> None:  # fmt: skip
    made = start_line(tmp_path / "line", tiny_model, text_file, recipe(text_file, method, every_s))
    for index, moment in enumerate(moments):
        assert run(made, moment, resuming=index > 0) == -signal.SIGKILL
        assert not (made.trained.path / "trained.safetensors").exists()
        assert (made.trained.path / qcompress.training.checkpoint.NAME).exists()
    assert run(made, resuming=True) == 0
    assert outcome(made) == uninterrupted(method)


def test_a_finished_checkpoint_is_enough_to_write_the_result_again(
    uninterrupted: Callable[[str], dict[str, bytes]], tmp_path: Path, tiny_model: Path, text_file: Path
) -> None:
    """Killed between the last checkpoint and the artifact: nothing is trained a second time."""
    made = start_line(tmp_path / "line", tiny_model, text_file, recipe(text_file, "lsq", 3600))
    assert run(made) == 0
    for name in ("trained.safetensors", "trained.json"):
        (made.trained.path / name).unlink()
    assert run(made, ("update", 1), resuming=True) == 0  # would die at an update
    assert outcome(made) == uninterrupted("lsq")


# The checkpoint itself -------------------------------------------------------------------------------


class Two(torch.nn.Module):
    """Two names for one tensor, and one that stands still."""

    def __init__(self) -> None:
        super().__init__()
        self.moves = torch.nn.Parameter(torch.arange(3.0))
        self.shared = self.moves
        self.still = torch.nn.Parameter(torch.ones(2))


def test_a_checkpoint_restores_tensors_moments_position_and_facts(tmp_path: Path) -> None:
    model = Two()
    optimizer = torch.optim.AdamW([model.moves], lr=0.1)
    for _ in range(3):
        model.moves.sum().backward()
        optimizer.step()
    checkpoints = Checkpoints(tmp_path, 3600)
    position, facts = Position(phase=1, block=2, step=3, passes=4), [{"name": "calibrate", "before": 0.1}]
    kept = {"offset:0": torch.tensor([0.5, -2.0])}
    checkpoints.save(position, model, {"moves", "shared"}, optimizer, facts, [1.5, 0.1], kept)
    other = Two()
    with torch.no_grad():
        other.still.fill_(7.0)
    resumed = Checkpoints(tmp_path, 3600).load(other)
    assert torch.equal(other.moves, model.moves) and torch.equal(other.still, torch.full((2,), 7.0))
    assert (resumed.position, resumed.facts, resumed.recent) == (position, facts, [1.5, 0.1])
    assert list(resumed.stepper) == ["offset:0"] and torch.equal(
        resumed.stepper["offset:0"], kept["offset:0"]
    )
    again = torch.optim.AdamW([other.moves], lr=0.1)
    restore(again, resumed.moments)
    for each in (model, other):
        each.moves.grad = torch.tensor([0.3, -0.1, 2.0])
    optimizer.step()
    again.step()
    assert torch.equal(other.moves, model.moves)


def test_without_a_file_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, 1).load(Two()) is None


def test_a_checkpoint_is_due_when_its_time_has_come_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("qcompress.training.checkpoint.time.monotonic", lambda: now)
    checkpoints = Checkpoints(tmp_path, 60)
    now = 159.9
    assert not checkpoints.due()
    now = 160.0
    assert checkpoints.due()
    checkpoints.save(Position(), Two(), {"moves"}, None, [], [], {})
    assert not checkpoints.due()


@pytest.mark.parametrize("file", [qcompress.training.checkpoint.NAME, "history.jsonl"])
@pytest.mark.parametrize("where", [0.02, 0.5, 0.97])
def test_training_never_goes_on_from_bits_that_nobody_wrote(
    uninterrupted: Callable[[str], dict[str, bytes]], tmp_path: Path, tiny_model: Path, text_file: Path,
    file: str, where: float,
) -> None:  # fmt: skip
    made = start_line(tmp_path / "line", tiny_model, text_file, recipe(text_file, "lsq", 0))
    assert run(made, ("update", 4)) == -signal.SIGKILL
    damaged = made.trained.path / file
    data = bytearray(damaged.read_bytes())
    data[int(len(data) * where)] ^= 4
    damaged.write_bytes(data)
    assert file in (Checkpoints(made.trained.path, 0).damage() or "")
    assert run(made) == 0
    assert outcome(made) == uninterrupted("lsq")
