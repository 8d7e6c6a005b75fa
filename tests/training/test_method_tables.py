"""The tables of the five axes, and everything that they say can be combined."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Line, token_ids
from tiny_bert import encoder_line, save_encoder, token_inputs

from qcompress.quant.codebook import CodebookWeight
from qcompress.quant.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, Quantizer
from qcompress.quant.weight_quantizer import CodedWeight
from qcompress.schema.axes import AXES, ILLEGAL, METHODS, PHASES
from qcompress.schema.custom import OF_WEIGHTS, PROTOCOLS
from qcompress.schema.recipe import Train
from qcompress.training.methods import ADAPTERS, OBJECTIVES, SCHEDULES, STEPPERS
from qcompress.training.methods.protocols import Adapter, Objective, Stepper

TABLES = {
    "adapter": ADAPTERS,
    "objective": OBJECTIVES,
    "stepper": STEPPERS,
    "schedule": SCHEDULES,
    "quantizer": {**WEIGHT_QUANTIZERS, **ACTIVATION_QUANTIZERS, "codebook": CodebookWeight},
}
NAMES = {axis: [options.model_fields["name"].default for options in values] for axis, values in AXES.items()}


def is_illegal(choice: dict[str, str]) -> bool:
    return any(all(choice[axis] == name for axis, name in pair.items()) for pair, _ in ILLEGAL)


COMBINATIONS = [dict(zip(NAMES, values, strict=True)) for values in itertools.product(*NAMES.values())]
LEGAL = [
    choice
    for choice in COMBINATIONS
    if not is_illegal(choice) and not (choice["quantizer"] == "codebook" and choice["adapter"] != "none")
]
"""An adapter's scales divide integers' weights, which `check` knows when it has seen the layers."""

BOOK = {"codebook": "gather", "centroids": 16, "block": 8}


def test_every_axis_value_has_the_class_that_does_its_work_and_no_class_is_unreachable() -> None:
    assert set(TABLES) == set(AXES)
    for axis, names in NAMES.items():
        assert set(TABLES[axis]) == set(names), axis


def test_registration_asks_for_the_methods_of_each_protocol_and_every_class_has_them() -> None:
    protocols = {"quantizer": Quantizer, "adapter": Adapter, "objective": Objective, "stepper": Stepper}
    assert PROTOCOLS.keys() == protocols.keys()
    for axis, protocol in protocols.items():
        methods = {name for name in vars(protocol) if name == "__call__" or not name.startswith("_")}
        assert set(PROTOCOLS[axis]) == methods, axis
        for kind in TABLES[axis].values():
            assert all(callable(getattr(kind, name)) for name in methods), kind
    weights = {*WEIGHT_QUANTIZERS.values(), CodebookWeight}
    assert all(issubclass(kind, CodedWeight) for kind in weights)
    assert all(callable(getattr(CodedWeight, name)) for name in OF_WEIGHTS)


def test_every_schedule_makes_the_phases_that_the_table_of_phases_promises(
    line: Callable[..., Line], untied_model: Path
) -> None:
    made = line(untied_model, format={"weights": BOOK, "embeddings": BOOK})
    plan, architecture = made.plan, made.architecture
    assert set(PHASES) == set(NAMES["schedule"])
    for options in AXES["schedule"]:
        name = options.model_fields["name"].default
        phases = SCHEDULES[name](options(), Train()).phases(architecture, plan)
        found = {phase.name: (phase.steps, phase.roles) for phase in phases}
        assert list(found) == list(PHASES[name])
        assert found == {key: (value.steps, value.roles) for key, value in PHASES[name].items()}
        short = Train(phases={key: {"steps": 7} for key in PHASES[name]})
        assert all(phase.steps == 7 for phase in SCHEDULES[name](options(), short).phases(architecture, plan))


def test_every_preset_names_values_that_exist_and_may_be_combined() -> None:
    defaults = {axis: {"schedule": "calibrate"}.get(axis, names[0]) for axis, names in NAMES.items()}
    for method, preset in METHODS.items():
        chosen = {axis: value["name"] if isinstance(value, dict) else value for axis, value in preset.items()}
        assert all(value in NAMES[axis] for axis, value in chosen.items()), method
        assert not is_illegal(defaults | chosen), method


def test_every_refusal_names_values_that_exist_a_reason_and_a_way_out() -> None:
    assert len(ILLEGAL) == 20
    for pair, reason in ILLEGAL:
        assert len(pair) > 1 and all(name in NAMES[axis] for axis, name in pair.items())
        why, colon, fix = reason.partition(": ")
        assert why and colon and fix


def options_of(choice: dict[str, str]) -> dict[str, Any]:
    """A recipe's keys for a choice on every axis, with few steps."""
    phases = {name: {"steps": 2} for name in PHASES[choice["schedule"]]}
    fused = {"objective": {"name": "distillation", "attention": 0.0}}
    own = fused if choice.get("objective") == "distillation" else {}
    form: dict[str, Any] = {"preset": "ternary-a8" if choice["quantizer"] == "ternary" else "w8a8"}
    if choice["quantizer"] == "codebook":
        form |= {"weights": BOOK, "embeddings": BOOK, "layers": {"*_proj": {"weights": "int8"}}}
    elif choice["schedule"] == "staged":
        form |= {"layers": {"*.mlp.*": {"weights": BOOK, "activations": "int8"}}}
    if choice.get("adapter") == "awq":
        form["activations"] = "float"
    return {**choice, **own, "format": form, "train": {"phases": phases}}


@pytest.fixture
def encoder(text_file: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A folder, a checkpoint with query, key and value apart, and its text."""
    return tmp_path / "line", save_encoder(tmp_path / "encoder", text_file, "bert"), text_file


def encoder_with(choice: dict[str, str], folder: Path, source: Path, text: Path) -> None:
    """What looks into attentions needs them apart, which GPT-2's are not."""
    made = encoder_line(folder, source, text, "bert", **options_of(choice)).train().fold()
    inputs = token_inputs("bert", pad="right")
    trained = made.logits("train", inputs)
    assert torch.equal(trained, made.logits("fold", inputs))
    assert trained.isfinite().all() and not torch.equal(trained, made.logits("float", inputs))


def test_there_are_as_many_combinations_as_the_tables_say() -> None:
    assert len(COMBINATIONS) == math.prod(map(len, NAMES.values())) >= 900
    assert len(LEGAL) >= 156


def pairs_of(choice: dict[str, str]) -> set[tuple[tuple[str, str], ...]]:
    """Every pair of axis values in a combination."""
    return set(itertools.combinations(sorted(choice.items()), 2))


def few() -> list[dict[str, str]]:
    """Combinations that hold every legal pair at least once, the richest one first; enough for every run."""
    left, found = set().union(*map(pairs_of, LEGAL)), []
    while left:
        best = max(LEGAL, key=lambda choice: len(pairs_of(choice) & left))
        left -= pairs_of(best)
        found.append(best)
    return found


QUICK = few()


def marked(choice: dict[str, str]) -> Any:
    marks = [] if choice in QUICK else [pytest.mark.slow]
    return pytest.param(choice, marks=marks, id="-".join(choice.values()))


def test_the_quick_combinations_hold_every_legal_pair() -> None:
    assert set().union(*map(pairs_of, QUICK)) == set().union(*map(pairs_of, LEGAL))
    assert 20 <= len(QUICK) <= 60


@pytest.mark.parametrize("choice", [marked(choice) for choice in LEGAL])
def test_every_legal_combination_trains_folds_and_is_the_same_model_afterwards(
    line: Callable[..., Line], encoder: tuple[Path, Path, Path], choice: dict[str, str]
) -> None:
    if choice["objective"] == "teacher-intervention":
        encoder_with(choice, *encoder)
        return
    made = line(**options_of(choice)).train().fold()
    ids = token_ids()
    trained = made.logits("train", ids)
    assert torch.equal(trained, made.logits("fold", ids))
    assert trained.isfinite().all() and not torch.equal(trained, made.logits("float", ids))


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_trains_and_folds(
    line: Callable[..., Line], encoder: tuple[Path, Path, Path], method: str
) -> None:
    if method == "teacher-intervention":
        taught = {"quantizer": "ternary", "schedule": "two-step"}
        encoder_with({"method": method, **taught}, *encoder)
        return
    own: dict[str, Any] = {"format": "float"} if method == "float" else {}
    if method == "ipq":
        own = {"format": {"weights": BOOK, "embeddings": BOOK}}
    if method == "awq":
        own = {"format": "w4a16-g32"}
    if method == "distillation":
        own = {"objective": {"attention": 0.0}}
    made = line(method=method, steps=2, **own).train().fold()
    ids = token_ids()
    assert torch.equal(made.logits("train", ids), made.logits("fold", ids))
    phases = [fact["name"] for fact in made.facts()["phases"]]
    tied = {"rest"} if method == "ipq" else set()  # the head is its table's, and nothing else is left over
    assert list(dict.fromkeys(phases)) == [
        name for name in PHASES[made.recipe.schedule.name] if name not in tied
    ]
