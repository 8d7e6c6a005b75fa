"""`qcompress init`: what it makes of a model and of data, and what it refuses."""

from __future__ import annotations

import csv
import doctest
import importlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from jsonschema import Draft202012Validator
from lines import Result, cli, python
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_bert import LABELS, TOKEN, save_encoder
from tiny_vit import LABELS as SHAPES
from tiny_vit import save_vit, write_images
from transformers import AutoConfig, AutoTokenizer
from word_tokenizer import word_tokenizer

from qcompress.cli import completion, init_command
from qcompress.cli.init import lengths, write
from qcompress.cli.init.options import InitOptions
from qcompress.cli.init.start import InitResult, begin
from qcompress.errors import QcompressError
from qcompress.models import FAMILIES
from qcompress.recipe.check import all_mistakes

WORDS = ("one", "two", "three", "four", "five", "six", "red", "blue", "green", "small", "large", "old")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, Path]:
    """Checkpoints: a body without a head, heads of three labels, of tags, of images. Read only."""
    folder = tmp_path_factory.mktemp("models")
    body = save_encoder(folder / "body", text_file, "bert", bare=True)
    config = json.loads((body / "config.json").read_text())
    (body / "config.json").write_text(json.dumps(config | {"id2label": {}, "label2id": {}}))
    word_tokenizer().save_pretrained(body)
    return {
        "body": body,
        "head": save_encoder(folder / "head", text_file, "bert"),
        "tags": save_encoder(folder / "tags", text_file, "distilbert", TOKEN),
        "vit": save_vit(folder / "vit"),
    }


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) + f" {row}" for row in range(count)]


def write_table(
    file: Path, labels: tuple[Any, ...] = ("good", "bad"), count: int = 60, **columns: str
) -> Path:
    """A table of texts and labels in turn, with the columns `text` and `label` under these names."""
    names = [columns.get("text", "text"), columns.get("label", "label")]
    rows = [[text, labels[row % len(labels)]] for row, text in enumerate(sentences(count))]
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    else:
        with file.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, delimiter="\t" if file.suffix == ".tsv" else ",").writerows([names, *rows])
    return file


def started(folder: Path, model: Path, data: Path, **options: Any) -> InitResult:
    defaults = {"model": model, "data": data, "target": "rtx-ada", "out": folder / "recipe.yaml"}
    return begin(InitOptions(**{**defaults, **options}))


def refusal(folder: Path, model: Path | None, data: Path | None, **options: Any) -> str:
    """Message of a refused `init`, after a check that nothing was written or changed."""
    before = {file: file.read_bytes() for file in files(folder)}
    with pytest.raises(QcompressError, match=r"[a-z]") as caught:
        started(folder, model, data, **options)
    assert caught.value.exit_code == 2
    assert {file: file.read_bytes() for file in files(folder)} == before
    return str(caught.value)


def files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def values(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def rows_of(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


# What is written ----------------------------------------------------------------------------------


def test_a_checkpoint_without_a_head_is_fine_tuned_by_a_recipe_of_its_own(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begun = started(Path(), models["body"], write_table(Path("mine.csv")))
    assert set(begun.files) == {"recipe", "train", "test", "float"}
    assert all_mistakes(Path("recipe-float.yaml"))[2] == []
    first, then = values(Path("recipe-float.yaml")), values(Path("recipe.yaml"))
    assert first["method"] == first["format"] == "float" and first["task"]["labels"] == ["bad", "good"]
    assert then["task"] == first["task"] and then["model"]["run"] == f"runs/{first['name']}/latest"
    (mistake,) = all_mistakes(Path("recipe.yaml"))[2]
    assert mistake.key == "model.run" and "does not exist" in mistake.message
    assert begun.commands == [
        "qcompress check recipe-float.yaml", "qcompress run recipe-float.yaml --smoke",
        "qcompress run recipe-float.yaml", "qcompress check recipe.yaml", "qcompress run recipe.yaml",
    ]  # fmt: skip


@pytest.mark.slow
def test_both_recipes_run(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    started(Path(), models["body"], write_table(Path("mine.csv")), target="cpu")
    short = ["--set", "train.phases.finetune.steps=2", "--set", "gate.recovery="]
    done = cli("run", "recipe-float.yaml", *short)
    assert done.code == 0, done.stderr
    assert cli("check", "recipe.yaml").code == 0
    done = cli("run", "recipe.yaml", "--smoke")
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("unjudged  bert-mine-w8a8-smoke")


@pytest.mark.parametrize("labels", [("no", "yes", "maybe"), ("YES", "No"), (0, 1, 2)])
def test_a_checkpoint_of_the_datas_labels_is_quantized_as_it_is(
    labels: tuple[Any, ...], tmp_path: Path, models: dict[str, Path]
) -> None:
    begun = started(tmp_path, models["head"], write_table(tmp_path / "mine.csv", labels))
    assert set(begun.files) == {"recipe", "train", "test"} and begun.chosen["head"] == "its own"
    recipe = values(tmp_path / "recipe.yaml")
    assert "labels" not in recipe["task"] and recipe["method"] == "ptq"
    assert recipe["format"] == {"preset": "w8a8", "layers": {"classifier": "float"}}
    assert all_mistakes(tmp_path / "recipe.yaml")[2] == []


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_a_head_of_other_labels_is_left_out(tmp_path: Path, models: dict[str, Path], wrapper: str) -> None:
    source = shutil.copytree(models["head"], tmp_path / "head")
    tensors = load_file(source / "model.safetensors")
    save_file({f"{wrapper}{name}": value for name, value in tensors.items()}, source / "model.safetensors")
    begun = started(tmp_path, source, write_table(tmp_path / "mine.csv", ("a", "b", "c", "d")))
    assert begun.chosen["head"] == "of other labels"
    assert "the checkpoint's head is for no, yes, maybe, the data have a, b, c, d" in begun.why["head"]
    old = load_file(models["head"] / "model.safetensors")
    new = load_file(tmp_path / "recipe-model" / "model.safetensors")
    assert set(old) - set(new) == {"classifier.weight", "classifier.bias"}
    assert len(new) > 20 and all((new[name] == old[name]).all() for name in new)
    assert "id2label" not in json.loads((tmp_path / "recipe-model" / "config.json").read_text())
    assert all_mistakes(tmp_path / "recipe-float.yaml")[2] == []
    assert values(tmp_path / "recipe-float.yaml")["model"]["source"] == "recipe-model"


def test_the_method_float_is_one_recipe(tmp_path: Path, models: dict[str, Path]) -> None:
    data = write_table(tmp_path / "mine.csv")
    begun = started(tmp_path, models["body"], data, method="float")
    assert set(begun.files) == {"recipe", "train", "test"}
    recipe = values(tmp_path / "recipe.yaml")
    assert recipe["name"] == "bert-mine-float" and recipe["format"] == "float"
    assert recipe["gate"] == {"recovery": {"test.accuracy": {"threshold": 0.5}}}
    assert "quantizes" not in (tmp_path / "recipe.yaml").read_text()
    assert all_mistakes(tmp_path / "recipe.yaml")[2] == []


def test_lines_without_labels_are_measured_by_agreement(tmp_path: Path, models: dict[str, Path]) -> None:
    (tmp_path / "mine.txt").write_text("\n".join(sentences(100)))
    started(tmp_path, models["head"], tmp_path / "mine.txt")
    recipe = values(tmp_path / "recipe.yaml")
    assert "train" not in recipe["data"] and list(recipe["gate"]["recovery"]) == ["test.agreement"]
    assert recipe["gate"]["regression"] == recipe["gate"]["recovery"]
    (tmp_path / "again").mkdir()
    out = {"out": tmp_path / "again" / "recipe.yaml"}
    said = refusal(tmp_path, models["head"], tmp_path / "mine.txt", method="lsq", **out)
    assert "init: data.train: is missing: the phase finetune trains" in said


def test_labels_of_a_checkpoint_without_a_head_bind_nobody(tmp_path: Path, models: dict[str, Path]) -> None:
    shutil.copytree(models["body"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"id2label": {"0": "p", "1": "q"}}))
    started(tmp_path, tmp_path / "model", write_table(tmp_path / "mine.csv"))
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "recipe-model"))
    assert set(old) == set(new)
    assert values(tmp_path / "recipe-float.yaml")["task"]["labels"] == ["bad", "good"]


def test_outputs_that_nobody_named_are_pointed_out(tmp_path: Path, models: dict[str, Path]) -> None:
    shutil.copytree(models["head"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["id2label"] = {str(index): f"LABEL_{index}" for index in range(3)}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"label2id": {}}))
    begun = started(tmp_path, tmp_path / "model", write_table(tmp_path / "mine.csv", ("x", "z", "y")))
    assert values(tmp_path / "recipe.yaml")["task"]["labels"] == ["x", "y", "z"]
    assert len(begun.notes) == 1 and "alphabetical order (x, y, z)" in begun.notes[0]
    assert "# Note: the outputs of this checkpoint have no names" in (tmp_path / "recipe.yaml").read_text()


def test_numbers_are_a_regression_and_their_head_is_trained(tmp_path: Path, models: dict[str, Path]) -> None:
    started(tmp_path, models["body"], write_table(tmp_path / "mine.csv", (0.5, 1.25, 3.0)))
    recipe = values(tmp_path / "recipe.yaml")
    assert recipe["task"]["kind"] == "regression" and "labels" not in recipe["task"]
    assert list(recipe["gate"]["recovery"]) == list(recipe["gate"]["regression"]) == ["test.spearman"]


def relabelled(folder: Path, model: Path, **config: Any) -> Path:
    """A copy of a checkpoint with other entries in config.json."""
    shutil.copytree(model, folder / "model")
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder / "model"


def test_the_kind_comes_from_the_checkpoint(tmp_path: Path, models: dict[str, Path]) -> None:
    """One label a row is one of several labels where the head answers each of them by itself."""
    model = relabelled(tmp_path, models["head"], problem_type="multi_label_classification")
    begun = started(tmp_path, model, write_table(tmp_path / "mine.csv", ("no", "yes", "maybe")))
    recipe = values(tmp_path / "recipe.yaml")
    assert recipe["task"]["kind"] == "multi" and begun.chosen["head"] == "its own"
    assert begun.why["kind"] == "config.json says multi_label_classification"
    assert list(recipe["gate"]["recovery"]) == list(recipe["gate"]["regression"]) == ["test.f1_micro"]
    assert all_mistakes(tmp_path / "recipe.yaml")[2] == []


def test_whole_numbers_are_the_regression_that_the_checkpoint_was_trained_for(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    model = relabelled(tmp_path, models["head"], id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    weights = load_file(model / "model.safetensors")
    weights |= {f"classifier.{part}": weights[f"classifier.{part}"][:1].copy() for part in ("weight", "bias")}
    save_file(weights, model / "model.safetensors")
    begun = started(tmp_path, model, write_table(tmp_path / "mine.csv", (1, 2, 3, 4, 5)))
    assert values(tmp_path / "recipe.yaml")["task"]["kind"] == "regression"
    assert begun.chosen["head"] == "its own" and begun.why["kind"] == "the checkpoint's head gives a number"
    assert all_mistakes(tmp_path / "recipe.yaml")[2] == []


@pytest.mark.parametrize(("labels", "stated"), [((1, 2, 3), "names"), ((0, 1, 2), "indices")])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_labels_that_are_digits_are_said_to_be_names_or_indices(
    suffix: str, labels: tuple[int, ...], stated: str, tmp_path: Path, models: dict[str, Path]
) -> None:
    """Cells 1 and 2 of a part of the data would be names and indices."""
    model = relabelled(tmp_path, models["head"], id2label={"0": "1", "1": "2", "2": "3"})
    started(tmp_path, model, write_table(tmp_path / f"mine{suffix}", labels))
    assert values(tmp_path / "recipe.yaml")["task"]["labels_are"] == stated
    assert all_mistakes(tmp_path / "recipe.yaml")[2] == []


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_labels_that_can_be_read_in_two_ways_are_asked_for(
    suffix: str, tmp_path: Path, models: dict[str, Path]
) -> None:
    model = relabelled(tmp_path, models["head"], id2label={"0": "2", "1": "1", "2": "0"})
    data = write_table(tmp_path / f"mine{suffix}", (0, 1, 2))
    said = refusal(tmp_path, model, data)
    assert (
        "the label 0 can be read in two ways: as the name it is output 2, as an index it is output 0" in said
    )
    assert "say `--labels-are names` or `--labels-are indices`" in said
    started(tmp_path, model, data, labels_are="names")
    assert values(tmp_path / "recipe.yaml")["task"]["labels_are"] == "names"


def test_a_table_of_words_and_tags(tmp_path: Path, models: dict[str, Path]) -> None:
    rows = [{"tokens": text.split(), "tags": [LABELS[len(word) % 3] for word in text.split()]}
            for text in sentences(40)]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    started(tmp_path, models["tags"], tmp_path / "mine.jsonl", target="cpu")
    recipe = values(tmp_path / "recipe.yaml")
    assert recipe["task"]["name"] == "token-classification" and recipe["build"] == {"target": "cpu"}
    assert recipe["data"]["evaluate"]["test"]["columns"] == {"tokens": "tokens", "tags": "tags"}


@pytest.mark.slow
def test_a_text_is_for_a_language_model(tmp_path: Path, tiny_model: Path, text_file: Path) -> None:
    shutil.copyfile(text_file, tmp_path / "mine.txt")
    begun = started(tmp_path, tiny_model, tmp_path / "mine.txt")
    assert begun.chosen["method"] == "quadapter"
    joined = (tmp_path / "mine-train.txt").read_bytes() + (tmp_path / "mine-test.txt").read_bytes()
    assert joined == text_file.read_bytes()
    share = len((tmp_path / "mine-test.txt").read_bytes()) / len(joined)
    assert 0.05 < share <= 0.1
    done = cli("run", tmp_path / "recipe.yaml", "--smoke", "--out", tmp_path / "runs")
    assert done.code == 0, done.stderr


def test_folders_of_images(tmp_path: Path, models: dict[str, Path]) -> None:
    for part in ("train", "test"):
        for label in SHAPES:
            (tmp_path / "photos" / part / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "photos" / part / label / "one.png")
    started(tmp_path, models["vit"], tmp_path / "photos")
    recipe = values(tmp_path / "recipe.yaml")
    assert recipe["data"]["evaluate"] == {"test": {"folder": "photos/test"}}
    assert recipe["build"]["profiles"] == [{"batch": [1, 8, 32]}]
    archive = write_images(tmp_path) / "images.npz"
    said = refusal(tmp_path, models["vit"], archive, out=tmp_path / "other.yaml")
    assert "init does not split archives" in said
    (tmp_path / "noise.txt").write_bytes(b"\xff\xfe\x00")
    assert "neither a table nor UTF-8 text" in refusal(tmp_path, models["vit"], tmp_path / "noise.txt")


@pytest.mark.parametrize(
    ("target", "compute"), [("rtx-turing", "fp16"), ("rtx-ada", None), ("cpu", None), ("t4", None)]
)
def test_the_target_decides_what_is_computed_in(
    target: str, compute: str | None, tmp_path: Path, models: dict[str, Path]
) -> None:
    data = write_table(tmp_path / "mine.csv", LABELS)
    started(tmp_path, models["head"], data, target=target)
    assert values(tmp_path / "recipe.yaml")["format"].get("compute") == compute


# Splits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_the_two_parts_are_the_file_and_labels_keep_their_shares(
    suffix: str, tmp_path: Path, models: dict[str, Path]
) -> None:
    data = write_table(tmp_path / f"mine{suffix}", ("no", "no", "yes"), 300)
    started(tmp_path, models["head"], data)
    parts = [rows_of_any(tmp_path / f"mine-{part}{suffix}") for part in ("train", "test")]
    assert [len(part) for part in parts] == [210, 90]
    assert Counter(map(str, [*parts[0], *parts[1]])) == Counter(map(str, rows_of_any(data)))
    for part in parts:
        assert Counter(row["label"] for row in part)["yes"] == len(part) // 3


def rows_of_any(file: Path) -> list[dict[str, Any]]:
    if file.suffix != ".tsv":
        return rows_of(file)
    lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def test_what_is_measured_was_not_trained_on(tmp_path: Path, models: dict[str, Path]) -> None:
    """Rows with the same text stay together, whatever their cells hold."""
    texts = ['he said "no", twice', "two\nlines", "tab\there", "plain"] + sentences(16)
    rows = [{"text": text, "label": LABELS[index % 2]} for index, text in enumerate(texts)]
    with (tmp_path / "mine.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows * 5)
    started(tmp_path, models["head"], tmp_path / "mine.csv")
    train, test = (rows_of(tmp_path / f"mine-{part}.csv") for part in ("train", "test"))
    assert len(train) + len(test) == 100 and len(test) >= 20
    assert {row["text"] for row in train} | {row["text"] for row in test} == set(texts)
    assert not {row["text"] for row in train} & {row["text"] for row in test}


def test_a_parquet_table_is_split_into_lines_of_json(tmp_path: Path, models: dict[str, Path]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = rows_of(write_table(tmp_path / "rows.jsonl", LABELS))
    table = importlib.import_module("pyarrow").Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "mine.parquet")
    started(tmp_path, models["head"], tmp_path / "mine.parquet")
    parts = [rows_of(tmp_path / f"mine-{part}.jsonl") for part in ("train", "test")]
    assert Counter(map(str, [*parts[0], *parts[1]])) == Counter(map(str, rows)) and len(parts[1]) == 18


def test_of_many_rows_not_all_are_measured_on(tmp_path: Path, models: dict[str, Path]) -> None:
    started(tmp_path, models["head"], write_table(tmp_path / "mine.csv", LABELS, 12_000))
    assert len(rows_of(tmp_path / "mine-test.csv")) == 2001  # 667 of each of three labels


# Columns ------------------------------------------------------------------------------------------


def test_columns_are_found_by_what_they_hold(tmp_path: Path, models: dict[str, Path]) -> None:
    data = write_table(tmp_path / "mine.csv", LABELS, text="Satz", label="Urteil")
    started(tmp_path, models["head"], data)
    columns = values(tmp_path / "recipe.yaml")["data"]["calibration"]["columns"]
    assert columns == {"text": "Satz", "label": "Urteil"}


def test_a_column_with_gaps_is_no_label(tmp_path: Path, models: dict[str, Path]) -> None:
    """As CoLA's column of marks, which are `*` or nothing."""
    rows = [[("*", "")[row % 2], text, LABELS[row % 3]] for row, text in enumerate(sentences(60))]
    with (tmp_path / "mine.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["mark", "words", "answer"], *rows])
    started(tmp_path, models["head"], tmp_path / "mine.csv")
    columns = values(tmp_path / "recipe.yaml")["data"]["evaluate"]["test"]["columns"]
    assert columns == {"text": "words", "label": "answer"}


def test_a_second_text_is_found_by_its_name_asked_for_or_pointed_out(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    def folder(name: str, *header: str) -> Path:
        (tmp_path / name).mkdir()
        rows = [[text, text[::-1], LABELS[row % 3]] for row, text in enumerate(sentences(60))]
        with (tmp_path / name / "mine.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([header, *rows])
        return tmp_path / name

    def columns(where: Path) -> dict[str, str]:
        return values(where / "recipe.yaml")["data"]["evaluate"]["test"]["columns"]

    here = folder("named", "sentence1", "sentence2", "label")
    assert started(here, models["head"], here / "mine.csv").notes == []
    assert columns(here)["pair"] == "sentence2"
    here = folder("asked", "text", "other", "label")
    assert "--pair-column" in refusal(here, models["head"], here / "mine.csv", pair_column="otter")
    assert started(here, models["head"], here / "mine.csv", pair_column="other").notes == []
    assert columns(here)["pair"] == "other"
    here = folder("unread", "text", "other", "label")
    assert started(here, models["head"], here / "mine.csv").notes == [
        "the text of other is not read; where examples are pairs, add --pair-column 'other'"
    ]
    assert "pair" not in columns(here)


def test_a_file_without_a_header_line_gets_one(tmp_path: Path, models: dict[str, Path]) -> None:
    data = write_table(tmp_path / "mine.csv", ("no", "yes"))
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    begun = started(tmp_path, models["head"], data)
    assert begun.found["data"]["header"] is False and begun.found["data"]["rows"] == 60
    assert set(rows_of(tmp_path / "mine-test.csv")[0]) == {"column1", "column2"}


def test_columns_that_could_be_either_are_asked_for(tmp_path: Path, models: dict[str, Path]) -> None:
    rows = [[text, LABELS[row % 3], ("x", "y")[row % 2]] for row, text in enumerate(sentences(60))]
    with (tmp_path / "mine.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["words", "first", "second"], *rows])
    data = tmp_path / "mine.csv"
    said = refusal(tmp_path, models["head"], data)
    assert "second, first could all be the label (fix: say which with --label-column second)" in said
    assert "did you mean `first`?" in refusal(tmp_path, models["head"], data, label_column="fist")
    asked = InitOptions(models["head"], data, "cpu", tmp_path / "recipe.yaml")
    questions = []
    begin(asked, lambda question, words: questions.append((question, words)) or words[0])
    assert questions == [("Which column holds the label?", ["second", "first"])]
    assert values(tmp_path / "recipe.yaml")["data"]["calibration"]["columns"]["label"] == "second"


def test_examples_in_docstrings_are_true() -> None:
    for module in (lengths, write, completion):
        outcome = doctest.testmod(module)
        assert outcome.attempted and not outcome.failed


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["recipe.yaml", "mine-train.csv", "mine-test.csv", "recipe.schema.json"])
def test_nothing_is_ever_overwritten(what: str, tmp_path: Path, models: dict[str, Path]) -> None:
    data = write_table(tmp_path / "mine.csv", LABELS)
    (tmp_path / what).write_text("precious")
    said = refusal(tmp_path, models["head"], data, with_schema=True)
    other = " with other content than the split of --data" if what.startswith("mine") else ""
    assert f"{tmp_path / what} exists{other}, and nothing is overwritten" in said


@pytest.mark.parametrize("name", ["mine.csv", "mine.tsv", "mine.jsonl", "mine.txt"])
def test_a_second_recipe_takes_the_split_that_is_there(
    name: str, tmp_path: Path, models: dict[str, Path]
) -> None:
    data = tmp_path / name
    if name == "mine.txt":
        data.write_text("\n".join(sentences(100)))
    else:
        write_table(data, LABELS)
    first = started(tmp_path, models["head"], data)
    before = {part: first.files[part].read_bytes() for part in ("train", "test")}
    times = {part: first.files[part].stat().st_mtime_ns for part in before}
    second = started(tmp_path, models["head"], data, out=tmp_path / "other.yaml", format="w8a16")
    assert {part: second.files[part].read_bytes() for part in before} == before
    assert {part: second.files[part].stat().st_mtime_ns for part in before} == times
    assert sum("exists already, with the same split" in note for note in second.notes) == 2
    assert all_mistakes(tmp_path / "other.yaml")[2] == []


def test_a_refused_recipe_leaves_the_split_that_was_there(tmp_path: Path, models: dict[str, Path]) -> None:
    data = write_table(tmp_path / "mine.csv", LABELS)
    started(tmp_path, models["head"], data)
    options = {"out": tmp_path / "other.yaml", "format": "w4a16-g32", "target": "rtx-turing"}
    assert "int4" in refusal(tmp_path, models["head"], data, **options)
    assert (tmp_path / "mine-train.csv").is_file() and (tmp_path / "mine-test.csv").is_file()


def test_a_table_with_other_separators_is_said_to_be_one(tmp_path: Path, models: dict[str, Path]) -> None:
    data = write_table(tmp_path / "mine.csv", LABELS)
    data.write_text(data.read_text().replace(",", ";"))
    said = refusal(tmp_path, models["head"], data)
    assert "its cells are separated by `;`" in said and "write it again with a comma" in said


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    said = refusal(tmp_path, tmp_path / "no-model", tmp_path / "no-data.csv", target="rtx-adda",
                   method="lsg", format="w8a9", out=tmp_path / "absent" / "recipe.txt")  # fmt: skip
    assert "no recipe was written: 7 mistakes:" in said
    for word in ("--model: ", "--data: ", "rtx-ada`?", "`lsq`?", "`w8a8`?", "is not a directory", ".yaml"):
        assert word in said


def test_an_unknown_family_is_refused_with_those_that_are_known(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    shutil.copytree(models["head"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(config | {"model_type": "bart", "architectures": []})
    )
    said = refusal(tmp_path, tmp_path / "model", write_table(tmp_path / "mine.csv"))
    assert f"known families: {', '.join(FAMILIES)}" in said and "the nearest is bert" in said


def discovered(folder: Path, tokenizer: Path, model_type: str, ending: str, **values: Any) -> Path:
    """A tiny checkpoint of an architecture without a family of its own."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        model_type, vocab_size=400, max_position_embeddings=64, pad_token_id=0, **sizes, **values
    )
    getattr(transformers, f"AutoModelFor{ending}").from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def test_any_architecture_is_begun_by_the_class_in_its_config(
    tmp_path: Path, models: dict[str, Path], text_file: Path
) -> None:
    names = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    model = discovered(
        tmp_path / "ernie", models["head"], "ernie", "SequenceClassification", type_vocab_size=2, **names
    )
    begun = started(tmp_path, model, write_table(tmp_path / "mine.csv"))
    assert begun.chosen["method"] == "ptq"
    recipe = values(tmp_path / "recipe.yaml")
    assert recipe["model"]["family"] == "text-model" and recipe["name"] == "ernie-mine-w8a8"
    assert recipe["task"]["name"] == "sequence-classification"

    other = write_table(tmp_path / "other.csv", labels=("x", "y", "z"))
    started(tmp_path, model, other, out=tmp_path / "other.yaml")
    kept = load_file(tmp_path / "other-model" / "model.safetensors")
    assert kept and all(name.startswith("ernie.") for name in kept)


@pytest.mark.parametrize(
    ("form", "method"), [("w4a16-g32", "awq"), ("w8a8", "quadapter"), ("w4a8", "quadapter")]
)
def test_a_discovered_decoder_is_rescaled_at_all_sites(
    form: str, method: str, tmp_path: Path, models: dict[str, Path], text_file: Path
) -> None:
    shutil.copyfile(text_file, tmp_path / "mine.txt")
    model = discovered(tmp_path / "llama", models["head"], "llama", "CausalLM", num_key_value_heads=1)
    assert started(tmp_path, model, tmp_path / "mine.txt", format=form).chosen["method"] == method
    recipe = values(tmp_path / "recipe.yaml")
    assert recipe["adapter"] == {"name": method, "sites": "all"}


def test_a_text_is_for_the_task_of_the_checkpoint(
    tmp_path: Path, models: dict[str, Path], text_file: Path
) -> None:
    shutil.copyfile(text_file, tmp_path / "mine.txt")
    model = discovered(tmp_path / "ernie", models["head"], "ernie", "MaskedLM", type_vocab_size=2)
    started(tmp_path, model, tmp_path / "mine.txt")
    assert values(tmp_path / "recipe.yaml")["task"]["name"] == "fill-mask"
    for file in tmp_path.glob("mine-*"):
        file.unlink()
    started(tmp_path, models["body"], tmp_path / "mine.txt", out=tmp_path / "body.yaml")
    assert values(tmp_path / "body.yaml")["task"]["name"] == "feature-extraction"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\n", "has 0 rows"),
        ("text,label\n" + "a b,x\n" * 30, "label is x everywhere"),
        ("text,label\n" + "a b,x\nc,y\n" * 15 + ",y\n", "mine.csv:32: the column text or label is empty"),
        ("text,label\n" + "a b,x,y\n" * 30, "3 cells, and the header names 2 columns"),
        ("text,label\n" + "a b,x\nc,y\n" * 15 + "a b\n", "mine.csv:32 has fewer cells"),
    ],
)
def test_data_that_cannot_be_used(text: str, message: str, tmp_path: Path, models: dict[str, Path]) -> None:
    (tmp_path / "mine.csv").write_text(text)
    assert message in refusal(tmp_path, models["head"], tmp_path / "mine.csv")


def test_model_and_data_that_do_not_go_together(
    tmp_path: Path, models: dict[str, Path], tiny_model: Path, text_file: Path
) -> None:
    table = write_table(tmp_path / "mine.csv", LABELS)
    assert "a gpt2 model carries causal-lm" in refusal(tmp_path, tiny_model, table)
    assert "name a folder with train/LABEL/" in refusal(tmp_path, models["vit"], table)
    assert "lacks folders `train` and `test`" in refusal(tmp_path, models["vit"], models["vit"])
    shutil.copyfile(text_file, tmp_path / "mine.txt")
    assert "names the labels" in refusal(
        tmp_path, models["body"], tmp_path / "mine.txt", task="sequence-classification"
    )


def test_a_recipe_that_check_refuses_is_not_left_behind(tmp_path: Path, models: dict[str, Path]) -> None:
    """Widths of 64 do not divide into blocks of 128, and no Turing multiplies 4-bit weights."""
    data = write_table(tmp_path / "mine.csv", LABELS)
    assert "--format" in refusal(tmp_path, models["head"], data, format="w4a16-g128")
    assert "int4" in refusal(tmp_path, models["body"], data, format="w4a16-g32", target="rtx-turing")
    assert [file.name for file in files(tmp_path)] == ["mine.csv"]


# The command --------------------------------------------------------------------------------------


def command(folder: Path, model: Path, data: Path, *more: str) -> Result:
    return cli(
        "init", "--model", model, "--data", data, "--target", "cpu", "--out", folder / "recipe.yaml", *more
    )


def test_the_command_prints_what_comes_next_to_stderr(tmp_path: Path, models: dict[str, Path]) -> None:
    done = command(tmp_path, models["head"], write_table(tmp_path / "mine.csv", LABELS), "--with-schema")
    assert done.code == 0
    assert f"wrote {tmp_path / 'recipe.yaml'}" in done.stdout and "next:" not in done.stdout
    assert f"next:\n  qcompress check {tmp_path / 'recipe.yaml'}\n" in done.stderr
    lines = (tmp_path / "recipe.yaml").read_text().splitlines()
    assert lines[0] == "# yaml-language-server: $schema=recipe.schema.json"
    schema = json.loads((tmp_path / "recipe.schema.json").read_text())
    assert list(Draft202012Validator(schema).iter_errors(values(tmp_path / "recipe.yaml"))) == []


def test_json_says_what_was_found_and_chosen_and_why(tmp_path: Path, models: dict[str, Path]) -> None:
    done = command(tmp_path, models["head"], write_table(tmp_path / "mine.csv", LABELS), "--json")
    told = done.json()
    assert told.keys() == {"files", "found", "chosen", "why", "notes", "next"}
    assert told["found"]["data"]["labels"] == {"maybe": 20, "no": 20, "yes": 20}
    assert told["found"]["model"]["family"] == told["chosen"]["family"] == "bert"
    assert told["chosen"]["positions"] == 32 and told["chosen"]["context"] in (16, 32)
    assert told["why"]["method"].startswith("observed ranges")
    assert not (tmp_path / "recipe.yaml").read_text().startswith("# yaml-language-server")


def test_without_a_terminal_nothing_is_asked(tmp_path: Path) -> None:
    done = cli("init", "--target", "rtx-adda")
    assert done.code == 2 and done.stdout == ""
    for option in ("--model: is not given", "--data: is not given", "did you mean `rtx-ada`?"):
        assert option in done.stderr


def test_at_a_terminal_what_is_missing_is_asked_for(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_table(tmp_path / "mine.csv", LABELS)
    answers = iter([str(models["head"]), str(data)])
    monkeypatch.setattr(init_command, "is_terminal", lambda: True)
    monkeypatch.setattr("typer.prompt", lambda question, err: next(answers))
    monkeypatch.setattr(init_command, "_ask", lambda question, words: "l4")
    done = cli("init", "--out", tmp_path / "recipe.yaml")
    assert done.code == 0, done.stderr
    assert values(tmp_path / "recipe.yaml")["build"]["target"] == "l4"


def test_who_leaves_at_a_question_has_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init_command, "is_terminal", lambda: True)
    done = cli("init", "--out", tmp_path / "recipe.yaml")  # stdin is empty
    assert done.code == 130 and done.stderr.endswith("interrupted\n") and list(files(tmp_path)) == []


BARE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "tokenizers", "pyarrow", "datasets"):
            raise ModuleNotFoundError(f"refused: {name}", name=name)
sys.meta_path.insert(0, Refuse())
from qcompress.cli.main import app
app(sys.argv[1:])
"""


def test_it_needs_no_torch_and_estimates_without_a_tokenizer(tmp_path: Path, models: dict[str, Path]) -> None:
    data = write_table(tmp_path / "mine.csv", LABELS)
    done = python(BARE, "init", "--model", str(models["head"]), "--data", str(data), "--target", "cpu",
                  "--out", str(tmp_path / "recipe.yaml"), "--json")  # fmt: skip
    assert done.code == 0, done.stderr
    assert "estimated from words" in done.json()["why"]["context"]
    assert python(BARE, "schema").code == 0
