"""Discovery of a model's structure: an observed run, runs that prove batch norms, runs that prove sites."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.models.architecture import Layer, Site
from qcompress.models.structure.attentions import find_attentions
from qcompress.models.structure.batch_norms import find_batch_norms
from qcompress.models.structure.blocks import find_blocks, representatives, with_parts
from qcompress.models.structure.layers import block_of, find_layers, kind_of, mark_head
from qcompress.models.structure.norm_factors import is_norm, norm_factors
from qcompress.models.structure.probe import Probe
from qcompress.models.structure.reached import unreached
from qcompress.models.structure.running import tensors_of, without_constants
from qcompress.models.structure.sites import search, stated_for, verified
from qcompress.models.structure.structure import Structure
from qcompress.models.structure.trace import Trace


def discover_structure(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    again: Mapping[str, Tensor] | None,
    *,
    sites: bool,
    representative: bool,
) -> Structure:
    """Implementation of `structure.discover`, which restores the model."""
    overrides = without_constants(model)

    def run() -> Any:
        return model(**inputs)

    def run_randomized() -> list[Tensor]:
        return tensors_of(torch.func.functional_call(model, overrides, (), dict(inputs)))

    layers, floats, trace = find_layers(model, run)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no linear, embedding or convolution layer that its forward calls",
            fix="name another model",
        )
    dead = unreached(model, run, [layer.name for layer in layers])
    layers = [layer for layer in layers if layer.name not in dead]
    floats = {**floats, **dict.fromkeys(dead, "nothing reads its output")}
    blocks = find_blocks(model, trace, layers)
    attentions = find_attentions(model, run)
    layers = with_parts(mark_head(layers, trace, blocks), trace, blocks, tuple(attentions))
    folded = find_batch_norms(model, layers, trace, run_randomized)
    layers = tuple(dataclasses.replace(layer, norm=folded.get(layer.name)) for layer in layers)
    proven: list[Site] = []
    rules: dict[str, str] = {}
    if sites:
        rules = norm_factors(model, [*_norms(model, trace, folded), *folded.values()], run)
        alike = representatives(model, layers, blocks) if representative else {}
        readers = _unshared(model, layers, trace)
        probe = Probe(model, inputs, readers, folded, overrides)
        proven = _proven_sites(probe, _writers(layers, readers, rules, trace), blocks, alike)
        if again is not None:
            proven = verified(Probe(model, again, readers, folded, overrides), proven, silent=True)
    covered, uncovered = _coverage(model, layers)
    return Structure(
        layers=layers,
        floats=floats,
        blocks=blocks,
        sites=tuple(proven),
        norms={site.writer: rules[site.writer] for site in proven if site.kind == "norm"},
        attentions=tuple(attentions),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        covered=covered,
        uncovered=uncovered,
        key_values=tuple(attentions.values()),
    )


def _coverage(
    model: nn.Module, layers: Sequence[Layer]
) -> tuple[float, tuple[tuple[str, tuple[int, ...]], ...]]:
    """Share of the layers in the parameters with two axes or more, and the others, the largest first."""
    held = {id(model.get_submodule(layer.name).weight) for layer in layers}
    wide = [(name, parameter) for name, parameter in model.named_parameters() if parameter.dim() > 1]
    outside = [(name, tuple(parameter.shape)) for name, parameter in wide if id(parameter) not in held]
    total = sum(parameter.numel() for _, parameter in wide)
    covered = 1 - sum(math.prod(shape) for _, shape in outside) / total if total else 1.0
    return covered, tuple(sorted(outside, key=lambda item: (-math.prod(item[1]), item[0])))


def _norms(model: nn.Module, trace: Trace, folded: Mapping[str, str]) -> list[str]:
    """Norms that are called once, share no parameter and do not fold into a convolution."""
    owners = Counter(id(tensor) for module in model.modules() for tensor in module.parameters(recurse=False))
    return [
        name
        for name, module in model.named_modules()
        if trace.calls[name] == 1
        and is_norm(module)
        and name not in folded.values()
        and name not in trace.read_outside
        and all(owners[id(tensor)] == 1 for tensor in module.parameters())
    ]


def _unshared(model: nn.Module, layers: Sequence[Layer], trace: Trace) -> list[str]:
    """Linear and convolution layers that are called once, whose weight no other layer reads, and that are
    not chosen by the inputs.
    """
    shared = {name for layer in layers if layer.tied_to for name in (layer.name, layer.tied_to)}
    choices = _choices(model, trace)
    return [
        layer.name
        for layer in layers
        if layer.kind != "embedding"
        and layer.name not in shared
        and trace.calls[layer.name] == 1
        and block_of(layer.name, choices) is None
    ]


def _choices(model: nn.Module, trace: Trace) -> list[str]:
    """Lists of modules with layers of which some were called and some were not: experts, of which other
    inputs call others. A norm before them has readers that were not seen.
    """
    choices = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            children = [
                f"{name}.{child}" if name else child
                for child, inner in module.named_children()
                if any(kind_of(part) for part in inner.modules())
            ]
            if len({child in trace.calls for child in children}) == 2:
                choices.append(name)
    return choices


def _writers(
    layers: Sequence[Layer], unshared: Sequence[str], rules: Mapping[str, str], trace: Trace
) -> dict[str, str]:
    """Candidates for writers of sites in call order -> their kind: norms whose weight takes a factor of the
    output, and layers of which that holds as well. It holds of a convolution with a batch norm if the batch
    norm takes it; one that holds an activation (timm's BatchNormAct2d) may not. A head's output is the
    model's.
    """
    folded = {layer.norm for layer in layers if layer.norm}
    kinds = {name: "norm" for name in rules if name not in folded}
    kinds |= {
        layer.name: "value"
        for layer in layers
        if layer.name in unshared
        and layer.kind != "head"
        and (layer.norm is None or rules.get(layer.norm) == "weight")
    }
    return {name: kinds[name] for name in trace.calls if name in kinds}


def _proven_sites(
    probe: Probe, writers: Mapping[str, str], blocks: Sequence[str], alike: Mapping[str, str]
) -> list[Site]:
    """Sites in call order. `writers`: name -> kind. `alike`: block -> the block whose sites are stated for
    it; a statement that one run does not confirm is searched like those of the first block.
    """

    def searched(writer: str) -> Site | None:
        return search(probe, writer, writers[writer])

    places = {writer: block_of(writer, blocks) for writer in writers}
    first = [name for name, block in places.items() if block is None or alike.get(block, block) == block]
    sites = {writer: site for writer in first if (site := searched(writer))}
    stated = [
        statement
        for block, original in alike.items()
        if block != original
        for site in sites.values()
        if places[site.writer] == original and (statement := stated_for(site, original, block))
    ]
    confirmed = verified(probe, stated, silent=False)
    sites |= {site.writer: site for site in confirmed}
    for site in stated:
        if site.writer not in sites and (own := searched(site.writer)):
            sites[own.writer] = own
    return [sites[writer] for writer in writers if writer in sites]
