"""Tasks and their data as a recipe writes them: what is wrong, where, and what to write instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from good_recipe import mistakes, write
from jsonschema import Draft202012Validator

from qcompress.recipe.json_schema import recipe_schema
from qcompress.recipe.load import load_recipe
from qcompress.schema.data import Columns
from qcompress.schema.tasks import (
    AnyTask,
    CausalLm,
    FeatureExtraction,
    FillMask,
    ImageClassification,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from qcompress.tasks import TASKS

GOOD = """\
name: good
model: {family: gpt2, source: model}
task: {name: sequence-classification, labels: [neg, pos], context: 64}
data:
  train: {table: [train.csv], columns: {text: sentence, label: stars}}
  calibration: {text: [lines.txt], limit: 8}
  evaluate:
    dev: {table: [dev.tsv]}
    live: {text: [lines.txt]}
format: w8a8
method: lsq
gate: {recovery: {dev.accuracy: {max-degradation: 0.01}, live.agreement: {threshold: 0.9}}}
"""

GOOD_LM = """\
name: good
model: {family: gpt2, source: model}
task: {name: causal-lm, context: 64}
data:
  calibration: {text: [lines.txt], limit: 8}
  evaluate:
    live: {text: [lines.txt]}
format: w8a8
"""

TASK_OPTIONS = (
    AnyTask,
    AnyTask,
    CausalLm,
    SequenceClassification,
    TokenClassification,
    ImageClassification,
    FeatureExtraction,
    FillMask,
    QuestionAnswering,
)
COLUMNS_OF_TRAIN = Columns(text="sentence", label="stars")

ONE_MISTAKE = {
    "a task without a name": (
        ("name: sequence-classification, ", ""),
        r":3: task\.name: must be one of causal-lm, sequence-classification, token-classification, image-cl",
    ),
    "a task that is none": (
        ("name: sequence-classification", "name: sequence-clasification"),
        r":3: task\.name: must be one of .*\(fix: did you mean `sequence-classification`\?\)",
    ),
    "a key of another task": (
        ("context: 64", "stride: 64"),
        r":3: task\.stride: unknown key \(fix: drop it, or write one of: name, glue, kind, labels, context",
    ),
    "a misspelt key": (("context: 64", "contxt: 64"), r":3: task\.contxt: unknown key .*`context`"),
    "a kind that is none": (
        ("context: 64", "kind: many"),
        r":3: task\.kind: must be one of single, multi, regression",
    ),
    "a task of GLUE that is none": (("labels: [neg, pos]", "glue: colla"), r":3: task\.glue: .*`cola`"),
    "a kind that is not GLUE's": (
        ("labels: [neg, pos]", "glue: cola, kind: regression"),
        r":3: task: `glue: cola` is of the kind single, and `kind` is regression",
    ),
    "labels that are not GLUE's": (
        ("labels: [neg, pos]", "glue: cola, labels: [neg, pos]"),
        r":3: task: `glue: cola` has labels of its own: drop `labels`",
    ),
    "labels of a regression": (
        ("context: 64", "kind: regression"),
        r":3: task: a regression gives a number and has no labels: drop `labels`",
    ),
    "one label": (("[neg, pos]", "[neg]"), r":3: task\.labels: must be 2 or more entries long"),
    "a label twice": (("[neg, pos]", "[neg, neg]"), r":3: task: `labels` names neg more than once"),
    "two origins": (
        ("dev: {table: [dev.tsv]}", "dev: {table: [dev.tsv], text: [lines.txt]}"),
        r":8: data\.evaluate\.dev: give exactly one of `text`, `table` and `dataset`",
    ),
    "no file": (("dev: {table: [dev.tsv]}", "dev: {table: []}"), r":8: .*dev: `table` names no file"),
    "text with columns": (
        ("live: {text: [lines.txt]}", "live: {text: [lines.txt], columns: {text: a}}"),
        r":9: data\.evaluate\.live: `columns` belong to `table` or `dataset`",
    ),
    "a column that is none": (("stars}", "stars, lable: x}"), r":5: data\.train\.columns\.lable: .*`label`"),
    "text to train on": (
        ("{table: [train.csv], columns: {text: sentence, label: stars}}", "{text: [lines.txt]}"),
        r":5: data\.train\.text: has no labels, and sequence-classification .*\(fix: write `table: ",
    ),
    "a column of language models": (
        ("dev: {table: [dev.tsv]}", "dev: {dataset: org/name, column: line}"),
        r":8: data\.evaluate\.dev\.column: belongs to causal-lm \(fix: write `columns: \{text: line\}`\)",
    ),
    "a column of another task": (
        ("stars}", "stars, tags: x}"),
        r":5: data\.train\.columns: names the column `tags`, and sequence-classification reads text, pai",
    ),
    "a suffix that is none": (
        ("[dev.tsv]", "[lines.txt]"),
        r":8: data\.evaluate\.dev\.table\[0\]: lines\.txt ends in none of \.tsv, \.csv, \.jsonl, \.parquet",
    ),
    "a table that is not there": (
        ("[dev.tsv]", "[dve.tsv]"),
        r":8: data\.evaluate\.dev\.table\[0\]: dve\.tsv does not exist",
    ),
    "a metric of another task": (
        ("dev.accuracy", "dev.perplexity"),
        r':12: gate\.recovery\."dev\.perplexity": is not a metric of an evaluation set',
    ),
    "tables for a language model": (
        ("task: {name: sequence-classification, labels: [neg, pos], context: 64}", "task: {name: causal-lm}"),
        None,
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    for name in ("train.csv", "dev.tsv", "lines.txt"):
        (tmp_path / name).write_text("text\n")
    return tmp_path


def test_the_good_recipe_is_good(folder: Path) -> None:
    recipe = load_recipe(write(folder, GOOD), ()).recipe
    assert recipe.task.labels == ["neg", "pos"]
    assert recipe.data.train.columns == COLUMNS_OF_TRAIN
    assert set(Columns.model_fields) == {column for task in TASK_OPTIONS for column in task.columns}


@pytest.mark.parametrize("what", [what for what, (_, expected) in ONE_MISTAKE.items() if expected])
def test_one_mistake_is_reported_once_where_it_is(what: str, folder: Path) -> None:
    (old, new), expected = ONE_MISTAKE[what]
    assert GOOD.count(old) == 1
    reported = mistakes(write(folder, GOOD.replace(old, new)))
    assert len(reported) == 1, reported
    assert re.match("recipe.yaml" + expected, reported[0]), reported


def test_a_language_model_reads_no_table(folder: Path) -> None:
    (old, new), _ = ONE_MISTAKE["tables for a language model"]
    reported = mistakes(write(folder, GOOD.replace(old, new)), "gate=")
    keys = [line.partition(": ")[2].partition(": ")[0] for line in reported]
    assert keys == ["data.train.table", "data.evaluate.dev.table"]
    assert all("and the task is causal-lm" in line and "`text: [FILE, ...]`" in line for line in reported)


def test_glue_gives_the_kind(folder: Path) -> None:
    file = write(folder, GOOD.replace("labels: [neg, pos], context: 64", "glue: stsb"))
    task = load_recipe(file, ["gate="]).recipe.task
    assert (task.kind, task.labels, task.context) == ("regression", None, 128)
    assert task.within(32).context == 32 and task.within(500) == task


def test_columns_stay_with_another_table_and_go_with_another_origin(folder: Path) -> None:
    file = write(folder, GOOD)
    (folder / "other.csv").write_text("text\n")
    train = load_recipe(file, ["data.train={table: [other.csv]}"]).recipe.data.train
    assert train.table == ["other.csv"] and train.columns == COLUMNS_OF_TRAIN
    live = load_recipe(file, ["data.evaluate.live={table: [other.csv]}"]).recipe.data.evaluate["live"]
    assert live.text is None and live.table == ["other.csv"]
    train = load_recipe(file, ["data.train={dataset: org/name}"]).recipe.data.train
    assert train.table is None and train.columns is None


def test_tables_of_a_recipe_that_is_extended_are_relative_to_it(folder: Path) -> None:
    write(folder, GOOD, "base.yaml")
    (folder / "sub").mkdir()
    child = write(folder, "extends: ../base.yaml\nname: child\n", "sub/child.yaml")
    data = load_recipe(child, ()).recipe.data
    assert data.train.table == ["../train.csv"] and data.evaluate["dev"].table == ["../dev.tsv"]


IMAGES = """\
name: images
model: {family: bert, source: model}
task: {name: image-classification, labels: [cat, dog]}
data:
  train: {npz: [train.npz], columns: {image: x, label: y}, augment: {flip: true, crop: 4}}
  calibration: {folder: photos, limit: 8}
  evaluate:
    dev: {npz: [train.npz]}
    hub: {dataset: org/name, columns: {image: picture}}
format: w8a8
method: lsq
gate: {recovery: {dev.accuracy: {max-degradation: 0.01}, hub.cross_entropy: {threshold: 0.9}}}
"""

WRONG_IMAGES = {
    "text": (
        ("{npz: [train.npz]}", "{text: [lines.txt]}"),
        r":8: .*dev\.text: belongs to a task of text.*`npz:",
    ),
    "a table": (
        ("{npz: [train.npz]}", "{table: [a.csv]}"),
        r":8: data\.evaluate\.dev\.table: belongs to a task",
    ),
    "two origins": (
        ("{folder: photos,", "{folder: photos, npz: [train.npz],"),
        r":6: .*exactly one of .*`npz`",
    ),
    "no archive": (("dev: {npz: [train.npz]}", "dev: {npz: []}"), r":8: .*dev: `npz` names no file"),
    "an archive that is not there": (
        ("dev: {npz: [train", "dev: {npz: [tarin"),
        r":8: .*npz\[0\]: tarin\.npz does n",
    ),
    "a folder that is not there": (
        ("folder: photos", "folder: photo"),
        r":6: .*\.folder: 'photo' does not exist",
    ),
    "a folder with columns": (
        ("limit: 8", "columns: {label: x}"),
        r":6: .*`columns` belong to .*`folder` has none",
    ),
    "a column of tables": (
        ("image: picture", "text: picture"),
        r":9: .*columns: names the column `text`, and ima",
    ),
    "variation elsewhere": (("limit: 8", "augment: {flip: true}"), r":6: .*\.augment: varies the images of"),
    "a wrong variation": (("flip: true", "flpi: true"), r":5: data\.train\.augment\.flpi: unknown key"),
    "a key of text": (("labels: [cat, dog]", "context: 8"), r":3: task\.context: unknown key"),
    "half of a preparation": (
        ("labels: [cat, dog]", "mean: [0.5, 0.5, 0.5]"),
        r":3: task: `mean` and `std` belong together",
    ),
    "a metric of five labels": (
        ("hub.cross_entropy", "hub.top5_accuracy"),
        r":12: .*is not a metric of an evalu",
    ),
}


@pytest.fixture
def photos(folder: Path) -> Path:
    (folder / "photos" / "cat").mkdir(parents=True)
    (folder / "train.npz").write_bytes(b"")
    return folder


def test_a_recipe_of_images_is_good_and_moves_with_its_files(photos: Path) -> None:
    recipe = load_recipe(write(photos, IMAGES), ()).recipe
    assert recipe.task.context is None and recipe.task.within(8) == recipe.task
    assert {task.model_fields["name"].default for task in TASK_OPTIONS} == set(TASKS)
    write(photos, IMAGES, "base.yaml")
    (photos / "sub").mkdir()
    data = load_recipe(
        write(photos, "extends: ../base.yaml\nname: child\n", "sub/child.yaml"), ()
    ).recipe.data
    assert data.train.npz == ["../train.npz"] and data.calibration.folder == "../photos"
    file = write(photos, IMAGES)
    train = load_recipe(file, ["data.train={folder: photos}"]).recipe.data.train
    assert (train.npz, train.folder, train.columns, train.augment.crop) == (None, "photos", None, 4)
    train = load_recipe(file, ["data.calibration={npz: [train.npz]}"]).recipe.data.calibration
    assert (train.npz, train.folder, train.limit) == (["train.npz"], None, 8)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("32", [32, 32]), ("[32, 48]", [32, 48]), ("[32]", None), ("true", None), ("0", None), ("1.5", None)],
)
def test_one_number_is_a_square(size: str, expected: list[int] | None, photos: Path) -> None:
    text = IMAGES.replace("name: image-classification", f"{SQUARE}, size: {size}")
    assert text.count(SQUARE) == 1
    file = write(photos, text)
    schema = Draft202012Validator(recipe_schema())
    if expected is None:
        assert len(mistakes(file)) == 1 and "task" in mistakes(file)[0]
    else:
        assert load_recipe(file, ()).recipe.task.size == expected
    assert schema.is_valid(yaml.safe_load(text)) == (expected is not None)


SQUARE = "name: image-classification, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]"


def test_one_number_for_a_list_is_written_as_often_as_the_list_is_long(photos: Path) -> None:
    text = IMAGES.replace("name: image-classification", "name: image-classification, mean: 0.5")
    assert (
        "task.mean: must be a list, found 0.5 (fix: put 3 values in brackets: [0.5, 0.5, 0.5])"
        in (mistakes(write(photos, text))[0])
    )


@pytest.mark.parametrize("what", WRONG_IMAGES)
def test_one_mistake_about_images_is_reported_once_where_it_is(what: str, photos: Path) -> None:
    (old, new), expected = WRONG_IMAGES[what]
    assert IMAGES.count(old) == 1
    reported = mistakes(write(photos, IMAGES.replace(old, new)))
    assert len(reported) == 1, reported
    assert re.match("recipe.yaml" + expected, reported[0]), reported


@pytest.mark.parametrize("origin", ["npz: [train.npz]", "folder: photos"])
@pytest.mark.parametrize("text", [GOOD, GOOD_LM])
def test_a_task_of_text_reads_no_images(text: str, origin: str, photos: Path) -> None:
    reported = mistakes(write(photos, text.replace("live: {text: [lines.txt]}", f"live: {{{origin}}}")))
    assert len(reported) == 1 and "belongs to image-classification, and the task is" in reported[0], reported
