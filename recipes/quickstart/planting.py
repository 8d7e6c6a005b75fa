"""Activation outliers for a GPT-2 that has none: step 4 of make_model.py, which says why and how.

Shapes: n_embd is d. `c_attn.weight` is [d, 3 d] = [in, q k v], `attn.c_proj.weight` [d, d], `mlp.c_fc.weight`
[d, 4 d]: transformers' Conv1D stores [in, out], so an input channel is a row.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GPT2LMHeadModel

PLANT_SEED = 7
LN_CHANNELS = 4
"""Channels planted in the output of every ln_1 and every ln_2."""
LN_FACTORS = (16, 32, 64)
VALUE_CHANNELS = 2
"""Channels planted in the value part of every c_attn."""
VALUE_FACTOR = 8
"""Moderate: attn.c_proj reads no LayerNorm, so methods that fold scales into LayerNorms cannot undo it."""


@dataclass(frozen=True)
class Planted:
    """Channels of one activation that were multiplied, and by what."""

    block: int
    activation: str
    """`ln_1` or `ln_2` (output of that LayerNorm), or `value` (value part of c_attn's output)."""
    channels: tuple[int, ...]
    factors: tuple[int, ...]


def plant(
    model: GPT2LMHeadModel,
    seed: int = PLANT_SEED,
    ln_channels: int = LN_CHANNELS,
    ln_factors: Sequence[int] = LN_FACTORS,
    value_channels: int = VALUE_CHANNELS,
    value_factor: int = VALUE_FACTOR,
) -> tuple[GPT2LMHeadModel, tuple[Planted, ...]]:
    """A copy of the model with outlier channels that computes the same function; and what was planted.

    All factors have to be powers of two: then every product of an activation and a weight is the same number
    as before, and nothing is rounded.
    """
    for factor in (*ln_factors, value_factor):
        if factor < 1 or factor & (factor - 1):
            raise ValueError(f"factor {factor} is not a power of two, so it would round; use 8, 16, ...")
    draw = random.Random(seed)
    model = copy.deepcopy(model)
    width = model.config.n_embd
    planted = []
    with torch.no_grad():
        for index, block in enumerate(model.transformer.h):
            readers = (("ln_1", block.ln_1, block.attn.c_attn), ("ln_2", block.ln_2, block.mlp.c_fc))
            for name, norm, reader in readers:
                channels = sorted(draw.sample(range(width), ln_channels))
                factors = [draw.choice(ln_factors) for _ in channels]
                scale = torch.tensor(factors, dtype=norm.weight.dtype)
                norm.weight[channels] *= scale
                norm.bias[channels] *= scale
                reader.weight[channels] /= scale[:, None]
                planted.append(Planted(index, name, tuple(channels), tuple(factors)))
            channels = sorted(draw.sample(range(width), value_channels))
            columns = [2 * width + channel for channel in channels]
            block.attn.c_attn.weight[:, columns] *= value_factor
            block.attn.c_attn.bias[columns] *= value_factor
            block.attn.c_proj.weight[channels] /= value_factor
            planted.append(Planted(index, "value", tuple(channels), (value_factor,) * value_channels))
    return model, tuple(planted)
