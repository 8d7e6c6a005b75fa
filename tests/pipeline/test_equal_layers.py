"""Small tensors that are bit-equal: every layer keeps codes, scales and bias of its own in the graph.

The oracle is ONNX Runtime with all optimizations off against the folded model in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from lines import plain_session
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer
from tiny_bert import PADDING, VOCABULARY, EncoderLine, encoder_line, token_inputs
from tiny_nets import net_line, save_images, save_net
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, logging

from qcompress.graph.view import read
from qcompress.pipeline.stages.export import export
from qcompress.schema.recipe import Export
from qcompress.system.artifacts import read_json

WIDTH, POSITIONS = 32, 32
Weights = dict[str, Tensor]


def layer(block: int, name: str) -> str:
    return f"bert.encoder.layer.{block}.{name}"


def equal(*names: str) -> Callable[[Weights], None]:
    """Layers that have the first one's weight and bias."""

    def change(weights: Weights) -> None:
        for name in names[1:]:
            for part in ("weight", "bias"):
                weights[f"{name}.{part}"].copy_(weights[f"{names[0]}.{part}"])

    return change


def blocks(weights: Weights) -> None:
    for name in [name for name in weights if ".layer.1." in name]:
        weights[name].copy_(weights[name.replace(".layer.1.", ".layer.0.")])


def zeros(weights: Weights) -> None:
    for name in [name for name in weights if name.startswith("bert.encoder") and "dense" in name]:
        weights[name].zero_()


def tables(weights: Weights) -> None:
    found = [f"bert.embeddings.{name}_embeddings.weight" for name in ("position", "token_type")]
    weights[found[1]].copy_(weights[found[0]])


def transposed(weights: Weights) -> None:
    query, key = (weights[layer(0, f"attention.self.{name}.weight")] for name in ("query", "key"))
    query.copy_((query + query.t()) / 2)
    key.copy_(query.t())


def as_initialised(weights: Weights) -> None:
    for name, tensor in weights.items():
        if "LayerNorm" in name or name.endswith("bias"):
            tensor.fill_(1.0 if "LayerNorm.weight" in name else 0.0)


def several(weights: Weights) -> None:
    as_initialised(weights)
    tables(weights)
    equal(VALUE, layer(1, "attention.self.value"))(weights)


QUERY, KEY, VALUE = (layer(0, f"attention.self.{name}") for name in ("query", "key", "value"))
PLANTED: dict[str, Callable[[Weights], None]] = {
    "query, key and value": equal(QUERY, KEY, VALUE),
    "layers of two blocks, tables, norms and biases": several,
    "two blocks": blocks,
    "zeros": zeros,
    "a symmetric weight and its transpose": transposed,
}
FORMATS: dict[str, Any] = {
    "w8a8": "w8a8",
    "int4 blocks": {"weights": {"bits": 4, "block": 32}, "activations": "int8", "embeddings": "int8"},
    "fp16": {"preset": "w8a8", "compute": "fp16"},
    "float query and key": {"preset": "w8a8", "layers": {"*.query": "float", "*.key": "float"}},
}
CASES = [*((name, "w8a8") for name in PLANTED), *(("two blocks", form) for form in FORMATS if form != "w8a8"),
         ("zeros", "int4 blocks"), ("query, key and value", "float query and key")]  # fmt: skip


def line_of(
    folder: Path, text: Path, change: Callable[[Weights], None], form: Any, count: int = 2
) -> EncoderLine:
    """An encoder of `count` blocks with planted weights, folded."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=count, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=POSITIONS, type_vocab_size=POSITIONS,
        pad_token_id=PADDING, id2label={0: "no", 1: "yes", 2: "maybe"},
    )  # fmt: skip
    torch.manual_seed(0)
    logging.disable_progress_bar()
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.add_(0.15 * torch.randn_like(tensor))
            assert tensor.numel() <= 1024 or "word_embeddings" in name
        change(dict(model.named_parameters()))
    model.save_pretrained(folder / "model")
    make_tokenizer(folder / "model", text.read_text(encoding="utf-8"))
    made = encoder_line(folder / "line", folder / "model", text, "bert", format=form, method="ptq")
    return made.train().fold()


@pytest.mark.parametrize(("plant", "form"), CASES)
def test_equal_layers_are_exported_and_certified_each_by_itself(
    tmp_path: Path, text_file: Path, plant: str, form: str
) -> None:
    count = 2 if plant in ("two blocks", "layers of two blocks, tables, norms and biases") else 1
    line = line_of(tmp_path, text_file, PLANTED[plant], FORMATS[form], count)
    out = tmp_path / "export"
    out.mkdir()
    target = "cpu" if plant in ("query, key and value", "zeros") else "rtx-ada"
    export(line.folded, Export(), target, {"version": "0", "recipe": "tiny"}, out)
    joined = [name for name in read(out / "model.onnx").constants if "+" in name]
    assert bool(joined) == (target == "cpu" and form != "float query and key")
    certificate = read_json(out / "certificate.json")
    assert certificate["complete"] and len(certificate["layers"]) >= 7 + 6 * (count - 1)

    stored = set(read(out / "model.onnx", separated=True).constants)  # joined weights layer by layer
    folded = load_file(line.folded.path / "folded.safetensors")
    own = {name for name in folded if not name.endswith((".input.scale", "_point.scale"))}
    # of float linear layers of this size the exporter stores the transpose, under a name of its own
    lacking = {name for name in own - stored if not name.endswith((".query.weight", ".key.weight"))}
    assert len(own) > 20 * count and lacking == set()
    assert all(item["bytes"] > item["information_bits"] for item in read_json(out / "sizes.json")["layers"])

    if form == "fp16":
        return  # ONNX Runtime sums in another order in half precision
    inputs = token_inputs("bert", rows=3, length=9, pad="right")
    session = plain_session(out / "model.onnx")
    found = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})[0]
    expected = line.logits("fold", inputs).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_one_rounding_still_serves_every_reader_of_one_input(tmp_path: Path, text_file: Path) -> None:
    """Equal scales of activations are stored once, so that query, key and value share a Q/DQ pair."""
    line = line_of(tmp_path, text_file, lambda weights: None, "w8a8")
    out = tmp_path / "export"
    out.mkdir()
    export(line.folded, Export(), "rtx-ada", {"version": "0", "recipe": "tiny"}, out)
    graph = onnx.load(out / "model.onnx").graph
    count = sum(node.op_type == "QuantizeLinear" for node in graph.node)
    assert count == 2 * 4 + 2  # an input each for query-key-value, three dense layers; pooler, classifier


def test_equal_codebooks_keep_their_indices_and_tables(tmp_path: Path, text_file: Path) -> None:
    form = {"weights": {"codebook": "gather", "block": 4, "centroids": 16}, "embeddings": "int8"}
    line = line_of(tmp_path, text_file, blocks, {**form, "activations": "int8"})
    file = line.folded.path / "folded.safetensors"
    weights = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    blocks(weights)  # k-means starts at random, so that the tables of equal weights differ
    save_file(weights, file, metadata)
    out = tmp_path / "export"
    out.mkdir()
    export(line.folded, Export(), "rtx-ada", {"version": "0", "recipe": "tiny"}, out)
    assert read_json(out / "certificate.json")["complete"]
    stored = {item.name for item in onnx.load(out / "model.onnx").graph.initializer}
    for block in (0, 1):
        for part in ("assignments", "centroids"):
            assert f"{layer(block, 'attention.self.value')}.weight.{part}" in stored


def test_equal_convolutions_and_batch_norms(tmp_path: Path) -> None:
    source = save_net(tmp_path / "model", "bottleneck")
    weights = load_file(source / "model.safetensors")
    first, second = (f"resnet.encoder.stages.0.layers.{place}.layer.1" for place in (0, 1))
    names = [name for name in weights if name.startswith(f"{first}.")]
    assert len(names) == 6 and weights[f"{first}.convolution.weight"].numel() <= 1024
    for name in names:
        weights[name.replace(first, second)] = weights[name].clone()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    archive = save_images(tmp_path / "images.npz")
    line = net_line(tmp_path / "line", "bottleneck", archive, source=source).train().fold()
    out = tmp_path / "export"
    out.mkdir()
    export(line.folded, Export(), "rtx-ada", {"version": "0", "recipe": "tiny"}, out)
    assert read_json(out / "certificate.json")["complete"]
    stored = {item.name for item in onnx.load(out / "model.onnx").graph.initializer}
    for name in (first, second):
        assert {f"{name}.convolution.{part}" for part in ("weight.codes", "weight.scale", "bias")} <= stored
