"""Text embeddings: pooling against loops, sentence-transformers' files, and stock encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_bert import PADDING, WIDTH, save_encoder, token_inputs
from transformers import AutoModel

from qcompress.errors import ModelError
from qcompress.models import FAMILIES, describe
from qcompress.models.architecture import Head
from qcompress.models.pooling import EmbeddingHead, output_name, settled_head
from qcompress.models.text_embedder import pool
from qcompress.pipeline.stages.load import fingerprint, load
from qcompress.schema.recipe import Model
from qcompress.system.artifacts import read_json

TASK = "feature-extraction"
ST = "sentence_transformers.models."


@pytest.mark.parametrize("pooling", ["mean", "cls", "last-token"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_pooled(pooling: str, side: str) -> None:
    random = np.random.default_rng(0)
    hidden, lengths = random.normal(size=(3, 7, 4)).astype(np.float32), [7, 3, 1]
    mask = np.zeros((3, 7), np.int64)
    expected = []
    for row, length in enumerate(lengths):
        tokens = slice(0, length) if side == "right" else slice(7 - length, 7)
        mask[row, tokens] = 1
        own = hidden[row, tokens].astype(np.float64)
        # the first token of a sequence that is padded on the left is not where transformers looks for it
        first = hidden[row, 0] if side == "left" else own[0]
        expected.append({"mean": own.mean(0), "cls": first, "last-token": own[-1]}[pooling])
    pooled = pool(torch.from_numpy(hidden), torch.from_numpy(mask), pooling)
    np.testing.assert_allclose(pooled.numpy(), expected, atol=1e-6)


def write_modules(folder: Path, pooling: Any, kinds: list[str] | None = None) -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if kinds is not None:
        (folder / "modules.json").write_text(json.dumps([{"type": ST + kind} for kind in kinds]))
    return folder


@pytest.mark.parametrize(
    ("pooling", "kinds", "expected"),
    [
        ({"pooling_mode_mean_tokens": True}, ["Transformer", "Pooling", "Normalize"], ("mean", True)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, None, ("cls", False)),
        ({"pooling_mode": "lasttoken"}, ["Transformer", "Pooling"], ("last-token", False)),
    ],
)
def test_the_files_of_sentence_transformers_are_the_defaults(
    pooling: dict[str, Any], kinds: list[str] | None, expected: tuple[str, bool], tmp_path: Path
) -> None:
    folder = write_modules(tmp_path, pooling, kinds)
    head = settled_head(EmbeddingHead(TASK), folder, {})
    assert (head.pooling, head.normalize) == expected
    own = settled_head(EmbeddingHead(TASK, pooling="cls", normalize=True), folder, {})
    assert (own.pooling, own.normalize) == ("cls", True)
    earlier = {"text_embedding": {"pooling": "mean", "normalize": True}}
    assert settled_head(EmbeddingHead(TASK, normalize=False), folder, earlier).pooling == "mean"
    assert output_name(earlier) == "embeddings" and output_name({}) == "logits"


@pytest.mark.parametrize(
    ("pooling", "kinds", "message"),
    [
        ({"pooling_mode_max_tokens": True}, None, "asks for pooling_mode_max_tokens, and"),
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            None,
            "asks for pooling_mode",
        ),
        ({}, None, "asks for no mode"),
        ([], None, "is not a JSON object"),
        ({"pooling_mode": "mean"}, ["Transformer", "Pooling", "Dense"], "lists Transformer, Pooling, Dense"),
    ],
)
def test_another_pooling_is_refused(
    pooling: Any, kinds: list[str] | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        settled_head(EmbeddingHead(TASK), write_modules(tmp_path, pooling, kinds), {})


def test_a_checkpoint_without_a_pooling_needs_one_in_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no 1_Pooling/config.json") as caught:
        settled_head(EmbeddingHead(TASK, pooling="mean"), tmp_path, {})
    assert caught.value.key == ("task", "normalize") and "`normalize: true`" in caught.value.fix
    assert settled_head(Head(), tmp_path, {}) == Head()


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("bare", [True, False])
def test_a_stock_encoder_is_loaded_pooled(family: str, bare: bool, text_file: Path, tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "model", text_file, family, bare=bare)
    write_modules(source, {"pooling_mode": "mean"}, ["Transformer", "Pooling", "Normalize"])
    (tmp_path / "load").mkdir()
    digests = fingerprint(source)
    assert {"modules.json", "1_Pooling/config.json"} <= digests.keys()
    load(Model(family=family, source=str(source)), source, digests, tmp_path / "load", EmbeddingHead(TASK))
    config = read_json(tmp_path / "load" / "config.json")
    assert config["text_embedding"] == {"pooling": "mean", "normalize": True}
    architecture = describe(family, source, EmbeddingHead(TASK))
    assert architecture.new_head == () and all(layer.kind != "head" for layer in architecture.layers)
    model = FAMILIES[family].load_float(source, tmp_path / "load")
    modules = dict(model.named_modules())
    assert all(layer.name in modules for layer in architecture.layers)
    unset = FAMILIES[family].empty(tmp_path / "load")
    assert [name for name, _ in unset.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert architecture.parameters == sum(one.numel() for one in model.parameters())
    inputs = token_inputs(family, pad="right")
    with torch.no_grad():
        embeddings = model(**inputs).logits.double()
        hidden = AutoModel.from_pretrained(source).eval()(**inputs).last_hidden_state.double()
    counted = inputs["input_ids"] != PADDING
    means = torch.stack([rows[mask].mean(0) for rows, mask in zip(hidden, counted, strict=True)])
    assert embeddings.shape == (4, WIDTH)
    torch.testing.assert_close(embeddings, means / means.norm(dim=1, keepdim=True), atol=1e-6, rtol=1e-5)


def test_a_classifier_that_starts_from_an_embedder_is_no_embedder(text_file: Path, tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "model", text_file, "bert", bare=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"text_embedding": {"pooling": "cls"}}))
    (tmp_path / "load").mkdir()
    load(Model(family="bert", source=str(source)), source, fingerprint(source), tmp_path / "load",
         Head("token-classification", ("a", "b")))  # fmt: skip
    assert "text_embedding" not in read_json(tmp_path / "load" / "config.json")
