"""Rescaling sites with channel lists and maps, norms of every class, tables with a forward of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hand_made import HandMade, linear, randomise
from torch import Tensor, nn

from qcompress.models.architecture import Layer, Site

HEADS, GROUPS, SIZE = 4, 2, 4
WIDTH, INNER, VOCABULARY = HEADS * SIZE, 24, 32
DECODER = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS, "head_dim": SIZE, "vocab_size": VOCABULARY, "max_position_embeddings": 16,
    "attn_implementation": "eager", "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
REPEATED = tuple(head // (HEADS // GROUPS) * SIZE + place for head in range(HEADS) for place in range(SIZE))
"""Value channel that each input of the output projection reads under grouped-query attention."""

BLOCK = "model.layers.0"
OPERANDS = tuple(f"{BLOCK}.self_attn.{name}_proj" for name in "qkv")
GATED = (f"{BLOCK}.mlp.gate_proj", f"{BLOCK}.mlp.up_proj")

Made = tuple[nn.Module, list[Layer], list[Site], Callable[[nn.Module], Tensor]]


def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=ids()).logits


def gated_block(model: nn.Module, after: str) -> tuple[list[Layer], list[Site]]:
    output, down = f"{BLOCK}.self_attn.o_proj", f"{BLOCK}.mlp.down_proj"
    sites = [
        Site(f"{BLOCK}.input_layernorm", OPERANDS, WIDTH),
        Site(after, GATED, WIDTH),
        Site(OPERANDS[2], (output,), GROUPS * SIZE, "value", maps=(REPEATED,)),
        Site(GATED[1], (down,), INNER, "value"),
    ]
    layers = linear(model, "model.embed_tokens", kind="embedding")
    return layers + linear(model, *OPERANDS, output, *GATED, down), sites


def llama() -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = randomise(LlamaForCausalLM(LlamaConfig(**DECODER)))
    layers, sites = gated_block(model, f"{BLOCK}.post_attention_layernorm")
    return model, layers + linear(model, "lm_head", kind="head"), sites, logits


def gemma2() -> Made:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = randomise(Gemma2ForCausalLM(Gemma2Config(**DECODER, sliding_window=4)))
    layers, sites = gated_block(model, f"{BLOCK}.pre_feedforward_layernorm")
    return model, layers + linear(model, "lm_head", kind="head", tied_to="model.embed_tokens"), sites, logits


def gemma3() -> Made:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    model = randomise(Gemma3ForCausalLM(Gemma3TextConfig(**DECODER, sliding_window=4)))
    layers, sites = gated_block(model, f"{BLOCK}.pre_feedforward_layernorm")
    return model, layers + linear(model, "lm_head", kind="head", tied_to="model.embed_tokens"), sites, logits


def phi3() -> Made:
    from transformers import Phi3Config, Phi3ForCausalLM

    model = randomise(Phi3ForCausalLM(Phi3Config(**DECODER)))
    fused, output = f"{BLOCK}.self_attn.qkv_proj", f"{BLOCK}.self_attn.o_proj"
    both, down = f"{BLOCK}.mlp.gate_up_proj", f"{BLOCK}.mlp.down_proj"
    values = GROUPS * SIZE
    first = WIDTH + values
    sites = [
        Site(f"{BLOCK}.input_layernorm", (fused,), WIDTH),
        Site(
            fused, (output,), values, "value", outputs=tuple(range(first, first + values)), maps=(REPEATED,)
        ),
        Site(both, (down,), INNER, "value", outputs=tuple(range(INNER, 2 * INNER)), maps=(None,)),
    ]
    return model, linear(model, fused, output, both, down), sites, logits


def neox() -> Made:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
             "max_position_embeddings", "attn_implementation", "use_cache")  # fmt: skip
    config = GPTNeoXConfig(**{name: DECODER[name] for name in names})
    model = randomise(GPTNeoXForCausalLM(config))
    block = "gpt_neox.layers.0"
    fused, output = f"{block}.attention.query_key_value", f"{block}.attention.dense"
    inner = (f"{block}.mlp.dense_h_to_4h", f"{block}.mlp.dense_4h_to_h")
    # each head has its query, key and value side by side
    outputs = tuple(3 * SIZE * head + 2 * SIZE + place for head in range(HEADS) for place in range(SIZE))
    sites = [
        Site(f"{block}.input_layernorm", (fused,), WIDTH),
        Site(f"{block}.post_attention_layernorm", inner[:1], WIDTH),
        Site(fused, (output,), WIDTH, "value", outputs=outputs),
    ]
    return model, linear(model, fused, output, *inner), sites, logits


def opt() -> Made:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=INNER, num_hidden_layers=1,
        vocab_size=VOCABULARY, num_attention_heads=HEADS, max_position_embeddings=16,
        attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    model = randomise(OPTForCausalLM(config))
    block = "model.decoder.layers.0"
    operands = tuple(f"{block}.self_attn.{name}_proj" for name in "qkv")
    output = f"{block}.self_attn.out_proj"
    layers = linear(
        model, "model.decoder.embed_tokens", "model.decoder.embed_positions", kind="embedding"
    ) + linear(model, *operands, output, f"{block}.fc1", f"{block}.fc2")
    layers += linear(model, "lm_head", kind="head", tied_to="model.decoder.embed_tokens")
    sites = [
        Site(f"{block}.self_attn_layer_norm", operands, WIDTH),
        Site(f"{block}.final_layer_norm", (f"{block}.fc1",), WIDTH),
        Site(operands[2], (output,), WIDTH, "value"),
    ]
    return model, layers, sites, logits


def t5() -> Made:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=WIDTH, d_kv=SIZE, num_heads=HEADS, d_ff=INNER, num_layers=1, vocab_size=VOCABULARY,
        relative_attention_num_buckets=8, relative_attention_max_distance=16,
    )  # fmt: skip
    model = randomise(T5EncoderModel(config))
    block = "encoder.block.0.layer"
    operands = tuple(f"{block}.0.SelfAttention.{name}" for name in "qkv")
    output, inner = f"{block}.0.SelfAttention.o", f"{block}.1.DenseReluDense"
    layers = linear(
        model, "encoder.embed_tokens", f"{block}.0.SelfAttention.relative_attention_bias", kind="embedding"
    )
    layers += linear(model, *operands, output, f"{inner}.wi", f"{inner}.wo")
    sites = [
        Site(f"{block}.0.layer_norm", operands, WIDTH),
        Site(f"{block}.1.layer_norm", (f"{inner}.wi",), WIDTH),
        Site(f"{inner}.wi", (f"{inner}.wo",), INNER, "value"),  # a positive factor passes a ReLU
    ]
    return model, layers, sites, lambda model: model(input_ids=ids()).last_hidden_state


def clip() -> Made:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=HEADS,
        image_size=8, patch_size=4, attn_implementation="eager",
    )  # fmt: skip
    model = randomise(CLIPVisionModel(config))
    start = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    block = next(name for name, _ in model.named_modules() if name.endswith("layers.0"))
    positions = start.replace("patch_embedding", "position_embedding")
    operands = tuple(f"{block}.self_attn.{name}_proj" for name in "qkv")
    layers = linear(model, start, kind="conv") + linear(model, positions, kind="embedding")
    layers += linear(model, *operands, f"{block}.self_attn.out_proj", f"{block}.mlp.fc1", f"{block}.mlp.fc2")
    sites = [
        Site(f"{block}.layer_norm1", operands, WIDTH),
        Site(operands[2], (f"{block}.self_attn.out_proj",), WIDTH, "value"),
    ]
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))

    def forward(model: nn.Module) -> Tensor:
        return model(pixel_values=pixels.to(next(model.parameters()).dtype)).last_hidden_state

    return model, layers, sites, forward


MODELS = {"llama": llama, "gemma2": gemma2, "gemma3": gemma3, "phi3": phi3, "gpt-neox": neox, "opt": opt,
          "t5": t5, "clip": clip}  # fmt: skip


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], HandMade]:
    return lambda name: HandMade(*MODELS[name](), tmp_path, monkeypatch)


@pytest.mark.parametrize("name", MODELS)
def test_a_rescaled_model_computes_what_it_did(name: str, made: Callable[[str], HandMade]) -> None:
    one = made(name)
    with torch.no_grad():
        rescaled, expected = one.forward(one.rescaled()), one.forward(one.model.double())
    assert expected.dtype == torch.float64 and float(expected.std()) > 1e-3
    # norms of transformers compute in fp32
    limit = 1e-12 if name in ("gpt-neox", "opt", "clip") else 1e-5
    assert float((rescaled - expected).abs().max()) < limit * float(expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_a_folded_model_computes_the_bits_of_the_trained_one(
    name: str, made: Callable[[str], HandMade]
) -> None:
    one = made(name)
    prepared = one.prepared()
    with torch.no_grad():
        trained, stock = one.forward(prepared.model), one.forward(one.model)
        rebuilt, folded = one.folded(prepared)
        assert torch.equal(one.forward(rebuilt.model), trained)
        assert torch.equal(one.forward(folded), trained)
    error = float((trained - stock).abs().max() / stock.abs().max())
    assert 1e-4 < error < 0.2
