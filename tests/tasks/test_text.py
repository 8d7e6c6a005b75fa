"""Text from files and from local datasets, and what is said when there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from qcompress.errors import UsageError
from qcompress.schema.recipe import TextData
from qcompress.tasks.text import fingerprint, read_lines, read_text

ROWS = ["First line.", "", "Third: \u00e9\u4e16\u754c", "last"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`datasets` keeps what it has read; a test must not find what another one left."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write_dataset(folder: Path, kind: str, rows: list[object] = ROWS, column: str = "text") -> Path:
    folder.mkdir(parents=True)
    for split, some in (("train", rows), ("test", rows[:2])):
        if kind == "parquet":
            datasets.Dataset.from_dict({column: some, "number": list(range(len(some)))}).to_parquet(
                folder / f"{split}.parquet"
            )
        else:
            lines = [json.dumps({column: row, "number": index}) for index, row in enumerate(some)]
            (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_files_are_joined_as_they_are_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\u00e9 \r".encode())
    (tmp_path / "b.txt").write_bytes(b"two")
    assert read_text(TextData(text=["a.txt", "b.txt"]), tmp_path) == "one\r\n\u00e9 \rtwo"
    assert read_text(TextData(text=["b.txt", "a.txt", "b.txt"]), tmp_path).startswith("twoone")


def test_a_byte_order_mark_at_the_beginning_of_a_file_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo \xef\xbb\xbf\n")
    data = TextData(text=["a.txt", "b.txt"])
    assert read_text(data, tmp_path) == "one\ntwo \ufeff\n"
    assert read_lines(data, tmp_path) == ["one", "two \ufeff"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_rows_of_a_local_dataset_are_joined_by_blank_lines(tmp_path: Path, kind: str) -> None:
    write_dataset(tmp_path / "corpus", kind)
    data = TextData(dataset="corpus")
    assert read_text(data, tmp_path) == "\n\n".join(ROWS)
    assert read_text(TextData(dataset="corpus", split="test"), tmp_path) == "First line.\n\n"


def test_another_column_can_be_named_and_a_wrong_one_is_answered_with_those_there_are(tmp_path: Path) -> None:
    write_dataset(tmp_path / "corpus", "jsonl", column="sentence")
    assert read_text(TextData(dataset="corpus", column="sentence"), tmp_path) == "\n\n".join(ROWS)
    with pytest.raises(
        UsageError, match="dataset corpus has the columns sentence, number, not 'text'"
    ) as caught:
        read_text(TextData(dataset="corpus"), tmp_path)
    assert "column:" in caught.value.fix


@pytest.mark.parametrize(
    ("column", "rows", "found"), [("number", ROWS, "int"), ("text", ["a", None, "b"], "NoneType")]
)
def test_a_column_that_holds_no_text_is_refused(
    tmp_path: Path, column: str, rows: list[str | None], found: str
) -> None:
    write_dataset(tmp_path / "corpus", "jsonl", rows=rows)
    with pytest.raises(UsageError, match=f"column '{column}' of dataset corpus is not all text: {found}"):
        read_text(TextData(dataset="corpus", column=column), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"split": "nowhere"}, "split nowhere"), ({"config": "other"}, "config other")],
)
def test_a_dataset_that_cannot_be_read_is_a_mistake_of_the_recipe(
    tmp_path: Path, options: dict[str, str], message: str
) -> None:
    write_dataset(tmp_path / "corpus", "jsonl")
    with pytest.raises(UsageError, match=rf"dataset corpus .*{message}.* cannot be read"):
        read_text(TextData(dataset="corpus", **options), tmp_path)


def test_an_empty_directory_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    with pytest.raises(UsageError, match="dataset corpus .* cannot be read"):
        read_text(TextData(dataset="corpus"), tmp_path)


def test_a_file_that_is_not_utf8_is_refused_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UsageError, match=r"latin.txt is not UTF-8 \(invalid continuation byte at byte 3\)"):
        read_text(TextData(text=["latin.txt"]), tmp_path)


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.txt does not exist"):
        read_text(TextData(text=["none.txt"]), tmp_path)


# Fingerprints ----------------------------------------------------------------------------------------


def test_the_fingerprint_of_files_is_their_content_and_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("one")
    first = fingerprint(TextData(text=["a.txt", "b.txt"]), tmp_path)
    assert fingerprint(TextData(text=["sub/a.txt", "b.txt"]), tmp_path) == first
    assert fingerprint(TextData(text=["b.txt", "a.txt"]), tmp_path) != first
    (tmp_path / "b.txt").write_text("two.")
    assert fingerprint(TextData(text=["a.txt", "b.txt"]), tmp_path) != first


def test_the_fingerprint_of_a_local_dataset_is_the_content_of_its_files(tmp_path: Path) -> None:
    write_dataset(tmp_path / "corpus", "jsonl")
    first = fingerprint(TextData(dataset="corpus"), tmp_path)
    assert set(first) == {"train.jsonl", "test.jsonl"}
    with (tmp_path / "corpus" / "test.jsonl").open("a") as stream:
        stream.write('{"text": "more"}\n')
    assert fingerprint(TextData(dataset="corpus"), tmp_path) != first


def test_the_fingerprint_of_a_hub_dataset_is_its_coordinates(tmp_path: Path) -> None:
    data = TextData(dataset="org/corpus", config="raw", split="test", revision="abc")
    others = [
        data.model_copy(update=change) for change in ({"config": "x"}, {"split": "x"}, {"revision": "x"})
    ]
    digests = [json.dumps(fingerprint(one, tmp_path)) for one in (data, *others)]
    assert len(set(digests)) == 4
