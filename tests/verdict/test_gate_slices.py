"""`gate --baseline` on slices of a set: which samples count, what is refused, how the bounds are shared."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from lines import cli
from scipy import stats
from sklearn import metrics

from qcompress.parity.sample_results import pack_samples, read_samples, write_samples
from qcompress.recipe.load import dump_recipe
from qcompress.schema.goals import Gate, Goal
from qcompress.schema.recipe import Recipe
from qcompress.system.artifacts import read_json, write_json
from qcompress.verdict.baseline.decide import decide
from qcompress.verdict.baseline.snapshot import read_snapshot
from qcompress.verdict.baseline.statistics import ALPHA, loss_of, mcnemar_exact, share_interval
from qcompress.verdict.judge import write_verdict
from qcompress.verdict.measured import measured
from qcompress.verdict.run_directory import load

LANGUAGES = ["de", "fr", "it", None]
COUNT = 400
LABELS = ["neg", "pos"]


def answers(
    wrong: dict[str | None, float], label: np.ndarray, parts: list[str | None], seed: int
) -> np.ndarray:
    random = np.random.default_rng(seed)
    share = np.array([wrong.get(part, 0.1) for part in parts])
    return np.where(random.random(len(label)) < share, 1 - label, label)


def write_run(folder: Path, goals: dict[str, Any], wrong: dict[str | None, float], seed: int = 1) -> Path:
    """A finished run as it lies on disk, of a classifier that is wrong by language as `wrong` says."""
    folder.mkdir()
    label = (np.random.default_rng(0).random(COUNT) < 0.4).astype(int)
    parts = [LANGUAGES[number % 4] for number in range(COUNT)]
    given = answers(wrong, label, parts, seed)
    recipe = Recipe.model_validate({
        "name": "tiny", "model": {"family": "bert", "source": "unused"},
        "task": {"name": "sequence-classification", "labels": LABELS},
        "data": {"evaluate": {"dev": {"table": ["dev.csv"], "slices": ["language"]}}},
        "format": "w8a8", "gate": {"regression": goals}, "verify": {"require": []},
    })  # fmt: skip
    (folder / "recipe.resolved.yaml").write_text(dump_recipe(recipe))
    rows = [{"label": int(a), "prediction": int(b), "loss": 0.5} for a, b in zip(label, given, strict=True)]
    samples_of_set = {
        "dev.accuracy": float((label == given).mean()),
        "dev.f1": metrics.f1_score(label, given),
    }
    row = {"stage": "onnx", "status": "measured", "reason": None, "metrics": samples_of_set, "distance": None}
    row["deployed"] = {"metrics": samples_of_set, "distance": None}
    report = {"rows": [row], "inputs": {"dev": "same"}, "main": {"dev": ["accuracy"]}, "sets": ["dev"]}
    write_json(folder / "parity.json", report)
    write_samples(
        folder / "samples.json.gz", {"onnx": {"dev": rows}}, ("label",), {"dev": {"language": parts}}
    )
    write_json(folder / "manifest.json", {"versions": {}, "stages": {}, "host": {}, "recipe": "tiny"})
    verdict = {"verdict": "accept", "goals": [], "reasons": [], "not_measured": []}
    write_verdict(folder, verdict, "tiny")
    return folder


def pair(tmp_path: Path, goals: dict[str, Any], wrong: dict[str | None, float]) -> tuple[Path, Path]:
    """A baseline, promoted, and a candidate."""
    run = write_run(tmp_path / "baseline", goals, {})
    file = tmp_path / "baseline.json"
    done = cli("baseline", "promote", run, "--out", file)
    assert done.code == 0, done.stderr
    return file, write_run(tmp_path / "candidate", goals, wrong, seed=2)


def judged(baseline: Path, candidate: Path, *more: str | Path) -> tuple[int, dict[str, Any]]:
    done = cli("gate", "--baseline", baseline, "--candidate", candidate, "--json", *more)
    return done.code, done.json()


EACH = {"dev.accuracy@language=*": {"max-degradation": 0.1}}


def test_a_slice_is_judged_by_its_own_samples(tmp_path: Path) -> None:
    goals = {f"dev.{name}@language={value}": {"max-degradation": 0.1} for name in ("accuracy", "f1")
             for value in ("de", "fr")}  # fmt: skip
    _, candidate = pair(tmp_path, goals, {"fr": 0.45})
    for baseline in (tmp_path / "baseline.json", tmp_path / "baseline"):
        code, judgement = judged(baseline, candidate)
        assert code == 3 and judgement["verdict"] == "regression"
        for entry in judgement["goals"]:
            language = entry["metric"].partition("=")[2]
            for side, folder in (("baseline", "baseline"), ("value", "candidate")):
                dev = read_samples(tmp_path / folder / "samples.json.gz")["dev"]
                chosen = [at for at, part in enumerate(dev["slices"]["language"]) if part == language]
                sides = [
                    [column[at] for at in chosen]
                    for column in (dev["label"], dev["rows"]["onnx"]["prediction"])
                ]
                score = metrics.f1_score if ".f1@" in entry["metric"] else metrics.accuracy_score
                assert entry[side] == pytest.approx(score(*sides))
            assert entry["samples"] == COUNT / 4
            assert (entry["outcome"] == "fail") == (language == "fr")


def test_a_goal_on_every_value_names_the_worst_in_each_form(tmp_path: Path) -> None:
    baseline, candidate = pair(tmp_path, EACH, {"it": 0.5})
    code, judgement = judged(baseline, candidate)
    assert code == 3 and judgement["verdict"] == "regression"
    losses = [entry["loss"] for entry in judgement["goals"]]
    assert losses == sorted(losses, reverse=True)
    assert judgement["goals"][0]["metric"] == "dev.accuracy@language=it"
    assert {entry["metric"].partition("=")[2] for entry in judgement["goals"]} == {"de", "fr", "it"}
    assert {(entry["every"], entry["slices"]) for entry in judgement["goals"]} == {
        ("dev.accuracy@language=*", 3)
    }
    (note,) = judgement["notes"]
    assert note.startswith("dev.accuracy@language=*: 3 slices, the worst it with a loss of")
    assert judgement["reasons"][0].startswith("dev.accuracy@language=it is ")
    files = ["--junit", tmp_path / "junit.xml", "--github", "--code-quality", tmp_path / "quality.json"]
    shown = cli("gate", "--baseline", baseline, "--candidate", candidate, *files)
    assert "dev.accuracy@language=it" in shown.stdout and "the worst it" in shown.stdout
    assert (
        "::error file=recipe.yaml,title=qcompress gate%3A regression::dev.accuracy@language=it is"
        in shown.stdout
    )
    cases = [case.get("name") for case in ElementTree.parse(tmp_path / "junit.xml").iter("testcase")]
    assert "dev.accuracy@language=it max-degradation 0.1" in cases
    assert "language=it" in read_json(tmp_path / "quality.json")[0]["description"]


def test_the_lower_bounds_of_a_goal_on_every_value_share_their_chance(tmp_path: Path) -> None:
    """The upper bound is that of the slice alone; a limit that one slice alone breaks need not be broken."""
    alone = {"dev.accuracy@language=it": {"max-degradation": 0.1}}
    baseline, candidate = pair(tmp_path, EACH | alone, {"it": 0.3})
    _, judgement = judged(baseline, candidate)
    each, one = (next(entry for entry in judgement["goals"] if entry["metric"] == "dev.accuracy@language=it"
                      and ("every" in entry) is shared) for shared in (True, False))  # fmt: skip
    assert each["interval"][1] == one["interval"][1] and each["interval"][0] < one["interval"][0]
    assert each["detectable"] > one["detectable"] and each["loss"] == one["loss"]


def test_labels_are_slices_by_their_names(tmp_path: Path) -> None:
    baseline, candidate = pair(tmp_path, {"dev.accuracy@label=*": {"max-degradation": 0.9}}, {})
    _, judgement = judged(baseline, candidate)
    assert {entry["metric"] for entry in judgement["goals"]} == {
        f"dev.accuracy@label={name}" for name in LABELS
    }
    assert judgement["verdict"] == "accept"


def of_samples(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def plant(run: Path) -> None:
        sets = read_samples(run / "samples.json.gz")
        change(sets["dev"])
        pack_samples(run / "samples.json.gz", sets)

    return plant


FAULTS: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "a candidate that keeps no column": (of_samples(lambda dev: dev.pop("slices")), 0, ""),
    "samples that changed their slice": (
        of_samples(lambda dev: dev["slices"]["language"].__setitem__(0, "fr")),
        4,
        "the samples have other values of language than the baseline's",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_users_columns_are_the_baselines(fault: str, tmp_path: Path) -> None:
    plant, code, says = FAULTS[fault]
    baseline, candidate = pair(tmp_path, {"dev.accuracy@language=*": {"max-degradation": 0.5}}, {})
    plant(candidate)
    done = cli("gate", "--baseline", baseline, "--candidate", candidate)
    assert done.code == code and says in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("goal", "says"),
    [
        ("dev.accuracy@language=es", "no sample of the baseline has language=es: name one of de, fr, it"),
        (
            "dev.accuracy@region=*",
            "keeps no column region of dev, only label, language: write `slices: [region]`",
        ),
        ("dev.accuracy@loss=*", None),
    ],
)
def test_goals_of_a_file_on_what_is_not_there_are_anomalous(
    goal: str, says: str | None, tmp_path: Path
) -> None:
    baseline, candidate = pair(tmp_path, EACH, {})
    goals = tmp_path / "goals.yaml"
    goals.write_text(json.dumps({"gate": {"regression": {goal: {"max-degradation": 0.5}}}}))
    code, judgement = judged(baseline, candidate, "--goals", goals)
    if says is None:  # one value, the same in both
        assert code == 0 and judgement["goals"][0]["metric"] == "dev.accuracy@loss=0.5"
        return
    assert code == 4 and says in judgement["reasons"][0]


def test_a_slice_on_which_a_metric_is_not_defined_is_named(tmp_path: Path) -> None:
    """Nothing correlates with labels that are all the same, as those of `de` are."""
    label = [3.0 if number % 4 == 0 else float(number) for number in range(COUNT)]
    sides = []
    for name, noise in (("one", 3.0), ("two", 5.0)):
        one = read_snapshot(write_run(tmp_path / name, {}, {}))
        answer = (np.array(label) + np.random.default_rng(int(noise)).normal(0, noise, COUNT)).tolist()
        results_of_slice = {"dev.spearman": stats.spearmanr(label, answer).statistic}
        row = {
            **one.parity["rows"][0],
            "metrics": results_of_slice,
            "deployed": {"metrics": results_of_slice, "distance": None},
        }
        columns = {"dev": {"label": label, "prediction": answer}}
        sides.append(replace(one, parity={**one.parity, "rows": [row]}, samples=columns))
    verdicts = {}
    for value in ("de", "fr", "*"):
        goals = {f"dev.spearman@language={value}": {"max-degradation": 1}}
        verdicts[value] = decide(*sides, Gate.model_validate({"regression": goals}))
    assert verdicts["fr"]["verdict"] == "accept"
    for value in ("de", "*"):
        assert verdicts[value]["verdict"] == "anomalous"
        assert (
            "spearman of de is nan in the baseline: 100 samples do not define it"
            in verdicts[value]["reasons"][0]
        )


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "of another length": (
        lambda value: value["slices"]["dev"]["language"].pop(),
        "columns of 399, 400 cells",
    ),
    "a number": (lambda value: value["slices"]["dev"]["language"].__setitem__(0, 1), "slices.dev.language.0"),
    "of another kind": (lambda value: value.update(slices=[]), "slices: "),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_slices_of_a_baseline_are_refused(edit: str, tmp_path: Path) -> None:
    baseline, candidate = pair(tmp_path, EACH, {})
    change, says = EDITS[edit]
    value = json.loads(baseline.read_text())
    change(value)
    baseline.write_text(json.dumps(value))
    done = cli("gate", "--baseline", baseline, "--candidate", candidate)
    assert done.code == 2 and says in done.stderr


def test_a_baseline_of_before_has_no_slices(tmp_path: Path) -> None:
    goals = {"dev.accuracy": {"max-degradation": 0.5}}
    baseline, candidate = pair(tmp_path, goals, {})
    value = json.loads(baseline.read_text())
    assert value["slices"] == {"dev": {"language": [LANGUAGES[number % 4] for number in range(COUNT)]}}
    for key in ("slices", "latency"):
        del value[key]
    baseline.write_text(json.dumps(value))
    assert judged(baseline, candidate)[0] == 0


def test_slices_do_not_make_other_samples_of_two_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, {}, {}) for name in ("one", "two")]
    of_samples(lambda dev: dev.pop("slices"))(runs[1])
    for run in runs:
        manifest = {"phases": [], "stages": {"load": {"digest": "x"}}, "recipe": "tiny",
                    "host": {"name": "here", "threads": 1, "gpu": {"sm": []}}}  # fmt: skip
        write_json(run / "manifest.json", manifest)
    identities = [measured(load(run), "onnx").identity("dev") for run in runs]
    assert identities[0] == identities[1]


def test_outputs_are_called_as_the_checkpoint_orders_them(tmp_path: Path) -> None:
    """The recipe's order is another, or it names none."""
    run = write_run(tmp_path / "run", {}, {})
    assert load(run).labels == ("neg", "pos")
    write_json(run / "config.json", {"id2label": {"0": "pos", "1": "neg"}})
    assert load(run).labels == ("pos", "neg")


# Both errors --------------------------------------------------------------------------------------


def test_the_chance_of_a_lower_bound_moves_it_alone() -> None:
    low, high = share_interval(30, 14, 400)
    lower, same = share_interval(30, 14, 400, ALPHA / 10)
    assert lower < low and same == high
    for changed in range(1, 60):
        for lost in range(changed + 1):
            beyond = share_interval(lost, changed - lost, 500, ALPHA / 10)[0] > 0
            assert beyond <= (mcnemar_exact(lost, changed - lost) <= ALPHA / 10)


def test_of_ten_slices_that_are_no_worse_one_is_called_worse_5_times_in_100() -> None:
    """100 samples each, 15 of them changed. Ten bounds of 5 % each would raise an alarm 2 times in 10."""
    below = functools.cache(lambda lost, won, among: share_interval(lost, won, 100, ALPHA / among)[0] > 0)
    tables = np.random.default_rng(31).multinomial(100, [0.075, 0.075, 0.85], size=(2000, 10))
    alarms = {
        among: np.mean([any(below(int(lost), int(won), among) for lost, won, _ in each) for each in tables])
        for among in (10, 1)
    }
    print(
        f"{100 * alarms[10]:.1f} % false alarms of 2000 goals on ten slices, {100 * alarms[1]:.0f} % unshared"
    )
    assert alarms[10] <= 0.062 and alarms[1] > 0.2


@pytest.mark.slow
def test_of_ten_slices_that_are_no_worse_in_f1_one_is_called_worse_5_times_in_100() -> None:
    random, alarms, goal = np.random.default_rng(31), 0, Goal.model_validate({"max-degradation": 0.0})

    def given(label: np.ndarray) -> dict[str, list[Any]]:
        answer = np.where(random.random(100) < 0.15, 1 - label, label)
        return {"label": label.tolist(), "prediction": answer.tolist()}

    for _ in range(2000):
        labels = [(random.random(100) < 0.4).astype(int) for _ in range(10)]
        alarms += any(loss_of("f1", goal, given(one), given(one), 10).outcome == "fail" for one in labels)
    print(f"f1: {100 * alarms / 2000:.1f} % false alarms of 2000 goals on ten slices")
    assert alarms / 2000 <= 0.062
