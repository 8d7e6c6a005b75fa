"""Next-token prediction, against the sliding-window loop of transformers' documentation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import CONTEXT, VOCABULARY, make_model
from torch import Tensor
from transformers import GPT2LMHeadModel

from qcompress.errors import UsageError
from qcompress.models import FAMILIES, load_tokenizer
from qcompress.schema.goals import METRICS
from qcompress.schema.recipe import CausalLm, TextData
from qcompress.tasks import TASKS
from qcompress.tasks.causal_lm import Window, collate, examples, loss, measure, metrics, samples, tokenize


class Words:
    """A tokenizer of numbers: the text "3 1 4" is the tokens 3, 1, 4."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


def write_ids(folder: Path, count: int, seed: int = 0) -> tuple[TextData, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, count)
    (folder / "ids.txt").write_text(" ".join(map(str, ids)))
    return TextData(text=["ids.txt"]), ids


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return make_model(seed=5)


@torch.no_grad()
def by_the_recipe(
    model: GPT2LMHeadModel, ids: np.ndarray, context: int, stride: int
) -> tuple[float, int, int]:
    """Sum of the negative log-likelihood, targets, and targets ranked first, one window after another.

    Labels of tokens that an earlier window counted are masked; the model itself shifts the labels by one.
    """
    total, targets, correct, previous_end = 0.0, 0, 0, 0
    tensor = torch.from_numpy(ids)[None]
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        window = tensor[:, begin:end]
        labels = window.clone()
        labels[:, : window.shape[1] - (end - previous_end)] = -100
        counted = int((labels[:, 1:] != -100).sum())
        if counted:
            output = model(input_ids=window, labels=labels)
            total += float(output.loss) * counted
            best = output.logits[:, :-1].argmax(-1)
            correct += int(((best == labels[:, 1:]) & (labels[:, 1:] != -100)).sum())
        targets += counted
        previous_end = end
        if end == len(ids):
            break
    return total, targets, correct


@torch.no_grad()
def by_the_task(model: GPT2LMHeadModel, windows: list[Window], batch: int) -> list[dict[str, float]]:
    results: list[dict[str, float]] = []
    for start in range(0, len(windows), batch):
        ids, mask = collate(windows[start : start + batch]).values()
        logits = model(**FAMILIES["gpt2"].graph_inputs(torch.from_numpy(ids), torch.from_numpy(mask))).logits
        results += measure(windows[start : start + batch], logits.numpy())
    return results


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("context", "stride"), [(CONTEXT, None), (CONTEXT, CONTEXT), (CONTEXT, 11), (20, 1), (2, 2)]
)
@pytest.mark.parametrize("count", [200, 192, 193, 31, 2])
def test_perplexity_is_that_of_the_sliding_window_recipe(
    tmp_path: Path, model: GPT2LMHeadModel, context: int, stride: int | None, count: int, batch: int
) -> None:
    data, ids = write_ids(tmp_path, count)
    sample_list = samples(data, tmp_path, Words(), CausalLm(context=context, stride=stride), None)
    results = by_the_task(model, sample_list, batch)
    result = metrics(results)
    nll, targets, correct = by_the_recipe(model, ids, context, stride or context)
    assert sum(sample["tokens"] for sample in results) == targets > 0
    assert result["perplexity"] == pytest.approx(math.exp(nll / targets), rel=1e-5)
    assert result["token_accuracy"] == correct / targets
    assert set(result) == set(CausalLm().metrics) <= set(METRICS)


@pytest.mark.parametrize("count", [2, 31, 32, 33, 64, 65, 100])
@pytest.mark.parametrize("stride", [1, 7, 31, 32])
def test_every_token_but_the_first_of_the_text_counts_once_where_windows_overlap(
    tmp_path: Path, count: int, stride: int
) -> None:
    """Without overlap (stride 32) the first token of each window has no context and does not count."""
    data, ids = write_ids(tmp_path, count)
    sample_list = samples(data, tmp_path, Words(), CausalLm(context=32, stride=stride), None)
    start, counted = 0, []
    for window in sample_list:
        assert len(window.ids) <= 32 and window.first >= 1
        np.testing.assert_array_equal(window.ids, ids[start : start + len(window.ids)])
        counted += range(start + window.first, start + len(window.ids))
        start += stride
    expected = [index for index in range(1, count) if stride < 32 or index % 32]
    assert counted == expected


def test_limits_keep_the_first_windows_and_the_smaller_one_wins(tmp_path: Path) -> None:
    data, _ = write_ids(tmp_path, 200)
    task = CausalLm(context=32)
    whole = samples(data, tmp_path, Words(), task, None)
    assert len(whole) == 7
    for own, limit, count in ((3, None, 3), (None, 2, 2), (5, 2, 2), (2, 5, 2), (50, 60, 7)):
        limited = data.model_copy(update={"limit": own})
        sample_list = samples(limited, tmp_path, Words(), task, limit)
        assert len(sample_list) == count
        assert all(np.array_equal(a.ids, b.ids) for a, b in zip(sample_list, whole, strict=False))


@pytest.mark.parametrize("count", [0, 1])
def test_a_text_without_a_target_is_refused(tmp_path: Path, count: int) -> None:
    data, _ = write_ids(tmp_path, count)
    with pytest.raises(UsageError, match=f"the text has {count} tokens: nothing to measure"):
        samples(data, tmp_path, Words(), CausalLm(context=32), None)


# Training sequences ----------------------------------------------------------------------------------


def test_training_sequences_follow_one_another_without_overlap(tmp_path: Path) -> None:
    data, ids = write_ids(tmp_path, 205)
    example_set = examples(data, tmp_path, Words(), CausalLm(context=20))
    assert len(example_set) == 10 and example_set.lengths.tolist() == [20] * 10
    batch = example_set.batch([3, 0])
    assert list(batch) == ["input_ids"] and batch["input_ids"].dtype == torch.int64
    np.testing.assert_array_equal(example_set.ids.numpy(), ids[:200].reshape(10, 20))
    np.testing.assert_array_equal(batch["input_ids"].numpy(), ids[:200].reshape(10, 20)[[3, 0]])


@pytest.mark.parametrize("limit", [1, 3, 9, 10, 11])
def test_a_limit_spreads_them_evenly_over_the_text(tmp_path: Path, limit: int) -> None:
    data, ids = write_ids(tmp_path, 205)
    example_set = examples(data.model_copy(update={"limit": limit}), tmp_path, Words(), CausalLm(context=20))
    rows = ids[:200].reshape(10, 20)
    expected = (
        [int(np.floor(index * 10 / limit)) for index in range(min(limit, 10))] if limit < 10 else range(10)
    )
    np.testing.assert_array_equal(example_set.ids.numpy(), rows[list(expected)])


def test_a_text_shorter_than_one_sequence_is_refused(tmp_path: Path) -> None:
    data, _ = write_ids(tmp_path, 19)
    with pytest.raises(UsageError, match="19 tokens, fewer than one sequence of 20"):
        examples(data, tmp_path, Words(), CausalLm(context=20))


def test_the_loss_is_the_one_transformers_computes(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(0, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        computed = loss(model(input_ids=ids).logits, {"input_ids": ids})
        torch.testing.assert_close(computed, model(input_ids=ids, labels=ids).loss, rtol=1e-6, atol=0)


def test_a_real_tokenizer_adds_nothing_to_the_text(tiny_model: Path, text_file: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    ids = tokenize(TextData(text=[text_file.name]), text_file.parent, tokenizer)
    assert ids.dtype == np.int64 and ids.ndim == 1 and len(ids) > 32 * 64
    assert tokenizer.decode(ids) == text_file.read_text(encoding="utf-8")


# Batches and numbers ---------------------------------------------------------------------------------


def test_shorter_windows_are_padded_on_the_right() -> None:
    ids, mask = collate([Window(np.array([5, 6, 7]), 1), Window(np.array([8, 9]), 1)]).values()
    assert ids.tolist() == [[5, 6, 7], [8, 9, 0]] and mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert ids.dtype == mask.dtype == np.int64


def test_what_a_model_says_about_padding_and_about_the_last_token_is_not_measured() -> None:
    windows = [Window(np.array([5, 6, 7]), 2), Window(np.array([8, 9]), 1)]
    logits = np.random.default_rng(0).normal(size=(2, 3, 12)).astype(np.float32)
    before = measure(windows, logits)
    nonsense = logits.copy()
    nonsense[0, 0] = nonsense[0, 2] = nonsense[1, 1] = nonsense[1, 2] = np.nan
    assert measure(windows, nonsense) == before
    expected = float(F.cross_entropy(Tensor(logits[0, 1])[None].double(), torch.tensor([7])))
    assert before[0]["nll"] == pytest.approx(expected, rel=1e-6) and before[0]["tokens"] == 1


@pytest.mark.parametrize("first", [1, 5, 64, 65, 150])
def test_no_target_of_a_long_window_is_lost_or_counted_twice(first: int) -> None:
    random = np.random.default_rng(1)
    window, logits = (
        Window(random.integers(0, 12, 200), first),
        random.normal(size=(1, 200, 12)).astype(np.float32),
    )
    shifted = logits[0, first - 1 : -1].astype(np.float64)
    targets = window.ids[first:]
    picked = shifted[np.arange(len(targets)), targets]
    nll = float((np.log(np.exp(shifted).sum(-1)) - picked).sum())
    (sample,) = measure([window], logits)
    assert sample["tokens"] == 200 - first and sample["nll"] == pytest.approx(nll, rel=1e-6)
    assert sample["correct"] == int((shifted.argmax(-1) == targets).sum())


def test_a_nan_anywhere_makes_the_perplexity_nan(model: GPT2LMHeadModel) -> None:
    windows = [Window(np.array([5, 6, 7]), 1), Window(np.array([8, 9]), 1)]
    logits = np.zeros((2, 3, 12), np.float32)
    logits[1, 0, 4] = np.nan
    result = metrics(measure(windows, logits))
    assert math.isnan(result["perplexity"]) and 0 <= result["token_accuracy"] <= 1


def test_hopeless_models_have_infinite_perplexity_and_raise_nothing() -> None:
    assert metrics([{"nll": 1e6, "tokens": 10, "correct": 0}]) == {
        "perplexity": math.inf,
        "token_accuracy": 0.0,
    }
    assert metrics([{"nll": math.inf, "tokens": 10, "correct": 0}])["perplexity"] == math.inf


def test_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary() -> None:
    windows = [Window(np.arange(9), 1)]
    result = metrics(measure(windows, np.zeros((1, 9, 50), np.float32)))
    assert result["perplexity"] == pytest.approx(50.0, rel=1e-6)


def test_every_task_offers_what_the_stages_ask_for() -> None:
    asked = {"examples", "samples", "loss", "collate", "compared", "logits_of", "measure", "metrics"}
    assert TASKS and all(asked <= set(dir(task)) for task in TASKS.values())
