"""`predict` of classifiers, against transformers and a softmax written out."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_recipe
from tiny_bert import LABELS, SEQUENCE, TOKEN, EncoderLine, encoder_line, save_encoder

from qcompress.cli.predict import answer, classify, tag
from qcompress.errors import UsageError
from qcompress.models import load_tokenizer
from qcompress.pipeline.keys import provenance
from qcompress.pipeline.stages.export import export
from qcompress.schema.recipe import Recipe


@dataclass(frozen=True)
class Run:
    """As much of a finished run as an answer needs."""

    path: Path
    recipe: Recipe
    line: EncoderLine

    @property
    def parity(self) -> dict[str, Any]:
        return {"threads": 1}

    def logits(self, text: str, pair: str | None = None) -> np.ndarray:
        """Of stock transformers, in float64."""
        encoded = load_tokenizer(self.path)(text, pair, return_tensors="pt")
        kept = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if "token_type_ids" in encoded:
            kept["token_type_ids"] = encoded["token_type_ids"]
        with torch.no_grad():
            return self.line.model("float")(**kept).logits[0].double().numpy()


@pytest.fixture(scope="module", params=[SEQUENCE, pytest.param(TOKEN, marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, task = tmp_path_factory.mktemp("predict"), request.param
    source = save_encoder(folder / "model", text_file, "bert", task)
    nothing = {"train": {"phases": {"finetune": {"steps": 0}}}}
    line = encoder_line(
        folder / "line", source, text_file, "bert", task, format="float", method="float", **nothing
    )
    line.train().fold()
    (folder / "run").mkdir()
    export(line.folded, line.recipe.export, "cpu", provenance(make_recipe(text_file)), folder / "run")
    return Run(folder / "run", line.recipe, line)


def with_problem(run: Run, folder: Path, problem: str | None) -> Run:
    """A copy of the run with another `problem_type`."""
    shutil.copytree(run.path, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text()) | {"problem_type": problem}
    (folder / "config.json").write_text(json.dumps(config))
    return Run(folder, run.recipe, run.line)


def test_labels_have_the_probabilities_of_the_stock_model(run: Run, tmp_path: Path) -> None:
    if run.recipe.task.name != SEQUENCE:
        pytest.skip("a classifier's")
    for pair in (None, "another"):
        logits = run.logits("some words", pair)
        powers = np.exp(logits)
        expected = dict(zip(LABELS, powers / powers.sum(), strict=True))
        ranked = classify(run, "some words", pair)
        assert [label for label, _ in ranked] == sorted(LABELS, key=lambda label: -expected[label])
        assert all(abs(value - expected[label]) < 1e-5 for label, value in ranked)
        assert abs(sum(value for _, value in ranked) - 1) < 1e-9
    assert answer(run, "some words", None, 9).split("\n")[0].split("\t") == [
        classify(run, "some words")[0][0], f"{classify(run, 'some words')[0][1]:.4f}",
    ]  # fmt: skip
    many = with_problem(run, tmp_path / "many", "multi_label_classification")
    for label, value in classify(many, "some words"):
        assert abs(value - 1 / (1 + np.exp(-run.logits("some words")[LABELS.index(label)]))) < 1e-5
    values = classify(with_problem(run, tmp_path / "value", "regression"), "some words")
    assert [label for label, _ in values] == list(LABELS)
    np.testing.assert_allclose([value for _, value in values], run.logits("some words"), atol=1e-5)


def test_tokens_have_the_labels_of_the_stock_model(run: Run) -> None:
    if run.recipe.task.name != TOKEN:
        pytest.skip("a tagger's")
    text = "some words"
    powers = np.exp(run.logits(text))
    shares = powers / powers.sum(-1, keepdims=True)
    words = load_tokenizer(run.path).tokenize(text)
    tagged = tag(run, text)
    assert [word for word, _, _ in tagged] == words and len(words) > 1
    assert [label for _, label, _ in tagged] == [LABELS[index] for index in shares.argmax(-1)]
    np.testing.assert_allclose([share for _, _, share in tagged], shares.max(-1), atol=1e-5)
    assert answer(run, text, None, 9).count("\n") == len(words) - 1
    with pytest.raises(UsageError, match="the tokens of one text are labelled"):
        answer(run, text, "another", 9)


def test_a_text_that_the_model_cannot_take_is_refused(run: Run) -> None:
    with pytest.raises(UsageError, match=r"\d+ tokens, and the model takes 1 to 32"):
        answer(run, "much too long " * 20, None, 9)
    with pytest.raises(UsageError, match="0 tokens, and the model takes 1 to 32"):
        answer(run, "", None, 9)


def test_a_language_model_continues_one_text(run: Run, text_file: Path) -> None:
    with pytest.raises(UsageError, match="a language model continues one text"):
        answer(Run(run.path, make_recipe(text_file), run.line), "a", "b", 3)
