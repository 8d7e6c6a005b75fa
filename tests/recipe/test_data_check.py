"""Checks of data before any stage: images, tags and text, and how much is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lines import cli
from tiny import make_model, make_tokenizer
from tiny_bert import LABELS, TOKEN, save_encoder
from tiny_vit import LABELS as SHAPES
from tiny_vit import save_vit
from word_tokenizer import word_tokenizer

from qcompress.errors import RecipeError
from qcompress.recipe import data_check
from qcompress.recipe.check import all_mistakes, check_model
from qcompress.recipe.load import load_recipe

HEAD = "name: good\nmodel: {{family: {family}, source: model}}\ntask: {{name: {task}}}\ndata:\n"
TAIL = "format: w8a8\nmethod: ptq\nbuild: {here: never}\n"


def recipe(folder: Path, family: str, task: str, *data: str, tail: str = TAIL) -> Path:
    head = HEAD.replace("{task}", task).replace("{{", "{").replace("}}", "}").replace("{family}", family)
    (folder / "recipe.yaml").write_text(head + "".join(f"  {line}\n" for line in data) + tail)
    return folder / "recipe.yaml"


def said(file: Path) -> list[str]:
    """Mistakes that `check` reports; a run reports them before its first stage too."""
    messages = [str(one).replace(f"{file.parent}/", "") for one in all_mistakes(file)[2]]
    try:
        check_model(load_recipe(file), file.parent / "model")
        by_run = []
    except RecipeError as error:
        by_run = [str(one).replace(f"{file.parent}/", "") for one in error.mistakes]
    assert by_run == messages
    return messages


# Images -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture
def photos(vit: Path, tmp_path: Path) -> Path:
    shutil.copytree(vit, tmp_path / "model")
    return tmp_path


def archive(folder: Path, name: str, **arrays: object) -> None:
    labels = np.arange(6) % len(SHAPES)
    whole = {"images": np.zeros((6, 20, 24, 3), np.uint8), "labels": labels} | arrays
    np.savez(folder / name, **{key: np.asarray(value) for key, value in whole.items() if value is not None})


def images(folder: Path, section: str = "{npz: [test.npz]}", task: str = "image-classification") -> list[str]:
    archive(folder, "train.npz")
    return said(
        recipe(folder, "vit", task, "calibration: {npz: [train.npz]}", f"evaluate: {{test: {section}}}")
    )


IMAGES: dict[str, tuple[dict[str, object], str, str]] = {
    "another name": (
        {"images": None, "Images": np.zeros((6, 8, 8, 3), np.uint8)},
        "{npz: [test.npz]}",
        "data.evaluate.test.npz: test.npz has the arrays labels, Images, and not 'images' (fix: write "
        '`columns: {image: "Images"}`, or rename the column)',
    ),
    "floats": ({"images": np.zeros((6, 8, 8, 3))}, "{npz: [test.npz]}", "images is float64 [6, 8, 8, 3]"),
    "channels first": (
        {"images": np.zeros((6, 3, 8, 8), np.uint8)},
        "{npz: [test.npz]}",
        "images is uint8 [6, 3, 8, 8]",
    ),
    "fewer labels": (
        {"labels": np.zeros(5, int)},
        "{npz: [test.npz]}",
        "6 images, and labels is of shape [5]",
    ),
    "a label too large": (
        {"labels": [0, 1, 2, 0, 9, 0]},
        "{npz: [test.npz]}",
        "test.npz, row 5: 9 is not the name or the index of a label",
    ),
    "a column that is not there": (
        {},
        "{npz: [test.npz], columns: {label: fine}}",
        "data.evaluate.test.columns.label: test.npz has the arrays images, labels, and not 'fine'",
    ),
    "a slice that is not there": (
        {},
        "{npz: [test.npz], slices: [camera]}",
        "data.evaluate.test.slices: test.npz has the arrays images, labels, and not 'camera'",
    ),
}


@pytest.mark.parametrize("what", IMAGES)
def test_an_archive_is_looked_at_without_its_pixels(
    what: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, section, message = IMAGES[what]
    archive(photos, "test.npz", **arrays)
    monkeypatch.setattr("qcompress.tasks.images._pixels", lambda *_: pytest.fail("the pixels were read"))
    reported = images(photos, section)
    assert len(reported) == 1 and message in reported[0], reported


def test_images_that_are_right_are_right(photos: Path) -> None:
    archive(photos, "test.npz")
    assert images(photos) == []


def test_images_that_nothing_resizes_have_the_models_size(photos: Path) -> None:
    archive(photos, "test.npz")
    task = "image-classification, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]"
    size = json.loads((photos / "model" / "config.json").read_text())["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    (reported,) = images(photos, task=task)
    assert (
        f"holds images of 20 x 24, nothing resizes them, and the model takes {height} x {width}" in reported
    )
    assert f"write `size: [{height}, {width}]`, `mean` and `std` under `task`" in reported
    assert images(photos, task=f"{task}, size: [{height}, {width}]") == []


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (None, "holds no preprocessor_config.json"),
        ("{", "is not valid JSON"),
        ({"image_mean": [0.5]}, "image_mean is [0.5], and must be three numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std must be above 0"),
        ({"size": {"height": 5, "width": 5}}, "makes images of 5 x 5"),
    ],
)
def test_an_image_processor_is_looked_at(steps: object, message: str, photos: Path) -> None:
    archive(photos, "test.npz")
    file = photos / "model" / "preprocessor_config.json"
    before = json.loads(file.read_text())
    file.unlink()
    if steps is not None:
        file.write_text(steps if isinstance(steps, str) else json.dumps(before | steps))
    (reported,) = images(photos)
    assert reported.startswith("recipe.yaml:2: model.source: ") and message in reported


# Tags and texts -----------------------------------------------------------------------------------


def test_tags_are_looked_at(tmp_path: Path, text_file: Path) -> None:
    save_encoder(tmp_path / "model", text_file, "bert", TOKEN)
    word_tokenizer().save_pretrained(tmp_path / "model")

    def tags(*rows: dict[str, object]) -> list[str]:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = ("calibration: {table: [a.jsonl]}", "evaluate: {test: {table: [a.jsonl]}}")
        return said(recipe(tmp_path, "bert", f"{TOKEN}, context: 16", *data))

    good = {"tokens": ["a", "film"], "tags": [LABELS[0], 2]}
    assert tags(good) == []
    for bad, message in (
        ({"tokens": ["a"], "tags": ["B-ORG"]}, "a.jsonl:2: the label 'B-ORG' is not one of the model's"),
        ({"tokens": ["a"], "tags": [0, 1]}, "a.jsonl:2: 1 words and 2 tags"),
        ({"tokens": ["\ud800"], "tags": [0]}, "a.jsonl:2: the column 'tokens' holds half a character"),
        ({"tokens": "a film", "tags": [0]}, "a.jsonl:2: 'a film' is not a list"),
    ):
        (mistake,) = tags(good, bad)
        assert message in mistake and "(also data.evaluate.test.table)" in mistake


def language_model(folder: Path, text_file: Path) -> Callable[[str], list[str]]:
    """Writes a text, and says what `check` finds in it."""
    make_model().save_pretrained(folder / "model")
    make_tokenizer(folder / "model", text_file.read_text(encoding="utf-8"))

    def found(text: str) -> list[str]:
        (folder / "train.txt").write_text("a text\n" * 40)
        (folder / "test.txt").write_text(text, encoding="utf-8")
        data = ("calibration: {text: [train.txt]}", "evaluate: {test: {text: [test.txt]}}")
        return said(recipe(folder, "gpt2", "causal-lm, context: 16", *data))

    return found


def test_an_added_token_of_a_language_model(tmp_path: Path, text_file: Path) -> None:
    mistakes_of = language_model(tmp_path, text_file)
    file = tmp_path / "model" / "tokenizer_config.json"
    entry = {
        "content": "<|new|>",
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": True,
    }
    rows = json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"]
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"added_tokens_decoder": {str(rows): entry}}))
    assert mistakes_of("nothing of it\n" * 40) == []
    (mistake,) = mistakes_of("some text <|new|>\n" * 40)
    assert (
        f"the text has the token '<|new|>' of the id {rows}, and the embedding table has {rows} rows"
        in mistake
    )
    assert mistake.startswith("recipe.yaml:6: data.evaluate.test.text: ")


# How much is read ---------------------------------------------------------------------------------


def classified(folder: Path, text_file: Path, rows: int = 40, **wrong: int) -> Path:
    save_encoder(folder / "model", text_file, "bert")
    word_tokenizer().save_pretrained(folder / "model")
    for name in ("train", "test"):
        labels = [LABELS[row % 3] if row != wrong.get(name) else "never" for row in range(rows)]
        lines = ["text,label", *(f"a film {row},{label}" for row, label in enumerate(labels))]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    data = ("calibration: {table: [train.csv]}", "evaluate: {test: {table: [test.csv]}}")
    return recipe(folder, "bert", "sequence-classification, context: 16", *data)


def test_check_looks_at_the_first_rows_and_says_so_and_a_run_looks_at_all(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = classified(tmp_path, text_file, test=30)
    monkeypatch.setattr(data_check, "ROWS", 20)
    _, report, mistakes = all_mistakes(file)
    assert mistakes == []
    assert report.bounded == ("the first 20 rows of each file of data.calibration, data.evaluate.test",)
    done = cli("check", str(file), "--out", str(tmp_path / "runs"))
    assert done.code == 0 and "looked at the first 20 rows of each file of" in done.stdout.replace("\n", " ")
    with pytest.raises(RecipeError, match="test.csv:32: the label 'never' is not one of the model's"):
        check_model(load_recipe(file), tmp_path / "model")
    monkeypatch.setattr(data_check, "ROWS", 41)
    assert len(all_mistakes(file)[2]) == 1


def test_a_run_ends_before_its_first_stage(tmp_path: Path, text_file: Path) -> None:
    """A mistake in an evaluation set was found in `verify`, after hours of training."""
    file = classified(tmp_path, text_file, test=30)
    done = cli("run", str(file), "--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache"))
    assert done.code == 2 and "test.csv:32: the label 'never' is not one of the model's" in done.stderr
    assert not (tmp_path / "cache").exists() and not (tmp_path / "runs").exists()


def test_data_of_the_hub_are_left_to_a_run(tmp_path: Path, text_file: Path) -> None:
    classified(tmp_path, text_file)
    data = ("calibration: {dataset: nobody/nothing}", "evaluate: {test: {table: [test.csv]}}")
    assert all_mistakes(recipe(tmp_path, "bert", "sequence-classification, context: 16", *data))[2] == []


def test_a_larger_tokenizer_whose_extra_tokens_are_not_used_is_legitimate(
    tmp_path: Path, text_file: Path
) -> None:
    file = classified(tmp_path, text_file)
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([f"extra{number}" for number in range(400)])
    tokenizer.save_pretrained(tmp_path / "model")
    assert said(file) == []
    (tmp_path / "test.csv").write_text("text,label\na film,no\na film extra399,yes\n")
    (reported,) = said(file)
    assert "data.evaluate.test.table: example 2 has the token 'extra399' of the id 413" in reported


# Labels of several sets ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test", "fine"),
    [((1, 2, 3), (1, 2, 3), True), ((0, 1, 2), (0, 2, 0), True), ((1, 2, 3), (0, 1, 2), False)],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_number_is_one_label_in_all_sets(
    suffix: str, train: tuple[int, ...], test: tuple[int, ...], fine: bool, tmp_path: Path, text_file: Path
) -> None:
    """Outputs called 1, 2 and 3: a set of 1 to 3 can only hold names, and one of 0 to 2 only indices."""
    save_encoder(tmp_path / "model", text_file, "bert")
    word_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"id2label": {"0": "1", "1": "2", "2": "3"}}))
    for name, labels in (("train", train), ("test", test)):
        rows = [{"text": "a film", "label": label} for label in labels]
        lines = ["text,label", *(f"a film,{label}" for label in labels)]
        lines = lines if suffix == ".csv" else [json.dumps(row) for row in rows]
        (tmp_path / f"{name}{suffix}").write_text("\n".join(lines) + "\n")
    data = (f"calibration: {{table: [train{suffix}]}}", f"evaluate: {{test: {{table: [test{suffix}]}}}}")
    reported = said(recipe(tmp_path, "bert", "sequence-classification, context: 16", *data))
    if fine:
        assert reported == []
    else:
        (mistake,) = reported
        assert mistake.startswith(
            "recipe.yaml:3: task.labels_are: the label 1 is output 0 in data.calibration "
        )
        assert "and output 1 in data.evaluate.test" in mistake
