"""`qcompress init`: columns that are not labels, labels that a classifier reads, and goals that can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from test_first import LABELS, models, refusal, relabelled, rows_of, sentences, started, values, write_table

from qcompress.recipe.check import all_mistakes
from qcompress.tasks.labels import Labels

__all__ = ["models"]  # a fixture

Models = dict[str, Path]


def write_rows(file: Path, header: str, rows: list[str]) -> Path:
    file.write_text("\n".join([header, *rows]) + "\n")
    return file


@pytest.mark.parametrize(
    ("header", "options", "fix"),
    [
        ("id,text,label", {"text_column": "text", "label_column": "id"}, "--label-column label"),
        ("id,text,mood", {"label_column": "id"}, "--label-column mood"),
        ("id,text,label", {"label_column": "text", "text_column": "id"}, "--label-column label"),
        ("id,label,text", {}, "--label-column text --text-column label"),
        ("id,label,mood", {"label_column": "label", "text_column": "mood"},
         "--label-column mood --text-column label"),
    ],
)  # fmt: skip
def test_a_column_of_different_values_is_not_a_label(
    header: str, options: dict[str, str], fix: str, tmp_path: Path, models: Models
) -> None:
    rows = [f"{row},{text},{LABELS[row % 3]}" for row, text in enumerate(sentences(60))]
    said = refusal(tmp_path, models["head"], write_rows(tmp_path / "mine.csv", header, rows), **options)
    assert "--label-column: " in said and "has 60 different values in 60 rows" in said
    assert f"(fix: write {fix})" in said


@pytest.mark.parametrize("name", ["nope", "kind", "Sentiment_of_row"])
def test_an_unknown_column_has_the_likely_label_as_its_fix(name: str, tmp_path: Path, models: Models) -> None:
    rows = [f"{row},{text},{LABELS[row % 3]}" for row, text in enumerate(sentences(60))]
    data = write_rows(tmp_path / "mine.csv", "id,text,label", rows)
    assert "write --label-column label" in refusal(tmp_path, models["head"], data, label_column=name)
    assert "`label`" in refusal(tmp_path, models["head"], data, label_column="lable")


def two_outputs(folder: Path, models: Models, **config: object) -> Path:
    from safetensors.numpy import load_file, save_file

    names = {"0": "bad", "1": "good"}
    model = relabelled(folder, models["head"], id2label=names, label2id={"bad": 0, "good": 1}, **config)
    weights = load_file(model / "model.safetensors")
    weights |= {f"classifier.{part}": weights[f"classifier.{part}"][:2].copy() for part in ("weight", "bias")}
    save_file(weights, model / "model.safetensors")
    return model


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("config", [{"problem_type": "single_label_classification"}, {}])
def test_numbers_with_a_point_are_labels_of_a_classifier(
    config: dict[str, str], suffix: str, tmp_path: Path, models: Models
) -> None:
    model = two_outputs(tmp_path, models, **config)
    begun = started(tmp_path, model, write_table(tmp_path / f"mine{suffix}", (0.0, 1.0)))
    task = values(tmp_path / "recipe.yaml")["task"]
    assert "kind" not in task and begun.chosen["kind"] == "single" and begun.chosen["head"] == "its own"
    assert begun.why["kind"] == "the checkpoint's head has 2 outputs: 1.0 is the label 1"
    assert all_mistakes(tmp_path / "recipe.yaml")[2] == []


def test_numbers_with_a_point_are_a_regression_where_the_head_is_one_and_of_fractions(
    tmp_path: Path, models: Models
) -> None:
    (tmp_path / "a").mkdir()
    started(tmp_path / "a", models["body"], write_table(tmp_path / "a" / "mine.csv", (0.0, 1.0)))
    assert values(tmp_path / "a" / "recipe.yaml")["task"]["labels"] == ["0", "1"]
    for name, cells in {"b": (0.0, 1.0, 2.0, 5.0), "c": (0.0, 0.5, 1.0)}.items():
        (tmp_path / name).mkdir()
        started(tmp_path / name, models["body"], write_table(tmp_path / name / "mine.csv", cells))
        assert values(tmp_path / name / "recipe.yaml")["task"]["kind"] == "regression"


def test_whole_numbers_are_one_label_however_they_are_written() -> None:
    named = Labels(("bad", "good"))
    for cells in ([0.0, 1.0], ["0.0", "1.0"], [0, 1], ["0", "1.00"], [False or 0, "good"], ["bad", 1.0]):
        assert named.read(cells, ["here"] * 2) == [0, 1]
    assert Labels(("2.0", "1.0")).read(["1.0", "2.0", 2.0], ["here"] * 3) == [1, 0, 0]  # names
    assert Labels(("0", "1"), None, "names").read([1.0, 0.0], ["here"] * 2) == [1, 0]


def test_nan_is_an_empty_cell(tmp_path: Path, models: Models) -> None:
    data = write_table(tmp_path / "mine.jsonl", (0.0, 1.0, float("nan")))
    assert "mine.jsonl:3, and 19 more rows: the column text or label is empty" in refusal(
        tmp_path, models["body"], data
    )


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_files_of_all_kinds_agree_on_numbers_with_a_point(kind: str, suffix: str, tmp_path: Path) -> None:
    from pyarrow import parquet, table

    from qcompress.schema.recipe import SequenceClassification, TextData
    from qcompress.tasks.sequence_classification import _read

    file = tmp_path / f"mine{suffix}"
    if suffix == ".parquet":
        parquet.write_table(table({"text": ["a b", "c d", "e f"], "label": [0.0, 1.0, 1.0]}), file)
    else:
        write_table(file, (0.0, 1.0, 1.0), 3)
    task = SequenceClassification(
        name="sequence-classification", kind=kind, labels=["bad", "good"], context=8
    )
    answers = [one["label"] for one in _read(TextData(table=[file.name]), tmp_path, task)]
    assert answers == ([0, 1, 1] if kind == "single" else [[1, 0], [0, 1], [0, 1]])


@pytest.mark.parametrize("cell", [float("nan"), 1.5, float("inf"), -0.5])
def test_other_numbers_are_not_labels(cell: float) -> None:
    from qcompress.errors import UsageError

    with pytest.raises(UsageError, match="row 2: the number") as caught:
        Labels(("bad", "good")).read([1.0, cell], ["row 1", "row 2"])
    assert "write the label of that row, or remove the row; labels are bad, good, or" in caught.value.fix


@pytest.mark.parametrize(
    ("labels", "others"),
    [(["good"] * 59 + ["bad"], "bad 1"), (["good"] * 58 + ["bad", "sad"], "bad 1, sad 1")],
)
def test_a_split_that_would_measure_one_label_is_refused(
    labels: list[str], others: str, tmp_path: Path, models: Models
) -> None:
    rows = [f"{text},{label}" for text, label in zip(sentences(60), labels, strict=True)]
    said = refusal(tmp_path, models["body"], write_rows(tmp_path / "mine.csv", "text,label", rows))
    assert f"only the label good of mine.csv has two different texts; rows of the others: {others}" in said


def test_a_label_of_one_text_cannot_be_measured(tmp_path: Path, models: Models) -> None:
    rows = [*(f"{text},good" for text in sentences(30)), *["the same,bad"] * 30]
    said = refusal(tmp_path, models["body"], write_rows(tmp_path / "mine.csv", "text,label", rows))
    assert "only the label good" in said and "rows of the others: bad 30" in said
    rows = ["the same,bad", "the same,good"] * 20
    said = refusal(tmp_path, models["body"], write_rows(tmp_path / "mine.csv", "text,label", rows))
    assert "one text alone" in said


def test_a_rare_label_is_measured_and_the_floor_can_be_reached(tmp_path: Path, models: Models) -> None:
    rows = [f"{text},{'bad' if row < 2 else 'good'}" for row, text in enumerate(sentences(4000))]
    begun = started(tmp_path, models["body"], write_rows(tmp_path / "mine.csv", "text,label", rows))
    assert {row["label"] for row in rows_of(begun.files["test"])} == {"good", "bad"}
    assert values(tmp_path / "recipe.yaml")["gate"]["float_floor"]["test.accuracy"] == 0.998


def test_a_floor_of_two_folders_of_images_can_be_reached(tmp_path: Path, models: Models) -> None:
    from safetensors.numpy import load_file

    assert load_file(models["vit"] / "model.safetensors")
    for part in ("train", "test"):
        for label in ("round", "square"):
            folder = tmp_path / "photos" / part / label
            folder.mkdir(parents=True)
            for row in range(3):
                Image.new("RGB", (32, 32), (row * 9, 0, 0)).save(folder / f"{row}.png")
    begun = started(tmp_path, models["vit"], tmp_path / "photos")
    assert begun.chosen["gate"]["float_floor"] == {"test.accuracy": 0.75}
    assert json.dumps(begun.chosen["gate"])
