"""What log.jsonl and history.jsonl say of training: complete, in order, once, within their bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import Line, make_recipe, start_line

from qcompress.system.reporter import Reporter
from qcompress.training.history import History, read


def lines(file: Path, *events: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in found if line["event"] in events]


def logged(made: Line, log: Path) -> list[dict[str, Any]]:
    """Train with a silent reporter; the training's records in the log, without their times."""
    reporter = Reporter(silent=True)
    reporter.log_to(log)
    made.train(reporter)
    records = lines(log, "update", "scales")
    for record in records:
        del record["time"]
    return records


# A training ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lsq(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> tuple[Line, list]:
    """A training with learned scales and its log. Read only."""
    folder = tmp_path_factory.mktemp("lsq")
    train = {"lr": {"weight": 1e-3, "scale": 0.05}, "warmup": 0.5}
    made = start_line(folder / "line", tiny_model, text_file,
                      make_recipe(text_file, method="lsq", steps=4, train=train))  # fmt: skip
    return made, logged(made, folder / "log.jsonl")


def test_a_silent_run_logs_every_update_of_a_short_training_with_its_rates(lsq: tuple[Line, list]) -> None:
    made, records = lsq
    updates = [record for record in records if record["event"] == "update"]
    assert [record["step"] for record in updates] == [1, 2, 3, 4] == [record["update"] for record in updates]
    assert all(record["phase"] == "finetune" and record["steps"] == 4 for record in updates)
    # half of the steps warm up, then the rate falls linearly: 1/2, 1, 1, 1/2
    assert [record["lr"]["scale"] for record in updates] == pytest.approx([0.025, 0.05, 0.05, 0.025])
    assert [record["lr"]["weight"] for record in updates] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])
    last = json.loads((made.trained.path / "trained.json").read_text())["phases"][0]["last_loss"]
    assert sum(record["loss"] for record in updates) / 4 == pytest.approx(last, rel=1e-12)
    assert read(made.trained.path) == records


def test_the_last_scales_are_those_that_are_deployed(lsq: tuple[Line, list]) -> None:
    made, records = lsq
    scales = [record for record in records if record["event"] == "scales"]
    assert [record["step"] for record in scales] == [0, 1, 2, 3, 4]
    deployed = {
        name.removesuffix(".scale"): tensor
        for name, tensor in load_file(made.trained.path / "trained.safetensors").items()
        if name.endswith(".scale")
    }
    tables = {"transformer.wte.weight", "transformer.wpe.weight"}  # whose ranges follow them
    assert scales[-1]["scales"].keys() == deployed.keys() - tables and len(deployed) > 10
    for name, found in scales[-1]["scales"].items():
        values = sorted(deployed[name].flatten().tolist())
        wanted = [values[0], values[(len(values) - 1) // 2], values[-1]]
        assert found == pytest.approx(wanted if len(values) > 1 else values[0], rel=1e-5), name
    moved = [name for name, found in scales[0]["scales"].items() if found != scales[-1]["scales"][name]]
    assert len(moved) > 10


def test_a_block_phase_counts_over_its_blocks_and_ends_each_with_the_scales_it_kept(
    tmp_path: Path, tiny_model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompress.training.history.MOST_SCALES", 1)  # the end of the phase, by itself
    train = {"lr": {"adapter": 0.05}, "phases": {"calibrate": {"steps": 3}, "finetune": {"steps": 0}}}
    made = start_line(tmp_path / "line", tiny_model, text_file,
                      make_recipe(text_file, method="quadapter", train=train))  # fmt: skip
    records = logged(made, tmp_path / "log.jsonl")
    updates = [record for record in records if record["event"] == "update"]
    assert [record["step"] for record in updates] == [1, 2, 3, 4, 5, 6]
    ends = [(record["step"], record["scales"].keys()) for record in records if "scales" in record]
    assert [step for step, _ in ends] == [0, 3, 6]
    assert {name.split(".")[2] for name in ends[1][1]} == {"0"}
    deployed = load_file(made.trained.path / "trained.safetensors")
    last: dict[str, Any] = {}
    for record in records:
        last |= record.get("scales", {})
    rescalings = {name: found for name, found in last.items() if name.endswith(".rescale")}
    assert len(rescalings) == 4
    for name, (least, _, most) in rescalings.items():
        ends = [float(deployed[name].min()), float(deployed[name].max())]
        assert [least, most] == pytest.approx(ends, rel=1e-5)


def test_the_terms_of_a_loss_sum_to_it(tmp_path: Path, tiny_model: Path, text_file: Path) -> None:
    """SQuAT's update asks for several losses, and the terms are those of the one that it reports."""
    options = {"name": "distillation", "attention": 0, "hidden": 2.0, "task": 0.5}
    recipe = make_recipe(
        text_file, method="squat", steps=2, objective=options, stepper={"alternate": "batch"}
    )
    made = start_line(tmp_path / "line", tiny_model, text_file, recipe)
    updates = [record for record in logged(made, tmp_path / "log.jsonl") if record["event"] == "update"]
    assert len(updates) == 2
    for record in updates:
        assert record["terms"].keys() == {"logits", "hidden", "task"}
        assert sum(record["terms"].values()) == pytest.approx(record["loss"], rel=1e-6)
        assert record["passes"] == 3


# The records --------------------------------------------------------------------------------------

PHASES = (("calibrate", 40), ("nothing", 0), ("finetune", 6000))


def history(folder: Path, scales: int = 3, log: Path | None = None) -> History:
    reporter = Reporter(silent=True)
    if log is not None:
        reporter.log_to(log)
    return History(folder, PHASES, scales, reporter)


def test_the_number_of_log_points_is_bounded_and_the_ends_are_among_them(tmp_path: Path) -> None:
    found = history(tmp_path)
    due = [step for step in range(1, 6001) if found.update_due(2, step)]
    assert due[0] == 1 and due[-1] == 6000 and 150 <= len(due) <= 201
    assert [step for step in range(1, 41) if found.update_due(0, step)] == list(range(1, 41))
    scales = [step for step in range(6001) if found.scales_due(2, step)]
    assert scales[-1] == 6000 and len(scales) == 20 and scales[0] > 0  # it begins where the first phase ends
    assert found.scales_due(0, 0)


def test_a_thousand_layers_make_a_small_log(tmp_path: Path) -> None:
    """Two quantizers each, a scale for each channel."""
    found = history(tmp_path, scales=2000)
    summary = {f"model.layers.{place // 2}.mlp.down_proj.{('weight', 'input')[place % 2]}": [0.00123456] * 3
               for place in range(2000)}  # fmt: skip
    for number, (_, steps) in enumerate(PHASES):
        for step in range(steps + 1):
            if found.update_due(number, step):
                found.update(number, step, 1, 3.14159, {"logits": 3.0}, {"scale": 1e-3})
            if found.scales_due(number, step):
                found.scales(number, step, summary)
    assert (tmp_path / "history.jsonl").stat().st_size < 1e6
    assert len(read(tmp_path)) > 200


def test_a_process_that_keeps_no_records_has_nothing_due(tmp_path: Path) -> None:
    other = History(None, PHASES, 3, Reporter(silent=True))
    assert not any(other.update_due(2, step) or other.scales_due(2, step) for step in (0, 1, 6000))
    other.go_on(0, 0)


def test_what_was_recorded_after_the_checkpoint_is_forgotten(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    first = history(tmp_path, log=log)
    for step in range(8):
        if step:
            first.update(0, step, 1, 10.0 - step, {}, {"scale": 0.1})
        first.scales(0, step, {"a.input": 0.5 + step})
    with log.open("a") as stream:
        stream.write('{"event": "say", "text": "killed')  # in the middle of a line
    with (tmp_path / "history.jsonl").open("a") as stream:
        stream.write('{"event": "upd')
    again = history(tmp_path, log=log)
    again.go_on(0, 5)
    assert [record["step"] for record in read(tmp_path) if record["event"] == "update"] == [1, 2, 3, 4, 5]
    again.update(0, 6, 1, 3.5, {}, {"scale": 0.1})
    kept = lines(log, "update")
    assert [line["step"] for line in kept] == [1, 2, 3, 4, 5, 6] and kept[-1]["loss"] == 3.5
    assert [line["step"] for line in lines(log, "scales")] == [0, 1, 2, 3, 4, 5]
    history(tmp_path, log=log).go_on(0, 0)  # no checkpoint was left
    assert read(tmp_path) == [] == lines(log, "update", "scales")


def test_a_phase_that_begins_again_begins_once(tmp_path: Path) -> None:
    found = history(tmp_path)
    found.scales(0, 0, {"a.input": 0.5})
    found.go_on(0, 0)
    found.scales(0, 0, {"a.input": 0.5})
    found.update(0, 40, 1, 1.0, {}, {})
    found.go_on(2, 0)
    assert [(record["event"], record["step"]) for record in read(tmp_path)] == [("scales", 0), ("update", 40)]
