"""Which blocks a model has: some of a checkpoint's, and which of them share their weights. No torch above.

    [0, 2, 4]       three blocks of a checkpoint: a shallower model
    [0, 0, 2, 2]    four blocks, of which the first two share their weights, and the last two

A model with shared weights has a list of its own in config.json, `shared_blocks`: for each block the first
one with the same weights. Its checkpoint holds the tensors of those first ones alone.

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
"""Key of config.json: for each block the first one that has the same weights."""

Blocks = Literal["every-other", "pairs"] | Sequence[int]
"""every-other: the first, third ... of the blocks that have weights of their own, each as often as it is
used; pairs: as many blocks as before, of which two and two share the weights of the first; or numbers of
blocks, from 0."""

Names = Callable[[str], str | None]
"""What a tensor of the old model is called in the new one; None: it has no place there."""

Tensors = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Depth:
    """Where a family's blocks are, all of which have one shape."""

    key: str
    """Key of config.json that counts them."""
    stack: str
    """Module that lists them."""
    names: str
    """Pattern of what stands before a block's number in the names of a checkpoint's tensors."""
    buffers: tuple[str, ...] = ()
    """How the names of tensors end that old checkpoints have, and no parameter is."""
    placed: tuple[str, ...] = ()
    """Keys of config.json that, where they are true, make what a block computes depend on its place."""

    def split(self, name: str) -> tuple[str, int, str] | None:
        """What stands before the number of a block in a tensor's name, the number, and what follows."""
        found = re.match(rf"({self.names})(\d+)(\..*)$", name)
        return (found[1], int(found[2]), found[3]) if found else None


class BlocksError(ModelError):
    """Blocks that a model has not."""


def choose(config: dict[str, Any], depth: Depth, blocks: Blocks) -> tuple[dict[str, Any], Names]:
    """The config of a model of these blocks, and the names of its tensors. Raises BlocksError for a block
    that the checkpoint has not.
    """
    count = config[depth.key]
    shared = owners(config, depth)
    numbers = _numbers(blocks, shared)
    wrong = sorted({number for number in numbers if not 0 <= number < count})
    if wrong or not numbers:
        what = f"block {wrong[0]}" if wrong else "no block"
        raise BlocksError(
            f"names {what}, and the checkpoint has {count}", fix=f"write numbers from 0 to {count - 1}"
        )
    placed = next((key for key in depth.placed if config.get(key)), None)
    if placed and numbers != list(range(len(numbers))):
        raise BlocksError(
            f"moves blocks, and with {placed} in config.json what a block computes depends on its place",
            fix="keep the first blocks, such as [0, 1]",
        )
    used = [shared[number] for number in numbers]
    first = {number: used.index(number) for number in used}
    own = [first[number] for number in used]
    new = {key: value for key, value in config.items() if key != SHARED} | {depth.key: len(used)}
    if own != list(range(len(used))):
        new[SHARED] = own

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
    """For each block the first one with the same weights; its own number where it shares none. Raises
    ModelError where config.json names others.
    """
    count = config[depth.key]
    if type(count) is not int:
        raise ModelError(f"config.json: {depth.key} must be an integer, found {count!r}")
    found = config[SHARED] if SHARED in config else list(range(count))
    right = isinstance(found, list) and len(found) == count
    if not right or any(
        type(owner) is not int or not 0 <= owner <= number or found[owner] != owner
        for number, owner in enumerate(found)
    ):
        raise ModelError(
            f"config.json: {SHARED} must name for each of {count} blocks the first one with the same "
            f"weights, found {found!r}",
            fix="mend it, or drop it where every block has weights of its own",
        )
    return found


def lent_prefixes(config: dict[str, Any], depth: Depth) -> dict[str, str]:
    """How the names in a block begin that has another one's weights, and how those of the other one do."""
    return {
        f"{depth.stack}.{number}.": f"{depth.stack}.{owner}."
        for number, owner in enumerate(owners(config, depth))
        if owner != number
    }


def with_shared(tensors: Tensors, config: dict[str, Any], depth: Depth) -> Tensors:
    """Tensors of a checkpoint by every name under which the model has them."""
    shared = owners(config, depth)
    found = dict(tensors)
    for name, value in tensors.items():
        parts = depth.split(name)
        if parts is not None:
            before, own, after = parts
            found |= {
                f"{before}{number}{after}": value
                for number, owner in enumerate(shared)
                if owner == own and number != own
            }
    return found


def share(architecture: Architecture, tensors: Tensors, config: dict[str, Any], depth: Depth) -> Architecture:
    """The architecture with the layers of a block tied to those of the first one with the same weights.

    Nothing can be rescaled there: a factor that fits one block's activations would be another block's too.
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
    """The blocks of a stock model that have another one's weights, and whose."""
    shared = getattr(model.config, SHARED, None) or ()
    return {number: owner for number, owner in enumerate(shared) if owner != number}


def lacking(missing: Iterable[str], model: nn.Module, depth: Depth) -> list[str]:
    """Of the tensors that a checkpoint lacks those that no other block of the model has."""
    blocks = tuple(f"{depth.stack}.{number}." for number in lent(model))
    return sorted(name for name in missing if not name.startswith(blocks))


def share_parameters(model: nn.Module, depth: Depth) -> None:
    """Give a block the parameters of the first one with the same weights, as far as both still have them."""
    blocks = model.get_submodule(depth.stack)
    for number, owner in lent(model).items():
        for name, parameter in blocks[owner].named_parameters():
            place, _, own = name.rpartition(".")
            setattr(blocks[number].get_submodule(place), own, parameter)
