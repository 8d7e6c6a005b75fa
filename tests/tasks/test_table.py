"""Tables of each kind, GLUE's own files, and what is said of a table that cannot be used."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from pyarrow import Table, parquet

from qcompress.errors import UsageError
from qcompress.schema.glue import GLUE
from qcompress.schema.recipe import SequenceClassification, TextData, TokenClassification
from qcompress.tasks import sequence_classification, token_classification
from qcompress.tasks.columns import ColumnError
from qcompress.tasks.labels import Labels
from qcompress.tasks.table import Wanted, read_table, read_whole
from qcompress.tasks.text import fingerprint

ROWS = [
    {"text": 'He said "no, never"', "label": "bad", "number": 1},
    {"text": "caf\u00e9, \u2028 fine", "label": "good", "number": 2},
    {"text": "plain", "label": "bad", "number": 3},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`datasets` keeps what it has read; a test must not find what another one left."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write_table(file: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """A table's rows in the format of the suffix, written by hand."""
    names = list(rows[0])
    if file.suffix == ".parquet":
        parquet.write_table(Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    elif file.suffix == ".csv":

        def quote(cell: Any) -> str:
            return '"' + str(cell).replace('"', '""') + '"'

        lines = [",".join(names), *(",".join(quote(row[name]) for name in names) for row in rows)]
        file.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    else:
        lines = ["\t".join(names), *("\t".join(str(row[name]) for name in names) for row in rows)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


WANTED = Wanted({"text": "text", "label": "label"}, frozenset({"label"}))


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_the_same_rows_come_out_of_every_kind_of_table(suffix: str, tmp_path: Path) -> None:
    write_table(tmp_path / f"data{suffix}")
    table = read_table(TextData(table=[f"data{suffix}"]), tmp_path, WANTED)
    assert table.columns == {"text": [row["text"] for row in ROWS], "label": ["bad", "good", "bad"]}
    assert len(table.places) == 3 and all(f"data{suffix}" in place for place in table.places)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_read_whole_keeps_the_order_of_its_columns(suffix: str, tmp_path: Path) -> None:
    """Eight names: what went through a set has another order in all but one of 40,320 processes."""
    names = ["zeta", "text", "b", "label", "a", "number", "m", "0"]
    rows = [dict.fromkeys(names, "yes"), dict.fromkeys(names, "no")]
    header, found = read_whole(write_table(tmp_path / f"data{suffix}", rows))
    assert header == names and [list(cells) for _, cells in found] == [names, names]


def test_a_csv_cell_may_hold_line_ends_and_a_tsv_cell_keeps_its_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines, one cell",1\n')
    assert read_table(TextData(table=["a.csv"]), tmp_path, WANTED).columns["text"] == ["two\nlines, one cell"]
    (tmp_path / "a.tsv").write_text('text\tlabel\n"open\t1\n"\t0\n')
    assert read_table(TextData(table=["a.tsv"]), tmp_path, WANTED).columns["text"] == ['"open', '"']


def test_several_tables_are_one_after_another_and_have_the_same_columns(tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv")
    write_table(tmp_path / "b.jsonl", ROWS[:1])
    table = read_table(TextData(table=["b.jsonl", "a.csv"]), tmp_path, WANTED)
    assert table.columns["text"] == [row["text"] for row in [ROWS[0], *ROWS]]
    write_table(tmp_path / "c.jsonl", [{"text": "no label"}])
    with pytest.raises(UsageError, match="only some of a.csv, c.jsonl have the column label"):
        read_table(TextData(table=["a.csv", "c.jsonl"]), tmp_path, WANTED)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "sentence,label\nx,1\n", "a.csv has the columns sentence, label, and not 'text'"),
        ("a.csv", "", "a.csv has the columns none, and not 'text'"),
        ("a.csv", "text,label\n", "a.csv has no row"),
        ("a.csv", "text,label\nx,1\ny\n", "a.csv:3: the column 'label' is missing"),
        ("a.csv", "text,label\nx,1,2\n", "a.csv:2: 3 cells, and the header names 2 columns"),
        ("a.csv", 'text,label\n"x"y,1\n', "a.csv:2: "),
        ("a.csv", "text,label,text\nx,1,y\n", "a.csv has the column 'text' more than once"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", '["x"]\n', "a.jsonl:1 is not a JSON object"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x"}\n', "a.jsonl:2: the column 'label' is missing"),
        ("a.parquet", "no parquet", "a.parquet cannot be read as parquet"),
    ],
)
def test_a_table_that_is_broken_is_refused_with_the_place(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message) as refused:
        read_table(TextData(table=[name]), tmp_path, WANTED)
    assert refused.value.fix


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.dataset"])
@pytest.mark.parametrize(
    ("header", "asked", "fix"),
    [
        ("Label", None, 'write `columns: {label: "Label"}`, or rename the column'),
        (" label", None, 'write `columns: {label: " label"}`, or rename the column'),
        ("labels", None, 'write `columns: {label: "labels"}`, or rename the column'),
        ("LABEL ", "label", 'write `columns: {label: "LABEL "}`, or rename the column'),
        ("sentiment", "sentimnet", 'write `columns: {label: "sentiment"}`, or rename the column'),
        ("number", None, None),
    ],
)
def test_a_column_of_nearly_the_right_name_is_pointed_out(
    header: str, asked: str | None, fix: str | None, name: str, tmp_path: Path
) -> None:
    """Without a column `label` a table has no labels: one that is called `Label` was meant."""
    rows = [{"text": "x", header: "1"}]
    if name == "a.dataset":
        write_dataset(tmp_path / "rows", rows)
        data = TextData(dataset="rows")
    else:
        write_table(tmp_path / name, rows)
        data = TextData(table=[name])
    wanted = WANTED if asked is None else Wanted({"text": "text", "label": asked})
    if fix is None:
        assert list(read_table(data, tmp_path, wanted).columns) == ["text"]
        return
    with pytest.raises(ColumnError) as refused:
        read_table(data, tmp_path, wanted)
    assert f"and not {asked or 'label'!r}" in refused.value.message
    assert refused.value.fix == fix and refused.value.role == "label"


def write_dataset(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")


@pytest.mark.parametrize(
    ("name", "separator", "said"),
    [
        ("a.csv", ";", "separated by `;`, and those of a .csv file by a comma"),
        ("a.csv", "\t", "separated by tabs, and those of a .csv file by a comma"),
        ("a.csv", "|", "separated by `|`, and those of a .csv file by a comma"),
        ("a.tsv", ",", "separated by commas, and those of a .tsv file by a tab"),
        ("a.tsv", ";", "separated by `;`, and those of a .tsv file by a tab"),
    ],
)
def test_another_separator_is_named(name: str, separator: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f"text{separator}label\na film, long{separator}1\n")
    for read in (
        lambda: read_table(TextData(table=[name]), tmp_path, WANTED),
        lambda: read_whole(tmp_path / name),
    ):
        with pytest.raises(UsageError, match="has one column") as refused:
            read()
        assert said in refused.value.message and "write it again with" in refused.value.fix


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_cell_may_be_long(suffix: str, tmp_path: Path) -> None:
    """The parser of the standard library refuses cells above 131,072 characters unless it is told not to."""
    long = "word " * 30_000
    write_table(tmp_path / f"a{suffix}", [{"text": long, "label": "1"}])
    before = csv.field_size_limit()
    table = read_table(TextData(table=[f"a{suffix}"]), tmp_path, WANTED)
    assert table.columns["text"] == [long] and csv.field_size_limit() == before


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_name(suffix: str, tmp_path: Path) -> None:
    file = write_table(tmp_path / f"a{suffix}")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    assert list(read_table(TextData(table=[f"a{suffix}"]), tmp_path, WANTED).columns) == ["text", "label"]
    assert read_whole(file)[0] == ["text", "label", "number"]


@pytest.mark.parametrize("cell", ["half \ud83d", "\udc00", "a\ud800\ud800"])
def test_half_a_character_is_named_with_its_row_and_column(cell: str, tmp_path: Path) -> None:
    rows = [{"body": "fine", "label": 0}, {"body": cell, "label": 1}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [{"tokens": ["a"], "tags": [0]}, {"tokens": ["a", cell], "tags": [0, 0]}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    texts = TextData(table=["a.jsonl"], columns={"text": "body"})
    with pytest.raises(ColumnError, match="a.jsonl:2: the column 'body' holds half a character"):
        sequence_classification._read(texts, tmp_path, SequenceClassification(labels=["n", "p"]))
    with pytest.raises(ColumnError, match="b.jsonl:2: the column 'tokens' holds half a character"):
        tags = TokenClassification(labels=["n", "p"])
        token_classification._read(TextData(table=["b.jsonl"]), tmp_path, tags)
    with pytest.raises(UsageError) as refused:
        Labels(("n", "p")).read([cell], ["a.jsonl:2"])
    str(refused.value).encode()  # a terminal can show it


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_the_first_rows_alone_can_be_read(suffix: str, tmp_path: Path) -> None:
    write_table(tmp_path / f"a{suffix}")
    table = read_table(TextData(table=[f"a{suffix}"]), tmp_path, replace(WANTED, most=2))
    assert table.columns["label"] == ["bad", "good"]


def test_text_that_is_not_utf_8_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,1\n", encoding="utf-16")
    (tmp_path / "b.csv").write_bytes(b"text,label\nx\xe9,1\n")
    for name, fix in (("a.csv", "write it as UTF-8; it is UTF-16"), ("b.csv", "write it as UTF-8")):
        with pytest.raises(UsageError, match=f"{name} is not UTF-8") as refused:
            read_table(TextData(table=[name]), tmp_path, WANTED)
        assert refused.value.fix == fix


def test_the_rows_of_a_dataset_are_read_with_the_names_of_its_labels(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["n", "p"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    (tmp_path / "corpus").mkdir()
    rows.to_parquet(tmp_path / "corpus" / "train.parquet")
    table = read_table(TextData(dataset="corpus"), tmp_path, WANTED)
    assert table.columns == {"text": ["a", "b"], "label": [1, 0]} and table.names == ("n", "p")


def test_the_fingerprint_of_tables_is_their_content_and_their_order(tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv")
    write_table(tmp_path / "b.csv", ROWS[:1])
    first = fingerprint(TextData(table=["a.csv", "b.csv"]), tmp_path)
    assert len(first) == 2 and fingerprint(TextData(table=["b.csv", "a.csv"]), tmp_path) != first
    write_table(tmp_path / "b.csv", ROWS[:2])
    assert fingerprint(TextData(table=["a.csv", "b.csv"]), tmp_path) != first


# GLUE ---------------------------------------------------------------------------------------------

HEADERS = {
    "cola": None,
    "sst2": "sentence\tlabel",
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "rte": "index\tsentence1\tsentence2\tlabel",
    "qnli": "index\tquestion\tsentence\tlabel",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "mnli": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
    "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
    "wnli": "index\tsentence1\tsentence2\tlabel",
}
"""First line of each published file."""

LABEL = {"rte": "not_entailment", "qnli": "not_entailment", "mnli": "contradiction", "stsb": "3.8"}


@pytest.mark.parametrize("name", GLUE)
def test_each_published_file_is_read_by_the_name_of_its_task(name: str, tmp_path: Path) -> None:
    assert HEADERS.keys() == GLUE.keys()
    header, label = HEADERS[name], LABEL.get(name, "1")
    cells = {"text": 'one "quote', "pair": "two", "label": label}
    columns = list(GLUE[name].header or header.lstrip("\ufeff").split("\t"))
    of_role = {column: role for role, column in GLUE[name].tsv.items()}
    row = "\t".join(cells[of_role[column]] if column in of_role else "x" for column in columns)
    lines = [line for line in (header, *[row] * 1000, "short") if line]
    (tmp_path / "dev.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    task = SequenceClassification.model_validate({"glue": name})
    rows, *others = sequence_classification._read(TextData(table=["dev.tsv"]), tmp_path, task)
    assert others == [rows] * 999
    assert rows["text"] == 'one "quote' and rows.get("pair") == (None if name in ("cola", "sst2") else "two")
    assert rows["label"] == {"stsb": 3.8, "mnli": 2}.get(name, 1)


@pytest.mark.parametrize(
    ("name", "folder", "train", "dev"),
    [("cola", "CoLA", 8551, 1043), ("sst2", "SST-2", 67349, 872), ("mrpc", "MRPC", 3668, 408),
     ("rte", "RTE", 2490, 277), ("stsb", "STS-B", 5749, 1500)],
)  # fmt: skip
def test_glue_as_it_was_published_is_read_whole(
    name: str, folder: str, train: int, dev: int, assets: Path
) -> None:
    task = SequenceClassification.model_validate({"glue": name})
    for part, count in (("train", train), ("dev", dev)):
        data = TextData(table=[f"{part}.tsv"])
        rows = sequence_classification._read(data, assets / "glue" / folder, task)
        assert len(rows) == count
        labels = {one["label"] for one in rows}
        assert labels == {0, 1} if name != "stsb" else (min(labels), max(labels)) == (0.0, 5.0)
        assert all(one["text"].strip() for one in rows)


def test_files_of_ones_own_may_stand_beside_glue(tmp_path: Path) -> None:
    """The hub's column names, for any other kind of file or where columns are named."""
    write_table(tmp_path / "dev.jsonl", [{"sentence": "a", "label": 1}])
    write_table(tmp_path / "dev.tsv", [{"words": "a", "label": 0}])
    task = SequenceClassification(glue="cola")
    (one,) = sequence_classification._read(TextData(table=["dev.jsonl"]), tmp_path, task)
    (two,) = sequence_classification._read(
        TextData.model_validate({"table": ["dev.tsv"], "columns": {"text": "words"}}), tmp_path, task
    )
    assert (one, two) == ({"text": "a", "label": 1}, {"text": "a", "label": 0})


def test_a_published_file_with_more_than_a_few_broken_lines_is_refused(tmp_path: Path) -> None:
    rows = ["x\tone\ttwo\tentailment"] * 500
    (tmp_path / "dev.tsv").write_text("\n".join([HEADERS["rte"], *rows, "short", "short"]))
    with pytest.raises(UsageError, match="dev.tsv:502: the column 'sentence1' is missing, and of 1 more"):
        sequence_classification._read(
            TextData(table=["dev.tsv"]), tmp_path, SequenceClassification(glue="rte")
        )
