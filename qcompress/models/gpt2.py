"""GPT-2 and DistilGPT-2: a decoder that continues text, with learned positions.

Torch and transformers are imported only inside functions that make a model.

Layers (Conv1D stores [in, out]): per block `attn.c_attn` (fused Q, K, V), `attn.c_proj`, `mlp.c_fc`,
`mlp.c_proj`; the tables `transformer.wte` and `transformer.wpe`; `lm_head`, usually tied to `wte`.
Rescaling sites: the norms ln_1 -> c_attn and ln_2 -> c_fc, and the values (the last third of c_attn's
outputs) -> attn.c_proj. Not foldable: mlp.c_proj (a GELU in between) and lm_head (the table is shared with
wte). Quantization points: the operands of both attention matmuls; the residual stream has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.errors import ModelError
from qcompress.models.architecture import (
    CAUSAL_LM,
    OPERANDS,
    Architecture,
    CacheLayout,
    Head,
    Input,
    Layer,
    Point,
    Site,
    token_inputs,
)
from qcompress.models.config_checks import check_config, check_leftover
from qcompress.models.layer_selection import Depth, lacking, share_parameters
from qcompress.models.loading import complete, reading, stock_config, stock_model

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import GPT2LMHeadModel

CONFIG_KEYS = ("n_layer", "n_embd", "n_positions", "vocab_size")


TASKS = ("causal-lm",)


def describe(
    config: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]], head: Head = CAUSAL_LM
) -> Architecture:
    """Architecture of a checkpoint, whose tensors are checked against its config.

    Accepts checkpoints of `GPT2Model` (names without `transformer.`, no head: the hub's
    openai-community/gpt2) and of `GPT2LMHeadModel`.
    """
    check_config(config, "gpt2", TASKS, head, CONFIG_KEYS)
    width, vocabulary, context = config["n_embd"], config["vocab_size"], config["n_positions"]
    inner = config.get("n_inner") or 4 * width
    shapes = {name.removeprefix("transformer."): shape for name, (_, shape) in tensors.items()}
    tied = config.get("tie_word_embeddings", True)

    layers = [
        Layer("transformer.wte", "embedding", width, vocabulary),
        Layer("transformer.wpe", "embedding", width, context),
    ]
    blocks, sites = [], []
    for index in range(config["n_layer"]):
        block = f"transformer.h.{index}"
        blocks.append(block)
        layers += [
            Layer(f"{block}.attn.c_attn", "linear", width, 3 * width, part="attention", axis=1),
            Layer(f"{block}.attn.c_proj", "linear", width, width, part="attention", axis=1),
            Layer(f"{block}.mlp.c_fc", "linear", width, inner, part="ffn", axis=1),
            Layer(f"{block}.mlp.c_proj", "linear", inner, width, part="ffn", axis=1),
        ]
        sites += [
            Site(f"{block}.ln_1", (f"{block}.attn.c_attn",), width),
            Site(f"{block}.ln_2", (f"{block}.mlp.c_fc",), width),
            _value_site(block, width),
        ]
    layers.append(Layer("lm_head", "head", width, vocabulary, tied_to="transformer.wte" if tied else None))
    _check_shapes(layers, len(blocks), shapes)
    counted = [shape for name, shape in shapes.items() if not name.endswith(BUFFERS)]
    return Architecture(
        family="gpt2",
        layers=tuple(layers),
        blocks=tuple(blocks),
        sites=tuple(sites),
        context=context,
        vocabulary=vocabulary,
        parameters=sum(math.prod(shape) for shape in counted),
        points=tuple(
            Point(f"{block}.attn.{operand}", "attention", width) for block in blocks for operand in OPERANDS
        ),
        embeddings="transformer.drop",
    )


def _value_site(block: str, width: int) -> Site:
    attention = f"{block}.attn"
    return Site(
        writer=f"{attention}.c_attn",
        readers=(f"{attention}.c_proj",),
        channels=width,
        kind="value",
        first=2 * width,
        point=f"{attention}.value_point",
    )


def task_config(
    config: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]], head: Head
) -> dict[str, Any]:
    """The checkpoint's own config.json: its head is the model's."""
    return config


def _check_shapes(layers: list[Layer], blocks: int, shapes: dict[str, tuple[int, ...]]) -> None:
    for layer in layers:
        if layer.tied_to:
            continue
        expected = (layer.in_features, layer.out_features)
        if layer.kind != "linear":
            expected = expected[::-1]
        shape = shapes.get(f"{layer.name.removeprefix('transformer.')}.weight")
        if shape != expected:
            raise ModelError(
                f"{layer.name}.weight: config.json asks for shape {list(expected)}, the checkpoint has "
                f"{list(shape) if shape else 'no such tensor'}",
                fix="take config.json and model.safetensors from the same checkpoint",
            )
    parts = [layer.name.removeprefix("transformer.") for layer in layers if layer.kind == "linear"]
    parts += [f"h.{index}.ln_{norm}" for index in range(blocks) for norm in (1, 2)]
    own = {f"{part}.{end}" for part in parts for end in ("weight", "bias")}
    check_leftover(
        name for name in shapes if name.startswith("h.") and name not in own and not name.endswith(BUFFERS)
    )


BUFFERS = (".attn.bias", ".attn.masked_bias")
"""Suffixes of mask tensors in old checkpoints."""

DEPTH = Depth(
    "n_layer", "transformer.h", r"(?:transformer\.)?h\.", BUFFERS, ("scale_attn_by_inverse_layer_idx",)
)

TIED = {"lm_head.weight": ("transformer.wte.weight", "wte.weight")}
"""A head and the names of the table that it is tied to: a checkpoint may hold either one alone."""

CAUSAL = True
"""A token attends only to earlier tokens and itself."""


def cache_layout(config: dict[str, Any]) -> CacheLayout:
    """Layout of a key-value cache of this checkpoint."""
    heads = config.get("n_head", 12)  # transformers' default
    attentions = tuple(f"transformer.h.{index}.attn" for index in range(config["n_layer"]))
    return CacheLayout(attentions, heads, config["n_embd"] // heads)


INPUTS = ("input_ids", "attention_mask", "position_ids")
"""Inputs of the exported graph, each int64 [batch, sequence]. Without a mask, GPT-2 would export its
detection of packed sequences instead.
"""


def signature(config: dict[str, Any]) -> tuple[Input, ...]:
    """Inputs of the exported graph with their axes and types."""
    return token_inputs(INPUTS)


def load_float(source: Path, directory: Path | None = None) -> GPT2LMHeadModel:
    """Load the stock model in fp32, in evaluation mode, from safetensors in a local directory.

    transformers initializes missing tensors at random and unties a head that differs from its table; both
    would change the model that `describe` described, so both raise ModelError. `directory`: the load stage's
    folder, which has a copy of config.json.
    """
    config = stock_config(directory or source)
    model, loading_info = stock_model(
        "GPT2LMHeadModel", source, directory or source, config, attn_implementation="eager"
    )
    complete(model, source, directory or source, lacking(loading_info["missing_keys"], model, DEPTH))
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.transformer.wte.weight:
        raise ModelError(
            f"{source}: config.json ties lm_head to wte, and the checkpoint's lm_head has other values",
            fix="set tie_word_embeddings to false in config.json",
        )
    model.config.use_cache = False
    share_parameters(model, DEPTH)
    return model.eval()


def empty(directory: Path) -> GPT2LMHeadModel:
    """Stock model of a config.json with unset weights, to be filled by the caller."""
    import torch
    from transformers import GPT2LMHeadModel

    config = stock_config(directory)
    config._attn_implementation = "eager"
    config.use_cache = False
    with torch.device("meta"), reading(directory / "config.json", "transformers cannot make a model from it"):
        model = GPT2LMHeadModel(config)
    share_parameters(model, DEPTH)
    return model.eval()


def tie(model: GPT2LMHeadModel) -> None:
    """Share float tensors that were set after construction; quantized layers share by themselves."""
    from torch.nn import Embedding

    share_parameters(model, DEPTH)
    if model.config.tie_word_embeddings and isinstance(model.transformer.wte, Embedding):
        model.lm_head.weight = model.transformer.wte.weight


def install_points(model: GPT2LMHeadModel, points: Mapping[str, nn.Module]) -> None:
    """Install quantization points by name; each module receives the activation to quantize."""
    from qcompress.models.attention import open_attention

    if points:
        open_attention(model)
    for name, module in points.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def graph_inputs(input_ids: Tensor, attention_mask: Tensor | None = None, past: int = 0) -> dict[str, Tensor]:
    """Inputs of the exported graph for token ids [batch, sequence] that follow `past` cached ones; the mask
    [batch, past + sequence] is 0 at padding.
    """
    rows, length = input_ids.shape
    mask = input_ids.new_ones(rows, past + length) if attention_mask is None else attention_mask
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, past:]
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
