"""One reading for a column of labels, whatever the type of the file that holds it."""

from __future__ import annotations

import csv
import json
from itertools import permutations
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from word_tokenizer import word_tokenizer

from qcompress.errors import UsageError
from qcompress.schema.data import Columns, TextData
from qcompress.schema.tasks import ImageClassification, SequenceClassification, TokenClassification
from qcompress.tasks import image_classification, sequence_classification, token_classification
from qcompress.tasks.labels import Labels

FILES = ("csv", "tsv", "jsonl text", "jsonl", "parquet text", "parquet", "dataset")
"""Types of file; `text`: digits are written as text where the type has integers."""

READ, REFUSED = "read", "refused"


def written(kind: str, cells: list[Any], folder: Path) -> TextData:
    """A table of these labels in a file of this type."""
    suffix, _, text = kind.partition(" ")
    values = [str(cell) if text else cell for cell in cells]
    rows = [{"text": "a film", "label": value} for value in values]
    file = folder / f"data.{suffix}"
    if suffix == "dataset":
        datasets.Dataset.from_list(rows).to_parquet(folder / "rows" / "train.parquet")
        return TextData(dataset="rows")
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["text", "label"], delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return TextData(table=[file.name])


def outputs(data: TextData, folder: Path, **options: Any) -> list[int]:
    task = SequenceClassification(context=8, **options)
    sample_list = sequence_classification.samples(data, folder, word_tokenizer(), task, None)
    return [sample.known["label"] for sample in sample_list]


STARS = ["1", "2", "3", "4", "5"]
NAMED = ["neg", "pos"]
CASES: dict[str, tuple[list[str], list[int], list[int] | None]] = {
    "indices of names": (NAMED, [0, 1, 1], [0, 1, 1]),
    "names that are digits, in order": (["0", "1"], [0, 1, 1], [0, 1, 1]),
    "names that are digits, turned round": (["1", "0"], [0, 1, 1], None),
    "stars by name": (STARS, [1, 2, 5], [0, 1, 4]),
    "stars by index": (STARS, [0, 1, 4], [0, 1, 4]),
    "stars that could be either": (STARS, [1, 2, 4], None),
    "stars that are neither": (STARS, [0, 3, 5], None),
    "years": (["2019", "2020"], [2020, 2019], [1, 0]),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("case", CASES)
def test_a_column_is_read_alike_in_every_type_of_file(case: str, kind: str, tmp_path: Path) -> None:
    names, cells, expected = CASES[case]
    data = written(kind, cells, tmp_path)
    if expected is None:
        with pytest.raises(UsageError) as refused:
            outputs(data, tmp_path, labels=names)
        assert refused.value.fix
    else:
        assert outputs(data, tmp_path, labels=names) == expected


@pytest.mark.parametrize("kind", FILES)
def test_the_recipe_may_say_which_reading_is_meant(kind: str, tmp_path: Path) -> None:
    data = written(kind, [0, 1, 1], tmp_path)
    assert outputs(data, tmp_path, labels=["1", "0"], labels_are="names") == [1, 0, 0]
    assert outputs(data, tmp_path, labels=["1", "0"], labels_are="indices") == [0, 1, 1]


def test_a_column_that_can_be_read_in_two_ways_is_refused_with_both() -> None:
    with pytest.raises(UsageError) as refused:
        Labels(("1", "0")).read(["0", "1"], ["a.csv:2", "a.csv:3"])
    assert refused.value.message == (
        "a.csv:2: the label 0 can be read in two ways: as the name it is output 1, as an index it is output "
        "0, which is called '1'"
    )
    assert refused.value.fix == "write `labels_are: names` or `labels_are: indices` under `task`"


NAMES = (NAMED, STARS, ["1", "0"], ["0", "1", "2"], ["LABEL_0", "LABEL_1"], ["a", "1"])


@pytest.mark.parametrize(("labels_are", "reads"), [(None, 32), ("names", 32), ("indices", 34)])
def test_two_cells_of_different_spelling_never_become_one_output(labels_are: Any, reads: int) -> None:
    """All pairs of small numbers, and of names: they are two outputs, or an error."""
    read = 0
    for names in NAMES:
        words = dict.fromkeys([*map(str, range(6)), *names])
        for one, other in permutations(words, 2):
            if one.isdigit() != other.isdigit():
                continue
            try:
                first, second = Labels(tuple(names), None, labels_are).read([one, other], ["r1", "r2"])
            except UsageError:
                continue
            read += 1
            assert first != second, (names, one, other)
    assert read == reads


def test_what_the_recipe_says_of_the_labels_must_hold() -> None:
    with pytest.raises(UsageError, match="r2: the label '7' is not one of the model's"):
        Labels(("0", "1"), None, "names").read([0, 7], ["r1", "r2"])
    with pytest.raises(UsageError, match="r1: the label 'neg' is not one of the model's"):
        Labels(("neg", "pos"), None, "indices").read(["neg", 1], ["r1", "r2"])
    with pytest.raises(UsageError, match="r2: 2 is not the index of a label"):
        Labels(("neg", "pos"), None, "indices").read([0, 2], ["r1", "r2"])


def test_names_that_differ_in_case_alone_are_told_apart() -> None:
    labels = Labels(("a", "A", "b"))
    assert labels.read(["A", "a", "B"], ["r1", "r2", "r3"]) == [1, 0, 2]


@pytest.mark.parametrize(("names", "expected"), [(NAMED, [1, 0]), (["0", "1"], [1, 0]), (["1", "0"], None)])
def test_several_labels_and_tags_are_read_by_the_same_rule(
    names: list[str], expected: list[int] | None, tmp_path: Path
) -> None:
    (tmp_path / "several.csv").write_text("text,label\na,1\na,0\n")
    (tmp_path / "several.jsonl").write_text('{"text": "a", "label": [1]}\n{"text": "a", "label": 0}\n')
    rows = [{"tokens": ["a", "film"], "tags": tags} for tags in (["1", "-100"], [0, -100])]
    (tmp_path / "tags.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tags = TokenClassification(labels=names, context=8)
    several = SequenceClassification(kind="multi", labels=names, context=8)

    def read(file: str) -> list[Any]:
        module, task = (token_classification, tags) if "tags" in file else (sequence_classification, several)
        found = module.samples(TextData(table=[file]), tmp_path, word_tokenizer(), task, None)
        return [sample.known["label"] for sample in found]

    for file in ("several.csv", "several.jsonl", "tags.jsonl"):
        if expected is None:
            with pytest.raises(UsageError, match="can be read in two ways"):
                read(file)
        else:
            one_hot = [[int(place == output) for place in range(2)] for output in expected]
            assert read(file) == ([[output] for output in expected] if "tags" in file else one_hot)


@pytest.mark.parametrize("cells", [[[0, 1], [1, 1]], [[1.0, 0.0], [0.0, 1.0]], [["0", "1"], ["1", "0"]]])
def test_a_zero_or_a_one_for_each_label_is_not_a_list_of_indices(cells: list[Any], tmp_path: Path) -> None:
    text = "".join(json.dumps({"text": "a", "label": cell}) + "\n" for cell in cells)
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(UsageError, match="every row has 2 numbers 0 or 1, one for each label"):
        outputs(TextData(table=["data.jsonl"]), tmp_path, kind="multi", labels=NAMED)


def test_images_are_read_by_the_same_rule(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "integers.npz", images=images, labels=np.array([1, 0]))
    np.savez(tmp_path / "texts.npz", images=images, labels=np.array(["1", "0"]))
    for name in ("0", "1"):
        (tmp_path / "folder" / name).mkdir(parents=True)
        (tmp_path / "folder" / name / "a.png").write_bytes(b"")  # read when it is opened
    turned = ImageClassification(labels=["1", "0"])

    def read(data: TextData, task: ImageClassification) -> list[int]:
        return [one.known["label"] for one in image_classification._read(data, tmp_path, task)]

    for file in ("integers.npz", "texts.npz"):
        assert read(TextData(npz=[file]), ImageClassification(labels=["no", "yes"])) == [1, 0]
        assert read(TextData(npz=[file]), ImageClassification(labels=["0", "1"])) == [1, 0]
        assert read(TextData(npz=[file], columns=Columns(label="labels")),
                    ImageClassification(labels=["1", "0"], labels_are="names")) == [0, 1]  # fmt: skip
        with pytest.raises(UsageError, match="can be read in two ways"):
            read(TextData(npz=[file]), turned)
    assert read(TextData(folder="folder"), turned) == [1, 0]  # a folder's name is its label's name


def test_a_datasets_own_names_are_names(tmp_path: Path) -> None:
    """`datasets` writes integers and knows their names; a head may have the same names in another order."""
    label = datasets.ClassLabel(names=["0", "1"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    rows = [{"text": "a", "label": label} for label in (0, 1, 1)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows" / "train.parquet")
    assert outputs(TextData(dataset="rows"), tmp_path, labels=["1", "0"]) == [1, 0, 0]
