"""Stock models of masked tokens: their bias stands behind the decoder, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_bert import CLASSES, save_encoder, token_inputs
from transformers import AutoModelForMaskedLM, BertForMaskedLM, DistilBertForMaskedLM, RobertaForMaskedLM

from qcompress.errors import ModelError
from qcompress.models import FAMILIES, describe
from qcompress.models.architecture import Head
from qcompress.pipeline.stages.load import fingerprint, load
from qcompress.schema.recipe import Model

TASK = "fill-mask"
STOCK = {"bert": BertForMaskedLM, "roberta": RobertaForMaskedLM, "distilbert": DistilBertForMaskedLM}


def checkpoint(folder: Path, text_file: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(CLASSES, (family, TASK), STOCK[family])
    return save_encoder(folder / "model", text_file, family, TASK)


def loaded(source: Path, family: str, folder: Path) -> Path:
    folder.mkdir()
    load(Model(family=family, source=str(source)), source, fingerprint(source), folder, Head(TASK))
    return folder


@pytest.mark.parametrize("family", STOCK)
def test_the_loaded_model_computes_what_the_stock_model_does(
    family: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path, text_file, family, monkeypatch)
    folder = loaded(source, family, tmp_path / "load")
    model, inputs = FAMILIES[family].load_float(source, folder), token_inputs(family, pad="right")
    stock = AutoModelForMaskedLM.from_pretrained(source, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, atol=1e-6, rtol=1e-6)
    assert stock.get_output_embeddings().bias.abs().max() > 0.1
    architecture = describe(family, source, Head(TASK))
    head = architecture.layers[-1]
    assert head.kind == "head" and head.tied_to == f"{family}.embeddings.word_embeddings"
    assert model.get_submodule(head.name).bias is None
    assert architecture.parameters == sum(one.numel() for one in stock.parameters())
    unset = FAMILIES[family].empty(folder)
    assert [name for name, _ in unset.named_parameters()] == [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        unset.to_empty(device="cpu").load_state_dict(model.state_dict(), strict=False)
    FAMILIES[family].tie(unset)
    assert unset.get_output_embeddings().weight is unset.get_input_embeddings().weight


def test_a_decoder_of_its_own_is_a_head_with_a_bias(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path, text_file, "bert", monkeypatch)
    config, tensors = (
        json.loads((source / "config.json").read_text()),
        load_file(source / "model.safetensors"),
    )
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    table = tensors["bert.embeddings.word_embeddings.weight"]
    tensors |= {"cls.predictions.decoder.weight": 2 * table}
    tensors |= {"cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    head = describe("bert", source, Head(TASK)).layers[-1]
    assert head.tied_to is None and head.out_features == len(table)
    folder = loaded(source, "bert", tmp_path / "load")
    model = FAMILIES["bert"].load_float(source, folder)
    assert not hasattr(model, "output_bias")
    inputs = token_inputs("bert")
    with torch.no_grad():
        expected = AutoModelForMaskedLM.from_pretrained(source).eval()(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_without_the_head_is_refused(text_file: Path, tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "model", text_file, "bert", bare=True)
    with pytest.raises(ModelError, match=r"cls.predictions.transform.dense.weight: .* no such tensor"):
        describe("bert", source, Head(TASK))
