"""The gate: what is accepted, and each way not to be."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcompress.errors import QcompressError
from qcompress.pipeline.stages.gate import gate
from qcompress.schema.goals import PARITY, Gate
from qcompress.schema.recipe import Recipe
from qcompress.system.artifacts import read_json, write_json
from qcompress.verdict.judge import EXIT_CODES, exit_code, judge

REQUIRE = ["float", "trained", "folded", "onnx"]

GOALS = {
    "float_floor": {"test.perplexity": 31, "test.token_accuracy": 0.4},
    "recovery": {
        "test.perplexity": {"percent-max-degradation": 2},
        "test.token_accuracy": {"max-degradation": 0.01},
    },
}


def row(stage: str, perplexity: float = 30.0, accuracy: float = 0.5, **distance: Any) -> dict[str, Any]:
    """A measured row; its distance is that of a correct pipeline unless told otherwise."""
    to = {"trained": "float", "folded": "trained", "onnx": "folded", "engine": "onnx"}.get(stage)
    far = {"to": to, "max_abs": 0.0, "mean_abs": 0.0, "range": 50.0, "cosine": 1.0, "snr_db": None,
           "top1_agreement": 1.0, "positions": 100, **distance}  # fmt: skip
    return {
        "stage": stage,
        "status": "measured",
        "reason": None,
        "metrics": {"test.perplexity": perplexity, "test.token_accuracy": accuracy},
        "samples": 10,
        "distance": far if to else None,
    }


def report(**rows: dict[str, Any] | None) -> dict[str, Any]:
    """A report on a good model; `rows` replace rows, None takes one away."""
    found: dict[str, dict[str, Any] | None] = {
        "float": row("float"),
        "trained": row("trained", 30.4, 0.495, max_abs=9.0, mean_abs=0.5, top1_agreement=0.9),
        "folded": row("folded", 30.4, 0.495),
        "onnx": row("onnx", 30.4, 0.495, max_abs=4.0, mean_abs=0.005, top1_agreement=0.999),
        "engine": {"stage": "engine", "status": "not-run", "reason": "no GPU here"},
    }
    return {"rows": [value for value in {**found, **rows}.values() if value is not None]}


def verdict(
    parity: dict[str, Any] | None = None,
    goals: dict[str, Any] | None = None,
    require: list[str] | None = None,
    compute: str = "fp32",
) -> dict[str, Any]:
    gates = Gate.model_validate(GOALS if goals is None else goals)
    return judge(parity or report(), gates, REQUIRE if require is None else require, compute)


def passed(judgement: dict[str, Any], metric: str) -> bool:
    (goal,) = [goal for goal in judgement["goals"] if goal["metric"] == metric]
    return goal["passed"]


def one_reason(judgement: dict[str, Any]) -> str:
    assert len(judgement["reasons"]) == 1, judgement["reasons"]
    return judgement["reasons"][0]


@pytest.mark.parametrize(("least", "word"), [(0.98, "accept"), (0.99, "regression")])
def test_recovery_is_the_share_that_is_left(least: float, word: str) -> None:
    """30 of 30.4 is 0.987 of the perplexity, 0.495 of 0.5 is 0.99 of the accuracy."""
    judgement = verdict(goals={"recovery": {"test.perplexity": {"min-recovery": least},
                                        "test.token_accuracy": {"min-recovery": 0.99}}})  # fmt: skip
    assert judgement["verdict"] == word
    assert passed(judgement, "test.token_accuracy")


# What is accepted ---------------------------------------------------------------------------------


def test_a_good_model_is_accepted_with_every_goal_listed() -> None:
    judgement = verdict()
    assert judgement["verdict"] == "accept" and judgement["reasons"] == []
    assert {goal["metric"] for goal in judgement["goals"]} == {
        "float.test.perplexity", "float.test.token_accuracy", "test.perplexity", "test.token_accuracy",
        "parity.folded.max_abs", "parity.onnx.mean_abs", "parity.onnx.top1_agreement",
    }  # fmt: skip
    assert all(goal["passed"] for goal in judgement["goals"])


def test_a_row_that_was_not_measured_and_is_not_required_is_named_and_does_not_fail() -> None:
    judgement = verdict()
    assert judgement["not_measured"] == ["engine"] and judgement["verdict"] == "accept"


def test_a_goal_carries_its_value_and_its_reference() -> None:
    goal = next(goal for goal in verdict()["goals"] if goal["metric"] == "test.perplexity")
    assert goal == {"metric": "test.perplexity", "goal": {"percent-max-degradation": 2.0}, "value": 30.4,
                    "baseline": 30.0, "interval": None, "passed": True}  # fmt: skip


def test_recovery_is_judged_on_the_last_measured_row() -> None:
    engine = row("engine", 33.0, 0.495)
    assert "engine: test.perplexity is 33" in one_reason(verdict(report(engine=engine)))


# Anomalous ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stage", ["float", "trained", "folded", "onnx"])
def test_a_metric_that_is_not_a_number_is_anomalous_in_any_row(stage: str, value: float) -> None:
    broken = report()
    next(row for row in broken["rows"] if row["stage"] == stage)["metrics"]["test.perplexity"] = value
    judgement = verdict(broken)
    assert judgement["verdict"] == "anomalous"
    assert f"{stage}: test.perplexity is {value}" in judgement["reasons"]


def test_a_metric_that_is_not_a_number_in_the_deployed_session_is_anomalous() -> None:
    onnx = row("onnx", 30.4, 0.495)
    onnx["deployed"] = {
        "metrics": {"test.perplexity": math.nan, "test.token_accuracy": 0.5},
        "distance": None,
    }
    judgement = verdict(report(onnx=onnx))
    assert judgement["verdict"] == "anomalous"
    assert one_reason(judgement) == "onnx (deployed): test.perplexity is nan"


@pytest.mark.parametrize("stage", ["trained", "folded", "onnx"])
def test_a_metric_that_float_has_and_a_row_has_not_is_anomalous(stage: str) -> None:
    broken = report()
    del next(row for row in broken["rows"] if row["stage"] == stage)["metrics"]["test.token_accuracy"]
    judgement = verdict(broken, {})
    assert judgement["verdict"] == "anomalous"
    assert one_reason(judgement) == f"{stage}: test.token_accuracy was not measured"


@pytest.mark.parametrize("stage", ["float", "onnx"])
def test_a_goal_on_a_metric_that_is_missing_is_anomalous(stage: str) -> None:
    broken = report()
    for row in broken["rows"]:
        if row["stage"] == stage or stage == "onnx":
            row.get("metrics", {}).pop("test.perplexity", None)
    judgement = verdict(broken, {"recovery": {"test.perplexity": {"threshold": 99}}})
    assert judgement["verdict"] == "anomalous"
    assert "recovery.test.perplexity: not measured in both float and onnx" in judgement["reasons"]


def test_a_required_row_that_is_missing_or_deferred_is_anomalous() -> None:
    deferred = {"stage": "onnx", "status": "deferred", "reason": "needs an RTX"}
    for parity, why in (
        (report(onnx=None), "it is missing from the report"),
        (report(onnx=deferred), "needs an RTX"),
    ):
        judgement = verdict(parity)
        assert judgement["verdict"] == "anomalous"
        assert one_reason(judgement) == f"required row onnx was not measured: {why}"


def test_a_report_without_a_measured_row_is_anomalous_even_if_nothing_is_required() -> None:
    nothing = {"rows": [{"stage": "float", "status": "not-run", "reason": "gone"}]}
    for empty in (nothing, {"rows": []}):
        judgement = verdict(empty, {}, [])
        assert judgement["verdict"] == "anomalous" and one_reason(judgement) == "no row was measured"


@pytest.mark.parametrize(("metric", "worse"), [("test.perplexity", 31.0001), ("test.token_accuracy", 0.3999)])
def test_a_float_model_below_its_floor_is_no_reference(metric: str, worse: float) -> None:
    goals = {"float_floor": GOALS["float_floor"]}
    at = report(float=row("float", 31.0, 0.4), trained=row("trained"))
    assert verdict(at, goals)["verdict"] == "accept"
    below = copy.deepcopy(at)
    below["rows"][0]["metrics"][metric] = worse
    judgement = verdict(below, goals)
    assert judgement["verdict"] == "anomalous" and not passed(judgement, f"float.{metric}")
    assert one_reason(judgement) == f"float: {metric} is {worse:.6g}, its floor is " + (
        "31: no reference" if worse > 1 else "0.4: no reference"
    )


def test_a_floor_on_a_metric_that_was_not_measured_or_is_nan_is_anomalous() -> None:
    assert not passed(verdict(report(float=None), require=[]), "float.test.perplexity")
    judgement = verdict(report(float=row("float", math.nan)))
    assert not passed(judgement, "float.test.perplexity") and judgement["verdict"] == "anomalous"


@pytest.mark.parametrize(("perplexity", "accuracy"), [(10.0, 0.5), (30.0, 0.99)])
def test_a_gain_too_large_to_be_true_is_anomalous(perplexity: float, accuracy: float) -> None:
    judgement = verdict(report(onnx=row("onnx", perplexity, accuracy)))
    assert judgement["verdict"] == "anomalous" and "too good" in one_reason(judgement)


def test_a_gain_that_a_regularized_model_may_have_is_accepted() -> None:
    # 30 -> 16: (30 - 16) / (30 - 1) = 0.48 of the way to a perfect model; 0.5 -> 0.74: 0.48
    assert verdict(report(onnx=row("onnx", 16.0, 0.74)))["verdict"] == "accept"


def test_recovery_goals_with_only_the_float_row_are_anomalous() -> None:
    only = {"rows": [row("float")]}
    judgement = verdict(only, require=["float"])
    assert judgement["verdict"] == "anomalous" and "no row after float" in one_reason(judgement)
    assert verdict(only, {}, ["float"])["verdict"] == "accept"


def test_limits_on_a_row_that_was_not_measured_are_anomalous() -> None:
    judgement = verdict(goals={"parity": {"engine": {"mean_abs": 0.1}}})
    assert judgement["verdict"] == "anomalous"
    assert one_reason(judgement) == "parity.engine has limits, and the row was not measured"


def test_limits_on_a_row_without_a_row_before_it_are_anomalous() -> None:
    first = row("trained")
    first["distance"] = None
    parity = report(float=None, trained=first)
    assert verdict(parity, {}, [])["verdict"] == "accept"
    judgement = verdict(parity, {"parity": {"trained": {"mean_abs": 0.1}}}, [])
    assert judgement["verdict"] == "anomalous"
    assert "trained: mean_abs to None is not a number" in judgement["reasons"]


def test_the_first_measured_row_has_nothing_to_be_compared_with() -> None:
    first = row("folded", 30.4, 0.495)
    first["distance"] = None
    assert verdict(report(float=None, trained=None, folded=first), {}, [])["verdict"] == "accept"


@pytest.mark.parametrize("field", ["max_abs", "mean_abs", "top1_agreement"])
@pytest.mark.parametrize("value", [math.nan, "missing"])
def test_a_distance_that_is_not_a_number_is_anomalous(field: str, value: float | str) -> None:
    onnx = row("onnx", 30.4, 0.495)
    onnx["distance"].pop(field)
    if value != "missing":
        onnx["distance"][field] = value
    judgement = verdict(
        report(onnx=onnx), {"parity": {"onnx": {field: 1.0 if field != "top1_agreement" else 0.0}}}
    )
    assert judgement["verdict"] == "anomalous"
    assert not passed(judgement, f"parity.onnx.{field}")


@pytest.mark.parametrize("field", ["max_abs", "mean_abs", "top1_agreement"])
def test_two_models_whose_logits_are_all_equal_prove_nothing(field: str) -> None:
    """Everything zero: no difference, no range, and every position agrees."""
    dead = report(onnx=row("onnx", 30.4, 0.495, range=0.0))
    limit = 1.0 if field == "top1_agreement" else 0.0
    judgement = verdict(dead, {"parity": {"onnx": {field: limit}}})
    assert judgement["verdict"] == "anomalous"
    assert "onnx: all logits of folded are equal" in judgement["reasons"]


def test_a_range_that_is_not_a_number_is_anomalous() -> None:
    for value in (math.nan, -1.0):
        judgement = verdict(report(onnx=row("onnx", 30.4, 0.495, range=value)))
        assert judgement["verdict"] == "anomalous" and not passed(judgement, "parity.onnx.mean_abs")


# Regression: recovery -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "goal", "at", "over"),
    [
        ("test.perplexity", {"threshold": 32}, 32.0, 32.0001),
        ("test.perplexity", {"max-degradation": 1.5}, 31.5, 31.5001),
        ("test.perplexity", {"percent-max-degradation": 10}, 33.0, 33.0001),
        ("test.perplexity", {"max-degradation": 0}, 30.0, 30.0001),
        ("test.perplexity", {"min-recovery": 0.8}, 37.5, 37.5001),
        ("test.token_accuracy", {"threshold": 0.4}, 0.4, 0.3999),
        ("test.token_accuracy", {"max-degradation": 0.25}, 0.25, 0.2499),
        ("test.token_accuracy", {"percent-max-degradation": 50}, 0.25, 0.2499),
        ("test.token_accuracy", {"max-degradation": 0}, 0.5, 0.4999),
        ("test.token_accuracy", {"min-recovery": 0.5}, 0.25, 0.2499),
    ],
)
def test_a_recovery_goal_holds_at_its_limit_and_breaks_just_beyond(
    metric: str, goal: dict[str, float], at: float, over: float
) -> None:
    for value, expected in ((at, "accept"), (over, "regression")):
        onnx = row("onnx")
        onnx["metrics"][metric] = value
        judgement = verdict(report(onnx=onnx), {"recovery": {metric: goal}})
        assert judgement["verdict"] == expected and passed(judgement, metric) is (expected == "accept")
    name = next(iter(goal))
    assert one_reason(judgement).startswith(f"onnx: {metric} is {over:.6g}, the limit is {at:.6g} ({name}")


def test_recovery_is_against_float_and_not_against_the_trained_model() -> None:
    """A pipeline that keeps a broken model as it is has perfect parity."""
    bad = {stage: row(stage, 90.0, 0.2) for stage in ("trained", "folded", "onnx")}
    judgement = verdict(report(**bad), {"recovery": {"test.perplexity": {"percent-max-degradation": 2}}})
    assert judgement["verdict"] == "regression"


# Regression: parity -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "at", "over"),
    [("max_abs", 5.0, 5.001), ("mean_abs", 5.0, 5.001), ("top1_agreement", 0.9, 0.8999)],
)
def test_a_parity_limit_holds_at_its_limit_and_breaks_just_beyond(field: str, at: float, over: float) -> None:
    limit = 0.9 if field == "top1_agreement" else 0.1  # a fraction of the range, which is 50
    for value, expected in ((at, "accept"), (over, "regression")):
        parity = report(onnx=row("onnx", 30.4, 0.495, **{field: value}))
        judgement = verdict(parity, {"parity": {"onnx": {field: limit}}})
        assert judgement["verdict"] == expected
        assert passed(judgement, f"parity.onnx.{field}") is (expected == "accept")
    assert one_reason(judgement).startswith(f"onnx: {field} to folded is")


@pytest.mark.parametrize(
    ("stage", "far"),
    [
        ("folded", {"max_abs": 1e-6}),
        ("onnx", {"mean_abs": 0.0101}),
        ("onnx", {"top1_agreement": 0.9979}),
        ("engine", {"mean_abs": 0.101}),
        ("engine", {"top1_agreement": 0.9899}),
    ],
)
def test_the_default_limits_of_fp32_are_those_of_the_design(stage: str, far: dict[str, float]) -> None:
    judgement = verdict(report(**{stage: row(stage, 30.4, 0.495, **far)}))
    assert judgement["verdict"] == "regression"
    assert one_reason(judgement).startswith(f"{stage}: {next(iter(far))} to ")


def test_fp16_is_allowed_more_and_bf16_has_no_limit_on_onnx() -> None:
    far = report(onnx=row("onnx", 30.4, 0.495, mean_abs=0.09, top1_agreement=0.991))
    assert verdict(far, compute="fp32")["verdict"] == "regression"
    assert verdict(far, compute="fp16")["verdict"] == "accept"
    worse = report(onnx=row("onnx", 30.4, 0.495, mean_abs=0.2, top1_agreement=0.5))
    assert verdict(worse, compute="fp16")["verdict"] == "regression"
    assert verdict(worse, compute="bf16")["verdict"] == "accept"
    assert set(PARITY) == {"fp32", "fp16", "bf16"}
    assert all(limits["folded"].max_abs == 0.0 for limits in PARITY.values())


@pytest.mark.parametrize("compute", ["fp32", "fp16", "bf16"])
def test_folding_that_changes_a_logit_is_a_regression_in_every_type(compute: str) -> None:
    parity = report(folded=row("folded", 30.4, 0.495, max_abs=1e-30))
    assert verdict(parity, compute=compute)["verdict"] == "regression"


def test_a_recipes_limits_replace_the_defaults_of_that_row_alone() -> None:
    far = row("onnx", 30.4, 0.495, mean_abs=0.4, top1_agreement=0.5)
    assert verdict(report(onnx=far), {"parity": {"onnx": {"mean_abs": 0.01}}})["verdict"] == "accept"
    flipped = row("folded", 30.4, 0.495, max_abs=0.1)
    judgement = verdict(report(onnx=far, folded=flipped), {"parity": {"onnx": {"mean_abs": 0.01}}})
    assert one_reason(judgement).startswith("folded: max_abs")


def test_the_distance_of_the_trained_row_has_no_default_limit() -> None:
    far = row("trained", 30.4, 0.495, max_abs=49.0, mean_abs=20.0, top1_agreement=0.1)
    assert verdict(report(trained=far))["verdict"] == "accept"
    judgement = verdict(report(trained=far), {"parity": {"trained": {"mean_abs": 0.1}}})
    assert judgement["verdict"] == "regression"


# Verdicts -----------------------------------------------------------------------------------------


def test_anomalous_outranks_regression_and_both_reasons_are_given() -> None:
    parity = report(trained=row("trained", math.nan, 0.495), onnx=row("onnx", 40.0, 0.495))
    judgement = verdict(parity)
    assert judgement["verdict"] == "anomalous"
    assert [text.split(":")[0] for text in judgement["reasons"]] == ["trained", "onnx"]


def test_every_verdict_has_its_exit_code() -> None:
    assert EXIT_CODES == {"accept": 0, "unjudged": 0, "regression": 3, "anomalous": 4, "inconclusive": 3}
    assert [exit_code(name) for name in EXIT_CODES] == [0, 0, 3, 4, 3]
    assert [exit_code(name, "pass") for name in EXIT_CODES] == [0, 0, 3, 4, 0]
    with pytest.raises(QcompressError, match="unknown verdict 'splendid'"):
        exit_code("splendid")


def test_the_stage_reads_parity_json_and_writes_verdict_json(tmp_path) -> None:
    write_json(tmp_path / "parity.json", report(onnx=row("onnx", 30.4, 0.495, mean_abs=math.nan)))
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"family": "gpt2", "source": "model"},
            "task": "causal-lm",
            "data": {"evaluate": {"test": {"text": ["test.txt"]}}},
            "gate": GOALS,
        }
    )
    gate(tmp_path / "parity.json", recipe, tmp_path)
    assert read_json(tmp_path / "verdict.json")["verdict"] == "anomalous"


# Tasks other than language models -----------------------------------------------------------------


def scored(stage: str, metrics: dict[str, float], **distance: Any) -> dict[str, Any]:
    """A row with these metrics of the set `dev`."""
    return {**row(stage, **distance), "metrics": {f"dev.{name}": value for name, value in metrics.items()}}


GAINS = {
    "accuracy": (0.6, 0.85),
    "mcc": (-0.1, 0.5),
    "f1": (0.0, 0.55),
    "spearman": (0.5, 0.8),
    "pearson": (0.5, 0.8),
    "span_f1": (0.2, 0.7),
}
"""A float value and one that is too good to be true beside it, by metric: all end at 1."""


@pytest.mark.parametrize("metric", GAINS)
def test_a_gain_too_large_to_be_true_is_found_in_every_metric_that_ends_at_1(metric: str) -> None:
    base, value = GAINS[metric]
    judgement = verdict(
        {"rows": [scored("float", {metric: base}), scored("trained", {metric: value})]}, {}, []
    )
    assert judgement["verdict"] == "anomalous" and one_reason(judgement).endswith("too good")
    smaller = base + 0.4 * (1 - base)
    rows = [scored("float", {metric: base}), scored("trained", {metric: smaller})]
    assert verdict({"rows": rows}, {}, [])["verdict"] == "accept"


@pytest.mark.parametrize(("metric", "best"), [("cross_entropy", 0.0), ("perplexity", 1.0)])
def test_a_gain_is_a_share_of_the_way_to_the_best_value(metric: str, best: float) -> None:
    for left, expected in ((0.9, "accept"), (0.4, "anomalous")):
        rows = [scored("float", {metric: best + 0.5}), scored("trained", {metric: best + 0.5 * left})]
        assert verdict({"rows": rows}, {}, [])["verdict"] == expected


@pytest.mark.parametrize("metric", GAINS)
def test_a_run_that_trains_the_float_model_may_gain_anything(metric: str) -> None:
    base, value = GAINS[metric]
    rows = [scored("float", {metric: base}), scored("trained", {metric: value})]
    judgement = judge({"rows": rows}, Gate(), [], "fp32", float_trains=True)
    assert judgement["verdict"] == "accept" and judgement["reasons"] == []


def test_the_stage_gate_knows_a_float_run_by_its_format(tmp_path: Path, line: Callable[..., Any]) -> None:
    rows = [scored("float", {"mcc": 0.0}), scored("trained", {"mcc": 0.6})]
    write_json(tmp_path / "parity.json", {"rows": rows})
    for options, expected in (({"method": "float", "format": "float"}, "accept"), ({}, "anomalous")):
        recipe = line(**options, verify={"require": []}).recipe
        gate(tmp_path / "parity.json", recipe, tmp_path)
        assert read_json(tmp_path / "verdict.json")["verdict"] == expected


def test_agreement_of_the_float_row_with_itself_is_no_baseline_for_a_gain() -> None:
    rows = [scored("float", {"agreement": 1.0}), scored("trained", {"agreement": 0.97})]
    goals = {"recovery": {"dev.agreement": {"max-degradation": 0.05}}}
    assert verdict({"rows": rows}, goals, [])["verdict"] == "accept"
    goals = {"recovery": {"dev.agreement": {"max-degradation": 0.02}}}
    assert verdict({"rows": rows}, goals, [])["verdict"] == "regression"


def test_a_regression_has_no_top_1_agreement_and_the_gate_asks_for_none() -> None:
    rows = [scored("float", {"spearman": 0.8}), scored("onnx", {"spearman": 0.8}, top1_agreement=None)]
    judgement = verdict({"rows": rows}, {}, [])
    assert judgement["verdict"] == "accept"
    assert [goal["metric"] for goal in judgement["goals"]] == ["parity.onnx.mean_abs"]
    missing = scored("onnx", {"spearman": 0.8})
    del missing["distance"]["top1_agreement"]
    assert verdict({"rows": [rows[0], missing]}, {}, [])["verdict"] == "anomalous"


def test_the_defaults_of_parity_are_about_the_row_before() -> None:
    """Float and onnx differ by what compression did; folded and onnx must not."""
    far = {"max_abs": 1.0, "mean_abs": 1.0, "range": 1.0, "top1_agreement": 0.1}
    metrics = {"test.perplexity": 30.0}
    rows = [
        {"stage": stage, "status": "measured", "reason": None, "metrics": metrics, "distance": distance}
        for stage, distance in (("float", None), ("onnx", {**far, "to": "folded"}))
    ]
    assert judge({"rows": rows}, Gate(), ["float"], "fp32")["verdict"] == "regression"
    rows[1]["distance"]["to"] = "float"
    assert judge({"rows": rows}, Gate(), ["float"], "fp32")["verdict"] == "accept"


def with_flips(flipped: int, codes: int = 10**6, **distance: Any) -> dict[str, Any]:
    folded = row("folded", 30.4, 0.495, **distance)
    return {**folded, "flipped": {"codes": codes, "flipped": flipped, "samples": 10}}


@pytest.mark.parametrize(("flipped", "accepted"), [(0, True), (100, True), (101, False)])
def test_folding_batch_norms_may_flip_one_code_in_ten_thousand(flipped: int, accepted: bool) -> None:
    judgement = verdict(report(folded=with_flips(flipped, max_abs=2.0, mean_abs=0.05, top1_agreement=0.99)))
    assert judgement["verdict"] == ("accept" if accepted else "regression")
    assert passed(judgement, "parity.folded.flipped") is accepted


def test_where_batch_norms_are_folded_a_logit_may_move_but_not_far() -> None:
    for distance in ({"mean_abs": 0.2}, {"top1_agreement": 0.98}):
        judgement = verdict(report(folded=with_flips(1, max_abs=2.0, **distance)))
        assert one_reason(judgement).startswith(f"folded: {next(iter(distance))}")
        behind = row("onnx", 30.4, 0.495, **distance)
        assert one_reason(verdict(report(folded=with_flips(1), onnx=behind))).startswith("onnx")


def test_where_no_activation_is_rounded_nothing_can_flip_and_the_distance_is_judged() -> None:
    assert verdict(report(folded=with_flips(0, 0)))["verdict"] == "accept"
    assert verdict(report(folded=with_flips(0, 0, mean_abs=0.5)))["verdict"] == "regression"


# From the graph's own codes -----------------------------------------------------------------------


def held(unexplained: int = 0, **distance: Any) -> dict[str, Any]:
    """Addition of `verify.held` to the onnx row; by default of a graph without a defect."""
    far = {"to": "folded", "max_abs": 1e-5, "mean_abs": 1e-6, "range": 50.0, "top1_agreement": 1.0}
    where = "h.1.mlp" if unexplained else None
    return {"samples": 4, "codes": 1000, "differ": 3, "unexplained": unexplained, "first_unexplained": where,
            "largest_share": 1e-4, "at": "h.0.mlp", "distance": {**far, **distance}}  # fmt: skip


def flipped(**found: Any) -> dict[str, Any]:
    """An onnx row that is as far from the folded one as flips at ties take it."""
    return {**row("onnx", 30.4, 0.495, mean_abs=0.5, top1_agreement=0.95), **found}


def test_flips_at_ties_alone_are_no_regression() -> None:
    assert verdict(report(onnx=flipped()))["verdict"] == "regression"
    judgement = verdict(report(onnx=flipped(held=held())))
    assert judgement["verdict"] == "accept"
    judged = {goal["metric"] for goal in judgement["goals"] if goal["metric"].startswith("parity.onnx")}
    assert judged == {
        f"parity.onnx.held.{name}" for name in ("unexplained", "ties", "mean_abs", "top1_agreement")
    }


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (held(2), "onnx.held: 2 of 1000 codes differ by more than a tie of rounding, first at h.1.mlp"),
        (held(mean_abs=0.02), "onnx.held: mean_abs to folded is 0.0004, the limit is 0.0002"),
        (held(top1_agreement=0.99), "onnx.held: top1_agreement to folded is 0.99, the limit is 0.998"),
    ],
)
def test_a_defect_is_a_regression_however_near_the_row_is(broken: dict[str, Any], said: str) -> None:
    near = {**row("onnx", 30.4, 0.495), "held": broken}
    judgement = verdict(report(onnx=near))
    assert judgement["verdict"] == "regression" and one_reason(judgement) == said


def test_the_recipes_own_limits_are_about_the_graph_as_it_runs() -> None:
    goals = {**GOALS, "parity": {"onnx": {"mean_abs": 0.001}}}
    judgement = verdict(report(onnx=flipped(held=held())), goals)
    assert judgement["verdict"] == "regression"
    assert one_reason(judgement) == "onnx: mean_abs to folded is 0.01, the limit is 0.001"
    wide = {**GOALS, "parity": {"onnx": {"mean_abs": 0.1}}}
    assert verdict(report(onnx=flipped(held=held())), wide)["verdict"] == "accept"
    assert verdict(report(onnx=flipped(held=held(1))), wide)["verdict"] == "regression"
    assert verdict(report(onnx=flipped(held=held(mean_abs=1.0))), wide)["verdict"] == "accept"


@pytest.mark.parametrize(("compute", "limit"), [("fp32", 1e-3), ("fp16", 0.03)])
def test_more_ties_than_chance_makes_are_a_regression(compute: str, limit: float) -> None:
    """An error of a part of a step flips only codes that a wide enough limit takes for ties."""
    for share, expected in ((limit, "accept"), (1.1 * limit, "regression"), (math.nan, "regression")):
        judgement = verdict(report(onnx=flipped(held={**held(), "largest_share": share})), compute=compute)
        assert judgement["verdict"] == expected
    assert one_reason(
        verdict(report(onnx=flipped(held={**held(), "largest_share": 0.5})), compute=compute)
    ) == (f"onnx.held: 50 % of the codes at h.0.mlp differ on ties, more than {100 * limit:g} %")


def test_an_engine_is_not_judged_by_how_flips_take_it_away() -> None:
    """A recipe has one verdict with a GPU and without; limits that it writes count."""
    engine = row("engine", 30.4, 0.495, mean_abs=0.5, top1_agreement=0.95)
    assert verdict(report(engine=engine))["verdict"] == "regression"
    assert verdict(report(onnx=flipped(held=held()), engine=engine))["verdict"] == "accept"
    goals = {**GOALS, "parity": {"engine": {"mean_abs": 0.001}}}
    assert verdict(report(onnx=flipped(held=held()), engine=engine), goals)["verdict"] == "regression"


def test_limits_that_say_nothing_ask_for_no_row() -> None:
    assert verdict(goals={**GOALS, "parity": {"engine": {}}})["verdict"] == "accept"
    assert verdict(goals={**GOALS, "parity": {"engine": {"max_abs": 1.0}}})["verdict"] == "anomalous"


@pytest.mark.parametrize("where", ["row", "held"])
def test_logits_that_are_not_finite_are_anomalous_whatever_is_judged(where: str) -> None:
    nan = {"max_abs": math.nan, "mean_abs": math.nan, "range": math.nan, "top1_agreement": math.nan}
    onnx = (
        flipped(held=held(**nan)) if where == "held" else {**row("onnx", 30.4, 0.495, **nan), "held": held()}
    )
    assert verdict(report(onnx=onnx))["verdict"] == "anomalous"


# From the trained model's codes -----------------------------------------------------------------


def amplified(**found: Any) -> dict[str, Any]:
    """A folded row that is as far from the trained one as flips take it in a deep net."""
    far = {"max_abs": 2.0, "mean_abs": 0.5, "top1_agreement": 0.95}
    return {**with_flips(1, **far), **found}


def from_trained(unexplained: int = 0, **distance: Any) -> dict[str, Any]:
    """`held` of the folded row."""
    return held(unexplained, to="trained", **distance)


def test_flips_that_a_deep_net_amplifies_are_no_regression() -> None:
    assert verdict(report(folded=amplified()))["verdict"] == "regression"
    judgement = verdict(report(folded=amplified(held=from_trained())))
    assert judgement["verdict"] == "accept"
    judged = {goal["metric"] for goal in judgement["goals"] if goal["metric"].startswith("parity.folded")}
    names = ("held.unexplained", "held.ties", "held.mean_abs", "held.top1_agreement", "flipped")
    assert judged == {f"parity.folded.{name}" for name in names}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (from_trained(2), "2 of 1000 codes differ by more than a tie of rounding, first at h.1.mlp"),
        (from_trained(mean_abs=0.02), "mean_abs to trained is 0.0004, the limit is 0.0002"),
        (from_trained(top1_agreement=0.99), "top1_agreement to trained is 0.99, the limit is 0.998"),
        ({**from_trained(), "largest_share": 0.5},
         "50 % of the codes at h.0.mlp differ on ties, more than 0.1 %"),
    ],
)  # fmt: skip
def test_a_defect_of_the_fold_is_found_however_near_the_row_is(broken: dict[str, Any], said: str) -> None:
    judgement = verdict(report(folded={**with_flips(1), "held": broken}))
    assert judgement["verdict"] == "regression" and one_reason(judgement) == f"folded.held: {said}"


def test_raised_scales_move_codes_by_more_than_a_tie() -> None:
    """Their share and the distance are judged; the same codes without raised scales are a defect."""
    moved = {**from_trained(5), "largest_share": 0.5}
    assert verdict(report(folded=amplified(held=moved, raised=3)))["verdict"] == "accept"
    assert verdict(report(folded=amplified(held=moved)))["verdict"] == "regression"
    far = amplified(held={**moved, **from_trained(5, mean_abs=0.02)}, raised=3)
    assert one_reason(verdict(report(folded=far))).startswith("folded.held: mean_abs")


def test_the_recipes_own_limits_are_about_the_folded_model_as_it_runs() -> None:
    goals = {**GOALS, "parity": {"folded": {"mean_abs": 0.001}}}
    judgement = verdict(report(folded=amplified(held=from_trained())), goals)
    assert one_reason(judgement) == "folded: mean_abs to trained is 0.01, the limit is 0.001"
