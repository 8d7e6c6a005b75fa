"""`compare`: the statistics against hand-worked numbers and simulation, what is refused, what is printed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lines import NAME, Project, cli, finished
from rich.console import Console
from scipy import special, stats
from sklearn import metrics

from qcompress import api
from qcompress.errors import IncomparableError, UsageError
from qcompress.parity.sample_results import REFERENCE
from qcompress.report.compare_table import finding, print_comparison
from qcompress.schema.recipe import ImageClassification
from qcompress.system.artifacts import read_json, write_json
from qcompress.tasks import TASKS
from qcompress.tasks.scores import span_f1
from qcompress.verdict.compare import compare
from qcompress.verdict.measured import Cost, Measured
from qcompress.verdict.paired import DRAWS, bootstrap_interval, detectable, t_interval
from qcompress.verdict.replicates import BLOCK, REPLICATES, draw_counts

# Statistics ---------------------------------------------------------------------------------------


def test_the_t_interval_of_a_textbook_sample() -> None:
    """Ten extra hours of sleep (Student 1908, drug 2 against drug 1): mean 1.58, interval 0.70 to 2.46."""
    hours = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    low, high = t_interval(hours)
    assert (round(low, 2), round(high, 2)) == (0.70, 2.46)
    assert low < math.fsum(hours) / 10 < high


def test_the_t_interval_covers_the_truth_in_95_of_100_studies() -> None:
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(2000):
        low, high = t_interval(random.normal(0.3, 2.0, 4))
        hits += low < 0.3 < high
    assert abs(hits / 2000 - 0.95) < 0.015  # 3 standard errors of a share of 2000


@pytest.mark.parametrize(
    ("pairs", "effect"), [(10, 0.996), (15, 0.778), (20, 0.660), (34, 0.495), (199, 0.1996)]
)
def test_the_detectable_difference_is_that_of_published_power_tables(pairs: int, effect: float) -> None:
    """Paired t test, two-sided 5 %, power 80 %, in standard deviations; 34 and 199: Cohen's 0.5, 0.2."""
    half = [-1.0, 1.0] * (pairs // 2) + [0.0] * (pairs % 2)
    assert detectable(half) / np.std(half, ddof=1) == pytest.approx(effect, abs=1.5e-3)


@pytest.mark.parametrize("pairs", [2, 3, 4, 8])
def test_a_difference_of_that_size_is_seen_in_80_of_100_studies(pairs: int) -> None:
    random = np.random.default_rng(pairs)
    spread = [-1.0, 1.0] * (pairs // 2) + [0.0] * (pairs % 2)
    truth = detectable(spread) / np.std(spread, ddof=1)
    studies = random.normal(truth, 1.0, (20_000, pairs))
    seen = stats.ttest_1samp(studies, 0.0, axis=1).pvalue < 0.05
    assert abs(seen.mean() - 0.8) < 0.01  # 3.5 standard errors of a share of 20,000


def test_a_single_pair_has_no_interval_and_equal_pairs_have_an_exact_one() -> None:
    assert t_interval([0.5]) is None and detectable([0.5]) is None
    assert bootstrap_interval([np.zeros((1, 10))]) is None
    assert t_interval([0.25, 0.25]) == (0.25, 0.25) and detectable([0.25, 0.25]) == 0.0


def test_the_bootstrap_of_an_accuracy_is_as_wide_as_theory_says() -> None:
    """Without spread over seeds all noise is that of the evaluation samples: sqrt(p (1 - p) / count)."""
    right = np.random.default_rng(3).random(400) < 0.3
    columns = {"label": [1] * 400, "prediction": [int(value) for value in right]}
    drawn = REPLICATES["accuracy"](columns, draw_counts(400, DRAWS, task=0))
    low, high = bootstrap_interval([np.stack([drawn, drawn, drawn])])
    error = math.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert low == pytest.approx(right.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(right.mean() + 1.96 * error, abs=0.2 * error)


def test_the_bootstrap_draws_seeds_within_their_task_and_keeps_the_tasks() -> None:
    """Two seeds that differ by 1 in one task, none in the other: means 0, 1/4 and 1/2 in shares 1:2:1."""
    apart = np.stack([np.zeros(DRAWS), np.ones(DRAWS)])
    low, high = bootstrap_interval([apart, np.zeros((2, DRAWS))])
    assert (low, high) == (0.0, 0.5)
    low, high = bootstrap_interval([np.full((2, DRAWS), 1.0), np.full((2, DRAWS), 3.0)])
    assert (low, high) == (2.0, 2.0)  # tasks apart from each other, and not drawn


def test_draws_depend_on_the_task_alone_and_keep_the_number_of_samples() -> None:
    first = draw_counts(50, 20, task=1)
    assert np.array_equal(first, draw_counts(50, 20, task=1))
    assert not np.array_equal(first, draw_counts(50, 20, task=2))
    assert (first.sum(axis=1) == 50).all() and first.max() > 1 and (first == first.round()).all()


def columns_of(kind: str) -> dict[str, list[Any]]:
    random = np.random.default_rng(7)
    if kind == "tokens":
        tokens = random.integers(3, 20, 60)
        return {"nll": list(random.random(60) * 40), "tokens": list(tokens), "correct": list(tokens // 3)}
    if kind == "numbers":
        label = random.integers(0, 11, 60) / 2  # ties, as STS-B has
        return {"label": list(label), "prediction": list((label + random.normal(0, 1, 60)).round(1))}
    if kind == "images":
        logits, label = random.normal(size=(60, 7)), random.integers(0, 7, 60)
        outcomes = TASKS["image-classification"].results(
            [{"label": int(one)} for one in label], logits, ImageClassification()
        )
        return {"logits": list(logits), **{name: [one[name] for one in outcomes] for name in outcomes[0]}}
    classes = 2 if kind == "two" else 4
    label = random.integers(0, classes, 60)
    answer = np.where(random.random(60) < 0.6, label, random.integers(0, classes, 60))
    return {"label": label.tolist(), "prediction": answer.tolist()}


def by_hand(metric: str, rows: dict[str, np.ndarray]) -> float:
    """The metric of some samples written out one after another: scikit-learn's and scipy's."""
    if metric == "perplexity":
        return math.exp(rows["nll"].sum() / rows["tokens"].sum())
    if metric == "token_accuracy":
        return rows["correct"].sum() / rows["tokens"].sum()
    label, answer = rows["label"], rows["prediction"]
    if metric == "top5_accuracy":
        return float(metrics.top_k_accuracy_score(label, rows["logits"], k=5, labels=range(7)))
    if metric == "cross_entropy":
        return float(metrics.log_loss(label, special.softmax(rows["logits"], axis=-1), labels=range(7)))
    if metric in ("pearson", "spearman"):
        return float(
            {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[metric](label, answer).statistic
        )
    compute = {"accuracy": metrics.accuracy_score, "f1": metrics.f1_score, "mcc": metrics.matthews_corrcoef}
    return float(compute[metric](label, answer))


@pytest.mark.parametrize(
    ("metric", "kind"),
    [("perplexity", "tokens"), ("token_accuracy", "tokens"), ("accuracy", "two"), ("accuracy", "four"),
     ("f1", "two"), ("mcc", "two"), ("mcc", "four"), ("pearson", "numbers"), ("spearman", "numbers"),
     ("accuracy", "images"), ("top5_accuracy", "images"), ("cross_entropy", "images")],
)  # fmt: skip
def test_a_replicate_is_the_metric_of_the_drawn_samples(metric: str, kind: str) -> None:
    columns, counts = columns_of(kind), draw_counts(60, 25, task=0)
    replicate = REPLICATES[metric](columns, counts)
    for draw, row in enumerate(counts.astype(int)):
        rows = {name: np.repeat(np.array(values), row, axis=0) for name, values in columns.items()}
        assert replicate[draw] == pytest.approx(by_hand(metric, rows), rel=1e-9), draw


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_a_draw_has_its_correlation_wherever_it_stands(metric: str) -> None:
    columns, counts = columns_of("numbers"), draw_counts(60, 2 * BLOCK + 3, task=0)
    whole = REPLICATES[metric](columns, counts)
    each = [REPLICATES[metric](columns, counts[place : place + 1])[0] for place in range(len(counts))]
    assert whole == pytest.approx(each, rel=1e-12)


def test_every_replicate_is_tested() -> None:
    assert REPLICATES.keys() == {
        "perplexity", "token_accuracy", "accuracy", "f1", "mcc", "pearson", "spearman", "top5_accuracy",
        "cross_entropy",
        # tests/verdict/test_loss_statistics.py
        "f1_macro", "f1_micro", "span_f1", "agreement",
        # tests/tasks, with the tasks that have them
        "cosine_spearman", "cosine_pearson", "pseudo_perplexity", "masked_accuracy", "answer_f1",
        "exact_match",
        # tests/models/test_any_model.py
        "score", "error",
    }  # fmt: skip


def test_degenerate_draws_of_mcc_and_f1_are_0_as_scikit_learn_has_them() -> None:
    ones = np.ones((1, 4))
    assert REPLICATES["mcc"]({"label": [0, 1, 0, 1], "prediction": [1, 1, 1, 1]}, ones) == [0.0]
    assert REPLICATES["f1"]({"label": [0, 0, 0, 0], "prediction": [0, 0, 0, 0]}, ones) == [0.0]


# Documents ----------------------------------------------------------------------------------------


def one(arm: str, seed: int, correct: list[int], task: str = "cola", **changes: Any) -> Measured:
    """A run of a task of ten windows of ten tokens; `correct` counts those that the model ranked first."""
    nll = [5.0 - 0.1 * count for count in correct]
    rows = [{"nll": a, "correct": b, "tokens": 10} for a, b in zip(nll, correct, strict=True)]
    values = {f"dev.{key}": value for key, value in TASKS["causal-lm"].metrics(rows).items()}
    made = Measured(
        arm=arm,
        task=task,
        seed=seed,
        where=f"{arm}-{task}-{seed}",
        metrics=values,
        sets=("dev",),
        main={"dev": "perplexity"},
        samples={
            "dev": {
                "ids": [f"dev:{index}" for index in range(len(correct))],
                "tokens": [10] * len(correct),
                "inputs": f"inputs of {task}",
                "results": {"nll": nll, "correct": correct},
            }
        },
        cost=Cost(updates=100, block_updates=0, passes=100, seconds=12.0),
        settings={"train": {"batch_size": 4}},
        start="float",
        machine="here",
    )
    return replace(made, **changes)


def study() -> list[Measured]:
    """Two arms, two tasks, three seeds; `new` is right 1, 1 and 2 times more often in ten on cola."""
    gains = {"cola": (1, 1, 2), "mrpc": (0, 1, 1)}
    runs = []
    for task in gains:
        for seed in range(3):
            base = [4 + (seed + index) % 3 for index in range(10)]
            runs.append(one("old", seed, base, task))
            runs.append(one("new", seed, [count + gains[task][seed] for count in base], task))
    return runs


def accuracy(runs: list[Measured], **options: Any) -> dict[str, Any]:
    return compare(runs, "onnx", "token_accuracy", **options)


def test_differences_are_paired_and_pooled_over_task_and_seed() -> None:
    comparison = accuracy(study())
    (item,) = comparison["differences"]
    assert item["arm"] == "new" and comparison["baseline"] == "old" and comparison["better"] == "higher"
    pairs = {(pair["task"], pair["seed"]): pair["difference"] for pair in item["pairs"]}
    expected = {("cola", 0): 0.1, ("cola", 1): 0.1, ("cola", 2): 0.2,
                ("mrpc", 0): 0.0, ("mrpc", 1): 0.1, ("mrpc", 2): 0.1}  # fmt: skip
    assert pairs == pytest.approx(expected)
    # mean 0.1, sd sqrt(0.02 / 5), t(0.975, 5) = 2.5706
    half = 2.5706 * math.sqrt(0.02 / 5) / math.sqrt(6)
    assert item["mean"] == pytest.approx(0.1)
    assert item["t_interval"] == pytest.approx((0.1 - half, 0.1 + half), abs=1e-5)
    # every sample gains alike, so only the seeds are drawn: a task's mean gain lies within its extremes
    assert 0.05 <= item["bootstrap_interval"][0] < 0.1 < item["bootstrap_interval"][1] <= 0.15
    assert finding(comparison, item) == "new: better than old by 0.1"


def test_mean_spread_and_extremes_of_each_task_and_over_them() -> None:
    runs = study()
    arm = accuracy(runs)["arms"][0]
    values = [run.metrics["dev.token_accuracy"] for run in runs if run.arm == "old" and run.task == "cola"]
    (cola, mrpc) = arm["tasks"]
    assert cola["values"] == values and cola["mean"] == pytest.approx(np.mean(values))
    assert cola["sd"] == pytest.approx(np.std(values, ddof=1))
    assert (cola["min"], cola["max"], cola["seeds"]) == (min(values), max(values), [0, 1, 2])
    means = [(a + b) / 2 for a, b in zip(cola["values"], mrpc["values"], strict=True)]
    assert arm["pooled"]["values"] == pytest.approx(means)


def test_another_baseline_turns_the_sign_and_a_lower_metric_turns_the_finding() -> None:
    comparison = accuracy(study(), baseline="new")
    assert comparison["differences"][0]["mean"] == pytest.approx(-0.1)
    assert finding(comparison, comparison["differences"][0]) == "old: worse than new by 0.1"
    comparison = compare(study(), "onnx", "perplexity")
    assert comparison["better"] == "lower" and comparison["differences"][0]["mean"] < 0
    assert finding(comparison, comparison["differences"][0]).startswith("new: better than old by")
    assert compare(study(), "onnx")["tasks"][0]["metric"] == "dev.perplexity"  # the task's first


def test_one_seed_has_no_interval_and_says_so() -> None:
    comparison = accuracy([run for run in study() if run.seed == 0 and run.task == "cola"])
    (item,) = comparison["differences"]
    assert item["t_interval"] is item["bootstrap_interval"] is item["detectable"] is None
    assert finding(comparison, item) == "new: one pair has no spread, so no interval: run more seeds"


def test_a_difference_within_its_spread_is_not_called_one() -> None:
    gains = (2, -2, 1)
    runs = [one("old", seed, [5] * 10) for seed in range(3)]
    runs += [one("new", seed, [5 + gain] * 10) for seed, gain in enumerate(gains)]
    comparison = accuracy(runs)
    (item,) = comparison["differences"]
    text = finding(comparison, item)
    # sd 0.2082; three pairs see 3.264 standard deviations
    assert text.startswith("new: no difference from old seen; one of 0.68 would have been, 80 times in 100")
    assert item["detectable"] > abs(item["mean"])


def test_seeds_that_an_arm_lacks_are_left_out_and_named() -> None:
    comparison = accuracy([run for run in study() if (run.arm, run.seed) != ("new", 1)])
    assert [pair["seed"] for pair in comparison["differences"][0]["pairs"]] == [0, 2, 0, 2]
    assert comparison["notes"] == [
        f"{task}: not every arm has seed 1; a pair needs both" for task in ("cola", "mrpc")
    ]


def test_a_metric_that_the_samples_do_not_give_has_no_bootstrap_and_says_so() -> None:
    runs = study()
    runs[0] = changed(runs[0], results={"nll": [1.0] * 10, "correct": [0] * 10})
    comparison = accuracy(runs)
    assert comparison["differences"][0]["bootstrap_interval"] is None
    assert comparison["differences"][0]["t_interval"] is not None
    assert comparison["notes"] == ["cola: the per-sample results do not give token_accuracy, so no bootstrap"]


def test_other_machines_and_other_float_models_are_named() -> None:
    runs = study()
    runs[-1] = replace(runs[-1], machine="there", start="another")
    assert accuracy(runs)["notes"] == [
        "mrpc: the runs start from 2 different float models",
        "seconds are from different machines: here; there",
    ]


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["span_f1", "agreement"])
def test_a_metric_that_the_results_do_not_give_has_no_bootstrap(metric: str) -> None:
    """A study's results say neither which words make an entity nor what float answered; the paired t test
    needs no results.
    """
    runs = [one(arm, seed, [4] * 10) for arm in ("old", "new") for seed in (0, 1)]
    main = {"dev": metric}
    runs = [replace(run, metrics={f"dev.{metric}": 0.5 + run.seed / 10}, main=main) for run in runs]
    answers = {"label": [[1]] * 10, "prediction": [[1]] * 10, "positions": [[0]] * 10}
    runs = [changed(run, results=answers) for run in runs]
    (item,) = compare(runs, "onnx")["differences"]
    assert item["bootstrap_interval"] is None and item["t_interval"] == (0.0, 0.0)


TAGS = ["O", "B-PER", "I-PER", "B-LOC"]


def tagged(arm: str, seed: int, wrong: float, *, labelled: bool) -> Measured:
    """A run on 40 sequences of six words; of each word the model is wrong with this chance."""
    random = np.random.default_rng([seed, int(100 * wrong)])
    truth = np.random.default_rng(40).integers(0, 4, (40, 6))
    answer = np.where(random.random((40, 6)) < wrong, (truth + 1) % 4, truth)
    known, made = {"label": truth.tolist()}, {"prediction": answer.tolist()}
    metric, value = "span_f1", span_score(truth.tolist(), answer.tolist())
    if not labelled:
        known, made = {}, {**made, REFERENCE: truth.tolist()}
        metric, value = "agreement", float((truth == answer).mean())
    entry = {"ids": [f"dev:{index}" for index in range(40)], "positions": [list(range(6))] * 40, **known,
             "inputs": "same", "results": {"prediction": made.pop("prediction")}, **made}  # fmt: skip
    return replace(
        one(arm, seed, [4] * 10), metrics={f"dev.{metric}": value}, main={"dev": metric},
        samples={"dev": entry}, labels=tuple(TAGS),
    )  # fmt: skip


def span_score(truth: list[list[int]], answer: list[list[int]]) -> float:
    spelled = [[[TAGS[tag] for tag in words] for words in side] for side in (truth, answer)]
    return span_f1(*spelled)


@pytest.mark.parametrize("labelled", [True, False])
def test_entities_and_agreement_are_drawn_by_sequences(labelled: bool) -> None:
    """The oracle scores each drawn sequence anew; a changed float model is not changed data."""
    runs = [tagged(arm, seed, wrong, labelled=labelled) for arm, wrong in (("old", 0.1), ("new", 0.3))
            for seed in (0, 1)]  # fmt: skip
    if not labelled:
        runs[0].samples["dev"][REFERENCE] = [[0] * 6] * 40
        runs[0] = replace(runs[0], metrics={"dev.agreement": agrees(runs[0], np.arange(40))})
    comparison = compare(runs, "onnx")
    assert comparison["notes"] == []
    replicates = []
    for counts in draw_counts(40, DRAWS, 0).astype(int)[:300]:
        drawn = np.repeat(np.arange(40), counts)
        values = [(entities if labelled else agrees)(run, drawn) for run in runs]
        replicates.append([values[2] - values[0], values[3] - values[1]])
    low, high = comparison["differences"][0]["bootstrap_interval"]
    expected = bootstrap_interval([np.array(replicates).T])
    assert (low, high) == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0]))
    assert high < 0 or not labelled


def entities(run: Measured, drawn: np.ndarray) -> float:
    entry = run.samples["dev"]
    return span_score(
        *([side[at] for at in drawn] for side in (entry["label"], entry["results"]["prediction"]))
    )


def agrees(run: Measured, drawn: np.ndarray) -> float:
    entry = run.samples["dev"]
    sides = [np.array(side)[drawn] for side in (entry[REFERENCE], entry["results"]["prediction"])]
    return float((sides[0] == sides[1]).mean())


def changed(run: Measured, **entry: Any) -> Measured:
    return replace(run, samples={"dev": {**run.samples["dev"], **entry}})


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"inputs": "other"}, "inputs"),
        ({"ids": [f"dev:{index + 1}" for index in range(10)]}, "ids"),
        ({"tokens": [9] * 10}, "tokens"),
        ({"results": {"nll": [1.0] * 10, "correct": [1] * 10, "label": [1] * 10}}, "label"),
    ],
)
def test_runs_on_other_samples_are_refused(entry: dict[str, Any], named: str) -> None:
    runs = study()
    runs[1] = changed(runs[1], **entry)
    wanted = f"old-cola-0 and new-cola-0 were measured on other samples of cola.*differ in {named}"
    with pytest.raises(IncomparableError, match=wanted) as caught:
        accuracy(runs)
    assert caught.value.exit_code == 4


def test_an_arm_without_a_task_or_a_common_seed_is_refused() -> None:
    with pytest.raises(IncomparableError, match="new was not measured on mrpc"):
        accuracy([run for run in study() if (run.arm, run.task) != ("new", "mrpc")])
    with pytest.raises(IncomparableError, match="old and new have no seed in common"):
        accuracy([run for run in study() if (run.seed == 0) == (run.arm == "new")])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_no_number_is_refused(value: float) -> None:
    runs = study()
    runs[2] = replace(runs[2], metrics={**runs[2].metrics, "dev.token_accuracy": value})
    with pytest.raises(IncomparableError, match=f"old-cola-1: dev.token_accuracy is {value}"):
        accuracy(runs)


def test_runs_that_are_no_arm_are_refused() -> None:
    runs = study()
    with pytest.raises(UsageError, match="both seed 0 of old on cola"):
        accuracy([*runs, runs[0]])
    runs[2] = replace(runs[2], settings={"train": {"batch_size": 8}})
    with pytest.raises(UsageError, match="differ in more than their seed: train"):
        accuracy(runs)
    with pytest.raises(UsageError, match="no arm is called 'newer'"):
        accuracy(study(), baseline="newer")
    with pytest.raises(UsageError, match="has no metric 'mcc'"):
        compare(study(), "onnx", "mcc")
    with pytest.raises(UsageError, match="nothing to compare"):
        compare([], "onnx")


# The command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with two seeds of its recipe, and two of another learning rate called `fast`."""
    project = finished(tiny_model, text_file).copy(tmp_path_factory.mktemp("compare") / "project")
    values = yaml.safe_load(project.recipe.read_text())
    values["train"]["phases"] = {"calibrate": {"steps": 4}, "finetune": {"steps": 4}}
    values["build"]["here"] = "never"
    project.recipe.write_text(yaml.safe_dump(values, sort_keys=False))
    values["name"], values["train"]["lr"] = "fast", {"adapter": 0.05}
    (project.folder / "fast.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("recipe", "fast"):
            api.run_seeds(project.folder / f"{name}.yaml", [0, 1], project.out, cache=project.cache)
    return project


def folder(project: Project, name: str) -> Path:
    folders = {file.parent.resolve() for file in (project.out / name).glob("*/seeds.json")}
    assert len(folders) == 1
    return folders.pop()


@pytest.mark.slow
def test_compare_reads_folders_of_seeds_and_single_runs(seeds: Project) -> None:
    done = cli("compare", folder(seeds, NAME), folder(seeds, "fast"), "--json")
    assert done.code == 0
    document = json.loads(done.stdout, parse_constant=pytest.fail)
    assert [arm["arm"] for arm in document["arms"]] == [NAME, "fast"]
    values = read_json(folder(seeds, "fast") / "seeds.json")["rows"][3]["metrics"]["test.perplexity"]
    assert document["arms"][1]["tasks"][0]["values"] == values["values"]
    assert document["arms"][1]["tasks"][0]["sd"] == values["sd"]
    apart = np.subtract(values["values"], document["arms"][0]["tasks"][0]["values"])
    test = stats.ttest_1samp(apart, 0.0).confidence_interval(0.95)
    assert document["differences"][0]["t_interval"] == pytest.approx([test.low, test.high])
    assert document["arms"][0]["tasks"][0]["updates"] == document["arms"][0]["tasks"][0]["passes"] == 4
    assert document["arms"][0]["tasks"][0]["block_updates"] == 8
    one_seed = cli("compare", f"a={folder(seeds, NAME) / 'seed-1'}", f"b={folder(seeds, 'fast') / 'seed-1'}")
    assert one_seed.code == 0 and "b: one pair has no spread" in one_seed.stdout


@pytest.mark.slow
def test_a_run_that_is_compared_with_itself_shows_no_difference(seeds: Project) -> None:
    mine = folder(seeds, NAME)
    (item,) = api.compare([f"a={mine}", f"b={mine}"])["differences"]
    assert item["mean"] == item["detectable"] == 0.0
    assert item["t_interval"] == item["bootstrap_interval"] == (0.0, 0.0)


@pytest.mark.slow
def test_compare_fits_into_80_columns(seeds: Project) -> None:
    done = cli("compare", folder(seeds, NAME), folder(seeds, "fast"), environment={"COLUMNS": "80"})
    assert done.code == 0 and "…" not in done.stdout
    assert max(map(len, done.stdout.split("fast: ")[0].splitlines())) <= 80  # sentences wrap
    console = Console(width=80, record=True)
    runs = [replace(run, arm=f"{run.arm}-teacher-intervention") for run in study()]
    print_comparison(console, accuracy(runs))
    text = console.export_text()
    tables = text.split("new-teacher-intervention: ")[0]
    assert "…" not in text and max(map(len, tables.splitlines())) <= 80


@pytest.mark.slow
def test_a_run_on_other_data_is_refused_with_4(seeds: Project) -> None:
    other = seeds.copy(seeds.folder.parent / "other")
    (other.folder / "text.txt").write_text((other.folder / "text.txt").read_text()[2000:])
    run = other.run("name=changed")
    done = cli("compare", folder(seeds, NAME) / "seed-0", run.path)
    assert done.code == 4 and "measured on other samples of test" in done.stderr


@pytest.mark.slow
def test_a_row_that_was_not_measured_is_refused_with_4(seeds: Project) -> None:
    done = cli("compare", folder(seeds, NAME), "--row", "engine")
    assert done.code == 4 and "the row engine was not measured" in done.stderr
    done = cli("compare", folder(seeds, NAME), "--row", "plan")
    assert done.code == 2 and "unknown row 'plan'" in done.stderr


@pytest.mark.slow
def test_runs_of_an_earlier_version_say_what_to_do(seeds: Project) -> None:
    run = seeds.copy(seeds.folder.parent / "earlier").latest
    manifest = read_json(run / "manifest.json")
    del manifest["phases"]
    write_json(run / "manifest.json", manifest)
    done = cli("compare", run)
    assert done.code == 4 and "run the recipe again" in done.stderr
