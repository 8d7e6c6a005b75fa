"""What a layer costs, against stock transformers with the weight put in its place by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from lines import Project, cli, make_project
from transformers import GPT2LMHeadModel

from qcompress import api
from qcompress.errors import RecipeError, UsageError
from qcompress.models import describe
from qcompress.pipeline.sensitivity.candidates import parse_format, stored_bytes
from qcompress.pipeline.sensitivity.measure import Cost, divergence
from qcompress.pipeline.sensitivity.study import fragment
from qcompress.schema.formats import WeightFormat
from qcompress.system.artifacts import read_json
from qcompress.tasks import TASKS

SAMPLES = 5
W8A16 = {"preset": "w8a16"}
BLOCK = "transformer.h.0.mlp.c_fc"


@pytest.fixture(scope="module")
def project(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(
        tmp_path_factory.mktemp("sensitivity") / "project", tiny_model, text_file, format=W8A16
    )


@pytest.fixture(scope="module")
def document(project: Project) -> dict[str, Any]:
    return api.sensitivity(project.recipe, project.out, formats=("int8", "int4-g32"), samples=SAMPLES,
                           as_small_as="int4-g32")  # fmt: skip


# Distances ------------------------------------------------------------------------------------------


def test_the_distance_of_predictions_is_the_mean_kullback_leibler_divergence() -> None:
    random = np.random.default_rng(0)
    reference, found = random.normal(size=(2, 7, 11)).astype(np.float32) * 3
    p, q = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) for logits in (reference, found))
    expected = np.mean([scipy.stats.entropy(*pair) for pair in zip(p, q, strict=True)])
    assert divergence(reference, found) == pytest.approx(expected, rel=1e-5)
    assert divergence(reference, reference + 2.0) == pytest.approx(0.0, abs=1e-6)


def test_the_distance_of_several_labels_is_the_sum_of_that_of_each_and_of_numbers_the_square() -> None:
    reference, found = np.array([[1.0, -2.0]], np.float32), np.array([[0.5, 0.0]], np.float32)
    p, q = 1 / (1 + np.exp(-reference[0])), 1 / (1 + np.exp(-found[0]))
    expected = sum(scipy.stats.entropy([a, 1 - a], [b, 1 - b]) for a, b in zip(p, q, strict=True))
    assert divergence(reference, found, "multi") == pytest.approx(expected, rel=1e-5)
    assert divergence(np.array([[1.5]]), np.array([[1.0]]), "regression") == 0.25


def test_a_cost_has_the_standard_error_of_its_mean() -> None:
    cost = Cost.of(np.array([1.0, 2.0, 6.0]))
    assert cost.mean == 3.0 and cost.error == pytest.approx(math.sqrt(7 / 3))
    assert math.isnan(Cost.of(np.array([1.0])).error)


# Layers ---------------------------------------------------------------------------------------------


def by_hand(weight: torch.Tensor, block: int | None, largest: int) -> torch.Tensor:
    """Rounded with max|w| / `largest`, [in, out], blocks of input channels."""
    parts = weight.unflatten(0, (-1, block)) if block else weight[None]
    scale = parts.abs().amax(1, keepdim=True) / largest
    return (scale * (parts / scale).round().clamp(-largest - 1, largest)).flatten(0, 1)


@pytest.fixture(scope="module")
def stock(project: Project) -> Any:
    """Mean divergence of stock GPT-2 with some weights replaced, on the calibration windows."""
    recipe = yaml.safe_load(project.recipe.read_text())
    task = TASKS["causal-lm"]
    from qcompress.recipe.load import load_recipe

    loaded = load_recipe(project.recipe).recipe
    reader = task.reader(project.folder / "model")
    every = task.samples(loaded.data.calibration, project.folder, reader, loaded.task, 2 * SAMPLES)
    assert len(every) == 2 * SAMPLES <= recipe["data"]["calibration"]["limit"]

    def measure(block: int | None, largest: int, names: list[str], skip: int = 0) -> float:
        windows = every[skip : skip + SAMPLES]
        said = []
        for rounded in (False, True):
            model = GPT2LMHeadModel.from_pretrained(project.folder / "model").eval()
            for name in names if rounded else ():
                weight = model.get_submodule(name).weight
                weight.data = by_hand(weight.data, block, largest)
            ids = torch.tensor([list(window.ids) for window in windows])
            with torch.no_grad():
                said.append(model(input_ids=ids).logits.double().log_softmax(-1))
        p, q = said
        return float((p.exp() * (p - q)).sum(-1).mean())

    return measure


@pytest.mark.parametrize(("word", "block", "largest"), [("int8", None, 127), ("int4-g32", 32, 7)])
def test_a_layer_costs_what_stock_transformers_lose_with_its_weight_rounded(
    document: dict[str, Any], stock: Any, word: str, block: int | None, largest: int
) -> None:
    layers = document["formats"][word]["layers"]
    for name in (BLOCK, "transformer.h.1.attn.c_proj"):
        expected = stock(block, largest, [name])
        assert expected > 0
        assert layers[name]["alone"][0] == pytest.approx(expected, rel=2e-3)


def test_what_a_layer_wins_is_what_the_others_cost_less(document: dict[str, Any], stock: Any) -> None:
    found = document["formats"]["int4-g32"]
    linear = [name for name in found["layers"] if ".h." in name]
    tables = [name for name in found["layers"] if ".h." not in name]
    assert len(linear) == 8 and set(tables) == {"transformer.wte", "transformer.wpe"}
    # the tables are int8 in this format: little beside int4, and not rounded here
    every, without = stock(32, 7, linear), stock(32, 7, [name for name in linear if name != BLOCK])
    assert found["all"][0] == pytest.approx(every, rel=0.05)
    assert found["layers"][BLOCK]["wins"][0] == pytest.approx(every - without, rel=0.1)


@pytest.mark.slow
def test_bytes_are_those_of_the_exported_file(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """sizes.json of a run counts initializers; here of a file in fp16 with int4 and int8 weights."""
    words = {
        "attn.c_attn": "int4-g32",
        "attn.c_proj": "int8",
        "mlp.c_fc": "int4-channel",
        "mlp.c_proj": "int4-g64",
    }
    form = {"preset": "w8a16", "compute": "fp16", "layers": {
        f"*.{part}": {"weights": parse_format(word).model_dump()} for part, word in words.items()
    }}  # fmt: skip
    project = make_project(tmp_path / "project", tiny_model, text_file, format=form, method="ptq", train={},
                           build={"here": "never"})  # fmt: skip
    sizes = read_json(project.run(until="export").path / "sizes.json")
    layers = {layer.name: layer for layer in describe("gpt2", tiny_model).layers}
    assert len(sizes["layers"]) > 8
    for found in sizes["layers"]:
        layer = layers[found["name"]]
        word = words.get(".".join(layer.name.split(".")[-2:]), "int8")
        zeros = layer.out_features if word == "int8" and layer.section == "weights" else 0
        expected = stored_bytes(layer, parse_format(word), "fp16")
        assert found["bytes"] in (expected, expected + zeros), found["name"]  # once for layers of a shape


# Mixtures -------------------------------------------------------------------------------------------


def test_the_mixture_is_no_larger_than_the_uniform_format_and_no_worse(document: dict[str, Any]) -> None:
    mixture, uniform = document["mixture"], document["formats"]["int4-g32"]
    assert mixture["bytes"] <= uniform["bytes"] < document["formats"]["int8"]["bytes"]
    assert mixture["predicted"] <= sum(layer["alone"][0] for layer in uniform["layers"].values()) + 1e-12
    assert json.loads(json.dumps(document)) == document and document["unit"] == "nats"


def test_the_mixture_is_measured_on_samples_that_did_not_choose_it(
    project: Project, document: dict[str, Any], stock: Any
) -> None:
    mixture = document["mixture"]
    assert mixture["fresh"] is True and mixture["samples"] == SAMPLES
    uniform = document["formats"]["int4-g32"]
    assert mixture["uniform"] != uniform["all"]
    linear = [name for name in uniform["layers"] if ".h." in name]
    assert mixture["uniform"][0] == pytest.approx(stock(32, 7, linear, skip=SAMPLES), rel=0.05)
    mean, error = mixture["difference"]
    assert mean == pytest.approx(mixture["measured"][0] - mixture["uniform"][0], abs=1e-12)
    # paired: less than what two independent means would have
    assert error < math.hypot(mixture["measured"][1], mixture["uniform"][1])
    most = yaml.safe_load(project.recipe.read_text())["data"]["calibration"]["limit"]
    again = api.sensitivity(project.recipe, project.out, formats=("int4-g32",), samples=most, max_cost=1.0)
    assert again["mixture"]["fresh"] is False and again["mixture"]["samples"] == again["samples"]
    assert again["mixture"]["difference"] is None


def test_the_fragment_gives_each_layer_its_format(project: Project, document: dict[str, Any]) -> None:
    budget = (document["formats"]["int8"]["bytes"] + document["formats"]["int4-g32"]["bytes"]) // 2
    mixture = api.sensitivity(project.recipe, project.out, formats=("int8", "int4-g32"), samples=SAMPLES,
                              max_bytes=budget)["mixture"]  # fmt: skip
    assert len(set(mixture["formats"].values())) > 1
    assert document["formats"]["int4-g32"]["bytes"] < mixture["bytes"] <= budget
    recipe = yaml.safe_load(project.recipe.read_text())
    recipe["format"] = recipe["format"] | mixture["fragment"]
    mixed = project.folder / "mixed.yaml"
    mixed.write_text(yaml.safe_dump(recipe))
    checked = cli("check", mixed, "--json").json()
    said = {layer["name"]: layer["weights"] for layer in checked["layers"]}
    for name, word in mixture["formats"].items():
        assert said[name] == str(parse_format(word)), name


def test_a_fragment_names_the_common_format_once() -> None:
    int8, int4 = WeightFormat(bits=8), WeightFormat(bits=4, block=32)
    forms = {"a": int4, "b": int4, "c": int8, "table": int8, "d": None}
    assert fragment(forms, {"table"}) == {
        "weights": {"bits": 4, "block": 32},
        "layers": {"c": {"weights": "int8"}, "table": {"weights": "int8"}, "d": {"weights": "float"}},
    }


# The command ----------------------------------------------------------------------------------------


def test_the_command_prints_the_document_or_tables(project: Project, document: dict[str, Any]) -> None:
    words = ["sensitivity", project.recipe, "--out", project.out, "--samples", SAMPLES, "--try", "int8"]
    found = cli(*words, "--json")
    assert found.code == 0 and found.json()["formats"]["int8"] == document["formats"]["int8"]
    assert found.json()["mixture"] is None
    text = cli(*words).stdout
    assert BLOCK in text and "rounded alone" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"formats": ["int5"]}, UsageError, "unknown weight format 'int5'"),
        ({"max_bytes": 10}, UsageError, "the least that these formats make possible"),
        ({"max_bytes": 10, "max_cost": 1.0}, UsageError, "a mixture has one budget"),
        ({"overrides": ["format=w8a8"], "formats": ["int4-g32"]}, RecipeError, "cannot multiply int4 blocks"),
    ],
)
def test_what_cannot_be_measured_is_said(
    project: Project, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        api.sensitivity(project.recipe, project.out, **{"samples": SAMPLES, "formats": ["int8"], **options})


def test_a_recipe_for_the_float_model_is_enough(project: Project, document: dict[str, Any]) -> None:
    recipe = yaml.safe_load(project.recipe.read_text()) | {"format": "float", "method": "float"}
    del recipe["train"], recipe["gate"]
    file = project.folder / "float.yaml"
    file.write_text(yaml.safe_dump(recipe))
    found = api.sensitivity(file, project.out, formats=["int4-g32"], samples=SAMPLES)["formats"]["int4-g32"]
    same = document["formats"]["int4-g32"]["layers"]
    assert found["layers"] == {name: found["layers"][name] for name in same if ".h." in name}
    assert found["layers"][BLOCK]["alone"] == pytest.approx(same[BLOCK]["alone"], rel=1e-4)


def test_a_budget_that_no_mixture_keeps_is_refused_before_anything_is_measured(
    project: Project, document: dict[str, Any], tmp_path: Path
) -> None:
    least = document["formats"]["int4-g32"]["bytes"]
    with pytest.raises(UsageError, match=f"the least that these formats make possible is {least} bytes"):
        api.sensitivity(project.recipe, tmp_path / "runs", formats=("int8", "int4-g32"), max_bytes=least - 1)
    assert not (tmp_path / "runs").exists()
