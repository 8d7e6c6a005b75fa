"""LayerDrop (arXiv:1909.11556, section 3.1): each update leaves out each block with probability p.

What is left is the residual stream, so that a model trained so can lose blocks afterwards: `model.blocks:
every-other` in the recipe that reads the run. Nothing is rescaled, and evaluation uses every block. Blocks
that share their weights are left out together, as they would be dropped together (our reading of
Quant-Noise, arXiv:2004.07320, which combines the two and does not say). One block or chunk always stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from qcompress.models.architecture import Architecture

Draw = Callable[..., None]
"""Draws anew which blocks are left out, as a function of its arguments: integers."""

STREAM = 2
"""Keeps these draws apart from others with the same integers."""


@contextmanager
def layer_drop(model: nn.Module, architecture: Architecture, p: float) -> Iterator[Draw]:
    """Inside, blocks are left out of passes in training mode. A draw depends on nothing but the integers that
    it is given: both passes of an update leave out the same blocks, and so do several processes.
    """
    if p == 0:
        yield lambda *where: None
        return
    chunks, left_out = chunks_of(architecture), set()

    def draw(*where: int) -> None:
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(where, spawn_key=(STREAM,))))
        values = random.random(len(chunks))
        values[values.argmax()] = 1.0  # one stays: without any block nothing would be learned
        left_out.clear()
        for chunk, value in zip(chunks, values, strict=True):
            left_out.update(chunk if value < p else ())

    blocks = {name: model.get_submodule(name) for name in architecture.blocks}
    try:
        for name, block in blocks.items():
            block.forward = _skipping(name, block, block.forward, left_out)
        yield draw
    finally:
        for block in blocks.values():
            block.__dict__.pop("forward", None)


def _skipping(
    name: str, block: nn.Module, forward: Callable[..., Tensor], left_out: set[str]
) -> Callable[..., Tensor]:
    def run(*arguments: Any, **keywords: Any) -> Tensor:
        if block.training and name in left_out:
            return arguments[0] if arguments else keywords["hidden_states"]
        return forward(*arguments, **keywords)

    return run


def chunks_of(architecture: Architecture) -> list[tuple[str, ...]]:
    """Blocks that share their weights, in the order of the forward pass."""
    chunks: dict[str, list[str]] = {block: [block] for block in architecture.blocks}
    for layer in architecture.layers:
        block = next((one for one in architecture.blocks if layer.name.startswith(f"{one}.")), None)
        owner = next(
            (one for one in architecture.blocks if (layer.tied_to or "").startswith(f"{one}.")), None
        )
        if owner and block in chunks:
            chunks[owner] += chunks.pop(block)
    return [tuple(chunk) for chunk in chunks.values()]
