"""`qcompress init --task feature-extraction`: its recipe, its run, and `predict` of the run."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper, save
from tiny_bert import CLASSES, save_encoder
from transformers import AutoModel, AutoTokenizer, BertForMaskedLM
from word_tokenizer import CLS, FIRST, SEP, WORDS, word_tokenizer

from qcompress import api
from qcompress.cli.init.options import InitOptions
from qcompress.cli.init.start import InitResult, begin
from qcompress.cli.predict import answer
from qcompress.errors import UsageError
from qcompress.recipe.check import all_mistakes
from qcompress.schema.recipe import FeatureExtraction
from qcompress.system.reporter import Reporter
from qcompress.verdict.run_directory import load


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A checkpoint without a head. Read only."""
    return save_encoder(tmp_path_factory.mktemp("model") / "body", text_file, "bert", bare=True)


def write_pairs(file: Path, score: Any = lambda draw: round(draw.uniform(0, 5), 2)) -> Path:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(120)]
    with file.open("w", newline="", encoding="utf-8") as stream:
        rows = [[a, b, score(draw)] for a, b in zip(texts[::2], texts[1::2], strict=True)]
        csv.writer(stream).writerows([["sentence1", "sentence2", "score"], *rows])
    return file


def started(folder: Path, model: Path, data: Path, **options: Any) -> InitResult:
    defaults = {"target": "cpu", "out": folder / "recipe.yaml", "task": "sentence-similarity"}
    return begin(InitOptions(**{"model": model, "data": data, **defaults, **options}))


def test_pairs_with_scores_give_a_recipe_of_embeddings(tmp_path: Path, model: Path) -> None:
    result = started(tmp_path, model, write_pairs(tmp_path / "pairs.csv"))
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert recipe["task"] == {
        "name": "feature-extraction",
        "pooling": "mean",
        "normalize": True,
        "context": 32,
    }
    assert recipe["data"]["evaluate"]["test"]["columns"] == {
        "text": "sentence1", "text_pair": "sentence2", "score": "score",
    }  # fmt: skip
    assert recipe["gate"]["recovery"].keys() == {"test.cosine_spearman"}
    assert "has no 1_Pooling/config.json" in result.why["pooling"] and "float" not in result.files
    assert all_mistakes(tmp_path / "recipe.yaml")[2] == []


def test_whole_numbers_are_scores_and_a_pooling_file_is_read(tmp_path: Path, model: Path) -> None:
    (tmp_path / "model").mkdir()
    for file in model.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model" / "1_Pooling").mkdir()
    pooling = tmp_path / "model" / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True}))
    data = write_pairs(tmp_path / "pairs.csv", lambda draw: draw.randint(0, 5))
    result = started(tmp_path, tmp_path / "model", data)
    assert result.chosen["kind"] == "regression" and "1_Pooling/config.json says" in result.why["pooling"]
    assert result.chosen["pooling"] == {"pooling": "cls", "normalize": False}
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UsageError, match="asks for pooling_mode_max_tokens"):
        started(tmp_path, tmp_path / "model", data, out=tmp_path / "other.yaml")


def test_lines_of_text_are_measured_by_agreement(tmp_path: Path, model: Path) -> None:
    (tmp_path / "lines.txt").write_text("".join(f"good film {row}\n" for row in range(60)))
    started(tmp_path, model, tmp_path / "lines.txt")
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert recipe["gate"]["recovery"] == {"test.agreement": {"threshold": 0.97}}
    assert recipe["data"].keys() == {"calibration", "evaluate"}
    taught = tmp_path / "taught.yaml"
    started(tmp_path, model, tmp_path / "lines.txt", method="distillation", out=taught)
    assert yaml.safe_load(taught.read_text())["data"]["train"] == {"text": ["lines-train.txt"]}
    taught.write_text(taught.read_text().replace("method: distillation", "method: lsq"))
    (mistake,) = all_mistakes(taught)[2]
    assert mistake.key == "data.train.text" and "has no labels" in mistake.message


def test_a_text_for_masks(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLASSES, ("bert", "fill-mask"), BertForMaskedLM)
    source = save_encoder(tmp_path / "masked", text_file, "bert", "fill-mask")
    (tmp_path / "lines.txt").write_text("".join(f"good film {row}\n" for row in range(600)))
    started(tmp_path, source, tmp_path / "lines.txt", task="fill-mask")
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert recipe["task"].keys() == {"name", "context"} and recipe["task"]["name"] == "fill-mask"
    assert recipe["format"]["layers"] == {"cls.predictions.decoder": {"activations": "float"}}
    assert recipe["gate"]["recovery"].keys() == {"test.pseudo_perplexity"}
    assert all_mistakes(tmp_path / "recipe.yaml")[2] == []


def test_a_task_that_the_data_do_not_fit_is_refused(tmp_path: Path, model: Path) -> None:
    data = write_pairs(tmp_path / "pairs.csv", lambda draw: draw.choice(["same", "other"]))
    with pytest.raises(UsageError, match="takes a text file, or pairs of texts with a score"):
        started(tmp_path, model, data)
    with pytest.raises(UsageError, match="--task ner does not fit|ner does not fit"):
        started(tmp_path, model, data, task="ner")
    with pytest.raises(UsageError, match="must be one of causal-lm"):
        started(tmp_path, model, data, task="sentence-similarty")


def write_run(folder: Path) -> Any:
    """As much of a run as `predict` needs: a graph that adds up a row of a table for each token."""
    table = np.random.default_rng(0).normal(size=(FIRST + len(WORDS), 12)).astype(np.float32)
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
              for name in ("input_ids", "attention_mask", "token_type_ids")]  # fmt: skip
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("ReduceSum", ["rows", "axis"], ["embeddings"], keepdims=0),
    ]
    output = helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", 12])
    constants = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1]), "axis")]
    graph = helper.make_graph(nodes, "adds", inputs, [output], constants)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
         folder / "model.onnx")  # fmt: skip
    word_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 16}))
    recipe = SimpleNamespace(task=FeatureExtraction(), model=SimpleNamespace(family="bert"))
    return SimpleNamespace(path=folder, recipe=recipe, parity={"threads": 1}), table.astype(np.float64)


def test_embeddings_and_the_cosine_of_two_texts_are_printed(tmp_path: Path) -> None:
    run, table = write_run(tmp_path)
    good, bad = (table[[CLS, FIRST + WORDS.index(word), SEP]].sum(0) for word in ("good", "bad"))
    first, second, last = answer(run, "good", "bad", 9).split("\n")
    for line, text, values in ((first, "good", good), (second, "bad", bad)):
        assert line == f"{text}\t[12] " + " ".join(f"{value:.4f}" for value in values[:8]) + " ..."
    assert last == f"cosine\t{good @ bad / np.linalg.norm(good) / np.linalg.norm(bad):.4f}"
    assert answer(run, "good", None, 9) == first


@pytest.mark.slow
def test_from_init_to_an_accepted_run(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    started(tmp_path, model, write_pairs(tmp_path / "pairs.csv"))
    text = (tmp_path / "recipe.yaml").read_text().replace("float_floor: {test.cosine_spearman: 0.3}", "")
    (tmp_path / "recipe.yaml").write_text(text)  # random weights and random scores: nothing to reach
    result = api.run(tmp_path / "recipe.yaml", reporter=Reporter(silent=True))
    loaded = load(result.path)
    assert loaded.verdict["verdict"] == "accept", loaded.verdict
    lines = answer(loaded, "good film", "bad film", 9).split("\n")
    tokenizer, stock = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    with torch.no_grad():
        means = [stock(**tokenizer(one, return_tensors="pt")).last_hidden_state[0].mean(0)
                 for one in ("good film", "bad film")]  # fmt: skip
    expected = torch.cosine_similarity(*means, dim=0).item()
    assert float(lines[-1].split("\t")[1]) == pytest.approx(expected, abs=0.02)
