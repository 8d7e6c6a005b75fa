"""JSON without NaN and infinity, and every file of a run that has them."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
from lines import Project, cli, make_project
from safetensors.torch import load_file, save_file

from qcompress import api
from qcompress.system import strict_json
from qcompress.verdict.baseline.snapshot import read_snapshot


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


def strictly(text: str | bytes) -> object:
    return json.loads(text, parse_constant=refuse)


VALUES = {
    "nothing special": {"a": [1, 2.5, None, "NaN"]},
    "NaN in a list": {"rows": [{"loss": math.nan}, {"loss": 1.0}]},
    "both infinities": {"a": {"b": [math.inf, -math.inf, 0.0]}},
    "keys with signs of a pointer": {"a/b": {"~c": math.nan, "d~1": -math.inf}},
    "a tuple": {"interval": (math.nan, 1.0)},
    "a key that is a digit": {"0": {"1": math.inf}},
    "keys that are not text": {True: math.nan, None: {2: math.inf}, 1.5: [math.nan]},
    "a key of the mark's name further down": {"a": {"not_finite": math.nan}},
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_numbers_that_are_not_finite_come_back(value: dict) -> None:
    text = strict_json.dumps(value, indent=1)
    strictly(text)
    back = strict_json.loads(text)
    assert json.dumps(back) == json.dumps(value)  # which spells NaN, so that it can be compared


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {},
        {"a": "nan"},
        {"/missing": "nan"},
        {"/a/7": "inf"},
        {"/a": "nan"},
        {"/b": "words"},
        "text",
        None,
    ],
    ids=str,
)
def test_a_key_of_somebody_elses_is_content(content: object) -> None:
    value = {"not_finite": content, "a": [1, 2], "b": None}
    assert strict_json.loads(json.dumps(value)) == value
    assert strict_json.loads(strict_json.dumps(value)) == value


def test_two_meanings_of_one_key_are_refused() -> None:
    with pytest.raises(ValueError, match="not_finite is taken"):
        strict_json.dumps({"not_finite": [1], "a": math.nan})


def test_a_reader_finds_null_and_the_place() -> None:
    document = strictly(strict_json.dumps({"rows": [{"loss": math.nan, "n": 3}], "x/y": -math.inf}))
    assert document == {"rows": [{"loss": None, "n": 3}], "x/y": None,
                     "not_finite": {"/rows/0/loss": "nan", "/x~1y": "-inf"}}  # fmt: skip


def test_what_has_no_object_around_it_becomes_null() -> None:
    assert strictly(strict_json.dumps([1.0, math.nan])) == [1.0, None]


def test_files_of_older_versions_are_read() -> None:
    assert math.isnan(strict_json.loads('{"a": NaN}')["a"])


@pytest.fixture(scope="module")
def anomalous(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run whose graph in half precision has logits beyond 65504, while fp32 holds them."""
    folder = tmp_path_factory.mktemp("anomalous") / "p"
    project = make_project(folder, tiny_model, text_file, format={"preset": "w8a8", "compute": "fp16"})
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("ln_f.weight"))
    tensors[name].mul_(3e4)
    save_file(tensors, file, {"format": "pt"})
    project.run()
    return project


def test_every_file_of_an_anomalous_run_is_strict_json(anomalous: Project) -> None:
    """parity.json, samples.json.gz, verdict.json, log.jsonl and whatever else there is."""
    run = anomalous.latest
    assert api.load(run).verdict["verdict"] == "anomalous"
    row = next(row for row in api.load(run).parity["rows"] if row["stage"] == "onnx")
    assert math.isnan(row["metrics"]["test.perplexity"]) and math.isnan(row["distance"]["mean_abs"])
    files = [file for file in run.rglob("*") if file.name.endswith((".json", ".json.gz", ".jsonl"))]
    names = {file.name for file in files}
    assert names >= {
        "parity.json",
        "samples.json.gz",
        "verdict.json",
        "log.jsonl",
        "sizes.json",
        "manifest.json",
    }
    for file in files:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        for line in content.splitlines() if file.suffix == ".jsonl" else [content]:
            strictly(line)
    assert "not_finite" in strictly((run / "parity.json").read_bytes())
    samples = strictly(gzip.decompress((run / "samples.json.gz").read_bytes()))
    assert any("/onnx/" in place for place in samples["not_finite"])


def test_commands_about_an_anomalous_run_print_strict_json(anomalous: Project) -> None:
    for words in (("show", anomalous.latest), ("gate", "--candidate", anomalous.latest)):
        printed = strictly(cli(*words, "--json").stdout)
        assert printed["verdict"]["verdict"] == "anomalous" and printed["not_finite"]


def test_a_baseline_of_an_anomalous_run_is_strict_and_is_read_again(
    anomalous: Project, tmp_path: Path
) -> None:
    file = tmp_path / "baseline.json"
    api.promote(anomalous.latest, file, row="onnx", force=True)
    assert strictly(file.read_text())["not_finite"]
    row = next(row for row in read_snapshot(file).parity["rows"] if row["stage"] == "onnx")
    assert math.isnan(row["metrics"]["test.perplexity"])
