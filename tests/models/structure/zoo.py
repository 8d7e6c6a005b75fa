"""Tiny models of many architectures with random weights, each with example inputs of two sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, logging

Inputs = dict[str, Tensor]
VOCABULARY, SIDE = 97, 32
NO_LIMIT = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)

GPT = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **NO_LIMIT)
DECODER = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, **NO_LIMIT,
)  # fmt: skip
ENCODER = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=66, **NO_LIMIT,
)  # fmt: skip
TOWER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE,
    patch_size=8,
)  # fmt: skip
PAIR = dict(
    vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, decoder_start_token_id=1, **NO_LIMIT,
)  # fmt: skip
T5 = dict(
    vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
)
STAGES = dict(hidden_sizes=[16, 24], depths=[1, 2])
SPEECH = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    conv_dim=[16, 16, 16], conv_stride=[5, 2, 2], conv_kernel=[10, 3, 3], num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4, **NO_LIMIT,
)  # fmt: skip
BLOOM = dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **NO_LIMIT)
FALCON = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **NO_LIMIT)
EXPERTS = DECODER | dict(num_experts_per_tok=2, sliding_window=None)

LM, CLASSES, IMAGES = (
    "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForImageClassification",
)  # fmt: skip

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # name, or `name/variant`: class, inputs, config
    "llama": (LM, "decoder", DECODER),
    "mistral": (LM, "decoder", DECODER | dict(sliding_window=4)),
    "qwen2": (LM, "decoder", DECODER),
    "qwen3": (LM, "decoder", DECODER),
    "gemma": (LM, "decoder", DECODER),
    "gemma2": (LM, "decoder", DECODER | dict(query_pre_attn_scalar=8, sliding_window=4)),
    "gemma3_text": (LM, "decoder", DECODER | dict(query_pre_attn_scalar=8, sliding_window=4)),
    "phi": (LM, "decoder", DECODER),
    "phi3": (LM, "decoder", DECODER | dict(sliding_window=None)),
    "smollm3": (LM, "decoder", DECODER | dict(num_hidden_layers=4)),
    "olmo": (LM, "decoder", DECODER),
    "olmo2": (LM, "decoder", DECODER),
    "granite": (LM, "decoder", DECODER),
    "stablelm": (LM, "decoder", DECODER),
    "starcoder2": (LM, "decoder", DECODER),
    "cohere": (LM, "decoder", DECODER),
    "glm": (LM, "decoder", DECODER),
    "gpt_neox": (LM, "decoder", DECODER),
    "gpt2": (LM, "decoder", GPT),
    "gptj": (LM, "decoder", GPT | dict(rotary_dim=4)),
    "codegen": (LM, "decoder", GPT | dict(rotary_dim=4)),
    "bloom": (LM, "masked decoder", BLOOM),
    "falcon": (LM, "decoder", FALCON | dict(multi_query=True, new_decoder_architecture=False)),
    "falcon/groups": (LM, "decoder", FALCON | dict(num_kv_heads=2, new_decoder_architecture=True)),
    "opt": (LM, "decoder", DECODER | dict(ffn_dim=48, word_embed_proj_dim=32)),
    "mixtral": (LM, "decoder", EXPERTS | dict(num_local_experts=4)),
    "qwen3_moe": (LM, "decoder", EXPERTS | dict(
        num_experts=4, moe_intermediate_size=24, decoder_sparse_step=1)),
    "bert": (CLASSES, "encoder", ENCODER),
    "roberta": (CLASSES, "encoder", ENCODER),
    "xlm-roberta": (CLASSES, "encoder", ENCODER),
    "distilbert": (CLASSES, "encoder", dict(
        vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64)),
    "electra": (CLASSES, "encoder", ENCODER | dict(embedding_size=16)),
    "albert": (CLASSES, "encoder", ENCODER | dict(embedding_size=16)),
    "mpnet": (CLASSES, "encoder", ENCODER),
    "deberta-v2": (CLASSES, "encoder", ENCODER | dict(
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True,
        norm_rel_ebd="layer_norm", position_biased_input=False)),
    "modernbert": (CLASSES, "encoder", ENCODER | dict(
        num_hidden_layers=3, cls_token_id=1, sep_token_id=2, local_attention=4, reference_compile=False)),
    "t5/encoder": ("T5EncoderModel", "encoder", T5),
    "clip_text_model": ("CLIPTextModel", "encoder", ENCODER | dict(eos_token_id=96)),
    "t5": ("AutoModelForSeq2SeqLM", "pair", T5 | dict(feed_forward_proj="gated-gelu")),
    "bart": ("AutoModelForSeq2SeqLM", "pair", PAIR | dict(max_position_embeddings=64)),
    "whisper": ("AutoModelForSpeechSeq2Seq", "speech pair", PAIR | dict(
        max_source_positions=16, max_target_positions=32, num_mel_bins=8)),
    "wav2vec2": ("AutoModelForCTC", "speech", SPEECH),
    "hubert": ("AutoModelForCTC", "speech", SPEECH),
    "vit": (IMAGES, "images", TOWER),
    "deit": ("DeiTForImageClassification", "images", TOWER),
    "beit": (IMAGES, "images", TOWER | dict(use_relative_position_bias=True)),
    "dinov2": (IMAGES, "images", TOWER | dict(mlp_ratio=2)),
    "clip_vision_model": ("CLIPVisionModel", "images", TOWER),
    "siglip_vision_model": ("SiglipVisionModel", "images", TOWER),
    "swin": (IMAGES, "images", dict(
        image_size=SIDE, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)),
    "convnext": (IMAGES, "images", STAGES | dict(patch_size=2, num_stages=2)),
    "convnextv2": (IMAGES, "images", STAGES | dict(patch_size=2, num_stages=2)),
    "resnet": (IMAGES, "images", STAGES | dict(embedding_size=16, layer_type="basic")),
    "regnet": (IMAGES, "images", STAGES | dict(embedding_size=16, groups_width=8, layer_type="y")),
    "mobilenet_v1": (IMAGES, "images", dict(depth_multiplier=0.25, tf_padding=False)),
    "mobilenet_v2": (IMAGES, "images", dict(depth_multiplier=0.25, tf_padding=False)),
    "efficientnet": (IMAGES, "images", dict(
        in_channels=[32, 16], out_channels=[16, 24], kernel_sizes=[3, 5], strides=[1, 2],
        num_block_repeats=[1, 2], expand_ratios=[1, 6], width_coefficient=0.25, depth_coefficient=1.0,
        hidden_dim=320)),
    "segformer": ("AutoModelForSemanticSegmentation", "images", STAGES | dict(
        num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=16)),
    "detr": ("AutoModelForObjectDetection", "images", dict(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, d_model=32, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, num_queries=6)),
}  # fmt: skip


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    """Depthwise and pointwise convolution with a gate and a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.first = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.second = nn.BatchNorm2d(channels)
        self.gate = Gate(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.first(self.depthwise(x)))
        return x + self.gate(F.hardswish(self.second(self.pointwise(y))))


class OwnNet(nn.Module):
    """A user's network: no transformers, functional activations, two inputs, concatenation, a transposed
    convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(*(Inverted(16) for _ in range(3)))
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.norm = nn.LayerNorm(24)
        self.hidden, self.extra, self.classes = nn.Linear(24, 32), nn.Linear(8, 16), nn.Linear(32, 10)

    def forward(self, image: Tensor, extra: Tensor) -> Tensor:
        x = self.body(self.stem(image))
        joined = torch.cat([x.mean((2, 3)) + self.extra(extra), self.up(x).amax((2, 3))], 1)
        return self.classes(F.relu(self.hidden(self.norm(joined))))


class OwnEncoder(nn.Module):
    """Encoder of torch's own layers, whose attention holds its projections as parameters."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=True)
        self.table = nn.Embedding(VOCABULARY, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classes = nn.Linear(32, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.classes(self.encoder(self.table(input_ids)).mean(1))


OWN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "own net": (OwnNet, "image and extra"),
    "own encoder": (OwnEncoder, "tokens"),
}

OPTIONAL = ("timm:resnet18", "timm:mobilenetv3_small_050", "torchvision:mobilenet_v2")
"""Names in packages that may be absent."""

NAMES = (*ARCHITECTURES, *OWN, *OPTIONAL)

FEW = ("llama", "phi3", "gpt_neox", "opt", "modernbert", "resnet", "own net")
"""Architectures of the default tests: grouped queries, fused and interleaved projections, a ReLU, batch
norms.
"""


@dataclass(frozen=True)
class Sample:
    """A model in evaluation mode, with inputs of three sizes as far as it allows; `fresh` is for tests."""

    model: nn.Module
    inputs: Inputs
    again: Inputs
    fresh: Inputs


def build(name: str, seed: int = 0) -> Sample:
    """Make a model of this name with random weights. Skips the test if its package is not installed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in OWN:
            make, kind = OWN[name]
            model = make()
        else:
            model, kind = _installed(name) if name in OPTIONAL else _stock(name)
    _randomize(model, generator)
    sizes = ((2, 6), (3, 9), (4, 11))
    inputs, again, fresh = (_inputs(kind, generator, rows, length) for rows, length in sizes)
    _measure_batches(model, fresh)
    return Sample(model.eval(), inputs, again, fresh)


def _installed(name: str) -> tuple[nn.Module, str]:
    package, _, title = name.partition(":")
    module = pytest.importorskip(package, reason=f"{package} is not installed")
    if package == "timm":
        return module.create_model(title, pretrained=False, num_classes=5), "x"
    return module.models.get_model(title, weights=None, num_classes=5), "x"


def _stock(name: str) -> tuple[nn.Module, str]:
    title, kind, values = ARCHITECTURES[name]
    logging.set_verbosity_error()
    if name == "detr":
        backbone = AutoConfig.for_model(
            "resnet", **STAGES, embedding_size=16, layer_type="basic", out_features=["stage2"]
        )
        values = values | dict(backbone_config=backbone)
    config = AutoConfig.for_model(name.partition("/")[0], **values)
    cls = getattr(transformers, title)
    return (cls.from_config(config) if title.startswith("Auto") else cls(config)), kind


def _randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Give the model the values of a trained one: signals that do not fade, norms off 1, biases off 0."""

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(noise(parameter) * 0.1)
            else:
                inputs = parameter[0].numel() if parameter.dim() == 4 else parameter.shape[-1]
                parameter.copy_(noise(parameter) * inputs**-0.5)


def _measure_batches(model: nn.Module, inputs: Inputs) -> None:
    """Give batch norms the statistics of these inputs."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model.train()(**inputs)


def _inputs(kind: str, generator: torch.Generator, rows: int, length: int) -> Inputs:
    def ids(count: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (rows, count), generator=generator)

    def reals(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator)

    tokens, mask = ids(length), torch.ones(rows, length, dtype=torch.long)
    return {
        "tokens": lambda: {"input_ids": tokens},
        "encoder": lambda: {"input_ids": tokens, "attention_mask": mask},
        "masked decoder": lambda: {"input_ids": tokens, "attention_mask": mask},
        "decoder": lambda: {
            "input_ids": tokens, "attention_mask": mask,
            "position_ids": torch.arange(length).expand(rows, -1).contiguous(),
        },
        "pair": lambda: {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": ids(length - 2)},
        "speech pair": lambda: {"input_features": reals(8, 32), "decoder_input_ids": ids(length - 2)},
        "speech": lambda: {"input_values": reals(length * 100)},
        "x": lambda: {"x": reals(3, SIDE, SIDE)},
        "images": lambda: {"pixel_values": reals(3, SIDE, SIDE)},
        "image and extra": lambda: {"image": reals(3, 4 * length, 4 * length), "extra": reals(8)},
    }[kind]()  # fmt: skip
