"""The row that ships: where ONNX Runtime serves the target, its default session is judged as others are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_gate import GOALS, REQUIRE, report, row

from qcompress.pipeline.stages.gate import gate
from qcompress.schema.goals import Gate
from qcompress.schema.recipe import Recipe
from qcompress.system.artifacts import read_json, write_json
from qcompress.verdict.judge import judge


def onnx_row(
    perplexity: float = 30.4, to: str = "folded-integer", mean: float = 0.0, **distance: Any
) -> dict:
    """An exact onnx row with a deployed one beside it; `mean` and the rest are the deployed row's."""
    made = row("onnx", 30.4, 0.495, top1_agreement=1.0)
    beside = row("engine", perplexity, 0.495, mean_abs=mean * 50, **distance)
    made["deployed"] = {"metrics": beside["metrics"], "distance": {**beside["distance"], "to": to}}
    return made


def verdict(onnx: dict, goals: dict | None = None, *, served: bool = True) -> dict[str, Any]:
    gates = Gate.model_validate(GOALS if goals is None else goals)
    return judge(report(onnx=onnx), gates, REQUIRE, "fp32", served=served)


def test_a_good_deployed_row_is_accepted_with_its_goals_listed() -> None:
    judgement = verdict(onnx_row())
    assert judgement["verdict"] == "accept"
    assert judgement["deployed"]["judged"] and judgement["deployed"]["passed"]
    names = [goal["metric"] for goal in judgement["deployed"]["goals"]]
    assert names == [
        "deployed.test.perplexity", "deployed.test.token_accuracy", "parity.deployed.mean_abs",
        "parity.deployed.top1_agreement",
    ]  # fmt: skip
    assert all(goal in judgement["goals"] for goal in judgement["deployed"]["goals"])


SATURATED = {"mean": 0.23, "top1_agreement": 0.5}


@pytest.mark.parametrize(
    ("onnx", "said"),
    [
        (onnx_row(40.0), "deployed: test.perplexity is 40, the limit is 30.6"),
        (onnx_row(**SATURATED), "deployed: mean_abs to folded-integer is 0.23, the limit is 0.01"),
        (onnx_row(top1_agreement=0.97), "deployed: top1_agreement to folded-integer is 0.97"),
        (onnx_row(to="folded", mean=0.03), "deployed: mean_abs to folded is 0.03, the limit is 0.02"),
    ],
    ids=["recovery", "saturated", "agreement", "float inputs"],
)
def test_a_bad_deployed_row_is_a_regression_where_it_ships(onnx: dict, said: str) -> None:
    judgement = verdict(onnx)
    assert judgement["verdict"] == "regression" and any(said in reason for reason in judgement["reasons"])
    elsewhere = verdict(onnx, served=False)
    assert elsewhere["verdict"] == "accept" and not elsewhere["deployed"]["judged"]
    assert not elsewhere["deployed"]["passed"] and elsewhere["deployed"]["reasons"] == judgement["reasons"]


def test_rounded_activations_of_a_weights_only_format_are_within_its_limits() -> None:
    assert verdict(onnx_row(to="folded", mean=4.1e-3, top1_agreement=0.919))["verdict"] == "accept"


def test_flips_that_move_the_onnx_row_may_move_the_deployed_one() -> None:
    flipping = onnx_row(mean=0.03, top1_agreement=0.9)
    assert verdict(flipping)["verdict"] == "regression"
    flipping["distance"] |= {"mean_abs": 0.01 * 50, "top1_agreement": 0.97}
    flipping["held"] = {"distance": {**flipping["distance"], "mean_abs": 0.0, "top1_agreement": 1.0},
                        "codes": 100, "unexplained": 0, "first_unexplained": None, "largest_share": 0.0,
                        "at": None}  # fmt: skip
    assert verdict(flipping)["verdict"] == "accept"
    flipping["deployed"]["distance"]["mean_abs"] = 0.05 * 50
    assert verdict(flipping)["verdict"] == "regression"


def test_no_flip_excuses_a_deployed_row_that_is_somewhere_else() -> None:
    """An onnx row far from folded, which its own codes excuse, used to loosen the limits to 0.6 and 0.04."""
    far = onnx_row(mean=0.55, top1_agreement=0.1)
    far["distance"] |= {"mean_abs": 0.15 * 50, "top1_agreement": 0.76}
    far["held"] = {"distance": {**far["distance"], "mean_abs": 0.0, "top1_agreement": 1.0},
                   "codes": 100, "unexplained": 0, "first_unexplained": None, "largest_share": 0.0,
                   "at": None}  # fmt: skip
    reasons = " ".join(verdict(far)["reasons"])
    assert "mean_abs to folded-integer is 0.55, the limit is 0.1" in reasons
    assert "top1_agreement to folded-integer is 0.1, the limit is 0.85" in reasons


@pytest.mark.parametrize(
    ("roundings", "mean", "agreement"),
    [
        (["float-inputs"], 4.1e-3, 0.919),
        (["conv-biases"], 4.0e-2, 0.98),
        (["float-inputs", "conv-biases"], 4.0e-2, 0.93),
    ],
    ids=["mixed formats", "convolutions at W4A4", "both"],
)
def test_roundings_of_the_default_session_alone_widen_the_limits(
    roundings: list[str], mean: float, agreement: float
) -> None:
    onnx = onnx_row(mean=mean, top1_agreement=agreement)
    assert verdict(onnx)["verdict"] == "regression"
    onnx["deployed"]["roundings"] = roundings
    assert verdict(onnx)["verdict"] == "accept"
    worse = onnx_row(mean=0.07, top1_agreement=0.85)
    worse["deployed"]["roundings"] = roundings
    assert len(verdict(worse)["reasons"]) == 2


@pytest.mark.parametrize(("mean", "word"), [(0.02, "accept"), (0.24, "regression")])
def test_a_graph_made_elsewhere_is_held_against_itself(mean: float, word: str) -> None:
    onnx = onnx_row(to="onnx", mean=mean, top1_agreement=0.95)
    onnx["distance"] |= {"to": "float", "mean_abs": 0.1 * 50}
    assert verdict(onnx)["verdict"] == word


def test_limits_of_a_deployed_row_without_an_onnx_row_are_anomalous() -> None:
    missing = {"stage": "onnx", "status": "not-run", "reason": "no kernels"}
    goals = Gate.model_validate({"parity": {"deployed": {"mean_abs": 0.1}}})
    require = [name for name in REQUIRE if name != "onnx"]
    judgement = judge(report(onnx=missing), goals, require, "fp32")
    assert judgement["verdict"] == "anomalous" and "deployed row" in " ".join(judgement["reasons"])


def test_limits_of_the_recipe_replace_the_defaults_and_are_judged_for_every_target() -> None:
    goals = {"parity": {"deployed": {"mean_abs": 0.3}}}
    assert verdict(onnx_row(**SATURATED), goals)["verdict"] == "accept"
    strict = {"parity": {"deployed": {"mean_abs": 1e-4}}}
    assert verdict(onnx_row(mean=1e-3), strict, served=False)["verdict"] == "regression"


def test_a_distance_to_the_float_model_is_a_matter_of_recovery() -> None:
    assert verdict(onnx_row(to="float", **SATURATED))["verdict"] == "accept"
    assert verdict(onnx_row(40.0, to="float", **SATURATED))["verdict"] == "regression"


def test_a_deployed_row_that_is_missing_or_not_finite_is_anomalous() -> None:
    onnx = onnx_row()
    del onnx["deployed"]
    judgement = verdict(onnx)
    assert judgement["verdict"] == "anomalous" and judgement["deployed"] is None
    assert "ONNX Runtime's default session, is judged, and it was not measured" in judgement["reasons"][0]
    assert verdict(onnx, served=False)["verdict"] == "accept"
    assert verdict(onnx_row(float("nan")))["verdict"] == "anomalous"


@pytest.mark.parametrize(("target", "word"), [("cpu", "regression"), ("rtx-ada", "accept")])
def test_the_stage_asks_the_target(tmp_path: Path, recipe_for_gate: Recipe, target: str, word: str) -> None:
    write_json(tmp_path / "parity.json", report(onnx=onnx_row(**SATURATED)))
    recipe = recipe_for_gate.model_copy(
        update={"build": recipe_for_gate.build.model_copy(update={"target": target})}
    )
    gate(tmp_path / "parity.json", recipe, tmp_path)
    assert read_json(tmp_path / "verdict.json")["verdict"] == word
    assert ("parity.deployed.mean_abs" in (tmp_path / "junit.xml").read_text()) == (target == "cpu")


@pytest.fixture
def recipe_for_gate() -> Recipe:
    return Recipe.model_validate({
        "name": "deployed",
        "model": {"family": "gpt2", "source": "model"},
        "task": {"name": "causal-lm", "context": 8},
        "data": {"evaluate": {"test": {"text": ["a.txt"]}}},
        "gate": GOALS,
    })  # fmt: skip
