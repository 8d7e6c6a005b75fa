"""The JSON Schema of a recipe, held against the recipes that ship and mistakes that `check` refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from good_recipe import GOOD, edited, mistakes, prepare, write
from jsonschema import Draft202012Validator
from lines import cli
from pydantic import Field

from qcompress.recipe.json_schema import recipe_schema
from qcompress.recipe.validate import WORDS
from qcompress.recipe.yaml_file import parse_yaml, read_yaml
from qcompress.schema.axes import AXES, METHODS
from qcompress.schema.formats import FORMAT_PRESETS, Options
from qcompress.schema.recipe import TRACKERS, Recipe
from qcompress.schema.targets import TARGETS

RECIPES = sorted(
    file
    for file in (Path(__file__).parents[2] / "recipes").rglob("*.yaml")
    if file.name not in ("study.yaml", "mixtures.yaml")  # which list what a study compares
)
SCHEMA = recipe_schema()
VALIDATOR = Draft202012Validator(SCHEMA)


def refused(values: Any) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(values)]


def test_it_is_a_schema_of_the_draft_that_it_names() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"].endswith("draft/2020-12/schema")
    assert list(SCHEMA["properties"]) == ["extends", *Recipe.model_fields]


def test_there_are_recipes_and_some_extend_others() -> None:
    assert len(RECIPES) >= 40
    extending = [file for file in RECIPES if "extends" in read_yaml(file, file.name).value]
    assert len(extending) >= 5


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: "-".join(file.parts[-2:]))
def test_every_recipe_that_ships_is_valid_as_it_is_written(file: Path) -> None:
    assert refused(read_yaml(file, str(file)).value) == []


PLANTED = {
    "an unknown key": ("seed: 0", "sed: 0"),
    "an unknown key of a section": ("batch_size: 4", "batch: 4"),
    "an unknown family": ("family: gpt2", "family: gpt3"),
    "an unknown task": ("name: causal-lm", "name: causal"),
    "an unknown method": ("method: quadapter", "method: quadaptor"),
    "an unknown word of a format": ("weights: int8\n", "weights: int7\n"),
    "an unknown word of a layer": ('"transformer.h.0.*": float', '"transformer.h.0.*": flaot'),
    "bits that no format has": ("bits: 4", "bits: 5"),
    "an unknown compute type": ("compute: fp16", "compute: fp8"),
    "an unknown target": ("target: rtx-ada", "target: rtx-ad"),
    "an unknown phase": ("calibrate: {steps: 2}", "calibrat: {steps: 2}"),
    "an unknown role": ("{adapter: 1.0e-3, scale: 2e-4}", "{adaptor: 1.0e-3}"),
    "a phase without steps": ("calibrate: {steps: 2}", "calibrate: {}"),
    "a number as text": ("limit: 8", 'limit: "8"'),
    "a number that is too small": ("batch_size: 4", "batch_size: 0"),
    "a rate that is not above 0": ("scale: 2e-4", "scale: 0"),
    "one file in the place of a list": ("text: [test.txt]", "text: test.txt"),
    "a name that is not a slug": ("name: good", "name: Good One"),
    "an opset that is too old": ("opset: 21", "opset: 20"),
    "an axis of a profile without maximum": ("batch: [1, 1, 2]", "batch: [1, 1]"),
    "a goal on no metric": ("recovery: {test.perplexity:", "recovery: {test.perplexy:"),
    "an unknown kind of goal": ("{percent-max-degradation: 2}", "{percent_degradation: 2}"),
    "an unknown row": ("require: [float,", "require: [flot,"),
    "an unknown tracker": ("seed: 0", "tracking: tensorbord"),
    "an evaluation set that is not a slug": ("other: {text", "Other Set: {text"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_mistake_that_check_refuses_is_refused(what: str, tmp_path: Path) -> None:
    text = edited(*PLANTED[what])
    assert len(mistakes(write(prepare(tmp_path), text))) >= 1
    assert refused(parse_yaml(text, "recipe.yaml").value)


def test_the_recipe_without_planted_mistakes_is_valid(tmp_path: Path) -> None:
    assert refused(parse_yaml(GOOD, "recipe.yaml").value) == []
    assert mistakes(write(prepare(tmp_path))) == []


@pytest.mark.parametrize("key", ["name", "model", "task", "data"])
def test_what_a_whole_recipe_needs_may_stand_in_the_recipe_that_it_extends(key: str) -> None:
    values = parse_yaml(GOOD, "recipe.yaml").value
    del values[key]
    assert refused(values)
    assert refused({"extends": "other.yaml", **values}) == []
    assert refused({"extends": "other.yaml", "model": {"run": "runs/x"}, "data": {"train": None}}) == []
    assert refused({"extends": "other.yaml", "sed": 1}) and refused({"extends": 3})


SHORT = (
    *({"method": name} for name in METHODS),
    *({"format": name} for name in FORMAT_PRESETS),
    *({"build": {"target": name}} for name in TARGETS),
    *({"tracking": name} for name in TRACKERS),
    {"tracking": list(TRACKERS)},
    *({axis: value.model_fields["name"].default} for axis, values in AXES.items() for value in values),
    {"stepper": {"clip_norm": 2.0}},
    {"adapter": {"bound": 50.0}},
    {"quantizer": {"name": "lsq", "noise": 0.2}},
    {"quantizer": {"name": "lsq", "init": "mse"}},
    {"quantizer": {"weights": "lsq", "activations": {"name": "dynamic"}, "noise": "none"}},
    {"format": {"preset": "w4a16-g128", "weights": {"block": 64}}},
    {"format": {"weights": {"codebook": "gather", "block": 8}, "layers": {"*": "w8a8", "head": "float"}}},
)


BESIDE = {"adapter": {"method": "quadapter"}, "stepper": {"method": "saq"}}
"""Options without a name belong to what a method chose."""


@pytest.mark.parametrize("section", SHORT, ids=str)
def test_short_forms_are_valid_and_mean_something_to_the_project(section: dict[str, Any]) -> None:
    values = parse_yaml(GOOD, "recipe.yaml").value
    for key in ("format", "method", "train"):
        values.pop(key)
    values |= {**BESIDE.get(next(iter(section)), {}), **section}
    assert refused(values) == []
    Recipe.model_validate(values)


def test_words_are_offered_with_their_help_and_default() -> None:
    assert len(WORDS) == 12
    form = SCHEMA["$defs"]["Format"]["properties"]
    assert form["weights"]["anyOf"][0] == {
        "enum": ["float", "int8", "int4", "int3", "int2", "ternary", "codebook"]
    }
    assert form["weights"]["default"] == "float" and "Linear layers" in form["weights"]["description"]
    assert SCHEMA["properties"]["method"]["anyOf"] == [{"enum": list(METHODS)}]
    assert "saq: lsq, saq, plain" in SCHEMA["properties"]["method"]["description"]


class Documented(Options):
    """A section."""

    first: int = 1
    """One."""
    second: int = Field(default=2, alias="the-second")
    """Two:
    on two lines.
    """
    third: int = 3
    fourth: ClassVar[int] = 4
    """No field."""


class Longer(Documented):
    """A section over another one."""

    first: int = 11
    fifth: Documented | None = None
    """Five."""


def test_the_docstring_below_a_field_is_its_description() -> None:
    properties = Longer.model_json_schema()["properties"]
    texts = {name: field.get("description") for name, field in properties.items()}
    assert texts == {
        "first": "One.", "the-second": "Two:\non two lines.", "third": None, "fifth": "Five.",
    }  # fmt: skip


def test_the_command_prints_the_schema_alone() -> None:
    done = cli("schema")
    assert done.code == 0 and done.stderr == ""
    assert json.loads(done.stdout) == SCHEMA
