"""Text encoders with a head or with pooling: ModernBERT, DeBERTa, ELECTRA, ALBERT, MPNet, XLM-R and any
other architecture of transformers' auto classes for these tasks, discovered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcompress.models.auto_family import AutoFamily
from qcompress.models.hf_loader import AUTO

if TYPE_CHECKING:
    from torch import Tensor

TEXTS = AutoFamily(
    family="text-model",
    autos=AUTO,
    inputs=("input_ids", "attention_mask", "token_type_ids"),
)

TASKS, INPUTS = tuple(TEXTS.autos), TEXTS.inputs

DEPTH = None
"""Blocks may differ: `model.blocks` and layer drop do not apply."""

CAUSAL = False
"""A token may attend to all tokens."""

describe, task_config, signature = TEXTS.describe, TEXTS.task_config, TEXTS.signature
load_float, empty, tie = TEXTS.load_float, TEXTS.empty, TEXTS.tie
install_points, shorten = TEXTS.install_points, TEXTS.shorten
positions, prefix = TEXTS.positions, TEXTS.prefix


def graph_inputs(
    input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
) -> dict[str, Tensor]:
    """Inputs of the exported graph for token ids [batch, sequence]; padding has mask 0. Models without token
    types ignore them.
    """
    import torch

    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    return {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": types}
