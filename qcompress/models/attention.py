"""Attention that can be looked into, changed and rounded: a function beside transformers' own ones.

It computes what stock eager attention computes, in the same order (`qcompress` is its name in transformers'
`AttentionInterface`):

    s = q @ k^T * scaling (+ mask)        probe.scores(s)
    a = softmax(s)                        a = probe.probabilities(a)
    a = dropout(a)
    c = a @ v                             c = probe.context(c)

The mask is registered under the same name: without it transformers passes no mask at all, silently, and a
causal model looks ahead. Stock functions stay in use wherever a model has neither probes nor points.

Shapes: q, k, v and c [batch, heads, tokens, width of a head]; s and a [batch, heads, queries, keys].
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.models.architecture import OPERANDS

NAME = "qcompress"


class Probe(Protocol):
    """What hangs on an attention module as `probe`."""

    def scores(self, s: Tensor) -> None:
        """Sees the scores, with scaling and mask."""

    def probabilities(self, a: Tensor) -> Tensor:
        """Sees the probabilities, before dropout; what it returns is used."""

    def context(self, c: Tensor) -> Tensor:
        """Sees the weighted values, [batch, heads, tokens, width]; what it returns is used."""


def open_attention(model: nn.Module) -> None:
    """Let every attention of a transformers model run through `attend`; the function stays the same."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Context [batch, tokens, heads, width] and probabilities, as transformers wants them.

    `module.probe`, where there is one, is a `Probe`; children named as in `OPERANDS` round the operands: each
    right in front of its matmul, the key after its transposition, where TensorRT and ONNX Runtime want it.
    """
    probe: Probe | None = getattr(module, "probe", None)
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    query = _rounded(module, "query_point", query)
    key = _rounded(module, "key_point", key.transpose(-1, -2))
    scores = torch.matmul(query, key).mul_(scaling)
    if attention_mask is not None:
        scores = (
            scores.add_(attention_mask) if attention_mask.dtype == scores.dtype else scores + attention_mask
        )
    if probe is not None:
        probe.scores(scores)
    probabilities = F.softmax(scores, dim=-1).to(query.dtype)
    if probe is not None:
        probabilities = probe.probabilities(probabilities)
    dropped = F.dropout(probabilities, p=dropout, training=module.training)
    dropped = _rounded(module, "probability_point", dropped)
    context = torch.matmul(dropped, _rounded(module, "value_point", value))
    if probe is not None:
        context = probe.context(context)
    return context.transpose(1, 2).contiguous(), probabilities


def _rounded(module: nn.Module, point: str, x: Tensor) -> Tensor:
    rounding = getattr(module, point, None)
    return x if rounding is None else rounding(x)


def token_vectors(point: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """What a point sees of tokens that are no padding: [tokens, features], and of probabilities, whose number
    depends on the sequence, one in each row.

    `mask` [batch, tokens] is true at tokens that count.
    """
    operand = point.rpartition(".")[2]
    if operand == "probability_point":
        if mask is None:
            return x.reshape(-1, 1)
        real = (mask[:, None, :, None] & mask[:, None, None, :]).expand_as(x)
        return x[real].unsqueeze(1)
    if operand in OPERANDS:
        x = x.permute(0, 3, 1, 2) if operand == "key_point" else x.transpose(1, 2)
        x = x.flatten(2)
    return x.flatten(0, -2) if mask is None else x[mask]
