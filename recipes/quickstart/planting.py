"""Activation outliers for a GPT-2 that has none: step 4 of make_model.py, which says why and how.

Shapes: n_embd is d. `c_attn.weight` is [d, 3 d] = [in, q k v], `attn.c_proj.weight` [d, d], `mlp.c_fc.weight`
[d, 4 d]: transformers' Conv1D stores [in, out], so an input channel is a row.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


def unplant(model: GPT2LMHeadModel, planted: Sequence[Planted]) -> GPT2LMHeadModel:
    """A copy of a planted model without what was planted: to the last bit the model from before."""
    model = copy.deepcopy(model)
    width = model.config.n_embd
    with torch.no_grad():
        for item in planted:
            block, channels = model.transformer.h[item.block], list(item.channels)
            scale = torch.tensor(item.factors, dtype=block.ln_1.weight.dtype)
            if item.activation == "value":
                columns = [2 * width + channel for channel in channels]
                block.attn.c_attn.weight[:, columns] /= scale
                block.attn.c_attn.bias[columns] /= scale
                block.attn.c_proj.weight[channels] *= scale[:, None]
                continue
            norm = getattr(block, item.activation)
            reader = {"ln_1": block.attn.c_attn, "ln_2": block.mlp.c_fc}[item.activation]
            norm.weight[channels] /= scale
            norm.bias[channels] /= scale
            reader.weight[channels] *= scale[:, None]
    return model


def bundled_without_outliers(folder: Path) -> None:
    """Write the bundled model, un-planted, as a checkpoint."""
    here = Path(__file__).parent
    facts = json.loads((here / "facts.json").read_text(encoding="utf-8"))["planted"]["activations"]
    planted = [Planted(**{**item, "channels": tuple(item["channels"]), "factors": tuple(item["factors"])})
               for item in facts]  # fmt: skip
    shutil.copytree(here / "model", folder)
    (folder / "model.safetensors").unlink()
    unplant(GPT2LMHeadModel.from_pretrained(here / "model"), planted).save_pretrained(folder)
