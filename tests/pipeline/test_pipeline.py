"""The whole line: what a run leaves behind, what a change re-runs, and that a killed run ends the same."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lines import NAME, SETS, Project, Result, cli, finished, make_project, start, values

from qcompress.errors import BusyError
from qcompress.recipe.load import dump_recipe, load_recipe
from qcompress.schema.recipe import STAGES
from qcompress.system.artifacts import read_json, sha256_file

RUN_FILES = {
    "recipe.resolved.yaml", "manifest.json", "parity.json", "samples.json.gz", "verdict.json", "junit.xml",
    "certificate.json", "lint.json", "sizes.json", "model.onnx", "tokenizer.json", "tokenizer_config.json",
    "config.json", "engine/model.plan", "engine/build.json", "probe/inputs.npz", "probe/reference.npz",
    "probe/probe.json", "probe/measure_engine.py", "probe/engine_runners.py", "probe/engine_speed.py",
    "probe/strict_json.py",
    "log.jsonl", "distributions.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tiny_model: Path, text_file: Path) -> Project:
    return finished(tiny_model, text_file)


@pytest.fixture
def mine(project: Project, tmp_path: Path) -> Project:
    """A finished run of one's own."""
    return project.copy(tmp_path / "mine")


def made(project: Project, *overrides: str, **options: object) -> list[str]:
    """The stages that a run had to make."""
    return [step.stage for step in project.run(*overrides, **options).steps if not step.reused]


def would_make(project: Project, *overrides: str) -> list[str]:
    """The stages that `check` says a run would have to make."""
    words = [word for override in overrides for word in ("--set", override)]
    found = cli("check", project.recipe, "--out", project.out, "--json", *words)
    assert found.code == 0, found.stderr
    stages = found.json()["stages"]
    assert [stage["stage"] for stage in stages] == list(STAGES)
    return [stage["stage"] for stage in stages if not stage["reused"]]


# What a run leaves behind -------------------------------------------------------------------------


def test_a_run_has_every_file_of_the_design(project: Project) -> None:
    found = {str(file.relative_to(project.latest)) for file in project.latest.rglob("*") if file.is_file()}
    assert {name for name in found if not name.startswith(".")} == RUN_FILES
    assert project.latest.parent == project.out.resolve() / NAME


def test_the_resolved_recipe_is_the_recipe_with_every_default(project: Project) -> None:
    content = yaml.safe_load((project.latest / "recipe.resolved.yaml").read_text())
    assert content == yaml.safe_load(dump_recipe(load_recipe(project.recipe).recipe))
    assert content.keys() > values().keys()
    assert content["train"]["decay"] == "linear" and content["format"]["weights"]["bits"] == 8


def test_the_manifest_has_the_cost_and_the_digest_of_every_stage(project: Project) -> None:
    manifest = read_json(project.latest / "manifest.json")
    assert list(manifest["stages"]) == sorted(STAGES)
    for stage in manifest["stages"].values():
        assert stage["seconds"] >= 0 and stage["peak_mib"] > 50 and len(stage["digest"]) == 64
        assert Path(stage["path"]).is_dir()
    assert manifest["stages"]["train"]["seconds"] > 0.1
    assert manifest["seed"] == 0 and manifest["host"]["threads"] == 1
    assert {"torch", "transformers", "onnx", "qcompress"} <= manifest["versions"].keys()


def test_what_lies_in_the_run_is_what_the_stages_made(project: Project) -> None:
    for stage, name in (("export", "model.onnx"), ("verify", "parity.json"), ("gate", "verdict.json")):
        assert sha256_file(project.latest / name) == sha256_file(project.entry(stage) / name)
    plan = read_json(project.latest / "engine" / "build.json")["plan"]
    assert plan["sha256"] == sha256_file(project.latest / "engine" / "model.plan")


def test_the_log_has_every_stage(project: Project) -> None:
    lines = [json.loads(line) for line in (project.latest / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines if line["event"] == "stage"][:7] == list(STAGES)


def records(run: Path, *events: str) -> list[dict[str, Any]]:
    """Records of log.jsonl, without their times."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key != "time"} for line in lines if line["event"] in events]


def test_the_log_of_a_silent_run_has_training_metrics_and_verdict(project: Project) -> None:
    updates = records(project.latest, "update")
    assert [line["update"] for line in updates if line["phase"] == "finetune"] == list(range(81, 121))
    assert {key for line in updates for key in line["lr"]} == {"adapter", "scale"}
    assert all(line["loss"] > 0 for line in updates)
    assert "transformer.h.0.ln_1.rescale" in records(project.latest, "scales")[-1]["scales"]
    rows = read_json(project.latest / "parity.json")["rows"]
    assert {line["row"]: line["metrics"] for line in records(project.latest, "metrics")} == {
        row["stage"]: row["metrics"] for row in rows if row["status"] == "measured"
    }
    assert records(project.latest, "verdict")[0]["verdict"] == "accept"
    assert [line["stage"] for line in records(project.latest, "finished")][:7] == list(STAGES)


def test_a_training_that_is_reused_is_logged_once_in_every_run(mine: Project) -> None:
    before = records(mine.latest, "update", "scales")
    assert len(before) > 50
    mine.run()
    assert records(mine.latest, "update", "scales") == before
    other = mine.run("gate.recovery={test.perplexity: {threshold: 1.5}}")
    assert records(other.path, "update", "scales") == before
    assert [line["verdict"] for line in records(other.path, "verdict")] == ["regression"]


# What re-runs -------------------------------------------------------------------------------------


def test_the_same_run_again_makes_nothing(mine: Project) -> None:
    files = [
        file for file in mine.latest.rglob("*.json") if file.name not in ("manifest.json", ".placed.json")
    ]
    before = {file: sha256_file(file) for file in files}
    run = mine.run()
    assert [step.stage for step in run.steps] == list(STAGES) and all(step.reused for step in run.steps)
    assert run.verdict == "accept"
    assert {file: sha256_file(file) for file in before} == before and len(before) > 5


def test_a_changed_gate_is_judged_anew_and_nothing_else_runs(mine: Project) -> None:
    before = sha256_file(mine.latest / "model.onnx")
    run = mine.run("gate.recovery={test.perplexity: {threshold: 1.5}}")
    assert [step.stage for step in run.steps if not step.reused] == ["gate"]
    assert run.verdict == "regression"
    assert sha256_file(run.path / "model.onnx") == before
    assert run.path != mine.run().path  # a changed recipe never overwrites an older run


def test_a_changed_evaluation_is_measured_anew_and_nothing_else_runs(mine: Project) -> None:
    assert made(mine, "data.evaluate.other.limit=3") == ["verify", "gate"]


@pytest.mark.slow
def test_the_same_data_in_another_folder_re_run_nothing(mine: Project, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "text.txt"
    elsewhere.parent.mkdir()
    shutil.copyfile(mine.folder / "text.txt", elsewhere)
    there = f"{{text: [{elsewhere}], limit: %d}}"
    changes = [f"data.train={there % 64}", f"data.calibration={there % 12}",
               f"data.evaluate={{test: {there % SETS['test']}, other: {there % SETS['other']}}}"]  # fmt: skip
    assert made(mine, *changes) == []
    with elsewhere.open("a") as file:
        file.write("and more")
    assert made(mine, *changes)[0] == "train"


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ("gate.float_floor={test.perplexity: 99999}", "gate"),
        ("verify.require=[float]", "gate"),
        ("verify.samples=2", "verify"),
        ("data.evaluate.test.limit=3", "verify"),
        ("build.here=never", "build"),
        ("build.profiles=[{batch: [1, 1, 2], sequence: [1, 8, 32]}]", "build"),
        ("export.opset=22", "export"),
        ("build.target=cpu", "export"),
        ("train.lr={scale: 0.002}", "train"),
        ("train.phases.finetune.steps=41", "train"),
        ("format.compute=fp16", "train"),
        ("data.calibration.limit=11", "train"),
        ("seed=1", "train"),
        ("adapter.bound=50.0", "train"),
    ],
)
def test_a_change_re_runs_the_stage_that_reads_it_and_those_after(
    change: str, first: str, project: Project
) -> None:
    depends = {"load": STAGES, "train": STAGES[1:], "export": STAGES[3:], "build": STAGES[4:],
               "verify": STAGES[5:], "gate": STAGES[6:]}  # fmt: skip
    assert would_make(project, change) == list(depends[first])


def test_nothing_would_run_without_a_change(project: Project) -> None:
    assert would_make(project) == []


@pytest.mark.parametrize(
    ("file", "first"),
    [("text.txt", "train"), ("model/model.safetensors", "load"), ("model/config.json", "load")],
)
def test_changed_content_re_runs_what_reads_it(file: str, first: str, mine: Project) -> None:
    content = bytearray((mine.folder / file).read_bytes())
    if file.endswith("json"):
        content += b"\n"
    else:
        content[-1] ^= 1
    (mine.folder / file).write_bytes(content)
    assert would_make(mine) == list(STAGES[STAGES.index(first) :])


def test_a_torn_cache_entry_is_made_again_and_gives_the_same(mine: Project) -> None:
    torn = mine.entry("fold") / "folded.safetensors"
    digest = sha256_file(torn)
    torn.write_bytes(torn.read_bytes()[:-100])
    assert made(mine) == ["fold"]
    assert sha256_file(torn) == digest


def test_a_stage_that_was_deleted_is_made_again(mine: Project) -> None:
    (mine.entry("verify") / "parity.json").unlink()
    assert made(mine) == ["verify"]


def test_a_file_of_the_run_that_was_changed_is_put_back(mine: Project) -> None:
    (mine.latest / "verdict.json").write_text("{}")
    (mine.latest / "model.onnx").unlink()
    assert made(mine) == []
    assert sha256_file(mine.latest / "model.onnx") == sha256_file(mine.entry("export") / "model.onnx")
    assert read_json(mine.latest / "verdict.json")["verdict"] == "accept"


# Options ------------------------------------------------------------------------------------------


def test_until_ends_the_run_after_that_stage(mine: Project) -> None:
    run = mine.run("seed=3", "train.phases={calibrate: {steps: 1}, finetune: {steps: 1}}", until="fold")
    assert [step.stage for step in run.steps] == ["load", "train", "fold"]
    assert run.verdict == "unfinished" and not (run.path / "model.onnx").exists()
    assert (run.path / "manifest.json").is_file()


def test_keep_copies_a_stages_folder_into_the_run(mine: Project) -> None:
    run = mine.run(keep=("fold", "train"), until="fold")
    assert {file.name for file in (run.path / "fold").iterdir()} >= {"folded.safetensors", "folded.json"}
    assert sha256_file(run.path / "train" / "trained.safetensors") == sha256_file(
        mine.entry("train") / "trained.safetensors"
    )


@pytest.mark.slow
def test_fresh_makes_every_stage_anew_with_the_same_content(mine: Project) -> None:
    before = {stage: mine.entry(stage) for stage in ("load", "train", "fold")}
    digests = {stage: read_json(entry / "manifest.json") for stage, entry in before.items()}
    assert made(mine, fresh=True, until="fold") == ["load", "train", "fold"]
    for stage, old in digests.items():
        new = read_json(before[stage] / "manifest.json")
        assert new["digest"] == old["digest"] and new["created"] > old["created"], stage


@pytest.mark.slow
def test_a_float_run_is_the_model_of_the_next_recipe(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    first = make_project(
        tmp_path / "first", tiny_model, text_file, format="float", method="float",
        build={"target": "cpu"}, gate={}, train={"device": "cpu", "phases": {"finetune": {"steps": 4}}},
    )  # fmt: skip
    source = first.run().path
    assert (source / "model.safetensors").is_file()
    second = make_project(
        tmp_path / "second", tiny_model, text_file, model={"family": "gpt2", "run": str(source)},
        method="ptq", train={"device": "cpu"},
    )  # fmt: skip
    run = second.run(until="fold")
    rows = {row["stage"]: row for row in read_json(source / "parity.json")["rows"]}
    assert rows["trained"]["metrics"]["test.perplexity"] < rows["float"]["metrics"]["test.perplexity"]
    assert rows["onnx"]["distance"]["top1_agreement"] == 1.0
    assert [step.stage for step in run.steps] == ["load", "train", "fold"]
    assert would_make(second)[0] == "export"


# Killed runs --------------------------------------------------------------------------------------

Moment = Callable[[Path], Iterator[Path]]

MOMENTS: dict[str, Moment] = {
    "train": lambda cache: cache.glob("train/*.partial/checkpoint.safetensors"),
    "export": lambda cache: cache.glob("export/*.partial"),
    "verify": lambda cache: cache.glob("verify/*.partial/logits-*.npy"),
}
"""What is on the disk once a stage is at work."""


def stop_at(moment: Moment, project: Project) -> subprocess.Popen[str]:
    """A run in a process of its own, stopped (not ended) in the middle of a stage."""
    process = start(project.command())
    deadline = time.monotonic() + 300
    while not any(moment(project.cache)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    return process


def ended(process: subprocess.Popen[str]) -> Result:
    stdout, stderr = process.communicate(timeout=300)
    return Result(process.returncode, stdout, stderr)


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on_and_ends_with_the_same_bytes(
    project: Project, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """Ctrl-C while training; meanwhile the directory is taken; then the same command in the same place.

    The uninterrupted run was made in another process from another directory.
    """
    other = make_project(tmp_path / "elsewhere", tiny_model, text_file)
    process = stop_at(MOMENTS["train"], other)
    try:
        busy = cli(*other.command())
        assert busy.code == 7 and f"process {process.pid}" in busy.stderr
        with pytest.raises(BusyError, match="is in use by another run"):
            other.run()
    finally:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
    found = ended(process)
    assert found.code == 130
    assert f"continue with:\n  qcompress run {other.recipe} --out {other.out}" in found.stderr
    assert not (other.out / NAME / "latest").is_symlink()

    again = ended(start(other.command()))
    assert again.code == 0, again.stderr
    assert re.search("train: .*unfinished: goes on from where it was stopped", again.stderr)
    assert "train: resuming in phase" in again.stderr
    for name in ("model.onnx", "parity.json", "samples.json.gz"):
        assert sha256_file(other.latest / name) == sha256_file(project.latest / name), name
    assert other.latest.name == project.latest.name


@pytest.mark.slow
@pytest.mark.parametrize("stage", MOMENTS)
def test_a_killed_run_ends_with_the_same_bytes(
    stage: str, project: Project, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    other = make_project(tmp_path / "elsewhere", tiny_model, text_file)
    process = stop_at(MOMENTS[stage], other)
    process.kill()
    assert ended(process).code == -signal.SIGKILL
    assert not (other.out / NAME / "latest").is_symlink()
    again = ended(start(other.command()))
    assert again.code == 0, again.stderr
    assert re.search(f"{stage}: .*unfinished: goes on from where it was stopped", again.stderr)
    for name in ("model.onnx", "parity.json", "samples.json.gz", "engine/model.plan"):
        assert sha256_file(other.latest / name) == sha256_file(project.latest / name), name
