"""Slices of a recipe: what `check` and `run` say before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from good_recipe import mistakes, write
from jsonschema import Draft202012Validator

from qcompress.errors import RecipeError
from qcompress.pipeline.smoke import _little
from qcompress.recipe.check import all_mistakes, check_model
from qcompress.recipe.json_schema import recipe_schema
from qcompress.recipe.load import dump_recipe, load_recipe, read
from qcompress.recipe.validate import validate
from qcompress.recipe.yaml_file import read_yaml

GOOD = """\
name: good
model: {family: bert, source: model}
task: {name: sequence-classification, labels: [neg, pos], context: 32}
data:
  train: {table: [dev.csv]}
  evaluate:
    dev: {table: [dev.csv], slices: [language, fold]}
    live: {text: [lines.txt]}
format: w8a8
method: lsq
gate:
  regression:
    dev.accuracy@language=de: {max-degradation: 0.01}
    dev.accuracy@fold=*: {max-degradation: 0.05}
    dev.accuracy@label=pos: {max-degradation: 0.05}
"""

ROWS = ["text,label,language,fold,id", "a,pos,de,1,17", "b,neg,fr,2,18", "c,neg,,1,19", "d,neg,it,1,20"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "lines.txt").write_text("a line\n")
    (tmp_path / "dev.csv").write_text("\n".join(ROWS) + "\n")
    return tmp_path


def edited(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def of_slices(file: Path) -> list[str]:
    """Mistakes in data and gate; the model is an empty folder."""
    return [str(one) for one in all_mistakes(file)[2] if one.key.startswith(("data", "gate"))]


def test_the_good_recipe_is_good_and_stays_what_it_is(folder: Path) -> None:
    file = write(folder, GOOD)
    assert mistakes(file) == [] and of_slices(file) == []
    recipe = load_recipe(file).recipe
    assert validate(read(write(folder, dump_recipe(recipe), "again.yaml"))) == recipe
    plain = write(folder, edited(", slices: [language, fold]", ""), "plain.yaml")
    assert "slices" not in dump_recipe(load_recipe(plain, ["gate="]).recipe)  # digests stay what they were


ONE_MISTAKE = {
    "slices of training data": (
        ("train: {table: [dev.csv]}", "train: {table: [dev.csv], slices: [fold]}"),
        ":5: data.train.slices: parts the sets of `data.evaluate` alone (fix: drop it)",
    ),
    "slices of text": (
        ("live: {text: [lines.txt]}", "live: {text: [lines.txt], slices: [fold]}"),
        ":8: data.evaluate.live.slices: `text` has no columns",
    ),
    "a column that is not kept": (
        ("dev.accuracy@fold=*", "dev.accuracy@region=*"),
        ":14: gate.regression.\"dev.accuracy@region=*\": names the column 'region', which "
        "`data.evaluate.dev` does not keep (fix: write `slices: [region]` there)",
    ),
    "no value": (
        ("@language=de", "@language"),
        ':13: gate.regression."dev.accuracy@language": does not name a slice',
    ),
    "no column": (
        ("@language=de", "@=de"),
        ':13: gate.regression."dev.accuracy@=de": does not name a slice',
    ),
    "a column of results": (("[language, fold]", "[language, fold, label]"), "`slices` names 'label'"),
}


@pytest.mark.parametrize("what", ONE_MISTAKE)
def test_one_mistake_is_reported_once_where_it_is(what: str, folder: Path) -> None:
    (old, new), says = ONE_MISTAKE[what]
    (reported,) = mistakes(write(folder, edited(old, new)))
    assert says in reported


def test_a_window_of_text_is_of_no_row(folder: Path) -> None:
    text = GOOD.partition("gate:")[0].replace("sequence-classification, labels: [neg, pos]", "causal-lm")
    text = text.replace("{family: bert", "{family: gpt2").replace("table: [dev.csv]", "dataset: a/b")
    (reported,) = mistakes(write(folder, text))
    assert "data.evaluate.dev.slices: a sample of causal-lm is a window of the whole text" in reported


IN_THE_DATA = {
    "a value that no sample has": (
        ("@language=de", "@language=es"),
        ":13: gate.regression.\"dev.accuracy@language=es\": no sample of dev has language 'es'; there "
        "are de, fr, it",
    ),
    "a column that is not there": (("[language, fold]", "[language, fold, region]"), "and not 'region'"),
    "a value beyond the limit": (
        ("slices: [language, fold]", "slices: [language, fold], limit: 1"),
        "there are de (fix",
    ),
}


@pytest.mark.parametrize("what", IN_THE_DATA)
def test_the_data_are_looked_at_before_anything_is_trained(what: str, folder: Path) -> None:
    (old, new), says = IN_THE_DATA[what]
    text = edited(old, new)
    if what == "a value beyond the limit":
        text = text.replace("@language=de", "@language=it")
    file = write(folder, text)
    assert mistakes(file) == []
    (entries,) = of_slices(file)
    assert says in entries


def test_a_run_is_refused_too(folder: Path) -> None:
    """`run` holds the recipe against its model first; a folder with nothing in it has its own error."""
    config = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    resolved = load_recipe(write(folder, edited("@language=de", "@language=es")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcompress.recipe.check._describe_and_judge", lambda *_, **__: object())
        patch.setattr("qcompress.recipe.check.judge_data", lambda *_, **__: ())
        with pytest.raises(RecipeError, match="no sample of dev has language 'es'"):
            check_model(resolved, folder / "model")


def test_a_column_of_ids_is_no_slice(folder: Path) -> None:
    rows = [f"a,pos,de,1,{number}" for number in range(101)]
    (folder / "dev.csv").write_text("\n".join([ROWS[0], *rows]) + "\n")
    (entries,) = of_slices(write(folder, edited("[language, fold]", "[language, fold, id]")))
    assert "'id' has 101 different values, and goals hold for at most 100" in entries


def test_another_origin_leaves_no_slices_behind_and_another_goal_no_goal(folder: Path) -> None:
    file = write(folder, GOOD)
    recipe = load_recipe(file, ["data.evaluate.dev.text=[lines.txt]", "gate="]).recipe
    assert recipe.data.evaluate["dev"].slices is None
    key = "gate.regression.dev.accuracy@label=pos"
    changed = write(folder, f"extends: recipe.yaml\n{nested(key)}", "other.yaml")
    goal = load_recipe(changed).recipe.gate.regression["dev.accuracy@label=pos"]
    assert goal.min_recovery == 0.9 and goal.max_degradation is None


def nested(key: str) -> str:
    return "gate: {regression: {'" + key.removeprefix("gate.regression.") + "': {min-recovery: 0.9}}}\n"


def test_a_smoke_run_has_too_few_samples_for_slices(folder: Path) -> None:
    small = _little(load_recipe(write(folder, GOOD)).recipe.data)
    assert small.evaluate["dev"].slices is None and small.evaluate["dev"].limit is not None


@pytest.mark.parametrize(
    ("goal", "fine"),
    [("dev.accuracy@language=de", True), ("dev.accuracy@language=*", True), ("dev.accuracy@fold", False),
     ("dev.accuracy@=1", False), ("dev.accuracy", True)],
)  # fmt: skip
def test_the_schema_knows_slices_and_their_goals(goal: str, fine: bool, folder: Path) -> None:
    file = write(folder, edited("dev.accuracy@language=de", goal))
    errors_of_schema = list(Draft202012Validator(recipe_schema()).iter_errors(read_yaml(file, "x").value))
    assert (errors_of_schema == []) == fine
