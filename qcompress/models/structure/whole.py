"""Structure of a whole model: what is found in one block of its reduced model holds for all like it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from qcompress.models.architecture import CacheLayout, Layer, Site
from qcompress.models.structure import Structure, discover
from qcompress.models.structure.kept import Discovered
from qcompress.models.structure.reduced import reduce, ties_of
from qcompress.models.text_embedder import TextEmbedder

Inputs = Callable[[nn.Module, int], Mapping[str, Tensor]]
"""Function from a model and a length to example inputs."""

REPEATED = "shares its weight with a layer that is called more than once in a forward pass"
"""Reason for which a layer stays float: the order of the matmuls of one weight in the graph would not tell
which layer each of them is.
"""


def whole_structure(auto: str, values: dict[str, Any], inputs: Inputs) -> Discovered:
    """Discover the reduced model of a config.json, and state for the whole one what was found. Where sites
    lead from one block to another, as in convolutional nets, all blocks are run.
    """
    reduced = reduce(auto, values)
    found = _found(reduced.model, inputs)
    blocks = _Blocks(reduced.blocks, reduced.sources)
    if blocks.are_fewer and any(blocks.crosses(site) for site in found.sites):
        reduced = reduce(auto, values, all_blocks=True)
        found = _found(reduced.model, inputs)
    if not (blocks := _Blocks(reduced.blocks, reduced.sources)).are_fewer:
        blocks = _Blocks(found.blocks, {block: block for block in found.blocks})
    small, whole = reduced.model, reduced.whole
    mixed = _mixed(found.layers)
    told = (layer for layer in found.layers if layer.name not in mixed)
    layers = tuple(_at_full_size(layer, whole) for layer in blocks.layers(told))
    floats = found.floats | dict.fromkeys(mixed, REPEATED)
    own = dict(whole.named_parameters())
    sizes = {name: value.numel() for name, value in own.items()}
    held = {f"{layer.name}.weight" for layer in layers if layer.tied_to is None}
    matrices = [name for name, value in own.items() if value.dim() > 1]
    shapes = dict(zip(found.attentions, found.key_values, strict=True))
    left = sorted(set(matrices) - held, key=lambda name: (-sizes[name], name))
    structure = replace(
        found,
        layers=layers,
        floats={name: why for place, why in floats.items() for name in blocks.names(place)},
        blocks=blocks.blocks,
        sites=tuple(blocks.sites(found.sites)) if blocks.are_fewer else found.sites,
        norms={name: how for place, how in found.norms.items() for name in blocks.names(place)},
        attentions=tuple(blocks.spread(found.attentions)),
        parameters=sum(sizes.values()),
        covered=1 - sum(sizes[name] for name in left) / max(sum(sizes[name] for name in matrices), 1),
        uncovered=tuple((name, tuple(own[name].shape)) for name in left),
        key_values=tuple(shapes[place] for place in blocks.origins(found.attentions)),
    )
    conversions = get_model_conversion_mapping(whole, add_legacy=False) if _is_stock(whole) else []
    prefix = getattr(_stock(whole), "base_model_prefix", "")
    return Discovered(
        structure=structure,
        tensors={name: tuple(value.shape) for name, value in own.items()},
        ties=tuple(ties_of(whole)),
        title=type(_stock(whole) if _is_stock(whole) else whole.model).__name__,
        arguments=tuple(name for name in ARGUMENTS if takes(whole, name)),
        prefix=f"{prefix}." if prefix and hasattr(whole, prefix) else "",
        renames=tuple(_renames(whole)),
        converts=any(not isinstance(item, WeightRenaming) for item in conversions),
        cache=_cache_layout(small, inputs(small, 1), structure.attentions or blocks.blocks),
    )


def _mixed(layers: Iterable[Layer]) -> list[str]:
    """Layers with a matmul whose weight several such layers share, one of which is called more than once."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.kind != "embedding":
            groups.setdefault(layer.tied_to or layer.name, []).append(layer)
    shared = [group for group in groups.values() if len(group) > 1]
    return [layer.name for group in shared if any(one.calls > 1 for one in group) for layer in group]


def _found(model: nn.Module, inputs: Inputs) -> Structure:
    return discover(model, inputs(model, 7), inputs(model, 12))


@dataclass(frozen=True)
class _Blocks:
    """Names of a reduced model in all blocks for which they stand."""

    blocks: tuple[str, ...]
    """Blocks of the whole model, in the order of the forward pass."""
    sources: Mapping[str, str]
    """Block of the whole model -> block of the reduced model."""

    @property
    def are_fewer(self) -> bool:
        """True if the reduced model lacks blocks."""
        return len(set(self.sources.values())) < len(self.blocks)

    def crosses(self, site: Site) -> bool:
        """True if a site has parts in two blocks, or in a block and outside."""
        return len({self.split(name)[0] for name in (site.writer, *site.readers)}) > 1

    def split(self, name: str) -> tuple[str, str]:
        """The block of the reduced model that holds a module, and the rest of the name; no block outside."""
        inside = (block for block in self.sources.values() if f"{name}.".startswith(f"{block}."))
        block = next(inside, "")
        return block, name[len(block) :]

    def names(self, name: str) -> list[str]:
        """All names for which a name of the reduced model stands."""
        block, rest = self.split(name)
        return (
            [f"{other}{rest}" for other in self.blocks if self.sources[other] == block] if block else [name]
        )

    def spread(self, names: Iterable[str]) -> list[str]:
        """All names in order: those in front of the blocks, then block after block, then the others."""
        before: list[str] = []
        after: list[str] = []
        within: dict[str, list[str]] = {}
        for name in names:
            block, rest = self.split(name)
            if block:
                within.setdefault(block, []).append(rest)
            else:
                (after if within else before).append(name)
        inner = [f"{block}{rest}" for block in self.blocks for rest in within.get(self.sources[block], ())]
        return [*before, *inner, *after]

    def origins(self, names: Iterable[str]) -> list[str]:
        """For each name in order (`spread`) the name of the reduced model that stands for it."""
        origin = {name: place for place in names for name in self.names(place)}
        return [origin[name] for name in self.spread(names)]

    def beside(self, name: str | None, other: str) -> str | None:
        """The name in the block of the module `other`; unchanged outside the blocks."""
        block, rest = self.split(name or "")
        if not block:
            return name
        own = next(own for own in self.blocks if f"{other}.".startswith(f"{own}."))
        return f"{own}{rest}"

    def layers(self, layers: Iterable[Layer]) -> Iterator[Layer]:
        """Layers in all blocks, in order."""
        by_name = {layer.name: layer for layer in layers}
        origin = {name: place for place in by_name for name in self.names(place)}
        for name in self.spread(by_name):
            layer = by_name[origin[name]]
            tied, norm = self.beside(layer.tied_to, name), self.beside(layer.norm, name)
            yield replace(layer, name=name, tied_to=tied, norm=norm)

    def sites(self, sites: Iterable[Site]) -> Iterator[Site]:
        """Sites in all blocks, in order."""
        by_writer = {site.writer: site for site in sites}
        origin = {name: place for place in by_writer for name in self.names(place)}
        for writer in self.spread(by_writer):
            site = by_writer[origin[writer]]
            readers = tuple(self.beside(reader, writer) for reader in site.readers)
            point = self.beside(site.point, writer)
            yield replace(site, writer=writer, readers=readers, point=point)


def _renames(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Patterns by which transformers renames tensors of checkpoints, and their replacements."""
    for item in get_model_conversion_mapping(model) if _is_stock(model) else ():
        if isinstance(item, WeightRenaming):
            yield from ((source, item.target_patterns[0]) for source in item.source_patterns)


def _at_full_size(layer: Layer, whole: nn.Module) -> Layer:
    """The layer with the sizes of the whole model, whose vocabulary is larger."""
    weight = whole.get_submodule(layer.name).weight
    if layer.kind == "conv":
        return layer
    rows, columns = weight.shape if layer.axis == 0 else weight.shape[::-1]
    return replace(layer, in_features=columns, out_features=rows)


def _cache_layout(
    model: nn.Module, inputs: Mapping[str, Tensor], attentions: tuple[str, ...]
) -> CacheLayout | None:
    """Layout of a decoder's key-value cache; None for a model without one, and where its layers differ."""
    if not hasattr(model.config, "use_cache"):
        return None
    with torch.no_grad():
        kept = getattr(model(**inputs, use_cache=True), "past_key_values", None)
    layers = [
        layer for layer in getattr(kept, "layers", ()) if isinstance(getattr(layer, "keys", None), Tensor)
    ]
    shapes = {tuple(tensor.shape) for layer in layers for tensor in (layer.keys, layer.values)}
    if len(shapes) != 1 or any(len(shape) != 4 for shape in shapes):
        return None
    ((_, heads, _, width),) = shapes
    return CacheLayout(attentions, heads, width)


def text_inputs(model: nn.Module, length: int) -> dict[str, Tensor]:
    """Random token ids of two rows, a full mask, and positions if the model takes them."""
    random = torch.Generator().manual_seed(length)
    rows = _stock(model).get_input_embeddings().weight.shape[0]
    ids = torch.randint(min(3, rows - 1), rows, (2, length), generator=random)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if takes(model, "token_type_ids"):
        given["token_type_ids"] = torch.randint(0, 2, (2, length), generator=random)
    if takes(model, "position_ids"):
        given["position_ids"] = torch.arange(length).expand(2, -1).contiguous()
    return given


def image_inputs(model: nn.Module, length: int) -> dict[str, Tensor]:
    """Two random images, of the config's size if it gives one, or else of 64 or 96 pixels."""
    random = torch.Generator().manual_seed(length)
    vision = getattr(model.config, "vision_config", model.config)
    size = getattr(vision, "image_size", None) or (64 if length < 10 else 96)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    channels = getattr(vision, "num_channels", 3)
    return {"pixel_values": torch.randn(2, channels, *sides, generator=random)}


def inputs_like_example(model: nn.Module, length: int) -> dict[str, Tensor]:
    """Random values like those of a user's example, of its shapes and two rows: floats of its mean and its
    spread, integers of more than two values drawn from it, and others as they are.
    """
    random = torch.Generator().manual_seed(length)
    return {name: _like(tensor[[0, -1]], random) for name, tensor in model.example.items()}


def _like(example: Tensor, random: torch.Generator) -> Tensor:
    if example.is_floating_point():
        spread = example.std(correction=0) if example.numel() else 0
        return example.mean() + (spread or 1.0) * torch.randn(example.shape, generator=random)
    values = example.flatten()
    if len(values.unique()) <= 2:  # a mask
        return example.clone()
    return values[torch.randint(len(values), (len(values),), generator=random)].view_as(example)


ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "pixel_values")
"""Inputs that a graph may have."""


def takes(model: nn.Module, name: str) -> bool:
    """True if the forward pass has an argument of this name; token types must have a table of two rows."""
    stock = _stock(model)
    if name == "token_type_ids" and not (getattr(stock.config, "type_vocab_size", 0) or 0) > 1:
        return False
    return name in inspect.signature(stock.forward).parameters


def _is_stock(model: nn.Module) -> bool:
    """True for a model of transformers, False for a user's module."""
    return isinstance(_stock(model), PreTrainedModel)


def _stock(model: nn.Module) -> nn.Module:
    """transformers' model."""
    return model.encoder if isinstance(model, TextEmbedder) else model
