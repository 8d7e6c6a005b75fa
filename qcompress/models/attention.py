"""Attention function with probes and quantization points, registered beside transformers' own.

It computes transformers' eager attention, in the same order of operations (`qcompress` is its name in
transformers' `AttentionInterface`):

    s = q @ k^T * scaling                 (softcap: s = cap * tanh(s / cap))
    s = s + position bias + mask          probe.scores(s)
    a = softmax(s, with sinks)            a = probe.probabilities(a)
    a = dropout(a)
    c = a @ v                             c = probe.context(c)

The mask function is registered under this name too: otherwise transformers silently passes no mask, and a
causal model attends to later tokens. A model without probes and points keeps the stock functions.

Shapes: q and c [batch, heads, tokens, width of a head], k and v of as many or fewer heads; s and a [batch,
heads, queries, keys].
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.models.architecture import OPERANDS

NAME = "qcompress"
"""Name of the attention function. It stays registered, because transformers offers no way to withdraw a mask
function; models that do not ask for it are not affected.
"""


class Probe(Protocol):
    """Callbacks of an attention module, its attribute `probe`."""

    def scores(self, s: Tensor) -> None:
        """Receives the scores, with scaling and mask."""

    def probabilities(self, a: Tensor) -> Tensor:
        """Receives the probabilities, before dropout; its return value replaces them."""

    def context(self, c: Tensor) -> Tensor:
        """Receives the weighted values, [batch, heads, tokens, width]; its return value replaces them."""


def open_attention(model: nn.Module) -> str:
    """Make every attention of a transformers model run through `attend`, without changing its results.
    Returns the implementation that the model had before. Raises ModelError if another function has the name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ALL_ATTENTION_FUNCTIONS.get(NAME, attend) is not attend:
        raise ModelError(
            f"transformers' AttentionInterface has another function with the name {NAME!r}",
            fix="register that function with another name",
        )
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = model.config._attn_implementation  # transformers has no public name for it
    model.set_attn_implementation(NAME)
    return before


IGNORED = frozenset({
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "num_items_in_batch", "deterministic",
})  # fmt: skip
"""Keywords that transformers passes to every attention function and no eager one reads: positions are already
in the query and the key, and the others concern the model's return values.
"""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    head_mask: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **keywords: object,
) -> tuple[Tensor, Tensor]:
    """Compute the context [batch, tokens, heads, width] and the probabilities, in transformers' layout.

    `module.probe`, if present, is a `Probe`; children named as in `OPERANDS` quantize the operands: each
    directly before its matmul, the key after its transposition, where TensorRT and ONNX Runtime expect it.
    Key and value heads that several query heads share are quantized once and then repeated.

    Raises ModelError for a keyword that is neither computed here nor known to have no effect.
    """
    _refuse_unknown(module, keywords)
    _refuse_no_mask(module, query, key, attention_mask, sliding_window, is_causal)
    sinks = _sinks(module, s_aux)
    probe: Probe | None = getattr(module, "probe", None)
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    groups = _groups(module, query, key)
    query = _rounded(module, "query_point", query)
    key = _repeated(_rounded(module, "key_point", key.transpose(-1, -2)), groups)
    scores = torch.matmul(query, key).mul_(scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    scores = _masked(scores, attention_mask)
    if probe is not None:
        probe.scores(scores)
    probabilities = _softmax(scores, sinks).to(query.dtype)
    if probe is not None:
        probabilities = probe.probabilities(probabilities)
    dropped = F.dropout(probabilities, p=dropout, training=module.training)
    dropped = dropped if head_mask is None else dropped * head_mask
    dropped = _rounded(module, "probability_point", dropped)
    context = torch.matmul(dropped, _repeated(_rounded(module, "value_point", value), groups))
    if probe is not None:
        context = probe.context(context)
    return context.transpose(1, 2).contiguous(), probabilities


def _refuse_unknown(module: nn.Module, keywords: dict[str, object]) -> None:
    """Refuse keywords that would be ignored, because the result would then differ from the stock model's."""
    unknown = sorted(name for name, value in keywords.items() if value is not None and name not in IGNORED)
    if unknown:
        raise ModelError(
            f"{type(module).__name__} hands {', '.join(unknown)} to its attention function, which "
            "qcompress's does not compute",
            fix="leave attention float (no `format.attention`, `format.cache` or points, and no teacher "
            "intervention), or name another model",
        )


def _refuse_no_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    window: int | None,
    causal: bool | None,
) -> None:
    """Refuse a causal or windowed attention without a mask, because eager attention hides tokens only by
    the mask.
    """
    if mask is not None:
        return
    if (causal and query.size(-2) > 1) or (window is not None and key.size(-2) > window):
        requested = "is_causal" if causal else f"sliding_window {window}"
        raise ModelError(
            f"{type(module).__name__} asks for {requested} and hands over no attention_mask",
            fix="leave attention float, or name another model",
        )


def _sinks(module: nn.Module, s_aux: Tensor | None) -> Tensor | None:
    """Scores of the attention sinks, one for each head, [1, heads, 1, 1]; None without sinks."""
    if s_aux is None:
        if isinstance(getattr(module, "sinks", None), Tensor):
            raise ModelError(
                f"{type(module).__name__} has attention sinks and does not hand them over as s_aux",
                fix="leave attention float, or name another model",
            )
        return None
    return s_aux.reshape(1, -1, 1, 1)


def _groups(module: nn.Module, query: Tensor, key: Tensor) -> int:
    """Number of query heads that share a key and value head."""
    heads, shared = query.size(1), key.size(1)
    if heads % shared:
        raise ModelError(
            f"{type(module).__name__} has {heads} query heads, which is not a multiple of its {shared} key "
            "heads",
            fix="leave attention float, or name another model",
        )
    return heads // shared


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Repeat each head for the query heads that share it."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Apply a mask to scores: a float mask is added, a boolean mask is true at visible tokens."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.add_(mask) if mask.dtype == scores.dtype else scores + mask


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Probabilities; a sink takes a share of them and is dropped."""
    if sinks is None:
        return F.softmax(scores, dim=-1)
    sinks = sinks.to(scores.dtype).expand(scores.size(0), -1, scores.size(2), -1)
    return F.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]


def _rounded(module: nn.Module, point: str, x: Tensor) -> Tensor:
    rounding = getattr(module, point, None)
    return x if rounding is None else rounding(x)


def token_vectors(point: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """Inputs of a quantization point as vectors, without padding: [tokens, features], or [values, 1] for
    probabilities, whose number depends on the sequence.

    `mask` [batch, tokens] is true at real tokens.
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
