"""Small configs of many architectures, by task and `model_type`."""

from __future__ import annotations

from typing import Any

VOCABULARY, SIDE = 300, 32
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)

GROUPED = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, **TOKENS,
)  # fmt: skip
"""Decoders with two query heads to each key and value head."""

GEMMA = GROUPED | dict(sliding_window=8, query_pre_attn_scalar=16)
GPT = dict(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128, **TOKENS)
NEOX = {key: value for key, value in GROUPED.items() if key not in ("num_key_value_heads", "head_dim")}
BERT = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=130, pad_token_id=0,
)  # fmt: skip
VIT = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE,
    patch_size=8,
)  # fmt: skip
STAGES = dict(image_size=SIDE, hidden_sizes=[32, 64], depths=[2, 2], num_stages=2, patch_size=2)
NET = dict(image_size=SIDE, embedding_size=32, hidden_sizes=[32, 64], depths=[1, 2])

ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    "causal-lm": {
        "llama": GROUPED,
        "mistral": GROUPED | {"sliding_window": 8},
        "qwen2": GROUPED,
        "qwen3": GROUPED,
        "gemma": GROUPED,
        "gemma2": GEMMA,
        "gemma3_text": GEMMA | {"num_hidden_layers": 6},
        "phi": GROUPED,
        "phi3": GROUPED | {"sliding_window": None},
        "smollm3": GROUPED | {"num_hidden_layers": 4},
        "olmo2": GROUPED,
        "granite": GROUPED,
        "cohere": GROUPED,
        "glm": GROUPED,
        "stablelm": NEOX | {"num_key_value_heads": 2},
        "starcoder2": NEOX | {"num_key_value_heads": 2},
        "nemotron": GROUPED,
        "helium": GROUPED,
        "opt": dict(
            vocab_size=VOCABULARY, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, word_embed_proj_dim=64, pad_token_id=1,
        ),
        "gpt2": GPT,
        "gptj": GPT | {"rotary_dim": 8},
        "gpt_neox": NEOX,
        "bloom": dict(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, **TOKENS),
        "falcon": dict(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            multi_query=True, new_decoder_architecture=False, **TOKENS,
        ),
        "mixtral": GROUPED | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    },
    "sequence-classification": {
        "bert": BERT,
        "modernbert": BERT | dict(
            num_hidden_layers=3, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
            local_attention=8,
        ),
        "deberta-v2": BERT | dict(
            relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16, share_att_key=True,
            norm_rel_ebd="layer_norm", position_biased_input=False,
        ),
        "distilbert": dict(
            vocab_size=VOCABULARY, dim=64, hidden_dim=128, n_layers=2, n_heads=4, pad_token_id=0
        ),
        "electra": BERT | {"embedding_size": 32},
        "albert": BERT | {"embedding_size": 32, "num_hidden_layers": 3},
        "mpnet": BERT,
        "xlm-roberta": BERT,
        "roformer": BERT | {"embedding_size": 64},
        "megatron-bert": BERT,
        "ernie": BERT,
        "layoutlm": BERT,
    },
    "fill-mask": {
        "camembert": BERT,
        "nystromformer": BERT,
        "rembert": BERT | {"input_embedding_size": 32, "output_embedding_size": 32},
        "roformer": BERT | {"embedding_size": 64},
        "squeezebert": BERT | {"embedding_size": 64},
    },
    "question-answering": {
        "convbert": BERT,
        "electra": BERT | {"embedding_size": 32},
        "megatron-bert": BERT,
    },
    "feature-extraction": {"bert": BERT, "modernbert": BERT, "xlm-roberta": BERT, "qwen3": GROUPED},
    "image-classification": {
        "vit": VIT,
        "deit": VIT,
        "beit": VIT,
        "dinov2": VIT | {"mlp_ratio": 2},
        "swin": dict(
            image_size=SIDE, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4
        ),
        "convnext": STAGES,
        "convnextv2": STAGES,
        "resnet": NET | {"layer_type": "basic"},
        "regnet": NET | {"groups_width": 16, "layer_type": "y"},
        "mobilenet_v1": dict(image_size=SIDE, depth_multiplier=0.35, tf_padding=False),
        "mobilenet_v2": dict(image_size=SIDE, depth_multiplier=0.35, tf_padding=False),
        "mobilevit": dict(
            image_size=64, hidden_sizes=[32, 48, 64], neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 80]
        ),
        "segformer": dict(
            image_size=SIDE, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[32, 64],
            patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        ),
        "poolformer": dict(
            image_size=SIDE, num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[32, 64], patch_sizes=[7, 3],
            strides=[4, 2], padding=[2, 1],
        ),
        "bit": dict(image_size=SIDE, embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_groups=8),
    },
}  # fmt: skip
