"""Proven sites are sound: folded by hand in fp64 they keep the function, on inputs of other sizes."""

from __future__ import annotations

from math import prod

import fold_sites
import pytest
import torch
import zoo

from qcompress.models.structure import Structure, discover

LIMIT = 1e-12
"""Largest relative error of a folded model; a wrong site differs by 1e-3 or more."""


def worst_error(sample: zoo.Sample, structure: Structure, draws: int) -> dict[str, float]:
    """Writer of each site -> largest relative error of `draws` random scales."""
    wide = fold_sites.in_double(sample.model)
    expected = fold_sites.outputs(wide, sample.fresh)
    generator = torch.Generator().manual_seed(1)
    errors: dict[str, float] = {}
    for site in structure.sites:
        for _ in range(draws):
            with fold_sites.folded(wide, structure, site, fold_sites.factors(site, generator)):
                error = fold_sites.relative_error(fold_sites.outputs(wide, sample.fresh), expected)
            errors[site.writer] = max(errors.get(site.writer, 0.0), error)
    return errors


@pytest.mark.parametrize("name", zoo.FEW)
def test_folded_sites_keep_the_function(name: str) -> None:
    sample = zoo.build(name)
    errors = worst_error(sample, discover(sample.model, sample.inputs, sample.again), draws=1)
    assert len(errors) >= 3
    assert {writer: error for writer, error in errors.items() if not error <= LIMIT} == {}


def test_a_site_with_another_map_is_not_sound() -> None:
    """The oracle sees a wrong map: without its repetition the site of grouped queries changes the outputs."""
    sample = zoo.build("llama")
    structure = discover(sample.model, sample.inputs)
    site = next(site for site in structure.sites if site.writer == "model.layers.0.self_attn.v_proj")
    wrong = tuple(reversed(site.maps[0]))
    changed = Structure.from_json(structure.to_json() | {"sites": [vars(site) | {"maps": [wrong]}]})
    assert worst_error(sample, changed, draws=1)[site.writer] > 1e-3


def test_sites_of_representative_blocks_are_those_of_all_blocks() -> None:
    """Except sites that leave their block: those of other blocks are not searched."""
    for name in ("llama", "resnet"):
        sample = zoo.build(name)
        few = discover(sample.model, sample.inputs, sample.again).sites
        every = discover(sample.model, sample.inputs, sample.again, representative=False).sites
        assert few == every


def test_channels_of_values() -> None:
    """Grouped queries repeat, fused projections keep the values last, GPT-NeoX interleaves them by head."""

    def site(name: str, writer: str):
        sample = zoo.build(name)
        sites = discover(sample.model, sample.inputs, sample.again).sites
        return next(site for site in sites if site.writer.endswith(writer) and site.kind == "value")

    grouped = site("llama", "layers.1.self_attn.v_proj")
    heads = [tuple(range(8)), tuple(range(8)), tuple(range(8, 16)), tuple(range(8, 16))]
    assert (grouped.first, grouped.channels, grouped.outputs) == (0, 16, None)
    assert grouped.maps == (sum(heads, ()),)

    fused = site("phi3", "layers.0.self_attn.qkv_proj")
    assert (fused.first, fused.channels, fused.outputs) == (48, 16, None)
    assert fused.maps == (sum(heads, ()),)

    gate = site("phi3", "layers.0.mlp.gate_up_proj")
    assert (gate.first, gate.channels, gate.outputs, gate.maps) == (48, 48, None, ())

    interleaved = site("gpt_neox", "layers.0.attention.query_key_value")
    assert interleaved.outputs == tuple(24 * head + 16 + place for head in range(4) for place in range(8))
    assert (interleaved.first, interleaved.channels, interleaved.maps) == (16, 32, ())


def test_norms_take_factors_as_their_class_computes() -> None:
    for name, rule in (("llama", "weight"), ("gemma2", "1 + weight")):
        sample = zoo.build(name)
        assert set(discover(sample.model, sample.inputs).norms.values()) == {rule}


@pytest.mark.slow
def test_no_site_of_the_zoo_changes_the_function() -> None:
    """At least 45 architectures, every block, 2,000 foldings."""
    draws, foldings, built, unsound = 6, 0, 0, {}
    for name in zoo.NAMES:
        try:
            sample = zoo.build(name)
        except pytest.skip.Exception as skipped:
            print(f"{name}: {skipped}")
            continue
        structure = discover(sample.model, sample.inputs, sample.again, representative=False)
        errors = worst_error(sample, structure, draws)
        built, foldings = built + 1, foldings + draws * len(errors)
        unsound |= {(name, site): error for site, error in errors.items() if not error <= LIMIT}
        print(f"{name}: {len(errors)} sites, {max(errors.values(), default=0):.1e}")
    print(f"{built} architectures, {foldings} foldings")
    assert unsound == {}
    assert built >= 45 and foldings >= 2000


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_architecture_is_described(name: str) -> None:
    """Layers hold the weights, blocks are found, and discovery with representatives is sound too."""
    sample = zoo.build(name)
    structure = discover(sample.model, sample.inputs, sample.again)
    outside = sum(prod(shape) for _, shape in structure.uncovered)
    wide = sum(parameter.numel() for parameter in sample.model.parameters() if parameter.dim() > 1)
    assert structure.covered == pytest.approx(1 - outside / wide)
    assert len(structure.blocks) >= 1 and len(structure.layers) >= 5
    if not {"expert", "speech"} & set(name.split()):
        assert structure.covered > 0.2
    errors = worst_error(sample, structure, draws=1)
    assert all(error <= LIMIT for error in errors.values())
