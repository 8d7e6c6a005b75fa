"""Prediction from a run's ONNX file, on ONNX Runtime: the continuation of a text, the labels of a text or an
image, or the embeddings of texts and their cosine.

A continuation is greedy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompress.errors import UsageError
from qcompress.models import FAMILIES, load_tokenizer
from qcompress.models.architecture import PIXELS
from qcompress.models.checkpoint_files import read_config
from qcompress.models.loading import reading
from qcompress.parity.generate import Generator
from qcompress.parity.runners import OnnxRunner
from qcompress.schema.recipe import CausalLm
from qcompress.tasks import TASKS
from qcompress.tasks.images import open_image

if TYPE_CHECKING:
    from qcompress.verdict.run_directory import LoadedRun


def answer(run: LoadedRun, text: str, pair: str | None, tokens: int, chat: bool = False) -> str:
    """Output of `qcompress predict` for the run's task: a text, or a line for each label, token or text.
    `text` is the path of an image if the model classifies images; `chat`: a question to a language model.
    """
    if chat and run.recipe.task.name != "causal-lm":
        raise UsageError(
            f"only a model of the task causal-lm answers, and this one is of {run.recipe.task.name}",
            fix="drop --chat",
        )
    if run.recipe.task.name == "causal-lm":
        if pair is not None:
            raise UsageError("a language model continues one text", fix="drop --pair")
        return reply(run, text, tokens) if chat else continue_text(run, text, tokens)
    if run.recipe.task.name == "token-classification":
        if pair is not None:
            raise UsageError("the tokens of one text are labelled", fix="drop --pair")
        return "\n".join(f"{word}\t{label}\t{share:.4f}" for word, label, share in tag(run, text))
    if run.recipe.task.name == "question-answering":
        if pair is None:
            raise UsageError("a question is answered from a context", fix="give the context as second text")
        return answer_question(run, text, pair)
    if run.recipe.task.name == "fill-mask":
        if pair is not None:
            raise UsageError("the masks of one text are filled", fix="drop --pair")
        return "\n".join(f"{mask}\t{word}\t{share:.4f}" for mask, word, share in fill(run, text))
    if run.recipe.task.name == "feature-extraction":
        return "\n".join(embed(run, text, pair))
    if run.recipe.task.name == "image-classification":
        if pair is not None:
            raise UsageError("one image is classified", fix="drop --pair")
        labelled = classify_image(run, Path(text))
    else:
        labelled = classify(run, text, pair)
    return "\n".join(f"{label}\t{value:.4f}" for label, value in labelled)


def classify(run: LoadedRun, text: str, pair: str | None = None) -> list[tuple[str, float]]:
    """Each label with its probability, the likeliest first; for a regression the value."""
    config = read_config(run.path)
    return _ranked(config, _logits(run, _encoded(run, config, text, pair))[0])


def classify_image(run: LoadedRun, file: Path) -> list[tuple[str, float]]:
    """Each label of an image file with its probability, the likeliest first."""
    reader = TASKS[run.recipe.task.name].reader(run.path)
    pixels = reader.pixels([reader.shaped(open_image(file))])
    return _ranked(read_config(run.path), _runner(run)({PIXELS: pixels})[0])


def _ranked(config: dict[str, Any], logits: np.ndarray) -> list[tuple[str, float]]:
    logits = logits.astype(np.float64)
    problem = config.get("problem_type")
    if problem == "multi_label_classification":
        values = 1 / (1 + np.exp(-logits))
    else:
        values = logits if problem == "regression" else _softmax(logits)
    labels = [config["id2label"][str(index)] for index in range(len(logits))]
    order = range(len(labels)) if problem == "regression" else np.argsort(-values, kind="stable")
    return [(labels[index], float(values[index])) for index in order]


def answer_question(run: LoadedRun, question: str, context: str) -> str:
    """The part of the context that answers the question; empty if there is none."""
    task, options = TASKS[run.recipe.task.name], run.recipe.task
    windows = task.windows_of(question, context, load_tokenizer(run.path), options)
    logits = [_runner(run)(task.collate([window]))[0] for window in windows]
    measured = [task.measure([window], row[None])[0] for window, row in zip(windows, logits, strict=True)]
    (result,) = task.joined(measured, None)
    return result["prediction"] or ""


BEST = 5
"""Number of words that are shown for a mask."""


def fill(run: LoadedRun, text: str) -> list[tuple[int, str, float]]:
    """The likeliest tokens of each mask in a text, as number of the mask (from 1), token and probability.
    Raises UsageError for a text without a mask.
    """
    config, tokenizer = read_config(run.path), load_tokenizer(run.path)
    encoded = _encoded(run, config, text, None)
    places = np.flatnonzero(np.array(encoded["input_ids"]) == tokenizer.mask_token_id)
    if not len(places):
        raise UsageError("the text has no mask", fix=f"write {tokenizer.mask_token} in place of a word")
    shares = _softmax(_logits(run, encoded)[0][places].astype(np.float64))
    return [
        (number, tokenizer.decode([token]), float(row[token]))
        for number, row in enumerate(shares, 1)
        for token in np.argsort(-row, kind="stable")[:BEST]
    ]


SHOWN = 8
"""Number of an embedding's values that are shown."""


def embed(run: LoadedRun, text: str, pair: str | None = None) -> Iterator[str]:
    """Lines with the width and the first values of each text's embedding, and the cosine of two texts."""
    config = read_config(run.path)
    embeddings = [
        _logits(run, _encoded(run, config, given, None))[0].astype(np.float64)
        for given in (text, pair)
        if given is not None
    ]
    for given, embedding in zip((text, pair), embeddings, strict=False):
        values = " ".join(f"{value:.4f}" for value in embedding[:SHOWN])
        yield f"{given}\t[{len(embedding)}] {values}{' ...' if len(embedding) > SHOWN else ''}"
    if pair is not None:
        first, second = embeddings
        yield f"cosine\t{first @ second / np.sqrt(first @ first * (second @ second)):.4f}"


def tag(run: LoadedRun, text: str) -> list[tuple[str, str, float]]:
    """Each token of a text with its likeliest label and that label's probability, without special tokens."""
    config = read_config(run.path)
    encoded = _encoded(run, config, text, None)
    shares = _softmax(_logits(run, encoded)[0].astype(np.float64))
    tokenizer = load_tokenizer(run.path)
    words = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    best = shares.argmax(-1)
    return [
        (word, config["id2label"][str(label)], float(row[label]))
        for word, label, row, number in zip(words, best, shares, encoded["input_ids"], strict=True)
        if number not in tokenizer.all_special_ids
    ]


def _encoded(run: LoadedRun, config: dict[str, Any], text: str, pair: str | None) -> dict[str, list[int]]:
    """Inputs of the run's graph for a text or a pair of texts."""
    family = FAMILIES[run.recipe.model.family]
    encoded = load_tokenizer(run.path)(text, pair)
    limit, length = family.positions(config), len(encoded["input_ids"])
    if not 0 < length <= limit:
        raise UsageError(
            f"{length} tokens, and the model takes 1 to {limit}", fix="give a text of another length"
        )
    return {name: encoded[name] for name in family.INPUTS if name in encoded}


def _logits(run: LoadedRun, encoded: dict[str, list[int]]) -> np.ndarray:
    return _runner(run)({name: np.array([values], np.int64) for name, values in encoded.items()})


def _runner(run: LoadedRun) -> OnnxRunner:
    return OnnxRunner(run.path / "model.onnx", run.recipe.model.family, run.parity["threads"], optimized=True)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def continue_text(run: LoadedRun, text: str, tokens: int) -> str:
    """The text with `tokens` more tokens, or fewer if the model ends it. Raises UsageError beyond the
    context.
    """
    if not isinstance(run.recipe.task, CausalLm):
        raise UsageError(
            f"only a model of the task causal-lm continues a text, and this one is of {run.recipe.task.name}",
            fix="measure it with `qcompress verify`, or run model.onnx with onnxruntime",
        )
    tokenizer = load_tokenizer(run.path)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UsageError("the text has no tokens", fix="give at least one word")
    return tokenizer.decode(ids + _continued(run, tokenizer, ids, tokens), skip_special_tokens=True)


def reply(run: LoadedRun, question: str, tokens: int) -> str:
    """Answer to a question in the chat template of the checkpoint's tokenizer, at most `tokens` tokens.

    Raises UsageError without a template and beyond the context, ModelError for a template that cannot be
    filled.
    """
    tokenizer = load_tokenizer(run.path)
    if tokenizer.chat_template is None:
        raise UsageError("the checkpoint's tokenizer has no chat template", fix="drop --chat")
    messages = [{"role": "user", "content": question}]
    with reading(run.path / "tokenizer_config.json", "the chat template cannot be filled", "drop --chat"):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return tokenizer.decode(_continued(run, tokenizer, ids, tokens), skip_special_tokens=True)


def _continued(run: LoadedRun, tokenizer: Any, ids: list[int], tokens: int) -> list[int]:
    """New tokens behind `ids`, until the tokenizer's end token."""
    context = run.recipe.task.context
    if len(ids) + tokens > context:
        raise UsageError(
            f"{len(ids)} tokens of text and {tokens} more exceed the context of {context}",
            fix="shorten the text or lower --tokens",
        )
    generator = Generator(run.path / "model.onnx", run.recipe.model.family, run.parity["threads"])
    (new,) = generator([ids], tokens, tokenizer.eos_token_id)
    return new
