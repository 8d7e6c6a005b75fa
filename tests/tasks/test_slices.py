"""Columns of a user's own that part an evaluation set: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from pyarrow import Table, parquet

from qcompress.errors import UsageError
from qcompress.schema.recipe import (
    CausalLm,
    ImageClassification,
    SequenceClassification,
    TextData,
    TokenClassification,
)
from qcompress.tasks import TASKS
from qcompress.tasks.slices import MOST, slice_texts

TASK = SequenceClassification(labels=["bad", "good"])
ROWS: list[dict[str, Any]] = [
    {"text": "one", "label": "bad", "language": " de", "fold": 1},
    {"text": "two", "label": "good", "language": "", "fold": 2},
    {"text": "three", "label": "bad", "language": "fr ", "fold": 1},
]
EXPECTED = {"fold": ["1", "2", "1"], "language": ["de", None, "fr"]}


def read(task: Any, data: TextData, base: Path) -> dict[str, list[str | None]]:
    slice_cells = TASKS[task.name].slices(data, base, task)
    return slice_texts(slice_cells.columns, slice_cells.places)


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_the_columns_of_a_table_are_the_same_in_every_form(suffix: str, tmp_path: Path) -> None:
    """Two files in order; surrounding blanks are not part of a value, and an empty cell has none."""
    for name, rows in (("a", ROWS[:2]), ("b", ROWS[2:])):
        file, mark = tmp_path / f"{name}{suffix}", {".tsv": "\t", ".csv": ","}.get(suffix)
        if suffix == ".parquet":
            parquet.write_table(Table.from_pylist(rows), file)
        elif suffix == ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            lines = [mark.join(ROWS[0]), *(mark.join(map(str, row.values())) for row in rows)]
            file.write_text("\n".join(lines) + "\n")
    data = TextData(table=[f"a{suffix}", f"b{suffix}"], slices=["fold", "language"])
    assert read(TASK, data, tmp_path) == EXPECTED
    samples = TASKS[TASK.name]._read(data, tmp_path, TASK)
    assert [one["text"] for one in samples] == ["one", "two", "three"]  # and the samples are what they were


def test_a_row_that_lacks_the_key_has_no_value(tmp_path: Path) -> None:
    rows = [{"tokens": ["a"], "tags": ["O"], "customer": None}, {"tokens": ["b"], "tags": ["O"]},
            {"tokens": ["c"], "tags": ["O"], "customer": True}]  # fmt: skip
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = TextData(table=["dev.jsonl"], slices=["customer"])
    content = read(TokenClassification(labels=["O", "B-X"]), data, tmp_path)
    assert content == {"customer": [None, None, "true"]}


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that `datasets` loads, whose integers have names."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "shelf"
    folder.mkdir()
    features = datasets.Features({
        "text": datasets.Value("string"), "image": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["bad", "good"]),
        "language": datasets.ClassLabel(names=["de", "fr"]), "fold": datasets.Value("int64"),
    })  # fmt: skip
    columns = {"text": ["a", "b", "c"], "image": ["", "", ""], "label": [0, 1, 0], "language": [1, -1, 0],
               "fold": [1, 2, None]}  # fmt: skip
    datasets.Dataset.from_dict(columns, features).to_parquet(folder / "train.parquet")
    return folder


@pytest.mark.parametrize("task", [TASK, ImageClassification(labels=["bad", "good"])])
def test_the_integers_of_a_dataset_are_called_as_it_calls_them(task: Any, shelf: Path) -> None:
    data = TextData(dataset=str(shelf), slices=["language", "fold"])
    assert read(task, data, shelf) == {"language": ["fr", None, "de"], "fold": ["1", "2", None]}
    with pytest.raises(UsageError, match="shelf has the columns .*, and not 'region'"):
        read(task, TextData(dataset=str(shelf), slices=["region"]), shelf)


def test_an_archive_has_an_array_for_each_column(tmp_path: Path) -> None:
    task, images = ImageClassification(labels=["bad", "good"]), np.zeros((3, 2, 2, 3), np.uint8)
    for name, fold in (("a", [1, 2, 1]), ("b", [3, 3, 3])):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=[0, 1, 0], camera=["x", "", "y"], fold=fold,
                 short=[1, 2])  # fmt: skip
    data = TextData(npz=["a.npz", "b.npz"], slices=["camera", "fold"])
    assert read(task, data, tmp_path) == {
        "camera": ["x", None, "y"] * 2,
        "fold": ["1", "2", "1", "3", "3", "3"],
    }
    for name, says in (
        ("region", "a.npz has the arrays .*, and not 'region'"),
        ("short", "3 images, and short"),
    ):
        with pytest.raises(UsageError, match=says):
            read(task, TextData(npz=["a.npz"], slices=[name]), tmp_path)


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        (["de", 3], "b: language is a number .*, and in a text"),
        ([True, 1], "b: language is a number .*, and in a a truth value"),
        ([0.5, 1], "a: language is not an integer: 0.5"),
        ([["de"], "fr"], "a: language is neither text nor a number"),
        (["*", "fr"], "which stands for every value"),
        ([None, " "], "'language' has no value in any sample"),
    ],
)
def test_a_column_that_no_goal_could_name_is_refused(cells: list[Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        slice_texts({"language": cells}, ["a", "b"])


def test_a_column_of_too_many_values_is_a_measure_and_no_slice() -> None:
    cells = list(range(MOST))
    assert slice_texts({"n": cells}, list(map(str, cells)))["n"] == list(map(str, cells))
    with pytest.raises(
        UsageError, match=f"has {MOST + 1} different values, and goals hold for at most {MOST}"
    ):
        slice_texts({"n": [*cells, 500]}, ["x"] * (MOST + 1))
    assert slice_texts({"n": [1.0, float("nan")]}, ["a", "b"]) == {"n": ["1", None]}


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "dev.csv").write_text("text,label,language\na,good,de\n")
    with pytest.raises(UsageError, match="dev.csv has the columns text, label, language, and not 'lang'"):
        read(TASK, TextData(table=["dev.csv"], slices=["lang"]), tmp_path)
    (tmp_path / "twice.csv").write_text("text,label,language,language\na,good,de,fr\n")
    with pytest.raises(UsageError, match="'language' more than once"):
        read(TASK, TextData(table=["twice.csv"], slices=["language"]), tmp_path)
    with pytest.raises(UsageError, match="a window of the whole text"):
        read(CausalLm(), TextData(dataset="x", slices=["language"]), tmp_path)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a", "a"], "names a more than once"),
        (["label"], "is a result of a sample"),
        (["a=b"], "a goal could not"),
        ([" "], "a goal could not"),
        ([], "at least 1 item"),
    ],
)
def test_names_of_slices_are_refused_where_a_goal_could_not_tell_them(names: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TextData(table=["dev.csv"], slices=names)
