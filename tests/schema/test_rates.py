"""Learning rates by update, and the movement of learned scales that they allow."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from tiny import Line, make_recipe

from qcompress.models.architecture import Architecture
from qcompress.quant.quantizers import LsqActivation, LsqWeight
from qcompress.recipe.check import Report
from qcompress.recipe.load import Resolved
from qcompress.recipe.scale_reach import SMALL_REACH, scale_reach
from qcompress.report.check_table import check_json, print_check
from qcompress.schema.rates import rate_factor
from qcompress.schema.recipe import Recipe, Train
from qcompress.system.reporter import Reporter

TEXT = Path("text.txt")


def recipe(**sections) -> Recipe:
    return make_recipe(TEXT, **{"method": "lsq", **sections})


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("linear", [1 / 2, 2 / 2, 4 / 4, 3 / 4, 2 / 4, 1 / 4]),
        ("constant", [1 / 2, 1, 1, 1, 1, 1]),
        ("cosine", [1 / 2, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_rate_rises_and_falls_as_worked_by_hand(decay: str, expected: list[float]) -> None:
    train = Train(warmup=0.34, decay=decay)
    assert [rate_factor(train, step, 6) for step in range(6)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("sections", "percent"),
    [
        # 24 updates of warm-up sum to 12.5, 216 of linear decay to 108.5, times 1e-3
        ({"train": {"phases": {"finetune": {"steps": 240}}}}, 12.1),
        ({"train": {"phases": {"finetune": {"steps": 240}}, "lr": {"scale": 1e-2}}}, 121.0),
        ({"train": {"phases": {"finetune": {"steps": 240, "lr": {"scale": 2e-3}}}}}, 24.2),
        ({"train": {"phases": {"finetune": {"steps": 100}}, "decay": "constant", "warmup": 0.0}}, 10.0),
        ({"method": "quadapter", "train": {"phases": {"calibrate": {"steps": 50}, "finetune": {"steps": 100}},
          "decay": "constant", "warmup": 0.0}}, 15.0),
        ({"quantizer": {"weights": "minmax"}, "train": {"phases": {"finetune": {"steps": 240}}}}, 12.1),
    ],
    ids=["default rate", "large rate", "rate of a phase", "constant", "two phases", "activations alone"],
)  # fmt: skip
def test_the_reach_of_a_scale_is_the_sum_of_its_rates(sections: dict, percent: float) -> None:
    reach = scale_reach(recipe(**sections))
    assert reach is not None and 100 * reach.share == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize(
    ("alternate", "steps", "updates", "percent"),
    [
        # the rate of a constant schedule is 1e-3 at each update
        ("batch", 100, 100, 10.0),
        ("fused", 100, 100, 10.0),
        ("iteration", 100, 50, 5.0),
        ("iteration", 101, 50, 5.0),
        ("iteration", 2, 1, 0.1),
    ],
)
def test_squat_by_iteration_moves_scales_at_each_second_update(
    alternate: str, steps: int, updates: int, percent: float
) -> None:
    train = {"phases": {"finetune": {"steps": steps}}, "decay": "constant", "warmup": 0.0}
    reach = scale_reach(recipe(method="squat", stepper={"alternate": alternate}, train=train))
    assert reach is not None and reach.updates == updates and 100 * reach.share == pytest.approx(percent)
    only_weights = {"phases": {"finetune": {"steps": 1}}}
    assert scale_reach(recipe(method="squat", stepper={"alternate": "iteration"}, train=only_weights)) is None


def test_the_reach_of_squat_counts_the_rates_of_its_own_updates() -> None:
    """Steps 1, 3 and 5 of a linear decay over 6 updates, without warm-up: (5 + 3 + 1) / 6 of 1e-3."""
    train = {"phases": {"finetune": {"steps": 6}}, "warmup": 0.0}
    reach = scale_reach(recipe(method="squat", stepper={"alternate": "iteration"}, train=train))
    assert reach is not None and reach.share == pytest.approx(1.5e-3)


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"optimizer": "sgd", "phases": {"finetune": {"steps": 240}}}},
        {"method": "ptq"},
        {"method": "lsq", "quantizer": "minmax"},
        {"method": "float", "format": "float"},
        {"train": {"phases": {"finetune": {"steps": 0}}}},
    ],
    ids=["sgd", "ptq", "minmax", "float", "no steps"],
)
def test_there_is_no_reach_where_no_scale_learns_or_the_gradient_decides(sections: dict) -> None:
    assert scale_reach(recipe(**sections)) is None


@pytest.mark.parametrize(("rate", "shown"), [(1e-3, True), (2.4e-3, True), (2.5e-3, False)])
def test_check_tells_a_reach_below_30_percent(rate: float, shown: bool) -> None:
    made = recipe(train={"phases": {"finetune": {"steps": 240}}, "lr": {"scale": rate}})
    assert (scale_reach(made).share < SMALL_REACH) == shown
    resolved = Resolved(made, TEXT, Path(), {})
    report = Report(Architecture("gpt2", (), (), (), context=8, vocabulary=8, parameters=0), (), {})
    console = Console(width=200, record=True, file=io.StringIO())
    print_check(console, resolved, report, [])
    note = f"learned scales can move by about {12100 * rate:.2g} % at most: 240 AdamW updates"
    assert (note in console.export_text()) == shown
    assert check_json(resolved, report, [])["scale_reach"] == pytest.approx(121 * rate, abs=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_stores_scales_as_its_optimizer_wants_them_and_tells_how_far_they_moved(
    line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], optimizer: str
) -> None:
    starts: list[tuple[bool, bool]] = []

    def spy(kind: type) -> None:
        init = kind.init

        def watched(self, seen) -> None:
            init(self, seen)
            starts.append((bool((self.unit == 1).all()), bool((self.ratio.detach() == self.start).all())))

        monkeypatch.setattr(kind, "init", watched)

    spy(LsqWeight)
    spy(LsqActivation)
    made: Line = line(method="lsq", steps=4, train={"optimizer": optimizer, "lr": {"scale": 1e-2}})
    made.train(Reporter())
    assert len(starts) == 17 and set(starts) == {(optimizer == "sgd",) * 2}
    said = capsys.readouterr().err
    assert "learned scales moved: " in said and " activation scales by " in said


def test_lsq_and_saq_clip_no_gradient_unless_asked() -> None:
    """Neither paper clips; BertAdam of the text methods does."""
    assert recipe(method="lsq").stepper.clip_norm is None
    assert recipe(method="saq").stepper.clip_norm is None
    assert recipe(method="lsq", stepper="plain").stepper.clip_norm is None
    assert recipe(method="lsq", stepper={"clip_norm": 1.0}).stepper.clip_norm == 1.0
    assert recipe(method="saq", stepper={"rho": 0.1}).stepper.clip_norm is None
    assert recipe(method="distillation").stepper.clip_norm == 1.0
    assert recipe(method="lsq", stepper="squat").stepper.clip_norm == 1.0
