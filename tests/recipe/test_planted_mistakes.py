"""Forty recipes with one mistake each in data, labels, columns, tokenizers and heads: `check` names each of
them with its line, without torch and in seconds.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_bert import LABELS, save_encoder
from word_tokenizer import word_tokenizer

from qcompress.recipe.check import all_mistakes

RECIPE = """\
name: good
model: {family: bert, source: model}
task: {name: sequence-classification, context: 16}
data:
  train: {table: [train.csv]}
  calibration: {table: [lines.jsonl], limit: 8}
  evaluate:
    dev: {table: [dev.jsonl], slices: [language]}
    test:
      table: [test.tsv]
      columns: {text: body, pair: second, label: mark}
format: w8a8
method: lsq
train: {batch_size: 4, phases: {finetune: {steps: 2}}}
build: {here: never}
gate: {recovery: {dev.accuracy: {max-degradation: 0.1}, test.accuracy: {max-degradation: 0.1}}}
"""

TEXTS = ["a very good film", "a bad film", "paris is in rome", "anna is good", "good very-bad", "film film"]

Row = dict[str, Any]


def write(file: Path, rows: list[Row]) -> None:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    with file.open("w", newline="") as stream:
        table = csv.DictWriter(stream, rows[0], delimiter="\t" if file.suffix == ".tsv" else ",")
        table.writeheader()
        table.writerows(rows)


def rows_of(name: str) -> list[Row]:
    rows = [{"text": text, "label": LABELS[row % 3]} for row, text in enumerate(TEXTS)]
    if name == "dev.jsonl":
        return [{**row, "label": place % 3, "language": "de"} for place, row in enumerate(rows)]
    if name == "test.tsv":
        return [{"body": row["text"], "second": "a film", "mark": row["label"]} for row in rows]
    return [{"text": row["text"]} for row in rows] if name == "lines.jsonl" else rows


FILES = ("train.csv", "lines.jsonl", "dev.jsonl", "test.tsv")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("good")
    save_encoder(folder / "model", text_file, "bert")
    word_tokenizer().save_pretrained(folder / "model")
    for name in FILES:
        write(folder / name, rows_of(name))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


# Mistakes -----------------------------------------------------------------------------------------

Plant = Callable[[Path], object]


def cells(name: str, row: int, **values: Any) -> Plant:
    """Other cells in one row of a table; a value of None removes the cell."""

    def plant(folder: Path) -> None:
        rows = rows_of(name)
        rows[row] = {key: value for key, value in (rows[row] | values).items() if value is not None}
        write(folder / name, rows)

    return plant


def renamed(name: str, old: str, new: str | None) -> Plant:
    """Another name of a column; None: without it."""

    def plant(folder: Path) -> None:
        rows = [{new if key == old else key: cell for key, cell in row.items() if new or key != old}
                for row in rows_of(name)]  # fmt: skip
        write(folder / name, rows)

    return plant


def content(name: str, change: Callable[[bytes], bytes]) -> Plant:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def recipe(*edits: tuple[str, str]) -> Plant:
    def plant(folder: Path) -> None:
        text = RECIPE
        for old, new in edits:
            assert text.count(old) == 1
            text = text.replace(old, new)
        (folder / "recipe.yaml").write_text(text)

    return plant


TASK, GATE = "context: 16", RECIPE.splitlines(keepends=True)[-1]


def task(**options: str) -> Plant:
    return recipe((TASK, ", ".join([TASK, *(f"{key}: {value}" for key, value in options.items())])))


def edited(name: str, **values: Any) -> Plant:
    """Other entries in a JSON file of the checkpoint."""

    def plant(folder: Path) -> None:
        file = folder / "model" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return plant


def both(*plants: Plant) -> Plant:
    return lambda folder: [plant(folder) for plant in plants]


def added_token(token: str, number: int) -> Plant:
    def plant(folder: Path) -> None:
        file = folder / "model" / "tokenizer.json"
        whole = json.loads(file.read_text())
        entry = {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
        file.write_text(json.dumps(whole | {"added_tokens": [*whole["added_tokens"], entry]}))

    return plant


def smaller_table(rows: int) -> Plant:
    """The embedding table cut to its first rows."""

    def plant(folder: Path) -> None:
        edited("config.json", vocab_size=rows, pad_token_id=0)(folder)
        resize(folder, "bert.embeddings.word_embeddings.weight", rows)

    return plant


def resize(folder: Path, name: str, rows: int) -> None:
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = np.ascontiguousarray(tensors[name][:rows])
    save_file(tensors, file)


def one_output(folder: Path) -> None:
    edited("config.json", id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})(folder)
    for part in ("weight", "bias"):
        resize(folder, f"classifier.{part}", 1)


def names(*labels: str) -> Plant:
    return edited("config.json", id2label={str(place): label for place, label in enumerate(labels)})


def digits(folder: Path) -> None:
    """A head whose outputs are called 1, 0 and 2, and cells that are its names and its indices."""
    names("1", "0", "2")(folder)
    for name, key in (("train.csv", "label"), ("dev.jsonl", "label"), ("test.tsv", "mark")):
        label = str if name == "test.tsv" else int
        words = {"test.tsv": "21"}.get(name, "012")
        rows = [{**row, key: label(words[place % len(words)])} for place, row in enumerate(rows_of(name))]
        write(folder / name, rows)


MISTAKES: dict[str, tuple[Plant, str, str]] = {
    # columns
    "a capital letter": (
        renamed("train.csv", "label", "Label"),
        "5: data.train.table: ",
        'write `columns: {label: "Label"}`',
    ),
    "a blank before a name": (
        renamed("dev.jsonl", "label", " label"),
        "8: data.evaluate.dev.table: ",
        "has the columns text, ' label', language, and not 'label'",
    ),
    "a text column that is not there": (
        renamed("test.tsv", "body", "bodies"),
        "11: data.evaluate.test.columns.text: ",
        "and not 'body'",
    ),
    "a second text that is not there": (
        renamed("test.tsv", "second", None),
        "11: data.evaluate.test.columns.pair: ",
        "and not 'second'",
    ),
    "a label column that is not there": (
        renamed("test.tsv", "mark", "grade"),
        "11: data.evaluate.test.columns.label: ",
        "and not 'mark'",
    ),
    "a slice that is not there": (
        renamed("dev.jsonl", "language", "lang"),
        "8: data.evaluate.dev.slices: ",
        "and not 'language'",
    ),
    "a column that is there twice": (
        content("train.csv", lambda text: text.replace(b"text,label", b"text,text")),
        "5: data.train.table: ",
        "has the column 'text' more than once",
    ),
    "semicolons": (
        content("train.csv", lambda text: text.replace(b",", b";")),
        "5: data.train.table: ",
        "its cells are separated by `;`",
    ),
    "commas in a .tsv": (
        content("test.tsv", lambda text: text.replace(b"\t", b",")),
        "10: data.evaluate.test.table: ",
        "write it again with a tab between the cells",
    ),
    "labels to train on": (
        renamed("train.csv", "label", None),
        "5: data.train.table: ",
        "has no labels, and the phase finetune trains on them",
    ),
    "labels to measure on": (
        renamed("dev.jsonl", "label", None),
        '16: gate.recovery."dev.accuracy": ',
        "dev has no labels, so accuracy is not measured",
    ),
    # data
    "a file that is not there": (
        lambda folder: (folder / "test.tsv").unlink(),
        "10: data.evaluate.test.table[0]: ",
        "does not exist",
    ),
    "an empty file": (
        content("train.csv", lambda text: b""),
        "5: data.train.table: ",
        "has the columns none",
    ),
    "a header alone": (
        content("train.csv", lambda text: text.splitlines(True)[0]),
        "5: data.train.table: ",
        "has no row",
    ),
    "latin-1": (
        content("test.tsv", lambda text: text + "caf\u00e9\tx\tno\n".encode("latin-1")),
        "10: data.evaluate.test.table: ",
        "is not UTF-8",
    ),
    "utf-16": (
        content("train.csv", lambda text: text.decode().encode("utf-16")),
        "5: data.train.table: ",
        "it is UTF-16",
    ),
    "half a character": (
        cells("dev.jsonl", 2, text="half \ud83d"),
        "8: data.evaluate.dev.table: ",
        "dev.jsonl:3: the column 'text' holds half a character",
    ),
    "half a character to calibrate on": (
        cells("lines.jsonl", 1, text="\udc00"),
        "6: data.calibration.table: ",
        "lines.jsonl:2: the column 'text' holds half a character",
    ),
    "a line that is not JSON": (
        content("dev.jsonl", lambda text: text + b'{"text": \n'),
        "8: data.evaluate.dev.table: ",
        "dev.jsonl:7 is not JSON",
    ),
    "a cell too many": (
        content("train.csv", lambda text: text + b"a,no,film\n"),
        "5: data.train.table: ",
        "train.csv:8: 3 cells, and the header names 2 columns",
    ),
    "a cell too few": (
        content("train.csv", lambda text: text + b"a\n"),
        "5: data.train.table: ",
        "train.csv:8: the column 'label' is missing",
    ),
    "a text that is a number": (
        cells("dev.jsonl", 4, text=12),
        "8: data.evaluate.dev.table: ",
        "dev.jsonl:5: the column 'text' is not text but 12",
    ),
    # labels
    "a name of no label": (
        cells("train.csv", 1, label="never"),
        "5: data.train.table: ",
        "train.csv:3: the label 'never' is not one of the model's",
    ),
    "an index of no label": (
        cells("dev.jsonl", 5, label=3),
        "8: data.evaluate.dev.table: ",
        "dev.jsonl:6: 3 is not the name or the index of a label",
    ),
    "a label that is not published": (
        cells("dev.jsonl", 0, label=-1),
        "8: data.evaluate.dev.table: ",
        "dev.jsonl:1: -1 is not the name or the index of a label",
    ),
    "an empty label": (
        cells("test.tsv", 3, mark=" "),
        "10: data.evaluate.test.table: ",
        "test.tsv:5: an empty field is not a label",
    ),
    "indices where names are said": (
        task(labels_are="names"),
        "8: data.evaluate.dev.table: ",
        "the label '0' is not one of the model's",
    ),
    "two readings": (digits, "3: task.labels_are: ", "train.csv:2: the label 0 can be read in two ways"),
    "labels of another number": (task(labels="[no, yes]"), "3: task.labels: ", "differ in number"),
    "labels in another order": (task(labels="[yes, no, maybe]"), "3: task.labels: ", "differ in order"),
    "labels of other names": (task(labels="[x, y, z]"), "3: task.labels: ", "differ in name"),
    # tokenizers
    "a checkpoint without a tokenizer": (
        lambda folder: (folder / "model" / "tokenizer.json").unlink(),
        "2: model.source: ",
        "holds no tokenizer",
    ),
    "a tokenizer without padding": (
        edited("tokenizer_config.json", pad_token=None),
        "2: model.source: ",
        "the tokenizer has no padding token",
    ),
    "a padding token beyond the table": (
        both(smaller_table(14), edited("tokenizer_config.json", pad_token="<new>")),
        "2: model.source: ",
        "the padding token, '<new>', has the id 14, and the embedding table",
    ),
    "an added token that a set uses": (
        both(smaller_table(14), added_token("masterpiece", 14), cells("test.tsv", 1, body="a masterpiece")),
        "10: data.evaluate.test.table: ",
        "example 2 has the token 'masterpiece' of the id 14",
    ),
    "a tokenizer that is cut": (
        content("model/tokenizer.json", lambda text: text[:-9]),
        "2: model.source: ",
        "tokenizer.json is not valid JSON",
    ),
    "a padding id beyond the table": (
        edited("config.json", pad_token_id=300),
        "2: model.source: ",
        "pad_token_id is 300, and must be a row of the embedding table",
    ),
    # heads
    "a head of several labels": (
        edited("config.json", problem_type="multi_label_classification"),
        "3: task.kind: ",
        "write `kind: multi` under `task`",
    ),
    "a head of one output": (one_output, "3: task.kind: ", "write `kind: regression` under `task`"),
    "a regression of three outputs": (
        recipe((TASK, f"{TASK}, kind: regression"), (GATE, "")),
        "3: task.kind: ",
        "a regression has one output",
    ),
}


def said(folder: Path) -> list[str]:
    return [str(one).replace(f"{folder}/", "") for one in all_mistakes(folder / "recipe.yaml")[2]]


def test_there_are_forty_and_the_recipe_without_one_is_good(good: Path) -> None:
    assert len(MISTAKES) == 40
    assert said(good) == []


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_found_with_its_line(what: str, good: Path, tmp_path: Path) -> None:
    plant, where, message = MISTAKES[what]
    folder = shutil.copytree(good, tmp_path / "case")
    plant(folder)
    start = time.perf_counter()
    reported = said(folder)
    assert time.perf_counter() - start < 10  # 0.1 s on an idle machine
    assert len(reported) == 1, reported
    assert reported[0].startswith(f"recipe.yaml:{where}") and message in reported[0], reported
    assert "(fix: " in reported[0]
