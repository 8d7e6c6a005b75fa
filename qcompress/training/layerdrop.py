"""LayerDrop (arXiv:1909.11556, section 3.1): each update skips each block with probability p.

A skipped block passes the residual stream through, so that the trained model can lose blocks afterwards:
`model.blocks: every-other` in the recipe that reads the run. Nothing is rescaled, and evaluation uses every
block. Blocks that share weights form a chunk and are skipped together, as they would be dropped together (our
reading of Quant-Noise, arXiv:2004.07320, which combines the two and does not specify it). At least one chunk
always runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from qcompress.models.architecture import Architecture

Draw = Callable[..., None]
"""Draws the set of skipped blocks, as a function of its integer arguments."""

STREAM = 2
"""Spawn key that separates these draws from other generators seeded with equal integers."""


@contextmanager
def layer_drop(model: nn.Module, architecture: Architecture, p: float) -> Iterator[Draw]:
    """Context manager in which passes in training mode skip blocks. Yields `Draw`, which depends only on its
    integers: both passes of an update skip the same blocks in every process. Each block has its own `forward`
    again afterwards, also after an error.
    """
    if p == 0:
        yield lambda *where: None
        return
    chunks, left_out = chunks_of(architecture), set()

    def draw(*where: int) -> None:
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(where, spawn_key=(STREAM,))))
        values = random.random(len(chunks))
        values[values.argmax()] = 1.0  # at least one chunk runs
        left_out.clear()
        for chunk, value in zip(chunks, values, strict=True):
            left_out.update(chunk if value < p else ())

    blocks = {name: model.get_submodule(name) for name in architecture.blocks}
    before = {name: vars(block).get("forward") for name, block in blocks.items()}
    try:
        for name, block in blocks.items():
            block.forward = _skipping(name, block, block.forward, left_out)
        yield draw
    finally:
        for name, block in blocks.items():
            vars(block).pop("forward", None)
            if before[name] is not None:
                block.forward = before[name]


def _skipping(
    name: str, block: nn.Module, forward: Callable[..., Tensor], left_out: set[str]
) -> Callable[..., Tensor]:
    def run(*arguments: Any, **keywords: Any) -> Tensor:
        if block.training and name in left_out:
            return arguments[0] if arguments else keywords["hidden_states"]
        return forward(*arguments, **keywords)

    return run


def chunks_of(architecture: Architecture) -> list[tuple[str, ...]]:
    """Groups of blocks that share weights, in the order of the forward pass."""
    chunks: dict[str, list[str]] = {block: [block] for block in architecture.blocks}
    for layer in architecture.layers:
        block = _block_of(layer.name, architecture)
        owner = _block_of(layer.tied_to or "", architecture)
        if owner and block in chunks:
            chunks[owner] += chunks.pop(block)
    return [tuple(chunk) for chunk in chunks.values()]


def _block_of(layer: str, architecture: Architecture) -> str | None:
    return next((block for block in architecture.blocks if layer.startswith(f"{block}.")), None)
