"""`gate --baseline`: what passes, and each planted fault with its verdict and exit code."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lines import Project, cli, finished

from qcompress import api
from qcompress.errors import UsageError
from qcompress.parity.sample_results import pack_samples, read_samples
from qcompress.system.artifacts import read_json, write_json

GOALS = {
    "test.perplexity": {"percent-max-degradation": 5},
    "test.token_accuracy": {"max-degradation": 0.2},
    "onnx_bytes": {"percent-max-degradation": 5},
}


@pytest.fixture(scope="module")
def line(tiny_model: Path, text_file: Path) -> Project:
    return finished(tiny_model, text_file)


@pytest.fixture
def baseline(line: Project, tmp_path: Path) -> Path:
    """A run whose recipe states goals for later ones."""
    return with_goals(line, tmp_path / "baseline")


def with_goals(line: Project, folder: Path, **gate: Any) -> Path:
    shutil.copytree(line.latest, folder)
    file = folder / "recipe.resolved.yaml"
    recipe = yaml.safe_load(file.read_text())
    recipe["gate"] |= {"regression": GOALS, **gate}
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


def parity(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    report = read_json(run / "parity.json")
    change(report)
    write_json(run / "parity.json", report)


def row(report: dict[str, Any], stage: str = "onnx") -> dict[str, Any]:
    return next(item for item in report["rows"] if item["stage"] == stage)


def samples(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    sets = read_samples(run / "samples.json.gz")
    change(sets)
    pack_samples(run / "samples.json.gz", sets)


def perplexity(entry: dict[str, Any], stage: str = "onnx") -> float:
    import math

    return math.exp(sum(entry["rows"][stage]["nll"]) / sum(entry["tokens"]))


def worse(run: Path, factors: list[float]) -> None:
    """Log-likelihoods of the first set grow by these factors in turn, and the metric with them."""
    sets = read_samples(run / "samples.json.gz")
    results = sets["test"]["rows"]["onnx"]
    results["nll"] = [value * factors[place % len(factors)] for place, value in enumerate(results["nll"])]
    pack_samples(run / "samples.json.gz", sets)
    parity(run, lambda report: row(report)["metrics"].update({"test.perplexity": perplexity(sets["test"])}))


# What passes --------------------------------------------------------------------------------------


def test_a_run_against_itself_is_accepted_and_written_down(
    baseline: Path, line: Project, tmp_path: Path
) -> None:
    candidate = with_goals(line, tmp_path / "candidate")
    verdict_before = (candidate / "verdict.json").read_bytes()
    done = cli("gate", "--baseline", baseline, "--candidate", candidate, "--json")
    assert done.code == 0 and done.json()["verdict"] == "accept"
    against = [goal for goal in done.json()["goals"] if "outcome" in goal]
    assert [goal["metric"] for goal in against] == list(GOALS)
    assert {goal["test"] for goal in against} == {"identical", "none"}
    assert read_json(candidate / "gate.json") == done.json()
    assert (candidate / "verdict.json").read_bytes() == verdict_before


def test_a_promoted_baseline_says_what_the_run_says(baseline: Path, line: Project, tmp_path: Path) -> None:
    """The file alone is enough, and two writings of it are equal."""
    candidate = with_goals(line, tmp_path / "candidate")
    worse(candidate, [1.0, 1.002, 0.999])
    by_run = api.gate_against(baseline, candidate)
    file = tmp_path / "baseline.json"
    assert cli("baseline", "promote", baseline, "--out", file).code == 0
    first = file.read_bytes()
    api.promote(baseline, file)
    assert file.read_bytes() == first and json.loads(first)["format"] == 1
    shutil.rmtree(baseline)
    by_file = api.gate_against(file, candidate)
    for judgements in (by_run, by_file):
        del judgements["against"]
    assert by_file == by_run and by_run["verdict"] == "accept"
    assert {goal.get("test") for goal in by_run["goals"]} >= {"bootstrap", "none"}


def test_a_slightly_worse_run_is_inconclusive_and_the_goals_say_what_that_means(
    baseline: Path, line: Project, tmp_path: Path
) -> None:
    candidate = with_goals(line, tmp_path / "candidate")
    worse(candidate, [0.98, 1.0, 1.03])
    done = cli("gate", "--baseline", baseline, "--candidate", candidate, "--json")
    assert (done.code, done.json()["verdict"]) == (3, "inconclusive")
    goal = done.json()["goals"][0]
    assert goal["interval"][0] <= goal["allowed"] < goal["interval"][1] and goal["detectable"] > 0
    assert "the samples cannot tell" in done.json()["reasons"][0]
    other = [with_goals(line, tmp_path / name, on_inconclusive="pass") for name in ("one", "two")]
    worse(other[1], [0.98, 1.0, 1.03])
    done = cli("gate", "--baseline", other[0], "--candidate", other[1])
    assert done.code == 0 and done.stdout.splitlines()[-1].startswith("inconclusive")


def test_goals_of_a_file_replace_the_baselines(baseline: Path, line: Project, tmp_path: Path) -> None:
    candidate, goals = with_goals(line, tmp_path / "candidate"), tmp_path / "goals.yaml"
    worse(candidate, [1.1])
    assert cli("gate", "--baseline", baseline, "--candidate", candidate).code == 3
    goals.write_text(
        "gate: {parity: {onnx: {mean_abs: 0.05}}, regression: {test.perplexity: {min-recovery: 0.3}}}"
    )
    done = cli("gate", "--baseline", baseline, "--candidate", candidate, "--goals", goals, "--json")
    assert done.code == 0, done.json()["reasons"]
    assert done.json()["goals"][0]["goal"] == {"min-recovery": 0.3}


def test_a_part_of_a_set_has_goals_of_its_own(line: Project, tmp_path: Path) -> None:
    goals = {"test.perplexity@tokens=31": {"max-degradation": 1.0}}
    one, other = (with_goals(line, tmp_path / name, regression=goals) for name in ("one", "two"))
    judgement = api.gate_against(one, other)
    entry = judgement["goals"][0]
    tokens = read_samples(one / "samples.json.gz")["test"]["tokens"]
    assert judgement["verdict"] == "accept" and 0 < entry["samples"] == tokens.count(31)


# Planted faults -----------------------------------------------------------------------------------


def truncated(run: Path) -> None:
    def cut(entry: dict[str, Any]) -> None:
        for columns in (entry, *entry["rows"].values()):
            for name in columns:
                if isinstance(columns[name], list):
                    columns[name] = columns[name][:-1]

    samples(run, lambda sets: cut(sets["test"]))


def scale_off(run: Path) -> None:
    """One layer's scale grows by 10 % after the graph was measured."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(run / "model.onnx")
    named = {node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    scale = next(item for item in model.graph.initializer if item.name in named)
    scale.CopyFrom(
        numpy_helper.from_array(np.array(numpy_helper.to_array(scale) * np.float32(1.1)), scale.name)
    )
    onnx.save(model, run / "model.onnx")


def other_tokenizer(run: Path) -> None:
    file = run / "tokenizer.json"
    value = read_json(file)
    value["truncation"] = None
    value["added_tokens"] = [*value.get("added_tokens", []), {"id": 99999, "content": "<new>"}]
    write_json(file, value)


def build_json(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = read_json(run / "engine" / "build.json")
    change(value)
    write_json(run / "engine" / "build.json", value)


def of_row(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda run: parity(run, lambda report: change(row(report)))


def recipe(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = run / "recipe.resolved.yaml"
    value = yaml.safe_load(file.read_text())
    change(value)
    file.write_text(yaml.safe_dump(value, sort_keys=False))


def too_good(run: Path) -> None:
    worse(run, [0.3])


FAULTS: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "a scale is off by 10 %": (
        scale_off,
        4,
        "is not the file that was measured: let that run build and measure again",
    ),
    "another tokenizer": (other_tokenizer, 4, "tokenizer.json differs: take the baseline's"),
    "no tokenizer": (lambda run: (run / "tokenizer.json").unlink(), 4, "on one side only"),
    "a truncated evaluation set": (
        truncated,
        4,
        "11 samples, and the baseline has 12: measure both on the same data",
    ),
    "a missing evaluation set": (
        lambda run: samples(run, lambda sets: sets.pop("other")),
        4,
        "evaluation set other was not measured: measure the candidate on the baseline's sets",
    ),
    "other labels": (
        lambda run: samples(run, lambda sets: sets["test"]["tokens"].__setitem__(3, 5)),
        4,
        "other labels",
    ),
    "other inputs": (
        lambda run: parity(run, lambda report: report["inputs"].update(test="0" * 64)),
        4,
        "inputs are not those of the baseline: measure both",
    ),
    "NaN weights": (
        of_row(lambda found: found["metrics"].update({"test.perplexity": float("nan")})),
        4,
        "is nan",
    ),
    "a missing metric": (
        of_row(lambda found: found["metrics"].pop("test.token_accuracy")),
        4,
        "not measured",
    ),
    "a metric that was edited": (
        of_row(
            lambda found: found["metrics"].update(
                {"test.perplexity": found["metrics"]["test.perplexity"] * 0.99}
            )
        ),
        4,
        "by the candidate's samples",
    ),
    "an engine of another file": (
        lambda run: build_json(run, lambda value: value["onnx"].update(sha256="0" * 64)),
        4,
        "from another file",
    ),
    "weights of another file": (
        lambda run: (
            (run / "model.onnx.data").write_bytes(b"weights"),
            build_json(run, lambda value: value["onnx"]["data"].update({"model.onnx.data": "0" * 64})),
        ),
        4,
        "another file than",
    ),
    "weights that were not measured": (
        lambda run: (
            (run / "model.onnx.data").write_bytes(b"weights"),
            parity(run, lambda report: report["onnx"]["data"].update({"model.onnx.data": "0" * 64})),
        ),
        4,
        "model.onnx.data is not the file that was measured",
    ),
    "another plan": (
        lambda run: (run / "engine" / "model.plan").write_bytes(b"plan"),
        4,
        "is not the engine that was built",
    ),
    "edited goals": (
        lambda run: recipe(
            run,
            lambda value: value["gate"]["regression"].update(
                {"test.perplexity": {"percent-max-degradation": 50}}
            ),
        ),
        4,
        "other goals than the baseline",
    ),
    "an edited floor": (
        lambda run: recipe(run, lambda value: value["gate"].update(float_floor={})),
        4,
        "(float_floor)",
    ),
    "fewer required rows": (
        lambda run: recipe(run, lambda value: value["verify"].update(require=["float"])),
        4,
        "verify.require",
    ),
    "the row was not measured": (
        of_row(lambda found: found.update(status="not-run", reason="no time")),
        4,
        "not measured: no time",
    ),
    "an implausible gain": (too_good, 4, "too good"),
    "broken results": (
        lambda run: (run / "samples.json.gz").write_bytes(b"\x1f\x8bgarbage"),
        4,
        "cannot be read",
    ),
    "a regression": (functools.partial(worse, factors=[1.1]), 3, "a loss of"),
    "a larger file": (
        lambda run: write_json(run / "sizes.json", {**read_json(run / "sizes.json"), "file_bytes": 10**9}),
        3,
        "onnx_bytes is 1e+09",
    ),
    "logits far from the folded model's": (
        of_row(lambda found: found["distance"].update(mean_abs=found["distance"]["range"])),
        3,
        "mean_abs",
    ),
}


def test_there_are_at_least_twelve_faults() -> None:
    assert len(FAULTS) >= 22


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_has_its_verdict_and_exit_code(
    fault: str, baseline: Path, line: Project, tmp_path: Path
) -> None:
    plant, code, says = FAULTS[fault]
    candidate = with_goals(line, tmp_path / "candidate")
    plant(candidate)
    done = cli("gate", "--baseline", baseline, "--candidate", candidate)
    assert done.code == code, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
    if done.stdout:
        assert done.stdout.splitlines()[-1].startswith({3: "regression", 4: "anomalous"}[code])


def test_a_gain_over_the_baseline_that_is_too_large_is_looked_at_first(line: Project, tmp_path: Path) -> None:
    """The candidate is where float is; it is the baseline that cannot have been right."""
    runs = [with_goals(line, tmp_path / name) for name in ("one", "two")]
    worse(runs[0], [1.5])
    judgement = api.gate_against(*runs)
    assert judgement["verdict"] == "anomalous"
    assert len(judgement["reasons"]) == 1 and "in the baseline: too good" in judgement["reasons"][0]


@pytest.mark.parametrize(
    ("resource", "gpu", "code", "says"),
    [(1.02, "RTX 4090", 0, "accept"), (1.2, "RTX 4090", 3, "latency_ms"),
     (1.0, "RTX 4080", 4, "was measured on"), (None, "RTX 4090", 4, "latency_ms was not measured")],
)  # fmt: skip
def test_latency_is_compared_on_one_gpu(
    resource: float | None, gpu: str, code: int, says: str, line: Project, tmp_path: Path
) -> None:
    goals = {"latency_ms": {"percent-max-degradation": 10}, "device_memory_bytes": {"threshold": 2e9}}
    runs = [with_goals(line, tmp_path / name, regression=goals) for name in ("one", "two")]
    for run, factor, device in ((runs[0], 1.0, "RTX 4090"), (runs[1], resource, gpu)):
        taken = {"median": 2.0 * (factor or 0), "least": 1.9, "p99": 2.2, "runs": 200}
        speed = [{"latency_ms": taken}] if factor is not None else {"reason": "no clock"}
        facts = {"speed": speed, "device": {"gpu": device, "memory_bytes": 10**9}, "measured": "plan"}
        facts["file_sha256"] = read_json(run / "engine" / "build.json")["plan"]["sha256"]
        parity(run, lambda report, facts=facts: row(report, "engine").update(measured_on=facts))
    done = cli("gate", "--baseline", runs[0], "--candidate", runs[1])
    assert done.code == code and says in done.stdout, done.stdout + done.stderr
    told = code in (0, 3)
    spread = "single runs took 1.9 to 2.2 ms (least and 99th percentile of 200 runs) in the baseline"
    assert ("compared as it was measured" in done.stdout and spread in done.stdout) == told
    assert ("lies within the baseline's spread: measure again" in done.stdout) == (code == 0)


# What is refused ----------------------------------------------------------------------------------


def test_a_baseline_without_goals_is_refused_with_some_to_begin_with(line: Project, tmp_path: Path) -> None:
    run = shutil.copytree(line.latest, tmp_path / "run")
    done = cli("gate", "--baseline", run, "--candidate", run)
    assert done.code == 2 and "gate.regression" in done.stderr
    fragment = yaml.safe_load(done.stderr.partition("--goals:\n")[2])
    goals = tmp_path / "goals.yaml"
    fragment["gate"]["parity"] = {"onnx": {"mean_abs": 0.05}}
    goals.write_text(yaml.safe_dump(fragment))
    assert cli("gate", "--baseline", run, "--candidate", run, "--goals", goals).code == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [("gate: {recovery: {a.b: {}}}", "gate.recovery.a.b"), ("goals: {}", "the one key `gate`"),
     ("gate: {regresion: {}}", "gate.regresion"), ("a: [", "goals.yaml")],
)  # fmt: skip
def test_a_wrong_file_of_goals_is_named(text: str, says: str, baseline: Path, tmp_path: Path) -> None:
    goals = tmp_path / "goals.yaml"
    goals.write_text(text)
    done = cli("gate", "--baseline", baseline, "--candidate", baseline, "--goals", goals)
    assert done.code == 2 and says in done.stderr
    assert cli("gate", "--candidate", baseline, "--goals", goals).code == 2


RECOVERY: list[dict[str, Any]] = [
    {"test.perplexity": {"percent-max-degradation": 2.0}},
    {"test.perplexity": {"max-degradation": 0.5}, "other.perplexity": {"min-recovery": 0.97}},
    {"test.perplexity": {"threshold": 10000.0}},
    {},
]


@pytest.mark.parametrize("recovery", RECOVERY, ids=["percent", "two", "threshold", "none"])
def test_a_baseline_without_goals_for_later_runs_says_what_to_add(
    recovery: dict[str, Any], line: Project, tmp_path: Path
) -> None:
    """`promote` warns, `gate` refuses, and what both print is taken when it is added as it stands."""
    bare = with_goals(line, tmp_path / "bare", regression={}, recovery=recovery)
    file = tmp_path / "baseline.json"
    promoted = cli("baseline", "promote", bare, "--out", file, "--force")
    assert promoted.code == 0 and "warning: " in promoted.stderr and file.is_file()
    for against in (bare, file):
        refused = cli("gate", "--baseline", against, "--candidate", bare)
        assert refused.code == 2 and "states no goal for a later run" in refused.stderr
        texts = [text[text.index("    gate:\n") :] for text in (refused.stderr, promoted.stderr)]
        assert texts[0] == texts[1]
        assert ("`recovery` are a start" in refused.stderr) is bool(recovery)
    added = yaml.safe_load(texts[0])["gate"]["regression"]
    assert added == recovery or (not recovery and set(added) == {"test.perplexity", "other.perplexity"})
    whole = with_goals(line, tmp_path / "whole", regression=added, recovery=recovery)
    done = cli("gate", "--baseline", whole, "--candidate", whole)
    assert done.code == 0, done.stderr
    silent = cli("baseline", "promote", whole, "--out", file, "--force")
    assert "warning" not in silent.stderr


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 99}', '{"format": 1}', '{"format": 1, "gate": {}}']
)
def test_a_file_that_is_no_baseline_is_refused(content: str, line: Project, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    file.write_text(content)
    done = cli("gate", "--baseline", file, "--candidate", line.latest)
    assert done.code == 2 and "baseline promote" in done.stderr
    assert cli("gate", "--baseline", tmp_path / "none", "--candidate", line.latest).code == 2


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no parity": (lambda value: value.pop("parity"), "parity: Field required"),
    "parity of another kind": (lambda value: value.update(parity=[1]), "parity: "),
    "no rows": (lambda value: value["parity"].pop("rows"), "parity.rows: Field required"),
    "rows of another kind": (lambda value: value["parity"].update(rows={"onnx": 1}), "parity.rows: "),
    "a row without a stage": (lambda value: value["parity"]["rows"][0].pop("stage"), "parity.rows.0.stage"),
    "metrics of another kind": (lambda value: row(value["parity"]).update(metrics=[1.0]), "metrics: "),
    "a metric that is text": (
        lambda value: row(value["parity"])["metrics"].update({"test.perplexity": "low"}),
        "metrics.test.perplexity: ",
    ),
    "main of another kind": (lambda value: value["parity"].update(main=["test"]), "parity.main: "),
    "inputs of another kind": (lambda value: value["parity"].update(inputs=3), "parity.inputs: "),
    "the row is gone": (
        lambda value: value["parity"]["rows"].remove(row(value["parity"])),
        "parity.rows has no measured row onnx",
    ),
    "a cell is gone": (lambda value: value["samples"]["test"]["nll"].pop(), "columns of 11, 12 cells"),
    "a known column is gone": (
        lambda value: value["samples"]["test"].pop("tokens"),
        "lacks the column tokens",
    ),
    "a set is gone": (lambda value: value["samples"].pop("other"), "different evaluation sets"),
    "a resource that is text": (
        lambda value: value["resources"].update(onnx_bytes="1"),
        "resources.onnx_bytes",
    ),
    "a key of nobody": (lambda value: value.update(paritty={}), "paritty: "),
}


def test_an_edited_baseline_is_refused_with_the_key_that_is_wrong(baseline: Path, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    api.promote(baseline, file)
    whole = file.read_text()
    for edit, (change, says) in EDITS.items():
        value = json.loads(whole)
        change(value)
        file.write_text(json.dumps(value))
        done = cli("gate", "--baseline", file, "--candidate", baseline)
        assert done.code == 2, edit
        assert "not as it was written: " in done.stderr and says in done.stderr, (edit, done.stderr)
        assert "baseline promote" in done.stderr, edit


def test_results_that_do_not_give_a_metric_are_anomalous(baseline: Path, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    api.promote(baseline, file)
    value = json.loads(file.read_text())
    value["samples"]["test"]["nll"][3] = "high"
    file.write_text(json.dumps(value))
    done = cli("gate", "--baseline", file, "--candidate", baseline)
    assert done.code == 4 and "the per-sample results do not give it" in done.stdout


def test_a_run_that_was_not_accepted_is_no_baseline(baseline: Path, tmp_path: Path) -> None:
    write_json(baseline / "verdict.json", {**read_json(baseline / "verdict.json"), "verdict": "regression"})
    file = tmp_path / "baseline.json"
    with pytest.raises(UsageError, match="regression"):
        api.promote(baseline, file)
    assert not file.exists()
    assert cli("baseline", "promote", baseline, "--out", file, "--force").code == 0 and file.is_file()
