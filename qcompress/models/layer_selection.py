"""Selection of a checkpoint's blocks, and weight sharing among blocks. Torch is imported only for type
checking.

    [0, 2, 4]       three blocks of a checkpoint: a shallower model
    [0, 0, 2, 2]    four blocks; the first two share their weights, and so do the last two

A model with shared weights has a list in config.json, `shared_blocks`: for each block the first one with
equal weights. Its checkpoint holds the tensors of those first blocks alone.

Source: Quant-Noise (arXiv:2004.07320) makes its smallest models by sharing the weights of adjacent layers in
pairs and by dropping every other layer of a model that was trained with LayerDrop (arXiv:1909.11556, section
3.2: every other one).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from qcompress.errors import ModelError
from qcompress.models.architecture import Architecture

if TYPE_CHECKING:
    from torch import nn

SHARED = "shared_blocks"
"""Key of config.json: for each block, the first block that shares its weights."""

Blocks = Literal["every-other", "pairs"] | Sequence[int]
"""every-other: the first, third ... of the blocks that own their weights, each as often as it is used; pairs:
as many blocks as before, in pairs that share the weights of the first; or indices of blocks, from 0.
"""

Names = Callable[[str], str | None]
"""Function from a tensor's old name to its new one; None: the new model lacks it."""

Tensors = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Depth:
    """Location of a family's blocks, which all have one shape."""

    key: str
    """Key of config.json that counts the blocks."""
    stack: str
    """Module that lists them."""
    names: str
    """Pattern of the prefix before a block's number in tensor names of a checkpoint."""
    buffers: tuple[str, ...] = ()
    """Suffixes of tensors in old checkpoints that are not parameters."""
    placed: tuple[str, ...] = ()
    """Keys of config.json that, if true, make a block's function depend on its index."""

    def split(self, name: str) -> tuple[str, int, str] | None:
        """Prefix, block number and suffix of a tensor's name; None outside the blocks."""
        match = re.match(rf"({self.names})(\d+)(\..*)$", name)
        return (match[1], int(match[2]), match[3]) if match else None


class BlocksError(ModelError):
    """A selection of blocks that the model does not have."""


def choose(config: dict[str, Any], depth: Depth, blocks: Blocks) -> tuple[dict[str, Any], Names]:
    """Config of a model with these blocks, and the function to its tensor names. Raises BlocksError for a
    block that the checkpoint does not have.
    """
    count = config[depth.key]
    shared = owners(config, depth)
    numbers = _numbers(blocks, shared)
    wrong = sorted({number for number in numbers if not 0 <= number < count})
    if wrong or not numbers:
        named = f"block {wrong[0]}" if wrong else "no block"
        raise BlocksError(
            f"names {named}, and the checkpoint has {count}", fix=f"write numbers from 0 to {count - 1}"
        )
    placed = next((key for key in depth.placed if config.get(key)), None)
    if placed and numbers != list(range(len(numbers))):
        raise BlocksError(
            f"moves blocks, and with {placed} in config.json a block's function depends on its index",
            fix="keep the first blocks, such as [0, 1]",
        )
    used = [shared[number] for number in numbers]
    first = {number: used.index(number) for number in used}
    new_owners = [first[number] for number in used]
    new = {key: value for key, value in config.items() if key != SHARED} | {depth.key: len(used)}
    if new_owners != list(range(len(used))):
        new[SHARED] = new_owners

    def names(name: str) -> str | None:
        parts = depth.split(name)
        if parts is None:
            return name
        before, number, after = parts
        return f"{before}{first[number]}{after}" if number in first else None

    return new, names


def _numbers(blocks: Blocks, shared: Sequence[int]) -> list[int]:
    if blocks == "pairs":
        return [number - number % 2 for number in range(len(shared))]
    if blocks == "every-other":
        kept = sorted(set(shared))[::2]
        return [number for number, owner in enumerate(shared) if owner in kept]
    return list(blocks)


def owners(config: dict[str, Any], depth: Depth) -> list[int]:
    """For each block, the first one that shares its weights, or its own number. Raises ModelError for an
    invalid list in config.json.
    """
    count = config[depth.key]
    if type(count) is not int:
        raise ModelError(f"config.json: {depth.key} must be an integer, found {count!r}")
    listed = config[SHARED] if SHARED in config else list(range(count))
    has_length = isinstance(listed, list) and len(listed) == count
    if not has_length or any(
        type(owner) is not int or not 0 <= owner <= number or listed[owner] != owner
        for number, owner in enumerate(listed)
    ):
        raise ModelError(
            f"config.json: {SHARED} must name for each of {count} blocks the first one with the same "
            f"weights, found {listed!r}",
            fix="mend it, or drop it where every block has weights of its own",
        )
    return listed


def lent_prefixes(config: dict[str, Any], depth: Depth) -> dict[str, str]:
    """Map of name prefixes of blocks with shared weights to the prefix of the owning block."""
    return {
        f"{depth.stack}.{number}.": f"{depth.stack}.{owner}."
        for number, owner in enumerate(owners(config, depth))
        if owner != number
    }


def with_shared(tensors: Tensors, config: dict[str, Any], depth: Depth) -> Tensors:
    """Tensors of a checkpoint under every name that the model has for them."""
    shared = owners(config, depth)
    expanded = dict(tensors)
    for name, value in tensors.items():
        parts = depth.split(name)
        if parts is not None:
            before, block, after = parts
            expanded |= {
                f"{before}{number}{after}": value
                for number, owner in enumerate(shared)
                if owner == block and number != block
            }
    return expanded


def share(architecture: Architecture, tensors: Tensors, config: dict[str, Any], depth: Depth) -> Architecture:
    """Tie the layers of each block with shared weights to those of its owning block.

    Shared blocks have no rescaling sites: a factor that fits one block's activations would apply to the other
    blocks too.
    """
    shared = owners(config, depth)
    ties = lent_prefixes(config, depth)
    bound = tuple({*ties, *ties.values()})

    def tied(layer):
        block = next((block for block in ties if layer.name.startswith(block)), None)
        return layer if block is None else replace(layer, tied_to=ties[block] + layer.name[len(block) :])

    spared = 0
    for name, (_, shape) in with_shared(tensors, config, depth).items():
        parts = depth.split(name)
        if parts is not None and shared[parts[1]] != parts[1] and not name.endswith(depth.buffers):
            spared += math.prod(shape)
    return replace(
        architecture,
        layers=tuple(tied(layer) for layer in architecture.layers),
        sites=tuple(site for site in architecture.sites if not site.writer.startswith(bound)),
        parameters=architecture.parameters - spared,
    )


def lent(model: nn.Module) -> dict[int, int]:
    """Map of shared block index -> owning block index."""
    shared = getattr(model.config, SHARED, None) or ()
    return {number: owner for number, owner in enumerate(shared) if owner != number}


def lacking(missing: Iterable[str], model: nn.Module, depth: Depth) -> list[str]:
    """Missing tensors of a checkpoint, without those of shared blocks."""
    blocks = tuple(f"{depth.stack}.{number}." for number in lent(model))
    return sorted(name for name in missing if not name.startswith(blocks))


def share_parameters(model: nn.Module, depth: Depth) -> None:
    """Give shared blocks the parameters of their owning block, as far as both still have them."""
    blocks = model.get_submodule(depth.stack)
    for number, owner in lent(model).items():
        for name, parameter in blocks[owner].named_parameters():
            parent, _, attribute = name.rpartition(".")
            setattr(blocks[number].get_submodule(parent), attribute, parameter)
