"""A stock text encoder with pooling: one embedding for each text.

Shapes: hidden states [batch, tokens, width]; attention mask [batch, tokens], 1 for a token and 0 for padding
on either side; embeddings [batch, width].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass
class Embedded:
    """Output of an embedder, under the name that the outputs of all tasks have: [batch, width]."""

    logits: Tensor


class TextEmbedder(nn.Module):
    """An encoder without a head, as a child of the name that it has in models with a head, so that its
    tensors have their usual names. `pooling`: mean, cls or last-token.
    """

    def __init__(self, encoder: PreTrainedModel, pooling: str, normalize: bool) -> None:
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # of the first token, for a classifier
        self._name, self.pooling, self.normalize = encoder.base_model_prefix, pooling, normalize
        self.add_module(self._name, encoder)

    @property
    def encoder(self) -> PreTrainedModel:
        """The stock model."""
        return self.get_submodule(self._name)

    @property
    def config(self) -> PreTrainedConfig:
        """Config of the stock model."""
        return self.encoder.config

    def set_attn_implementation(self, name: str) -> None:
        """Choose the attention function of the stock model."""
        self.encoder.set_attn_implementation(name)

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Embedded:
        """Embed the texts."""
        hidden = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state
        embedding = pool(hidden, attention_mask, self.pooling)
        return Embedded(F.normalize(embedding, dim=-1) if self.normalize else embedding)


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool hidden states to [batch, width]. The mean is that of Reimers and Gurevych (arXiv:1908.10084),
    section 3: over the tokens without padding.
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last-token":
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask  # 0 for padding
        mask = places == places.amax(1, keepdim=True)
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def embedder(encoder: PreTrainedModel, options: dict[str, Any]) -> TextEmbedder:
    """Embedder of a stock model; `options`: {"pooling", "normalize"} of its config.json."""
    return TextEmbedder(encoder, options["pooling"], options["normalize"])
