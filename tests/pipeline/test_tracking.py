"""Trackers: what they are told, that they change nothing, and that no failure of theirs reaches a run."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from good_recipe import GOOD, mistakes, prepare, write
from lines import cli, make_project

import qcompress.pipeline.tracking
from qcompress.errors import MachineError
from qcompress.pipeline import keys
from qcompress.pipeline.tracker import flat, values_of
from qcompress.pipeline.tracking import demand_trackers, tracking
from qcompress.recipe.load import Resolved, load_recipe
from qcompress.schema.recipe import STAGES, Recipe
from qcompress.system.reporter import Reporter

RECORDS: tuple[dict[str, Any], ...] = (
    {"event": "scales", "phase": "finetune", "number": 0, "step": 0, "steps": 2, "update": 0,
     "scales": {"a.input": 0.5, "a.weight": [0.1, 0.2, 0.4]}},
    {"event": "update", "phase": "finetune", "number": 0, "step": 1, "steps": 2, "update": 1, "passes": 1,
     "loss": 3.5, "terms": {"logits": 3.0, "hidden": 0.5}, "lr": {"scale": 0.25}},
    {"event": "say", "text": "finetune: 1/2"},
    {"event": "update", "phase": "finetune", "number": 0, "step": 2, "steps": 2, "update": 2, "passes": 1,
     "loss": 2.5, "terms": {"logits": 2.0, "hidden": 0.5}, "lr": {"scale": 0.125}},
    {"event": "metrics", "row": "onnx", "metrics": {"test.accuracy@label=spam": 0.75}},
    {"event": "finished", "stage": "verify", "seconds": 1.5, "reused": False},
    {"event": "verdict", "verdict": "accept", "reasons": []},
)  # fmt: skip

WANTED = {
    "finetune/loss": [(1, 3.5), (2, 2.5)],
    "finetune/logits": [(1, 3.0), (2, 2.0)],
    "finetune/hidden": [(1, 0.5), (2, 0.5)],
    "lr/scale": [(1, 0.25), (2, 0.125)],
    "scales/a.input": [(0, 0.5)],
    "scales/a.weight/least": [(0, 0.1)],
    "scales/a.weight/median": [(0, 0.2)],
    "scales/a.weight/largest": [(0, 0.4)],
    "onnx/test.accuracy@label=spam": [(2, 0.75)],
    "seconds/verify": [(2, 1.5)],
    "verdict/accept": [(2, 1.0)],
}
"""What a tracker's curves are, by hand: (update, value)."""


def resolved(folder: Path, *names: str) -> Resolved:
    text = GOOD + (f"tracking: [{', '.join(names)}]\n" if names else "")
    return load_recipe(write(prepare(folder), text))


def track(recipe: Recipe, folder: Path) -> list[str]:
    """Send the records; what the run says beside them."""
    reporter = Reporter(silent=True)
    said: list[str] = []
    reporter.listen(lambda record: said.append(record["text"]) if record["event"] == "say" else None)
    with tracking(recipe, folder, reporter):
        for record in RECORDS:
            reporter.record(**record)
    assert said.count("finetune: 1/2") == 1
    return [line for line in said if line != "finetune: 1/2"]


# What a tracker is told ---------------------------------------------------------------------------


def test_records_become_the_curves_of_a_tracker() -> None:
    found: dict[str, list[tuple[int, float]]] = {}
    update = 0
    for record in RECORDS:
        update = record.get("update", update)
        for name, value in values_of(record).items():
            found.setdefault(name, []).append((update, value))
    assert found == WANTED


def test_a_recipe_becomes_flat_hyperparameters(tmp_path: Path) -> None:
    values = flat(resolved(tmp_path).recipe.model_dump(mode="json", by_alias=True))
    assert values["train.batch_size"] == 4 and values["stepper.name"] == "plain"
    assert len(values) > 60 and all(isinstance(value, str | int | float) for value in values.values())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("tensorboard") is None, reason="pip install tensorboard")
def test_tensorboard_reads_back_what_the_run_recorded(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = resolved(tmp_path, "tensorboard").recipe
    assert track(recipe, tmp_path / "run") == []
    (folder,) = [path for path in (tmp_path / "run" / "tracking" / "tensorboard").iterdir() if path.is_dir()]
    events = EventAccumulator(str(folder))
    events.Reload()
    found = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    assert found.keys() == WANTED.keys()
    for name, points in WANTED.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points]
        assert all(math.isclose(value, wanted, rel_tol=1e-6)
                   for (_, value), (_, wanted) in zip(found[name], points, strict=True))  # fmt: skip
    hyperparameters = next(folder.rglob("hparams.yml")).read_text()
    assert "train.batch_size: 4" in hyperparameters and "tracking: '[\"tensorboard\"]'" in hyperparameters


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mlflow") is None, reason="pip install mlflow")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_reads_back_what_the_run_recorded(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    recipe = resolved(tmp_path, "mlflow").recipe
    assert track(recipe, tmp_path / "run") == []
    client = MlflowClient(f"sqlite:///{tmp_path / 'run' / 'tracking' / 'mlflow' / 'mlflow.db'}")
    (experiment,) = [item for item in client.search_experiments() if item.name == recipe.name]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["train.batch_size"] == "4" and run.info.status == "FINISHED"
    for name, points in WANTED.items():
        history = client.get_metric_history(run.info.run_id, name.replace("@", "_").replace("=", "_"))
        assert [(item.step, item.value) for item in history] == points, name


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mlflow") is None, reason="pip install mlflow")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("a mistake"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_mlflow_tells_a_failed_run_from_a_finished_one(
    error: BaseException, status: str, tmp_path: Path
) -> None:
    from mlflow.tracking import MlflowClient

    recipe = resolved(tmp_path, "mlflow").recipe
    with pytest.raises(type(error)), tracking(recipe, tmp_path / "run", Reporter(silent=True)):
        raise error
    client = MlflowClient(f"sqlite:///{tmp_path / 'run' / 'tracking' / 'mlflow' / 'mlflow.db'}")
    (experiment,) = [item for item in client.search_experiments() if item.name == recipe.name]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == status


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mlflow") is None, reason="pip install mlflow")
@pytest.mark.filterwarnings("ignore")
def test_of_a_run_that_was_killed_mlflow_is_told_no_success(tmp_path: Path) -> None:
    """Its tracker reads to the end of the pipe, and no word of how the run ended is among the records."""
    from mlflow.tracking import MlflowClient

    place = f"sqlite:///{tmp_path / 'mlflow.db'}"
    values = {"project": "p", "run": "r", "recipe": {"seed": 0}}
    told = "".join(f"{json.dumps(record)}\n" for record in (values, *RECORDS))
    made = subprocess.run(
        [sys.executable, "-m", "qcompress.pipeline.tracker", "mlflow", str(tmp_path)],
        input=told, text=True, capture_output=True, env={**os.environ, "MLFLOW_TRACKING_URI": place},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    client = MlflowClient(place)
    (experiment,) = [item for item in client.search_experiments() if item.name == "p"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED" and run.data.metrics["finetune/loss"] == 2.5


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="pip install wandb")
def test_wandb_stays_offline(tmp_path: Path) -> None:
    assert track(resolved(tmp_path, "wandb").recipe, tmp_path / "run") == []
    assert exit_code(tmp_path / "run") == 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="pip install wandb")
def test_wandb_tells_a_failed_run_from_a_finished_one(tmp_path: Path) -> None:
    recipe = resolved(tmp_path, "wandb").recipe
    with pytest.raises(RuntimeError), tracking(recipe, tmp_path / "run", Reporter(silent=True)):
        raise RuntimeError("a mistake")
    assert exit_code(tmp_path / "run") == 1


def exit_code(run: Path) -> int:
    """What wandb keeps of an offline run's end: LevelDB's log format, of which each record is a message."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (run / "tracking" / "wandb").rglob("offline-run-*/*.wandb")
    data, at, whole, codes = file.read_bytes(), 7, b"", []
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:  # no header begins in what is left of a block
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # all of a record, or its last part
            record = Record.FromString(whole)
            codes += [record.exit.exit_code] if record.WhichOneof("record_type") == "exit" else []
            whole = b""
    (code,) = codes
    return code


# What it may not change ---------------------------------------------------------------------------


def test_tracking_is_in_no_key_and_not_in_the_graph(
    tmp_path: Path, tiny_model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qcompress.pipeline.keys, "demand_trackers", lambda names: None)
    file = make_project(tmp_path / "project", tiny_model, text_file).recipe
    plain, tracked = (keys.prepare(load_recipe(file, more)) for more in ((), ("tracking=[wandb, mlflow]",)))
    assert tracked.recipe.tracking == ["wandb", "mlflow"] != plain.recipe.tracking
    assert keys.run_key(plain) == keys.run_key(tracked)
    assert keys.provenance(plain.recipe) == keys.provenance(tracked.recipe)
    for stage in STAGES:
        assert keys.parts(plain, stage, {}) == keys.parts(tracked, stage, {}), stage


def test_a_tracker_that_is_not_installed_is_refused_at_check_with_what_installs_it(
    tmp_path: Path, tiny_model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompress.pipeline.tracking.find_spec", lambda name: None)
    file = make_project(tmp_path / "project", tiny_model, text_file, tracking=["wandb", "mlflow"]).recipe
    found = cli("check", file)
    assert found.code == 6 and found.stdout == ""
    assert "wandb, mlflow are not installed" in found.stderr and "pip install wandb mlflow" in found.stderr
    with pytest.raises(MachineError, match="tensorboard is not installed"):
        demand_trackers(["tensorboard"])
    demand_trackers([])


def test_a_tracker_that_nobody_knows_is_a_mistake_of_the_recipe(tmp_path: Path) -> None:
    (mistake,) = mistakes(write(prepare(tmp_path), GOOD + "tracking: tensorbord\n"))
    assert mistake.startswith("recipe.yaml:33: tracking: must be one of tensorboard, mlflow, wandb")
    assert "did you mean `tensorboard`?" in mistake


# What its failure may not do ----------------------------------------------------------------------


def played(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """A tracker's process that does something else."""
    monkeypatch.setattr(qcompress.pipeline.tracking, "command", lambda *words: [sys.executable, "-c", source])


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "finished"), (RuntimeError("a mistake"), "failed"), (KeyboardInterrupt(), "interrupted")],
    ids=["finished", "failed", "interrupted"],
)
def test_a_tracker_is_told_at_last_how_the_run_ended(
    error: BaseException | None, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played(monkeypatch, "import sys; print(sys.stdin.read(), end='')")
    reporter = Reporter(silent=True)
    with (
        nullcontext() if error is None else pytest.raises(type(error)),
        tracking(resolved(tmp_path, "mlflow").recipe, tmp_path / "run", reporter),
    ):
        reporter.record(**RECORDS[1])
        if error is not None:
            raise error
    lines = (tmp_path / "run" / "tracking" / "mlflow" / "tracker.log").read_text().splitlines()
    assert [json.loads(line).get("event") for line in lines] == [None, "update", "ended"]
    assert json.loads(lines[-1]) == {"event": "ended", "status": status}


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import sys; sys.stdin.readline(); sys.exit('no route to the server')", "no route to the server"),
        ("import os; os.abort()", "it printed nothing"),
        ("import sys; sys.stdin.close(); import time; time.sleep(60)", "took more than 1 s to end"),
    ],
    ids=["raises", "crashes", "hangs"],
)
def test_a_tracker_that_fails_is_one_line_and_the_run_goes_on(
    source: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played(monkeypatch, source)
    monkeypatch.setattr(qcompress.pipeline.tracking, "LAST_WORDS_S", 1.0)
    (said,) = track(resolved(tmp_path, "tensorboard").recipe, tmp_path / "run")
    assert said.startswith("tracking: tensorboard has stopped, and the run goes on: ") and why in said


def test_one_tracker_that_fails_at_the_end_is_no_failure_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "import sys; sys.stdin.read(); sys.exit({'mlflow': 'no space left'}.get(sys.argv[1]))"
    monkeypatch.setattr(
        qcompress.pipeline.tracking, "command", lambda _, *words: [sys.executable, "-c", source, *words]
    )
    (said,) = track(resolved(tmp_path, "tensorboard", "mlflow").recipe, tmp_path / "run")
    assert "mlflow has stopped" in said and "no space left" in said


def test_a_tracker_that_does_not_read_never_holds_up_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(qcompress.pipeline.tracking, "LAST_WORDS_S", 0.2)
    recipe, reporter = resolved(tmp_path, "tensorboard").recipe, Reporter(silent=True)
    began = time.monotonic()
    with tracking(recipe, tmp_path / "run", reporter):
        for _ in range(100):
            reporter.record(event="say", text="x" * 10_000)  # a pipe holds 64 KiB
    assert time.monotonic() - began < 30  # the tracker sleeps for 60


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    (said,) = track(resolved(tmp_path, "tensorboard").recipe, tmp_path / "run")
    assert "tensorboard has stopped" in said


def test_a_tracker_sees_no_launcher_no_gpu_and_the_users_own_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played(monkeypatch, "import json, os; print(json.dumps(dict(os.environ)))")
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "host", "ACCELERATE_USE_CPU": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    recipe = resolved(tmp_path, "wandb").recipe
    log = tmp_path / "run" / "tracking" / "wandb" / "tracker.log"
    track(recipe, tmp_path / "run")
    found = json.loads(log.read_text())
    assert not {"WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU"} & found.keys()
    assert found["CUDA_VISIBLE_DEVICES"] == "" and found["PATH"] == os.environ["PATH"]
    assert found["WANDB_MODE"] == "offline" and found["WANDB_DIR"] == str(log.parent)
    monkeypatch.setenv("WANDB_MODE", "online")
    track(recipe, tmp_path / "run")
    assert json.loads(log.read_text())["WANDB_MODE"] == "online"
