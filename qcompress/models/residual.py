"""Replacements of transformers' residual modules, with quantization points at both inputs of the addition.

The output of the sublayer is the *branch*, the input that bypasses it the *skip*: y = branch + skip, which
BERT and its relatives normalize at once and ViT before the next sublayer. The stock modules add inside their
`forward`, which hooks cannot reach, so a module with points is replaced by one of these. A replacement keeps
the children of the stock module, and so the names of its parameters.

Shapes: [batch, tokens, width] throughout.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.distilbert.modeling_distilbert import TransformerBlock
from transformers.models.vit.modeling_vit import ViTLayer


class RoundedOutput(nn.Module):
    """BertSelfOutput, BertOutput and their RoBERTa twins: norm(dropout(dense(x)) + skip)."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.dense, self.dropout, self.LayerNorm = stock.dense, stock.dropout, stock.LayerNorm
        self.branch_point: nn.Module = nn.Identity()
        self.skip_point: nn.Module = nn.Identity()

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        branch = self.branch_point(self.dropout(self.dense(hidden_states)))
        return self.LayerNorm(branch + self.skip_point(input_tensor))


class RoundedBlock(TransformerBlock):
    """DistilBERT's block, which computes both of its additions itself."""

    def __init__(self, stock: TransformerBlock) -> None:
        nn.Module.__init__(self)
        self.attention, self.ffn = stock.attention, stock.ffn
        self.sa_layer_norm, self.output_layer_norm = stock.sa_layer_norm, stock.output_layer_norm
        self.attention_branch_point: nn.Module = nn.Identity()
        self.attention_skip_point: nn.Module = nn.Identity()
        self.ffn_branch_point: nn.Module = nn.Identity()
        self.ffn_skip_point: nn.Module = nn.Identity()

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **rest: object) -> Tensor:
        attended, _ = self.attention(hidden_states, attention_mask=attention_mask, **rest)
        attended = self.attention_branch_point(attended) + self.attention_skip_point(hidden_states)
        attended = self.sa_layer_norm(attended)
        out = self.ffn_branch_point(self.ffn(attended)) + self.ffn_skip_point(attended)
        return self.output_layer_norm(out)


class RoundedViTLayer(ViTLayer):
    """ViT's block, which computes both of its additions itself, after its norms."""

    def __init__(self, stock: ViTLayer) -> None:
        nn.Module.__init__(self)
        self.attention, self.mlp, self.dropout = stock.attention, stock.mlp, stock.dropout
        self.layernorm_before, self.layernorm_after = stock.layernorm_before, stock.layernorm_after
        self.attention_branch_point: nn.Module = nn.Identity()
        self.attention_skip_point: nn.Module = nn.Identity()
        self.mlp_branch_point: nn.Module = nn.Identity()
        self.mlp_skip_point: nn.Module = nn.Identity()

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **rest: object) -> Tensor:
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **rest)
        branch = self.attention_branch_point(self.dropout(attended))
        attended = branch + self.attention_skip_point(hidden_states)
        branch = self.mlp_branch_point(self.dropout(self.mlp(self.layernorm_after(attended))))
        return branch + self.mlp_skip_point(attended)


OPENED = {TransformerBlock: RoundedBlock, ViTLayer: RoundedViTLayer}
"""Blocks that compute their additions themselves, and their replacements."""


def open_additions(parent: nn.Module) -> nn.Module:
    """Replacement of `parent` with quantization points; `parent` itself if it already has them."""
    if isinstance(parent, RoundedOutput | RoundedBlock | RoundedViTLayer):
        return parent
    return OPENED.get(type(parent), RoundedOutput)(parent)
