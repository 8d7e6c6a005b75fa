"""Rescaled values: no float function changes, what is trained is what is folded, outliers shrink."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import BLOCKS, Line
from tiny import WIDTH as GPT2_WIDTH
from tiny import token_ids as gpt2_ids
from tiny_bert import WIDTH, EncoderLine, StandInExamples, encoder_line, save_encoder, token_inputs
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, GPT2LMHeadModel

from qcompress.models import FAMILIES
from qcompress.models.architecture import Architecture
from qcompress.models.plan import plan_points, plan_sites, site_from_json, site_to_json
from qcompress.models.prepare import Prepared, quantize
from qcompress.quant.layers import QuantizedWeight
from qcompress.quant.rescaling import FixedScale
from qcompress.schema.adapters import QuadapterOptions
from qcompress.schema.recipe import Recipe
from qcompress.system.artifacts import read_json

ENCODERS = ("bert", "roberta", "distilbert")
CHANNEL = 7
"""Of the values, made large by `planted`."""


def random_scale(channels: int, seed: int) -> Tensor:
    return (0.7 * torch.randn(channels, generator=torch.Generator().manual_seed(seed))).exp()


def without_rounding(prepared: Prepared) -> nn.Module:
    for layer in prepared.layers.values():
        if isinstance(layer, QuantizedWeight):
            layer.weight_quantizer = None
        layer.input_quantizer = None
    return prepared.model


def rescaled(made: Line | EncoderLine, family: str, source: Path) -> tuple[nn.Module, list[str]]:
    """The float model with every site of the recipe rescaled at random, and the writers' names."""
    model = FAMILIES[family].load_float(source, made.float_model.path)
    prepared = quantize(model, family, made.plan)
    sites = plan_sites(made.recipe, made.architecture, made.plan)
    for seed, site in enumerate(sites):
        prepared.rescale(site, FixedScale(random_scale(site.channels, seed)))
    return without_rounding(prepared), [site.writer for site in sites]


@pytest.fixture
def encoder(tmp_path: Path, text_file: Path) -> Callable[..., EncoderLine]:
    """Makes a checkpoint of an encoder, by default without outliers, and loads it."""

    def make(family: str = "bert", factor: float = 1.0, **options: object) -> EncoderLine:
        place = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        source = planted(save_encoder(place / "checkpoint", text_file, family), family, factor)
        return encoder_line(place / "line", source, text_file, family, **options)

    return make


def planted(checkpoint: Path, family: str, factor: float) -> Path:
    """The same function with one channel of every block's values `factor` times as large."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    blocks = model.distilbert.transformer.layer if family == "distilbert" else model.base_model.encoder.layer
    with torch.no_grad():
        for block in blocks:
            own = block.attention
            value = own.v_lin if family == "distilbert" else own.self.value
            output = own.out_lin if family == "distilbert" else own.output.dense
            value.weight[CHANNEL] *= factor
            value.bias[CHANNEL] *= factor
            output.weight[:, CHANNEL] /= factor
    model.save_pretrained(checkpoint)
    return checkpoint


# What may not change ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ENCODERS)
def test_without_rounding_a_rescaled_encoder_is_the_float_model(
    encoder: Callable[..., EncoderLine], family: str
) -> None:
    made = encoder(family, adapter="quadapter")
    model, writers = rescaled(made, family, made.float_model.source)
    assert len(writers) == 2 and all("value" in name or "v_lin" in name for name in writers)
    inputs = token_inputs(family, pad="right")
    expected = AutoModelForSequenceClassification.from_pretrained(made.float_model.source).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits, rtol=0, atol=1e-5)
        difference = model.double()(**inputs).logits - expected.double()(**inputs).logits
    assert float(difference.abs().max()) < 1e-12


@pytest.mark.parametrize(("asked", "count"), [("auto", 4), ("norm", 4), ("value", 2), ("all", 6)])
def test_without_rounding_a_rescaled_gpt2_is_the_float_model(
    line: Callable[..., Line], asked: str, count: int
) -> None:
    made = line(adapter={"name": "quadapter", "sites": asked})
    model, writers = rescaled(made, "gpt2", made.source)
    assert len(writers) == count
    assert sum(name.endswith("c_attn") for name in writers) == (2 if asked in ("value", "all") else 0)
    ids, expected = gpt2_ids(), GPT2LMHeadModel.from_pretrained(made.source).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
        difference = model.double()(ids).logits - expected.double()(ids).logits
    assert float(difference.abs().max()) < 1e-12


@pytest.mark.parametrize("weights", [{"bits": 8}, {"bits": 4, "block": 32}], ids=["int8", "int4-g32"])
def test_a_rescaled_encoder_folds_into_value_and_output_bit_for_bit(
    encoder: Callable[..., EncoderLine], weights: dict[str, int]
) -> None:
    form = {"preset": "w8a8", "attention": "int8", "weights": weights}
    made = encoder(factor=40.0, adapter="quadapter", format=form)
    made.train().fold()
    inputs = token_inputs("bert", pad="right")
    trained = made.logits("train", inputs)
    assert torch.equal(trained, made.logits("fold", inputs))
    assert not torch.equal(trained, made.logits("float", inputs))
    source = load_file(made.float_model.source / "model.safetensors")
    tensors = load_file(made.trained.path / "trained.safetensors")
    folded = load_file(made.folded.path / "folded.safetensors")
    grid = -(2 ** (weights["bits"] - 1)), 2 ** (weights["bits"] - 1) - 1
    for block in range(BLOCKS):
        name = f"bert.encoder.layer.{block}.attention"
        scale = tensors[f"{name}.self.value.rescale"].numpy()
        assert scale.shape == (WIDTH,) and int(scale.argmin()) == CHANNEL
        bias = source[f"{name}.self.value.bias"].numpy() * scale
        np.testing.assert_array_equal(folded[f"{name}.self.value.bias"].numpy(), bias)
        value = source[f"{name}.self.value.weight"].numpy() * scale[:, None]
        output = source[f"{name}.output.dense.weight"].numpy() / scale
        for layer, weight in (("self.value", value), ("output.dense", output)):
            steps = folded[f"{name}.{layer}.weight.scale"].numpy()
            steps = steps if steps.ndim == 1 else steps.repeat(32, axis=0)
            codes = np.clip(np.round(weight.T / steps), *grid)
            np.testing.assert_array_equal(folded[f"{name}.{layer}.weight.codes"].numpy(), codes)


def test_gpt2s_values_are_the_last_third_of_its_fused_layer(line: Callable[..., Line]) -> None:
    adapter = {"name": "quadapter", "sites": "value"}
    made = line(method="ptq", adapter=adapter, format={"preset": "w8a8", "attention": "int8"}).train().fold()
    ids = gpt2_ids()
    assert torch.equal(made.logits("train", ids), made.logits("fold", ids))
    source, folded = load_file(made.source / "model.safetensors"), made.tensors("fold")
    for block in range(BLOCKS):
        layer = f"transformer.h.{block}.attn.c_attn"
        ratio = folded[f"{layer}.bias"] / source[f"{layer}.bias"]
        assert torch.equal(
            folded[f"{layer}.bias"][: 2 * GPT2_WIDTH], source[f"{layer}.bias"][: 2 * GPT2_WIDTH]
        )
        scale = made.tensors()[f"{layer}.rescale"]
        torch.testing.assert_close(ratio[2 * GPT2_WIDTH :], scale)
        assert float((scale - 1).abs().max()) > 0.1


# What must get better --------------------------------------------------------------------------------


def test_ranges_of_the_values_follow_the_rescaling(encoder: Callable[..., EncoderLine]) -> None:
    """Both the point in front of the matmul and the input of the output projection, observed anew."""
    form = {"preset": "w8a8", "attention": "int8"}
    made = encoder(factor=40.0, adapter="quadapter", format=form).train()
    tensors = load_file(made.trained.path / "trained.safetensors")
    plain = load_file(encoder(factor=40.0, format=form).train().trained.path / "trained.safetensors")
    for block in range(BLOCKS):
        name = f"bert.encoder.layer.{block}.attention"
        for place in (f"{name}.self.value_point.scale", f"{name}.output.dense.input.scale"):
            assert float(tensors[place]) < float(plain[place]) / 5
        same = f"{name}.self.key_point.scale"
        assert torch.equal(tensors[same], plain[same])
    held = [point for point in plan_points(made.recipe, made.architecture) if point.activations]
    assert len(held) == 4 * BLOCKS


@pytest.mark.parametrize("family", ENCODERS)
def test_a_balanced_start_undoes_an_outlier_among_the_values(
    encoder: Callable[..., EncoderLine], family: str
) -> None:
    inputs = token_inputs(family, pad="right")
    errors = []
    for adapter in ("none", "quadapter"):
        made = encoder(family, factor=40.0, adapter=adapter).train()
        difference = made.logits("train", inputs) - made.logits("float", inputs)
        errors.append(float(difference.square().mean()))
    assert errors[1] < errors[0] / 2


def block_errors(made: EncoderLine, family: str) -> list[float]:
    """Mean squared error of each block of the trained model on float inputs, one unpadded sequence at a time,
    from transformers' own hidden states.
    """
    stock = AutoModelForSequenceClassification.from_pretrained(made.float_model.source).eval()
    ours, data = made.model("train"), StandInExamples(made.recipe.task)
    total, count = [0.0] * BLOCKS, 0
    for row in range(len(data)):
        inputs = {name: tensor for name, tensor in data.batch([row]).items() if name != "labels"}
        with torch.no_grad():
            exact = stock(**inputs, output_hidden_states=True).hidden_states
            for index, name in enumerate(made.architecture.blocks):
                found = ours.get_submodule(name)(exact[index])
                found = found[0] if isinstance(found, tuple) else found
                total[index] += float((found - exact[index + 1]).double().square().sum())
        count += exact[0].numel()
    return [error / count for error in total]


@pytest.mark.parametrize("family", ENCODERS)
def test_blocks_of_an_encoder_learn_from_sequences_of_many_lengths(
    encoder: Callable[..., EncoderLine], family: str
) -> None:
    """The error that training sees is that of real tokens, and it falls below that of the start."""
    phases = {"calibrate": {"steps": 30}, "finetune": {"steps": 0}}
    identity = {"name": "quadapter", "init": "identity"}
    options = {"method": "quadapter", "train": {"phases": phases, "lr": {"adapter": 0.1}}}
    made = encoder(family, factor=40.0, adapter=identity, quantizer="minmax", **options).train().fold()
    facts = read_json(made.trained.path / "trained.json")["phases"]
    assert [fact["block"] for fact in facts] == list(made.architecture.blocks)
    for fact, error in zip(facts, block_errors(made, family), strict=True):
        assert fact["after"] == pytest.approx(error, rel=1e-3)
        assert fact["after"] < fact["before"] / 1.2
    inputs = token_inputs(family, pad="right")
    assert torch.equal(made.logits("train", inputs), made.logits("fold", inputs))


# Tables and recipes ----------------------------------------------------------------------------------


def test_only_sites_whose_layers_are_all_integers_are_rescaled(line: Callable[..., Line]) -> None:
    adapter = {"name": "quadapter", "sites": "all"}
    form = {"preset": "w8a8", "layers": {"transformer.h.0.attn.c_attn": "float", "*.1.mlp.c_fc": "float"}}
    made = line(adapter=adapter, format=form)
    found = [site.writer for site in plan_sites(made.recipe, made.architecture, made.plan)]
    names = ["transformer.h.0.ln_2", "transformer.h.1.ln_1", "transformer.h.1.attn.c_attn"]
    assert sorted(found) == sorted(names)


def test_a_site_survives_its_file(line: Callable[..., Line]) -> None:
    sites = line().architecture.sites
    assert {site.kind for site in sites} == {"norm", "value"}
    for site in sites:
        back = site_from_json(site_to_json(site))
        assert (back.writer, back.readers, back.kind) == (site.writer, site.readers, site.kind)
        assert (back.first, back.point) == (site.first, site.point)


def test_the_option_is_not_spelled_where_it_says_nothing(line: Callable[..., Line]) -> None:
    """So that recipes from before it have the digests that they had."""
    spelled = line(method="quadapter").recipe.model_dump(mode="json")["adapter"]
    assert spelled == {"name": "quadapter", "init": "balanced", "bound": 100.0}
    chosen = QuadapterOptions(sites="all").model_dump(mode="json")
    assert chosen["sites"] == "all" and QuadapterOptions(**chosen).sites == "all"


def test_every_value_site_is_between_modules_that_are_there(
    line: Callable[..., Line], encoder: Callable[..., EncoderLine]
) -> None:
    made: list[tuple[Architecture, nn.Module, Recipe]] = []
    for family in ENCODERS:
        one = encoder(family, adapter="quadapter")
        made.append((one.architecture, one.model("float"), one.recipe))
    gpt2 = line(adapter={"name": "quadapter", "sites": "value"})
    made.append((gpt2.architecture, GPT2LMHeadModel.from_pretrained(gpt2.source), gpt2.recipe))
    for architecture, model, _ in made:
        values = [site for site in architecture.sites if site.kind == "value"]
        assert len(values) == BLOCKS
        points = {point.name for point in architecture.points}
        for site in values:
            (reader,) = site.readers
            writer = architecture.layer(site.writer)
            assert architecture.layer(reader).in_features == site.channels == WIDTH
            assert site.first + site.channels == writer.out_features
            assert model.get_submodule(site.writer) is not None and site.point in points
