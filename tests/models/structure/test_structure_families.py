"""Discovery finds everything that the families written by hand state, on their stock models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import tiny_bert
import tiny_nets
import tiny_vit
import torch
from torch import Tensor, nn

from qcompress.models import describe
from qcompress.models.architecture import CAUSAL_LM, Architecture, Head, Layer, Site
from qcompress.models.structure import Structure, discover

Case = tuple[str, Head, Callable[[], nn.Module], Callable[[int], dict[str, Tensor]]]


def ids(rows: int) -> dict[str, Tensor]:
    tokens = tiny.token_ids(rows, 5 + rows)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def images(rows: int) -> dict[str, Tensor]:
    return {"pixel_values": tiny_nets.pixels(rows)}


def encoder(family: str, task: str) -> Case:
    return (
        family, Head(task, tiny_bert.LABELS), lambda: tiny_bert.make_encoder(family, task),
        lambda rows: tiny_bert.token_inputs(family, rows, 5 + rows),
    )  # fmt: skip


def net(kind: str) -> Case:
    return tiny_nets.FAMILY[kind], Head("image-classification"), lambda: tiny_nets.make_net(kind), images


CASES: dict[str, Case] = {
    "gpt2": ("gpt2", CAUSAL_LM, tiny.make_model, ids),
    "gpt2 untied": ("gpt2", CAUSAL_LM, lambda: tiny.make_model(tied=False), ids),
    "bert": encoder("bert", tiny_bert.SEQUENCE),
    "roberta": encoder("roberta", tiny_bert.TOKEN),
    "distilbert": encoder("distilbert", tiny_bert.SEQUENCE),
    "vit": ("vit", tiny_vit.HEAD, tiny_vit.make_vit, tiny_vit.pixels),
    "basic": net("basic"),
    "bottleneck": net("bottleneck"),
    "efficientnet": net("efficientnet"),
    "lite": net("lite"),
    "mobilenet": net("mobilenet"),
}


@pytest.fixture(scope="module", params=CASES)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Architecture, Structure]:
    """What a family states of a checkpoint, and what is discovered in the model."""
    family, head, make, inputs = CASES[request.param]
    folder: Path = tmp_path_factory.mktemp(family)
    model = make()
    model.save_pretrained(folder)
    return describe(family, folder, head), discover(model, inputs(2), inputs(3))


def by_name(layers: tuple[Layer, ...]) -> dict[str, Layer]:
    """Layers without the axis of the stored weight, which no family has stated for its layers."""
    return {layer.name: dataclasses.replace(layer, axis=0) for layer in layers}


def test_every_layer_is_found_with_all_that_is_said_of_it(both: tuple[Architecture, Structure]) -> None:
    stated, structure = both
    layers = by_name(structure.layers)
    for name, layer in by_name(stated.layers).items():
        if (stated.family, name) == (
            "distilbert",
            "classifier",
        ):  # behind a ReLU, which the family leaves out
            layer = dataclasses.replace(layer, nonnegative=True)
        assert layers[name] == layer


def test_layers_beyond_those_stated_are_vit_s_patches_alone(both: tuple[Architecture, Structure]) -> None:
    stated, structure = both
    more = {layer.name for layer in structure.layers} - {layer.name for layer in stated.layers}
    assert more == ({"vit.embeddings.patch_embeddings.projection"} if stated.family == "vit" else set())
    assert structure.floats == {}


def test_blocks_and_number_of_parameters_are_those_stated(both: tuple[Architecture, Structure]) -> None:
    stated, structure = both
    assert structure.blocks == stated.blocks
    assert structure.parameters == stated.parameters


def test_every_stated_site_is_proven(both: tuple[Architecture, Structure]) -> None:
    def key(site: Site) -> tuple[object, ...]:
        return site.kind, site.writer, frozenset(site.readers), site.first, site.channels, site.maps

    stated, structure = both
    assert {key(site) for site in stated.sites} <= {key(site) for site in structure.sites}


def test_attentions_are_those_stated(both: tuple[Architecture, Structure]) -> None:
    stated, structure = both
    if stated.attentions:
        assert structure.attentions == tuple(attention.module for attention in stated.attentions)


def test_conv1d_stores_its_outputs_in_the_second_axis() -> None:
    structure = discover(tiny.make_model(), ids(2), sites=False)
    axes = {layer.name.rpartition(".")[2]: layer.axis for layer in structure.layers}
    assert axes == {"wte": 0, "wpe": 0, "c_attn": 1, "c_proj": 1, "c_fc": 1, "lm_head": 0}
