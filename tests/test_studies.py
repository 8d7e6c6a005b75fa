"""The machinery of studies, on a study of a tiny GPT-2 made here."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_study import STUDY, Machinery, machinery, write_study
from tiny import make_recipe

from qcompress import api
from qcompress.errors import QcompressError, UsageError
from qcompress.tasks import TASKS


@pytest.fixture(scope="module")
def tools() -> Iterator[Machinery]:
    with machinery() as found:
        yield found


# A study of our own -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A study that was run once."""

    folder: Path
    data: Path
    out: Path

    def run(self, tools: Machinery, *options: str) -> None:
        tools.run.main([str(self.folder), "--out", str(self.out), "--data", str(self.data), *options])

    def results(self) -> dict[str, dict[str, Any]]:
        files = (self.folder / "results").glob("*.json")
        return {file.stem: json.loads(file.read_text()) for file in files}


@pytest.fixture(scope="module")
def made(
    tools: Machinery, tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    root = tmp_path_factory.mktemp("study")
    data = root / "data"
    data.mkdir()
    shutil.copytree(tiny_model, data / "model")
    text = text_file.read_text()
    (data / "train.txt").write_text(text[: len(text) // 2])
    (data / "test.txt").write_text(text[len(text) // 2 :])
    study = Made(write_study(root / "letters", tools), data, root / "runs")
    study.run(tools, "--keep")
    return study


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Made:
    """The same study to change; its runs are found where they are."""
    shutil.copytree(made.folder, tmp_path / "letters")
    return Made(tmp_path / "letters", made.data, made.out)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that are started, and none of them is."""
    names: list[str] = []

    def refuse(recipe: Path, out: Path, *, overrides: tuple[str, ...], **_: object) -> None:
        names.append(next(text for text in overrides if text.startswith("name=")))
        raise QcompressError("started")

    monkeypatch.setattr(api, "run", refuse)
    return names


@pytest.mark.slow
def test_each_run_leaves_one_small_result(made: Made) -> None:
    found = made.results()
    runs = {f"{arm}-letters-{seed}" for arm in ("lsq", "lsq-long") for seed in (0, 1)}
    assert found.keys() == runs | {"trials"}
    for name in runs:
        result = found[name]
        assert result["cost"]["updates"] == result["cost"]["passes"] == (20 if "long" in name else 10)
        assert result["cost"]["seconds"] > 0 and result["machine"]["threads"] == 1
        assert result["rows"].keys() == {"float", "trained", "folded", "onnx", "onnx (deployed)"}
        assert "torch" in result["versions"] and "name" not in result["machine"]
        assert (made.folder / "results" / f"{name}.json").stat().st_size < 200_000


def test_a_result_keeps_what_was_measured_beside_a_row(tools: Machinery) -> None:
    rows = [
        {"stage": "trained", "status": "measured", "metrics": {"dev.mcc": 0.5},
         "dynamic": {"metrics": {"dev.mcc": 0.625}}},
        {"stage": "onnx", "status": "measured", "metrics": {"dev.mcc": 0.25},
         "deployed": {"metrics": {"dev.mcc": 0.125}}},
        {"stage": "engine", "status": "not-run", "reason": "no GPU"},
    ]  # fmt: skip
    found = tools.results.rows_of({"rows": rows})
    assert {name: metrics["dev.mcc"] for name, metrics in found.items()} == {
        "trained": 0.5, "trained (dynamic)": 0.625, "onnx": 0.25, "onnx (deployed)": 0.125,
    }  # fmt: skip


@pytest.mark.slow
def test_the_samples_of_a_result_give_its_metric(made: Made) -> None:
    for name, result in made.results().items():
        if name != "trials":
            entry = result["samples"]["test"]
            columns = {"tokens": entry["tokens"], **entry["results"]}
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            metric = TASKS["causal-lm"].metrics(rows)["perplexity"]
            assert metric == pytest.approx(result["rows"]["onnx"]["test.perplexity"], rel=1e-4)


@pytest.mark.slow
def test_the_test_file_is_read_by_final_runs_and_the_part_held_out_by_trials(made: Made) -> None:
    for file in made.out.glob("letters/letters-*/latest/recipe.resolved.yaml"):
        evaluated = yaml.safe_load(file.read_text())["data"]["evaluate"]
        (name,) = evaluated
        assert name == ("holdout" if "-trial-" in str(file) else "test")
        (path,) = evaluated[name]["text"]
        assert Path(path).stem == name
    assert len(list(made.out.glob("letters/letters-*/latest/recipe.resolved.yaml"))) == 1 + 2 + 4


@pytest.mark.slow
def test_a_run_goes_when_its_result_is_kept_and_an_interruption_loses_no_trial(
    made: Made, tools: Machinery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Made(tmp_path / "letters", made.data, tmp_path / "runs")
    shutil.copytree(made.folder, mine.folder)
    shutil.copytree(made.out, mine.out, symlinks=True)  # so that every stage is reused, which is fast
    shutil.rmtree(mine.folder / "results")
    run, names = api.run, []

    def counted(*arguments: Any, overrides: tuple[str, ...], **options: Any) -> Any:
        names.append(next(text for text in overrides if text.startswith("name=")))
        if len(names) == 2:
            raise KeyboardInterrupt
        return run(*arguments, overrides=overrides, **options)

    monkeypatch.setattr(api, "run", counted)
    with pytest.raises(SystemExit):
        mine.run(tools)
    assert len(mine.results()["trials"]["lsq"]["trials"]) == 1
    mine.run(tools)
    assert len(names) == 1 + 2 + 4 - 1 + 1  # one trial before the interruption, and it is not run again
    assert mine.results()["trials"] == made.results()["trials"]
    assert [folder.name for folder in mine.out.glob("letters/letters-*")] == ["letters-float-letters-0"]
    assert len(list((mine.out / ".cache" / "train").glob("[!.]*"))) == 1


@pytest.mark.slow
def test_several_processes_are_refused(
    made: Made, tools: Machinery, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        made.run(tools)
    assert ended.value.code == 2 and "one process" in capsys.readouterr().err


@pytest.mark.slow
def test_every_run_trains_on_the_train_file_without_the_part_held_out(made: Made, tools: Machinery) -> None:
    parts = made.out / "letters" / "data" / "letters"
    train, held = (parts / f"{part}.txt" for part in ("train", "holdout"))
    assert train.read_bytes() + held.read_bytes() == (made.data / "train.txt").read_bytes()
    lines = len(train.read_bytes().splitlines()), len(held.read_bytes().splitlines())
    assert lines[1] == round(0.3 * sum(lines))
    for file in made.out.glob("letters/letters-*/latest/recipe.resolved.yaml"):
        data = yaml.safe_load(file.read_text())["data"]
        assert data["train"]["text"] == data["calibration"]["text"] == [str(train)]


@pytest.mark.slow
def test_the_best_trial_is_chosen_and_every_run_of_its_arms_uses_it(made: Made) -> None:
    trials = made.results()["trials"]["lsq"]
    assert [trial["set"] for trial in trials["trials"]] == STUDY["arms"]["lsq"]["trials"]
    scores = [trial["score"] for trial in trials["trials"]]
    assert scores[1] != scores[0] and {trial["metric"] for trial in trials["trials"]} == {"perplexity"}
    chosen = STUDY["arms"]["lsq"]["trials"][scores.index(min(scores))]
    assert trials["chosen"] == chosen
    rates = [result["settings"]["train"]["lr"] for name, result in made.results().items() if name != "trials"]
    assert len(rates) == 4 and all(lr["weight"] == chosen["train.lr.weight"] for lr in rates)


@pytest.mark.slow
def test_arms_start_from_the_float_model_that_the_study_trained(made: Made) -> None:
    (run,) = made.out.glob("letters/letters-float-letters-0/latest")
    trained = api.load(run).parity["rows"][3]["metrics"]["test.perplexity"]
    for name, result in made.results().items():
        if name != "trials":
            assert result["rows"]["float"]["test.perplexity"] == pytest.approx(trained, rel=1e-4)


@pytest.mark.slow
def test_the_readme_holds_the_table_of_the_results(made: Made, tools: Machinery) -> None:
    text = (made.folder / "README.md").read_text()
    assert text.startswith("# A study\n") and text.endswith("\n\nWhat it means.\n")
    found = made.results()
    for arm, updates in (("lsq", 10), ("lsq-long", 20)):
        scores = [found[f"{arm}-letters-{seed}"]["rows"]["onnx"]["test.perplexity"] for seed in (0, 1)]
        shown = f"| {arm} | {statistics.mean(scores):.5g} ± {statistics.stdev(scores):.2g} | 2 |"
        assert re.search(rf"{re.escape(shown)} [\d.]+ \| {updates} \| {updates} \| ", text)
    apart = [
        found[f"lsq-long-letters-{seed}"]["rows"]["onnx"]["test.perplexity"]
        - found[f"lsq-letters-{seed}"]["rows"]["onnx"]["test.perplexity"]
        for seed in (0, 1)
    ]
    assert f"| lsq-long | 2 | {statistics.mean(apart):+.3g} |" in text
    assert re.search(
        r"^Machine: .+, 1 threads, (no GPU|GPU sm\d+) \(4 runs\)\. qcompress", text, re.MULTILINE
    )


@pytest.mark.slow
def test_rebuilding_changes_nothing_and_a_changed_result_changes_the_table(
    copy: Made, tools: Machinery, started: list[str]
) -> None:
    before = (copy.folder / "README.md").read_text()
    copy.run(tools, "--table")
    assert (copy.folder / "README.md").read_text() == before and started == []
    file = copy.folder / "results" / "lsq-letters-0.json"
    result = json.loads(file.read_text())
    result["rows"]["onnx"]["test.perplexity"] += 10
    tools.results.write_document(file, result)
    copy.run(tools, "--table")
    assert (copy.folder / "README.md").read_text() != before


@pytest.mark.slow
def test_a_missing_result_is_named_and_its_arm_left_out(copy: Made, tools: Machinery) -> None:
    (copy.folder / "results" / "lsq-long-letters-1.json").unlink()
    copy.run(tools, "--table")
    assert "Missing: 1 of 4 runs." in (copy.folder / "README.md").read_text()
    (copy.folder / "results" / "lsq-long-letters-0.json").unlink()
    copy.run(tools, "--table")
    text = (copy.folder / "README.md").read_text()
    assert "Not yet measured: lsq-long." in text and "| lsq-long |" not in text
    shutil.rmtree(copy.folder / "results")
    copy.run(tools, "--table")
    assert "Not yet measured: none of 4 runs." in (copy.folder / "README.md").read_text()


# Resuming -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_finished_study_starts_no_run(copy: Made, tools: Machinery, started: list[str]) -> None:
    copy.run(tools)
    assert started == []


def change(study: Made, tools: Machinery, *path: str, value: Any) -> None:
    values = yaml.safe_load((study.folder / "study.yaml").read_text())
    section = values
    for key in path[:-1]:
        section = section.setdefault(key, {})
    section[path[-1]] = value
    (study.folder / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


@pytest.mark.parametrize(
    ("path", "value", "first"),
    [
        (("arms", "lsq-long", "set", "train.phases.finetune.steps"), 21, "lsq-long-letters-0"),
        (("seeds",), [0, 1, 2], "lsq-letters-2"),
        (("arms", "lsq", "trials"), [{"train.lr.weight": 3e-5}], "lsq-letters-0-trial-0"),
        (("start", "set", "train.lr.weight"), 1e-4, "float-letters-0"),
    ],
)
@pytest.mark.slow
def test_a_change_runs_again_what_depends_on_it(
    copy: Made, tools: Machinery, started: list[str], path: tuple[str, ...], value: Any, first: str
) -> None:
    change(copy, tools, *path, value=value)
    with pytest.raises(SystemExit):
        copy.run(tools)
    assert started == [f'name="letters-{first}"']


@pytest.mark.slow
def test_other_data_runs_again_and_another_folder_does_not(
    copy: Made, tools: Machinery, started: list[str], tmp_path: Path
) -> None:
    study = tools.study.read_study(copy.folder)
    here = tools.jobs.Place(copy.folder, copy.data, copy.out / "letters")
    shutil.copytree(copy.data, tmp_path / "moved")
    there = tools.jobs.Place(copy.folder, tmp_path / "moved", tmp_path / "work")

    def digest(place: Any) -> str:
        return tools.jobs.start_job(study, "letters", place).digest

    before = digest(there)
    assert digest(here) == before
    train, config = (tmp_path / "moved" / name for name in ("train.txt", "model/config.json"))
    config.write_text(config.read_text() + "\n")
    assert digest(there) != before
    config.write_text(config.read_text()[:-1])
    assert digest(there) == before
    train.write_text("more\n" + train.read_text())
    assert digest(there) != before


@pytest.mark.slow
def test_a_default_that_is_written_out_runs_nothing_again(copy: Made, tools: Machinery) -> None:
    place = tools.jobs.Place(copy.folder, copy.data, copy.out / "letters")
    digests = []
    for opset in (None, 21, 22):
        if opset is not None:
            change(copy, tools, "start", "set", "export.opset", value=opset)
        digests.append(tools.jobs.start_job(tools.study.read_study(copy.folder), "letters", place).digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_choice_among_classes_is_known_by_its_name(tools: Machinery) -> None:
    """As by default, `lsq` and `ternary` have the same options: none that was written."""
    found = {}
    for name in ("lsq", "ternary", "minmax"):
        quantizer = {"weights": name, "activations": "minmax", "embeddings": "minmax"}
        recipe = make_recipe(Path("text.txt"), quantizer=quantizer)
        found[name] = tools.jobs.essence(recipe, recipe.model_dump(mode="json", by_alias=True))
    assert found["lsq"]["quantizer"]["weights"] == {"name": "lsq"}
    assert found["ternary"]["quantizer"]["weights"] == {"name": "ternary"}
    assert "quantizer" not in found["minmax"] and "cache" not in found["lsq"]["format"]


@pytest.mark.slow
def test_only_chooses_runs_by_name(copy: Made, tools: Machinery, started: list[str]) -> None:
    for name in ("lsq-letters-1", "lsq-long-letters-0"):
        (copy.folder / "results" / f"{name}.json").unlink()
    with pytest.raises(SystemExit):
        copy.run(tools, "--only", "lsq-long-*")
    assert started == ['name="letters-lsq-long-letters-0"']


@pytest.mark.slow
def test_a_run_without_data_says_what_to_set(
    copy: Made, tools: Machinery, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("QCOMPRESS_ASSETS", raising=False)
    with pytest.raises(SystemExit) as left:
        tools.run.main([str(copy.folder), "--out", str(copy.out)])
    assert left.value.code == 2 and "set QCOMPRESS_ASSETS, or --data" in capsys.readouterr().err


def test_a_result_that_is_too_large_is_refused(tools: Machinery, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    tools.results.write_document(file, {"samples": ["x" * 199_990]})
    with pytest.raises(QcompressError, match="more than 200000"):
        tools.results.check_size(file)


# study.yaml ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("arms", "lsq-long", "trials"), [{}], "equally many trials"),
        (("arms", "lsq-long", "trials"), "nobody", "no arm with trials of its own"),
        (("arms", "lsq-long", "recipe"), "gone.yaml", "gone.yaml does not exist"),
        (("arms", "lsq-long", "tasks"), ["numbers"], "unknown task"),
        (("prepare",), "gone.py", "gone.py does not exist"),
        (("tables", "longer", "baseline"), "float", "the baseline float is none of its arms"),
        (("tables", "longer", "arms"), ["lsq", "saq"], "unknown arm"),
        (("arms", "LSQ"), {"recipe": "lsq.yaml", "trials": "none"}, "'LSQ' cannot name"),
        (("arms", "float"), {"recipe": "lsq.yaml", "trials": "none"}, "'float' cannot name"),
        (("seed",), 1, "Extra inputs are not permitted"),
    ],
)
@pytest.mark.slow
def test_a_wrong_study_says_what_is_wrong(
    copy: Made, tools: Machinery, path: tuple[str, ...], value: Any, message: str
) -> None:
    change(copy, tools, *path, value=value)
    with pytest.raises(UsageError, match=message):
        tools.study.read_study(copy.folder)


def test_the_best_trial_is_the_best_mean_in_the_direction_of_its_metric(tools: Machinery) -> None:
    def trial(rate: float, score: float, metric: str) -> dict[str, Any]:
        return {"set": {"lr": rate}, "score": score, "metric": metric}

    pairs = [(1.0, 0.2), (2.0, 0.6), (1.0, 0.7), (2.0, 0.5)]
    assert tools.run.best([trial(*pair, "token_accuracy") for pair in pairs]) == {"lr": 2.0}
    assert tools.run.best([trial(*pair, "perplexity") for pair in pairs]) == {"lr": 1.0}


@pytest.mark.slow
def test_the_plot_shows_each_point_where_it_belongs(made: Made, tools: Machinery) -> None:
    svg = ET.fromstring(tools.plot.draw({"one & two": [(100, 0.5, 0.0), (400, 0.7, 0.1), (200, 0.5, 0.0)]}))
    circles = [item for item in svg if item.tag.endswith("circle")]
    across, down = ([float(item.get(key)) for item in circles] for key in ("cx", "cy"))
    assert len(circles) == 3 and across == sorted(across)
    assert across[1] - across[0] == pytest.approx(
        across[2] - across[1], abs=0.2
    )  # 100, 200, 400: equal steps
    assert down[0] == down[1] > down[2]
    assert any(item.text == "one & two" for item in svg)
    assert ET.fromstring((made.folder / "score.svg").read_text()).tag.endswith("svg")
