"""Layers on which no output of a graph depends stay float."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import SqueezeBertConfig, SqueezeBertForMaskedLM

from qcompress.models.structure import discover
from qcompress.models.structure.reached import unreached


class Pooled(nn.Module):
    """Logits, and beside them a pooled output that is not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.body, self.pooler, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x)
        return {"logits": self.head(hidden), "pooled": self.pooler(hidden)}


def test_a_layer_beside_the_logits_stays_float_and_gradients_stay_off() -> None:
    model, x = Pooled(), torch.ones(2, 4)
    names = ["body", "pooler", "head"]
    assert unreached(model, lambda: model(x), names) == ["pooler"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    structure = discover(model, {"x": x})
    assert [layer.name for layer in structure.layers] == ["body", "head"]
    assert structure.floats == {"pooler": "nothing reads its output"}


def test_without_logits_every_output_counts() -> None:
    model, x = Pooled(), torch.ones(2, 4)
    assert unreached(model, lambda: tuple(model(x).values()), ["body", "pooler", "head"]) == []


def test_the_pooler_of_a_masked_language_model_stays_float() -> None:
    config = SqueezeBertConfig(
        vocab_size=40, hidden_size=16, embedding_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, q_groups=1, k_groups=1, v_groups=1, intermediate_groups=1, output_groups=1,
    )  # fmt: skip
    structure = discover(SqueezeBertForMaskedLM(config), {"input_ids": torch.tensor([[3, 4, 5]])})
    assert structure.floats["transformer.pooler.dense"] == "nothing reads its output"
