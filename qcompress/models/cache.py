"""Decoder wrapper with a key-value cache: past keys and values as inputs, present ones as outputs.

Where keys and values are quantized (points `key_point`, `value_point`), the cache holds their int8 codes,
which are dequantized before the matmul that reads them. A token is quantized in one way whether it is new or
comes from the cache, so the graph with a cache computes the result of the model without one.

Shapes: past and present [batch, heads, tokens, width], int8 or the compute type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from qcompress.models.architecture import CacheLayout
from qcompress.quant.folded import Rounding


class _Decoding(nn.Module):
    """Replacement of a point whose input, from the cache, is already codes."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, codes: Tensor) -> Tensor:
        return self.rounding.decoded(codes)


class _Layer(DynamicLayer):
    """Cache of one attention's keys and values, as codes where they are quantized."""

    def __init__(
        self, past: tuple[Tensor, Tensor], roundings: tuple[Rounding | None, Rounding | None]
    ) -> None:
        super().__init__()
        self.keys, self.values = past
        self.roundings = roundings
        self.dtype, self.device = past[0].dtype, past[0].device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *rest: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        new = (key_states, value_states)
        new = (x if item is None else item.coded(x) for x, item in zip(new, self.roundings, strict=True))
        return super().update(*new)


class Cached(nn.Module):
    """(inputs, past) -> (logits, *present) of a folded decoder. Replaces the key and value points of the
    model.
    """

    def __init__(self, model: nn.Module, layout: CacheLayout) -> None:
        super().__init__()
        self.model, self.layout = model, layout
        self.roundings = []
        for name in layout.attentions:
            attention = model.get_submodule(name)
            self.roundings.append(tuple(_take_over(attention, part) for part in ("key_point", "value_point")))

    def forward(self, inputs: dict[str, Tensor], past: list[Tensor]) -> tuple[Tensor, ...]:
        pairs = zip(past[0::2], past[1::2], strict=True)
        layers = [_Layer(pair, points) for pair, points in zip(pairs, self.roundings, strict=True)]
        outputs = self.model(**inputs, past_key_values=Cache(layers=layers), use_cache=True)
        present = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        return (outputs.logits, *present)

    def empty(self, rows: int, tokens: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Zero-filled past."""
        shape = (rows, self.layout.heads, tokens, self.layout.width)
        items = [item for pair in self.roundings for item in pair]
        return [torch.zeros(shape, dtype=dtype if item is None else torch.int8) for item in items]


def _take_over(attention: nn.Module, part: str) -> Rounding | None:
    rounding = getattr(attention, part, None)
    if rounding is None:
        return None
    setattr(attention, part, _Decoding(rounding))
    return rounding
