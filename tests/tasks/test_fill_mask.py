"""Masked tokens: sequences, masks that depend on the seed, loss, results, and the probe kit's script."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from word_tokenizer import CLS, FIRST, PAD, SEP, WORDS, word_tokenizer

from qcompress.cli.predict import fill
from qcompress.engine.probe import SCRIPT
from qcompress.errors import UsageError
from qcompress.schema.recipe import FillMask, TextData
from qcompress.system import strict_json
from qcompress.tasks.fill_mask import (
    collate,
    compared,
    examples,
    kit,
    loss,
    measure,
    metrics,
    samples,
    slices,
)
from qcompress.verdict.replicates import REPLICATES

TASK = FillMask(context=8, share=0.4)
MASK = FIRST + WORDS.index("anna")
TEXT = TextData(text=["text.txt"])


def tokenizer(mask: str | None = "anna") -> Any:
    made = word_tokenizer()
    if mask is not None:
        made.mask_token = mask
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = [WORDS[number % 9] for number in np.random.default_rng(0).integers(0, 9, 27)]
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
    return tmp_path


def test_a_text_is_cut_into_sequences_with_the_special_tokens_around(folder: Path) -> None:
    read = samples(TEXT, folder, tokenizer(), TASK, None)
    assert [sample.length for sample in read] == [8, 8, 8, 8, 5]
    whole = []
    for sample in read:
        ids = sample.inputs["input_ids"].copy()
        assert (ids[0], ids[-1]) == (CLS, SEP) and (ids[sample.places] == MASK).all()
        assert (ids == MASK).sum() == len(sample.places) == sample.known["tokens"]
        ids[sample.places] = sample.targets
        whole += list(ids[1:-1])
    words = (folder / "text.txt").read_text().split()
    assert whole == [FIRST + WORDS.index(word) for word in words]
    assert [len(sample.places) for sample in read] == [2, 2, 2, 2, 1]  # 0.4 of 6 and of 3 tokens
    assert len(samples(TEXT, folder, tokenizer(), TASK, 3)) == 3


def test_the_masked_places_follow_from_the_seed_and_the_update(folder: Path) -> None:
    def places(task: FillMask, limit: int | None = None) -> list[list[int]]:
        return [list(sample.places) for sample in samples(TEXT, folder, tokenizer(), task, limit)]

    assert places(TASK) == places(TASK) and places(TASK)[:2] == places(TASK, 2)
    assert places(TASK) != places(TASK.model_copy(update={"mask_seed": 1}))
    read = examples(TEXT, folder, tokenizer(), TASK)
    first, again, later = (read.batch([0, 4], moment) for moment in ((7, 0, 1), (7, 0, 1), (7, 0, 2)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["labels"], later["labels"])
    assert list(read.lengths) == [8, 8, 8, 8, 5] and read.batch([4])["labels"].shape == (1, 5)
    assert (first["input_ids"][1, 5:] == PAD).all() and (first["labels"][1, 5:] == -100).all()


def test_the_loss_and_the_results_count_masked_tokens_alone(folder: Path) -> None:
    read = samples(TEXT, folder, tokenizer(), TASK, None)[3:]
    logits = np.random.default_rng(2).normal(size=(2, 8, 20)).astype(np.float32)
    nll, right = [], []
    for sample, row in zip(read, logits.astype(np.float64), strict=True):
        for place, token in zip(sample.places, sample.targets, strict=True):
            nll.append(-math.log(np.exp(row[place, token]) / np.exp(row[place]).sum()))
            right.append(row[place].argmax() == token)
    made = measure(read, logits)
    assert [one["tokens"] for one in made] == [2, 1]
    assert metrics(made) == pytest.approx(
        {"pseudo_perplexity": math.exp(sum(nll) / 3), "masked_accuracy": sum(right) / 3}, rel=1e-6
    )
    columns, once = {name: [one[name] for one in made] for name in made[0]}, np.ones((1, 2))
    for name, value in metrics(made).items():
        assert REPLICATES[name](columns, once) == pytest.approx([value])
    batch = examples(TEXT, folder, tokenizer(), TASK).batch([3, 4])
    assert batch["input_ids"].tolist() == collate(read)["input_ids"].tolist()
    assert loss(torch.from_numpy(logits), batch).item() == pytest.approx(sum(nll) / 3, rel=1e-5)
    assert compared(read[1], logits[1]).shape == (5, 20)
    logits[0, read[0].places[0]] = np.nan
    assert math.isnan(metrics(measure(read, logits))["pseudo_perplexity"])


def test_the_kits_script_counts_as_the_task_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "strict_json", strict_json)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("measure_engine", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    read = samples(TEXT, folder, tokenizer(), TASK, None)
    arrays = kit(collate(read), read)
    logits = np.random.default_rng(3).normal(size=(5, 8, 20)).astype(np.float32)

    def runner(feed: dict[str, np.ndarray]) -> np.ndarray:
        assert feed.keys() == {"input_ids", "attention_mask", "token_type_ids"}
        rows = [next(row for row in range(5) if (arrays["input.input_ids"][row, : ids.size] == ids).all())
                for ids in feed["input_ids"]]  # fmt: skip
        return logits[rows, : feed["input_ids"].shape[1]]

    runner.largest_batch = lambda length: 2
    positions = np.arange(8)
    nll, correct, far, _ = script.run_masked(runner, arrays, logits[:2], positions, 4)
    expected = measure(read, logits)
    assert nll == pytest.approx([one["nll"] for one in expected])
    assert correct == [one["correct"] for one in expected] and far["max_abs"] == 0 and far["positions"] == 16


def test_what_cannot_be_measured_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="the tokenizer has no mask"):
        samples(TEXT, folder, tokenizer(None), TASK, None)
    with pytest.raises(UsageError, match="it has no slices"):
        slices(TEXT, folder, TASK)
    (folder / "text.txt").write_text(" ")
    with pytest.raises(UsageError, match="nothing to measure"):
        samples(TEXT, folder, tokenizer(), TASK, None)


def test_masks_of_a_text_are_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 16}))
    recipe = SimpleNamespace(task=TASK, model=SimpleNamespace(family="bert"))
    run = SimpleNamespace(path=tmp_path, recipe=recipe, parity={"threads": 1})
    logits = np.random.default_rng(4).normal(size=(1, 5, FIRST + len(WORDS))).astype(np.float32)
    monkeypatch.setattr("qcompress.cli.predict._logits", lambda *_: logits)
    filled = fill(run, "good anna film")
    shares = np.exp(logits[0, 2].astype(np.float64))
    shares /= shares.sum()
    best = np.argsort(-shares)[:5]
    names = word_tokenizer().convert_ids_to_tokens(best)
    assert [(mask, word) for mask, word, _ in filled] == [(1, name) for name in names]
    np.testing.assert_allclose([share for *_, share in filled], shares[best])
    with pytest.raises(UsageError, match="has no mask") as caught:
        fill(run, "good film")
    assert caught.value.fix == "write anna in place of a word"
