"""`run --smoke` and `run --seeds`: a small run that is whole, and several runs side by side."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lines import NAME, cli, finished, make_project
from safetensors.torch import load_file
from tiny import make_checkpoint, make_recipe
from transformers import GPT2LMHeadModel

from qcompress import api
from qcompress.errors import ModelError, UsageError
from qcompress.models import describe
from qcompress.pipeline import run as pipeline
from qcompress.pipeline.smoke import BLOCKS, SEQUENCES, shorten, smoke
from qcompress.recipe.load import load_recipe
from qcompress.report.seeds import SEVERITY, seeds_table, summarise
from qcompress.schema.goals import Gate
from qcompress.system.artifacts import read_json
from qcompress.system.memory import AllocationError
from qcompress.verdict.judge import EXIT_CODES, exit_code, verdict_of


@pytest.fixture(scope="module")
def deep(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with more blocks than a smoke run has."""
    return make_checkpoint(tmp_path_factory.mktemp("deep") / "model", text_file, blocks=12)


# A checkpoint with fewer blocks -------------------------------------------------------------------


def test_it_takes_the_first_of_the_blocks_that_the_recipe_picks(deep: Path, tmp_path: Path) -> None:
    tensors = load_file(deep / "model.safetensors")
    short = shorten("gpt2", deep, tmp_path, [2, 0])
    found = load_file(short / "model.safetensors")
    for new, old in ((0, 2), (1, 0)):
        name = "transformer.h.{}.mlp.c_fc.weight"
        assert torch.equal(found[name.format(new)], tensors[name.format(old)])
    shared = shorten("gpt2", deep, tmp_path, [0, 0, 1])
    assert describe("gpt2", shared).layer("transformer.h.1.mlp.c_fc").tied_to == "transformer.h.0.mlp.c_fc"
    assert shared != short != shorten("gpt2", deep, tmp_path)


def test_the_short_model_is_the_long_one_without_its_last_blocks(deep: Path, tmp_path: Path) -> None:
    short = shorten("gpt2", deep, tmp_path)
    ids = torch.arange(20)[None]
    long = GPT2LMHeadModel.from_pretrained(deep).eval()
    long.transformer.h = long.transformer.h[:BLOCKS]
    with torch.no_grad():
        assert torch.equal(GPT2LMHeadModel.from_pretrained(short).eval()(ids).logits, long(ids).logits)
    before, after = load_file(deep / "model.safetensors"), load_file(short / "model.safetensors")
    blocks = {int(name.split(".")[2]) for name in after if ".h." in name}
    assert blocks == {0, 1}  # and not 10 and 11, whose names begin with the same digit
    assert len(before) - len(after) == 10 * 12
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert len(describe("gpt2", short).blocks) == BLOCKS


def test_it_is_made_once_and_read_from_shards(deep: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    model = GPT2LMHeadModel.from_pretrained(deep)
    model.save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    short = shorten("gpt2", sharded, tmp_path / "cache")
    stamp = (short / "config.json").stat().st_mtime_ns
    assert shorten("gpt2", sharded, tmp_path / "cache") == short
    assert (short / "config.json").stat().st_mtime_ns == stamp
    alone = load_file(shorten("gpt2", deep, tmp_path / "cache") / "model.safetensors")
    both = load_file(short / "model.safetensors")
    assert both.keys() == alone.keys() and all(torch.equal(both[name], alone[name]) for name in both)


# A run --------------------------------------------------------------------------------------------


def test_a_smoke_run_is_the_whole_line_on_little(deep: Path, text_file: Path, tmp_path: Path) -> None:
    layers = {"transformer.h.11.*": "float", "*.mlp.c_fc": {"activations": "float"}}
    project = make_project(
        tmp_path / "project", deep, text_file, format={"preset": "w8a8", "layers": layers},
        gate={"float_floor": {"test.perplexity": 1.0}, "parity": {"onnx": {"mean_abs": 0.05}}},
    )  # fmt: skip
    done = cli(*project.command("--smoke", "--json"))
    found = done.json()
    assert done.code == 0 and found["verdict"]["verdict"] == "unjudged"
    assert found["recipe"] == f"{NAME}-smoke"
    run = api.load(found["path"])
    assert run.recipe.train.phases["calibrate"].steps == 2
    assert list(run.recipe.format.layers) == ["*.mlp.c_fc"]  # what only dropped blocks match is gone
    rows = {row["stage"]: row for row in run.parity["rows"]}
    assert rows["onnx"]["samples"] == SEQUENCES + 5
    assert (run.path / "engine" / "model.plan").is_file()
    phases = read_json(run.stage("train") / "trained.json")["phases"]
    assert [(phase["name"], phase.get("block")) for phase in phases] == [
        ("calibrate", "transformer.h.0"), ("calibrate", "transformer.h.1"), ("finetune", None),
    ]  # fmt: skip
    again = cli("verify", run.path)
    assert again.code == 0
    last = again.stdout.splitlines()[-1]
    assert last.startswith(f"unjudged  {NAME}-smoke  {run.path}  (all stages ran; a smoke run is not judged")
    assert not list(project.out.glob("*/latest"))  # of the smoke run neither
    for command in (["gate", "--candidate", run.path], ["baseline", "promote", run.path, "--force"],
                    ["gate", "--candidate", run.path, "--baseline", run.path]):  # fmt: skip
        refused = cli(*command)
        assert refused.code == 2 and "is a smoke run" in refused.stderr, command
    assert "<skipped" in (run.path / "junit.xml").read_text()


@pytest.mark.parametrize(
    "goals",
    [
        {"float_floor": {"test.perplexity": 1.0}},
        {"recovery": {"test.perplexity": {"max-degradation": 0.0}}},
        {"parity": {"folded": {"max_abs": 0.0}, "onnx": {"max_abs": 0.0}, "engine": {"max_abs": 0.0}}},
        {"regression": {"test.perplexity": {"max-degradation": 0.0}}},
    ],
    ids=lambda goals: next(iter(goals)),
)
def test_no_goal_of_the_recipe_is_left(goals: dict, deep: Path, text_file: Path, tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", deep, text_file, gate=goals)
    small = smoke(load_recipe(project.recipe), project.cache)
    assert small.smoke and small.recipe.gate == Gate()


@pytest.mark.parametrize(
    "row",
    [
        {"stage": "onnx", "status": "measured", "metrics": {"test.perplexity": float("nan")}},
        {"stage": "onnx", "status": "not-run", "reason": "no memory"},
        {"stage": "float", "status": "measured", "metrics": {}},
    ],
)
def test_nothing_is_judged_whatever_was_measured(row: dict, text_file: Path) -> None:
    recipe = make_recipe(text_file)
    verdict = verdict_of({"rows": [row]}, recipe, smoke=True)
    assert verdict["verdict"] == "unjudged" and verdict["goals"] == []
    assert exit_code("unjudged") == 0
    assert verdict_of({"rows": [row]}, recipe)["verdict"] == "anomalous"


# latest -------------------------------------------------------------------------------------------


ENDS = (ModelError("planted"), KeyboardInterrupt(), SystemExit(1), MemoryError())


def test_latest_stays_where_it_was_unless_a_run_finishes(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """Seed 4 ends in train, seed 3 in verify and in gate; what an earlier end of seed 3 made is reused."""
    made = finished(tiny_model, text_file).copy(tmp_path / "copy")
    before = made.latest
    for stage, error in itertools.product(("train", "verify", "gate"), ENDS):
        seed = "seed=4" if stage == "train" else "seed=3"
        with pytest.MonkeyPatch.context() as patch, pytest.raises((type(error), AllocationError)):
            patch.setattr(pipeline._Maker, f"_{stage}", _raising(error))
            made.run(seed, fresh=stage == "train")
        assert made.latest == before
    assert made.run("seed=3", until="load").verdict == "unfinished"
    assert made.latest == before
    assert made.run("gate.recovery={test.perplexity: {threshold: 0.5}}").verdict == "regression"
    assert made.latest != before  # it finished: a gate that reads `latest` must see it


def _raising(error: BaseException):
    def make(self: object, folder: Path) -> None:
        raise error

    return make


@pytest.mark.parametrize(
    ("smoke", "fails", "expected"),
    [(False, False, ["run", "run", "latest"]), (True, False, ["run", "run"]), (False, True, ["run"])],
)
def test_latest_names_a_folder_of_seeds_when_all_of_them_have_finished(
    smoke: bool, fails: bool, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    def run(resolved: None, *arguments: object, one_of_seeds: bool, **options: object) -> SimpleNamespace:
        if fails and happened:
            raise ModelError("planted")
        happened.append("run")
        assert one_of_seeds  # so that it leaves `latest` alone
        return SimpleNamespace(path=tmp_path / "seed", first=True)

    loaded = SimpleNamespace(path=tmp_path / "seed", recipe=make_recipe(tmp_path), parity={}, verdict={})
    monkeypatch.setattr(api, "_settings", lambda *arguments: (None, tmp_path, tmp_path))
    monkeypatch.setattr(api.pipeline, "run", run)
    monkeypatch.setattr(api, "load", lambda path: loaded)
    monkeypatch.setattr(api, "summarise", lambda name, runs: {})
    monkeypatch.setattr(api, "point_latest", lambda folder: happened.append("latest"))
    if fails:
        with pytest.raises(ModelError, match="planted"):
            api.run_seeds("unused", [0, 1], smoke=smoke)
    else:
        api.run_seeds("unused", [0, 1], smoke=smoke)
    assert happened == expected


def test_the_whole_recipe_is_checked_before(deep: Path, text_file: Path, tmp_path: Path) -> None:
    project = make_project(
        tmp_path / "project", deep, text_file, format={"preset": "w8a8", "layers": {"*.h.12.*": "float"}}
    )
    done = cli(*project.command("--smoke"))
    assert done.code == 2 and "*.h.12.*" in done.stderr
    assert not project.out.exists()


# Seeds --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_seeds_lie_side_by_side_with_mean_and_spread(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    project = finished(tiny_model, text_file).copy(tmp_path / "copy")
    done = cli(*project.command("--seeds", "0,3", "--json"))
    found = done.json()
    folder = Path(found["path"])
    assert done.code == 0 and found["verdicts"] == {"0": "accept", "3": "accept"}
    assert sorted(path.name for path in folder.iterdir()) == ["seed-0", "seed-3", "seeds.json"]
    assert (project.out / NAME / "latest").resolve() == folder.resolve()
    values = []
    for seed in (0, 3):
        run = api.load(folder / f"seed-{seed}")
        assert run.recipe.seed == seed
        row = next(row for row in run.parity["rows"] if row["stage"] == "onnx")
        values.append(row["metrics"]["test.perplexity"])
    assert values[0] != values[1]
    metric = next(row for row in found["rows"] if row["stage"] == "onnx")["metrics"]["test.perplexity"]
    assert metric["values"] == values
    assert metric["sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert "engine" not in [row["stage"] for row in found["rows"]]
    assert json.loads((folder / "seeds.json").read_text())["verdicts"] == found["verdicts"]
    table = cli(*project.command("--seeds", "0,3"))
    assert f"{statistics.fmean(values):.5g} ± {metric['sd']:.2g}" in table.stdout
    assert "train: reused" in table.stderr


def test_the_worst_verdict_counts() -> None:
    def run(verdict: str, value: float) -> tuple[dict, dict]:
        row = {"stage": "float", "status": "measured", "metrics": {"a.perplexity": value}}
        return {"rows": [row], "sets": ["a"]}, {"verdict": verdict}

    found = summarise("x", {0: run("accept", 2.0), 1: run("anomalous", 4.0), 2: run("regression", 6.0)})
    assert found["verdict"] == "anomalous"
    assert found["rows"][0]["metrics"]["a.perplexity"] == {"mean": 4.0, "sd": 2.0, "values": [2.0, 4.0, 6.0]}
    assert summarise("x", {0: run("accept", 2.0)})["rows"][0]["metrics"]["a.perplexity"]["sd"] is None
    order = [word for word in EXIT_CODES if word != "accept"]
    assert sorted(order, key=SEVERITY.index) == ["unjudged", "inconclusive", "regression", "anomalous"]
    for word in order:
        assert summarise("x", {0: run("accept", 2.0), 1: run(word, 2.0)})["verdict"] == word


def test_what_was_measured_beside_a_row_has_its_spread_and_its_line() -> None:
    def run(value: float, **more: float) -> tuple[dict, dict]:
        beside = {name: {"metrics": {"a.perplexity": one}, "distance": None} for name, one in more.items()}
        row = {"stage": "onnx", "status": "measured", "metrics": {"a.perplexity": value}, **beside}
        return {"rows": [row], "sets": ["a"]}, {"verdict": "accept"}

    found = summarise("x", {0: run(2.0, deployed=3.0, dynamic=1.0), 1: run(2.0, deployed=7.0)})
    (row,) = found["rows"]
    assert row["deployed"]["metrics"]["a.perplexity"] == {
        "mean": 5.0,
        "sd": pytest.approx(8**0.5),
        "values": [3.0, 7.0],
    }
    assert "dynamic" not in row  # one seed has none
    names, means = seeds_table(found).columns[:2]
    assert list(map(str, names.cells)) == ["onnx", "  deployed"]
    assert list(map(str, means.cells)) == ["2 ± 0", "5 ± 2.8"]


@pytest.mark.parametrize(
    "words", [["--seeds", "0,x"], ["--seeds", "1,1"], ["--seeds", "0,1", "--set", "seed=3"],
              ["--seeds", "0", "--until", "fold"]]
)  # fmt: skip
def test_wrong_seeds_are_refused(tiny_model: Path, text_file: Path, words: list[str]) -> None:
    done = cli(*finished(tiny_model, text_file).command(*words))
    assert done.code == 2 and "fix" in done.stderr.lower()


def test_seeds_need_different_numbers() -> None:
    with pytest.raises(UsageError, match="different"):
        api.run_seeds("unused.yaml", [])
