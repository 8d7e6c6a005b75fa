"""Mixtures by other costs, and what is not measured twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lines import Project, cli, make_project
from transformers import GPT2LMHeadModel

import qcompress.pipeline.sensitivity.measure as measure
from qcompress import api
from qcompress.errors import UsageError
from qcompress.pipeline.sensitivity.controls import other_costs
from qcompress.pipeline.sensitivity.mixture import Choice

OPTIONS: dict[str, Any] = {
    "formats": ("int8", "int4-g32"), "samples": 4, "fresh": 6, "seed": 3, "wins": False,
    "controls": ("weight-error", "shuffled"),
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("controls") / "project"
    return make_project(folder, tiny_model, text_file, format={"preset": "w8a16"})


@pytest.fixture(scope="module")
def document(project: Project) -> dict[str, Any]:
    plain = api.sensitivity(project.recipe, project.out, **OPTIONS | {"controls": ()})
    budget = sum(item["bytes"] for item in plain["formats"].values()) // 2
    return api.sensitivity(project.recipe, project.out, max_bytes=budget, **OPTIONS)


def layers(*sizes: int) -> dict[str, dict[str, Choice]]:
    """Layers of these sizes, each with costs of its own."""
    return {
        f"layer{number}": {"int8": Choice(number, 2 * size), "int4": Choice(10 * number, size)}
        for number, size in enumerate(sizes, 1)
    }


# Other costs ----------------------------------------------------------------------------------------


def test_shuffled_costs_are_those_of_another_layer_of_the_same_size() -> None:
    made = layers(*[64] * 6, *[32] * 5)
    moved = 0
    for seed in range(5):
        found = other_costs("shuffled", made, {}, seed)
        assert found.keys() == made.keys()
        for names in (list(made)[:6], list(made)[6:]):
            for word in ("int8", "int4"):
                costs = Counter(found[name][word].cost for name in names)
                assert costs == Counter(made[name][word].cost for name in names)
        for name, choices in found.items():
            assert choices["int4"].cost == 10 * choices["int8"].cost  # they stay together
            assert choices["int4"].bytes == made[name]["int4"].bytes
        moved += found != made
    assert moved == 5


def test_the_costs_of_weight_error_are_the_errors() -> None:
    errors = {"layer1": {"int8": 0.25, "int4": 0.5}, "layer2": {"int8": 0.125, "int4": 0.75}}
    found = other_costs("weight-error", layers(8, 8), errors, 0)
    assert {name: {word: one.cost for word, one in found[name].items()} for name in found} == errors
    assert found["layer2"]["int8"].bytes == 16


def test_the_error_of_a_weight_is_that_of_rounding_it_by_hand(
    project: Project, document: dict[str, Any]
) -> None:
    name = "transformer.h.1.mlp.c_fc"
    weight = (
        GPT2LMHeadModel.from_pretrained(project.folder / "model").get_submodule(name).weight.data.double()
    )
    for word, parts, largest in (
        ("int8", weight[None], 127),
        ("int4-g32", weight.unflatten(0, (-1, 32)), 7),
    ):
        scale = parts.abs().amax(1, keepdim=True) / largest
        error = scale * (parts / scale).round().clamp(-largest - 1, largest) - parts
        expected = float(error.square().sum() / parts.square().sum())
        assert document["formats"][word]["layers"][name]["weight_error"] == pytest.approx(expected, rel=1e-3)


# Mixtures -------------------------------------------------------------------------------------------


def test_a_control_has_no_more_bytes_and_is_measured_on_the_same_samples(document: dict[str, Any]) -> None:
    mixture = document["mixture"]
    assert document["seed"] == 3 and mixture["samples"] == 6 and mixture["fresh"] is True
    assert mixture["controls"].keys() == {"weight-error", "shuffled"}
    for control in mixture["controls"].values():
        assert control["bytes"] <= mixture["bytes"]
        assert control["formats"].keys() == mixture["formats"].keys()
        apart = mixture["measured"][0] - control["measured"][0]
        assert control["difference"][0] == pytest.approx(apart, abs=1e-12)
    errors = {word: item["layers"] for word, item in document["formats"].items()}
    # no exchange of two layers' formats at equal bytes has less error: it is the least there is
    chosen = mixture["controls"]["weight-error"]["formats"]
    names = [name for name in chosen if name.endswith("attn.c_proj")]
    assert len(names) == 2 and all(chosen[name] != "float" for name in names)
    first, second = names
    kept = errors[chosen[first]][first]["weight_error"] + errors[chosen[second]][second]["weight_error"]
    swapped = errors[chosen[second]][first]["weight_error"] + errors[chosen[first]][second]["weight_error"]
    assert kept <= swapped * (1 + 1e-5)


def test_another_budget_measures_no_layer_again(
    project: Project, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = [], measure.measure_costs

    def counted(*values: Any) -> Any:
        made.append(values[7])
        return real(*values)

    monkeypatch.setattr(measure, "measure_costs", counted)
    again = api.sensitivity(project.recipe, project.out, as_small_as="int4-g32", **OPTIONS)
    assert made == ["mixture", "uniform", "weight-error", "shuffled"]
    assert again["formats"] == document["formats"]
    api.sensitivity(
        project.recipe, project.out, **OPTIONS | {"formats": ("int8",), "seed": 4, "controls": ()}
    )
    assert made[4:] == ["int8"]


def test_the_order_of_the_samples_is_nothing_to_a_cost(project: Project) -> None:
    """All samples in the order of two seeds, and in that of the data: what was drawn is what was measured."""
    layer, options = "transformer.h.0.mlp.c_fc", {"formats": ("int4-g32",), "samples": 1000}
    found = [
        api.sensitivity(project.recipe, project.out, seed=seed, wins=False, **options)["formats"]["int4-g32"]
        for seed in (None, 1)
    ]
    assert found[0]["layers"][layer]["alone"] == pytest.approx(found[1]["layers"][layer]["alone"], rel=1e-5)
    few = api.sensitivity(project.recipe, project.out, wins=False, **options | {"samples": 4, "seed": 1})
    assert few["formats"]["int4-g32"]["layers"][layer]["alone"] != found[0]["layers"][layer]["alone"]


def test_the_command_prints_controls_and_dashes(project: Project, document: dict[str, Any]) -> None:
    words = ["sensitivity", project.recipe, "--out", project.out, "--samples", 4, "--fresh", 6, "--seed", 3]
    words += ["--no-wins", "--max-bytes", document["mixture"]["bytes"], "--control", "shuffled"]
    words += [part for word in OPTIONS["formats"] for part in ("--try", word)]
    text = cli(*words).stdout
    assert "control shuffled" in text
    (layer,) = [line for line in text.splitlines() if "h.0.mlp.c_fc" in line and "int8" not in line][:1]
    assert " - " in layer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controls": ["luck"], "as_small_as": "int8"}, "unknown control 'luck'"),
        ({"controls": ["shuffled"]}, "a control is a mixture, and needs a budget"),
    ],
)
def test_a_control_that_is_none_is_refused(project: Project, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        api.sensitivity(project.recipe, project.out, **options)
