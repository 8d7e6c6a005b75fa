"""The attention function against transformers' own eager functions: every argument is computed or refused.

The oracle is the `eager_attention_forward` of stock models, and stock models in eager attention.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    T5Config,
)

from qcompress.errors import ModelError
from qcompress.models.attention import attend, open_attention
from qcompress.quant.folded import Rounding

BATCH, HEADS, TOKENS, WIDTH = 2, 4, 6, 8


def eager(model: str):
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}").eager_attention_forward


def module(groups: int = 1, **parts: Any) -> nn.Module:
    made = nn.Module()
    made.num_key_value_groups, made.head_dim = groups, WIDTH
    for name, part in parts.items():
        setattr(made, name, part)
    return made.eval()


def operands(groups: int = 1, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = [HEADS, HEADS // groups, HEADS // groups]
    return [3 * torch.randn(BATCH, heads, TOKENS, WIDTH, generator=random) for heads in shapes]


def causal() -> Tensor:
    mask = torch.full((TOKENS, TOKENS), torch.finfo(torch.float32).min).triu(1)
    return mask.expand(BATCH, 1, -1, -1)


BIAS = torch.randn(1, HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(7))
SINKS = nn.Parameter(torch.linspace(-2, 3, HEADS), requires_grad=False)


def same(found: Tensor, expected: Tensor | np.ndarray) -> None:
    """Equal to 1e-6 of the largest value."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6 * max(1.0, np.abs(expected).max()))


STOCK: dict[str, tuple[str, int, dict[str, Any]]] = {
    "bert": ("bert", 1, {"scaling": 0.3}),
    "gpt2, own scaling": ("gpt2", 1, {}),
    "llama, two heads share one": ("llama", 2, {"scaling": 0.35}),
    "mistral, all heads share one": ("mistral", 4, {"scaling": 0.35, "sliding_window": 4}),
    "gemma2, softcap": ("gemma2", 2, {"scaling": 0.5, "softcap": 5.0, "sliding_window": None}),
    "t5, position bias": ("t5", 1, {"scaling": 1.0, "position_bias": BIAS}),
    "gpt-oss, sinks": ("gpt_oss", 2, {"scaling": 0.35, "s_aux": SINKS, "position_ids": torch.arange(TOKENS)}),
    "granite-swa, sinks": ("granite_swa", 2, {"scaling": 0.35, "s_aux": SINKS}),
    "clip, no causal mask asked for": ("clip", 1, {"scaling": 0.35, "is_causal": False}),
    "arguments without a value": ("llama", 2, {"scaling": 0.35, "indices": None, "cu_seq_lens_q": None}),
}


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("name", STOCK)
def test_it_computes_what_the_stock_function_computes(name: str, masked: bool) -> None:
    model, groups, arguments = STOCK[name]
    if not masked and arguments.get("sliding_window") is not None:
        pytest.skip("refused: see below")
    owner = module(groups, **({"sinks": SINKS} if "s_aux" in arguments else {}))
    mask = causal() if masked else None
    expected, weights = eager(model)(owner, *operands(groups), mask, **arguments)
    found, probabilities = attend(owner, *operands(groups), mask, **arguments)
    assert found.shape == (BATCH, TOKENS, HEADS, WIDTH)
    same(found, expected.reshape(found.shape))
    if model != "granite_swa":  # which returns the weights before its sinks take their part
        same(probabilities, weights)


def test_a_head_mask_multiplies_the_probabilities() -> None:
    heads = torch.tensor([1.0, 0.0, 0.5, 2.0]).view(1, HEADS, 1, 1)
    q, k, v = operands()
    found, _ = attend(module(), q, k, v, None, scaling=0.4, head_mask=heads)
    scores = 0.4 * q.numpy() @ k.numpy().transpose(0, 1, 3, 2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = heads.numpy() * weights / weights.sum(-1, keepdims=True)
    same(found, (weights @ v.numpy()).transpose(0, 2, 1, 3))


def test_a_boolean_mask_hides_what_is_false() -> None:
    expected, _ = attend(module(), *operands(), causal())
    found, _ = attend(module(), *operands(), causal() == 0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"indices": torch.zeros(1)}, "hands indices to its attention function"),
        ({"cu_seq_lens_q": torch.zeros(1), "cu_seq_lens_k": torch.zeros(1)}, "cu_seq_lens_k, cu_seq_lens_q"),
        ({"alibi": torch.zeros(1)}, "hands alibi"),
        ({"is_causal": True}, "asks for is_causal and hands over no attention_mask"),
        ({"sliding_window": 3}, "asks for sliding_window 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_dropped_is_refused_by_name(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        attend(module(), *operands(), None, **arguments)


def test_sinks_that_are_not_handed_over_and_odd_heads_are_refused() -> None:
    with pytest.raises(ModelError, match="has attention sinks"):
        attend(module(sinks=SINKS), *operands(), None)
    q, k, v = operands()
    with pytest.raises(ModelError, match="4 query heads, which is not a multiple of its 3 key heads"):
        attend(module(), q, k[:, :3], v[:, :3], None)


class Seen(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.rounding, self.shapes = Rounding(torch.tensor(scale)), []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return self.rounding(x)


def test_shared_heads_are_rounded_once_and_repeated_afterwards() -> None:
    points = {f"{name}_point": Seen(0.05) for name in ("query", "key", "value")}
    q, k, v = operands(2)
    found, _ = attend(module(2, **points), q, k, v, causal(), scaling=0.35)
    assert points["key_point"].shapes == [(BATCH, HEADS // 2, WIDTH, TOKENS)]
    assert points["value_point"].shapes == [(BATCH, HEADS // 2, TOKENS, WIDTH)]
    rounded = [torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127) for x in (q, k, v)]
    expected, _ = eager("llama")(module(2), *rounded, causal(), scaling=0.35)
    same(found, expected)


SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip

MODELS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=4),
    "gemma2": Gemma2Config(**SIZES, sliding_window=4, attn_logit_softcapping=2.0),
    "gpt-oss": GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=4),
    "t5": T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_stock_model_gives_its_own_outputs(name: str) -> None:
    torch.manual_seed(0)
    make = AutoModel if name == "t5" else AutoModelForCausalLM
    model = make.from_config(MODELS[name], attn_implementation="eager").eval()
    ids = torch.randint(1, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name == "t5":
        inputs["decoder_input_ids"] = ids[:, :5]

    def outputs() -> Tensor:
        with torch.no_grad():
            found: SimpleNamespace = model(**inputs)
        return found.last_hidden_state if name == "t5" else found.logits

    expected = outputs()
    open_attention(model)
    assert float((outputs() - expected).abs().max()) <= 1e-6 * float(expected.abs().max().clamp_min(1))
