"""ViT: a transformer that classifies images, as a sequence of patches.

Layers, in the order of the forward pass: per block query, key, value, attention output and the two linear
layers of the MLP, then the classifier (kind "head", which takes `format.embeddings` like a table). The patch
embedding is a convolution and stays float, like the class token and the positions.

Rescaling sites: a block's first norm, read by query, key and value alone, and its second, read by the first
layer of the MLP. Quantization points: the operands of both attention matmuls, and the branch and the skip of
each residual addition.

Checkpoints use layer names of transformers 4 (`vit.encoder.layer.0.attention.attention.query`) or of
transformers 5 (`vit.layers.0.attention.q_proj`); this module uses those of transformers 5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.errors import ModelError
from qcompress.models.architecture import (
    CAUSAL_LM,
    OPERANDS,
    PIXELS,
    Architecture,
    Attention,
    Head,
    Input,
    Layer,
    Point,
    Site,
    image_inputs,
)
from qcompress.models.config_checks import check_config, check_leftover, check_shapes, config_of, labels_of
from qcompress.models.hf_loader import Maker, empty_model, load_model, put_points
from qcompress.models.layer_selection import Depth, share_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

TASKS = ("image-classification",)

CAUSAL = False
"""A patch attends to all patches."""

INPUTS = (PIXELS,)
"""The input of the exported graph, fp32 [batch, channels, height, width]."""

CLASS = "ViTForImageClassification"

SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
"""Required keys of config.json."""

RENAMED = (
    (r"^(vit\.)?encoder\.layer\.", r"\1layers."),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
"""Patterns of transformers 4 names, and their replacements by the model's names; applied in this order."""

SIDES = ("branch_point", "skip_point")

Shapes = dict[str, tuple[int, ...]]


def describe(
    config: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]], head: Head = CAUSAL_LM
) -> Architecture:
    """Architecture of a checkpoint with the classifier of a task, whose tensors are checked against it."""
    _check_config(config, head)
    shapes = _shapes(tensors)
    labels = _labels(config, tensors, head)
    layers = _layers(config, len(labels))
    blocks = tuple(f"vit.layers.{index}" for index in range(config["num_hidden_layers"]))
    width, rest = config["hidden_size"], _rest(config)
    expected = {f"{layer.name}.weight": (layer.out_features, layer.in_features) for layer in layers}
    biases = [layer for layer in layers if _has_bias(config, layer)]
    expected |= {f"{layer.name}.bias": (layer.out_features,) for layer in biases}
    lacking = not any(f"classifier.{part}" in shapes for part in ("weight", "bias"))
    new = ("classifier.weight", "classifier.bias") if lacking else ()
    check_shapes(expected | rest, shapes, new)
    own = expected | rest
    check_leftover(name for name in shapes if name.startswith("vit.layers.") and name not in own)
    sizes = [*expected.values(), *rest.values()]
    return Architecture(
        family="vit",
        layers=tuple(layers),
        blocks=blocks,
        sites=tuple(site for block in blocks for site in _sites(block, width)),
        context=_patches(config) + 1,
        vocabulary=0,
        parameters=sum(math.prod(shape) for shape in sizes),
        attentions=tuple(_attention(block) for block in blocks),
        points=tuple(Point(name, kind, width) for block in blocks for name, kind in _points(block)),
        embeddings="vit.embeddings",
        new_head=new,
    )


def task_config(
    config: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]], head: Head
) -> dict[str, Any]:
    """config.json of the task's model: its class and its labels."""
    return config_of(config, CLASS, _labels(config, tensors, head), head)


def signature(config: dict[str, Any]) -> tuple[Input, ...]:
    """The input of the exported graph; all images have the size of the position embeddings."""
    return image_inputs(config.get("num_channels", 3), *_pair(config, "image_size", 224))


def graph_inputs(pixel_values: Tensor) -> dict[str, Tensor]:
    """Inputs of the exported graph for images [batch, channels, height, width]."""
    return {PIXELS: pixel_values}


DEPTH = Depth("num_hidden_layers", "vit.layers", r"(?:vit\.)?(?:encoder\.layer|layers)\.")


def load_float(source: Path, directory: Path | None = None) -> PreTrainedModel:
    """Load the stock model in fp32, in evaluation mode, from safetensors in a local directory. `directory` is
    the load stage's folder: its config.json has the labels, and its float.json the seed of a new classifier.
    """
    return load_model(MAKER, source, directory, DEPTH)


def empty(directory: Path) -> PreTrainedModel:
    """Stock model of a config.json with unset weights, to be filled by the caller."""
    return empty_model(MAKER, directory, DEPTH)


def tie(model: nn.Module) -> None:
    """Share float tensors that were set after construction."""
    share_parameters(model, DEPTH)


def install_points(model: nn.Module, points: Mapping[str, nn.Module]) -> None:
    """Install quantization points by name; each module receives the activation to quantize."""
    put_points(model, points)


MAKER = Maker({CLASS: "AutoModelForImageClassification"})


# Checks of config.json ----------------------------------------------------------------------------


def _check_config(config: dict[str, Any], head: Head) -> None:
    check_config(config, "vit", TASKS, head, SIZES)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads or config.get("head_dim", width // heads) * heads != width:
        raise ModelError(f"config.json: {heads} heads do not divide a width of {width}")
    sizes = zip(_pair(config, "image_size", 224), _pair(config, "patch_size", 16), strict=True)
    if any(image % patch for image, patch in sizes):
        raise ModelError("config.json: patch_size does not divide image_size")
    if config.get("num_channels", 3) != 3:
        raise ModelError(
            f"config.json: images of {config['num_channels']} channels, and they are read as RGB",
            fix="name another checkpoint",
        )


def _pair(config: dict[str, Any], key: str, default: int) -> tuple[int, int]:
    """Height and width, which config.json writes as one number or as two."""
    value = config.get(key, default)
    pair = tuple(value) if isinstance(value, list) else (value, value)
    if len(pair) != 2 or any(type(size) is not int or size < 1 for size in pair):
        raise ModelError(f"config.json: {key} must be one positive integer, or two, found {value!r}")
    return pair


def _patches(config: dict[str, Any]) -> int:
    (height, width), (high, wide) = _pair(config, "image_size", 224), _pair(config, "patch_size", 16)
    return (height // high) * (width // wide)


def _labels(
    config: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]], head: Head
) -> tuple[str, ...]:
    last = _shapes(tensors).get("classifier.weight")
    return labels_of(config, last[0] if last else None, head)


def _renamed(name: str) -> str:
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name


def _shapes(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Shapes:
    """Shapes by the model's names; a checkpoint of the bare model lacks the prefix."""
    shapes: Shapes = {}
    for name, (_, shape) in tensors.items():
        name = _renamed(name)
        shapes[name if name.startswith(("vit.", "classifier.")) else f"vit.{name}"] = shape
    return shapes


# Structure of the model ---------------------------------------------------------------------------


def _layers(config: dict[str, Any], labels: int) -> list[Layer]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    layers = []
    for index in range(config["num_hidden_layers"]):
        block = f"vit.layers.{index}"
        names = [f"{block}.attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        layers += [Layer(name, "linear", width, width, part="attention") for name in names]
        layers.append(Layer(f"{block}.mlp.fc1", "linear", width, inner, part="ffn"))
        layers.append(Layer(f"{block}.mlp.fc2", "linear", inner, width, part="ffn"))
    return [*layers, Layer("classifier", "head", width, labels)]


def _has_bias(config: dict[str, Any], layer: Layer) -> bool:
    return config.get("qkv_bias", True) or not layer.name.endswith(("q_proj", "k_proj", "v_proj"))


def _rest(config: dict[str, Any]) -> Shapes:
    """Shapes of tensors that belong to no quantizable layer."""
    width, embeddings = config["hidden_size"], "vit.embeddings"
    norms = ["vit.layernorm"]
    for index in range(config["num_hidden_layers"]):
        norms += [f"vit.layers.{index}.layernorm_{when}" for when in ("before", "after")]
    shapes: Shapes = {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    kernel = (width, config.get("num_channels", 3), *_pair(config, "patch_size", 16))
    shapes |= {f"{embeddings}.cls_token": (1, 1, width)}
    shapes |= {f"{embeddings}.position_embeddings": (1, _patches(config) + 1, width)}
    shapes |= {f"{embeddings}.patch_embeddings.projection.weight": kernel}
    return shapes | {f"{embeddings}.patch_embeddings.projection.bias": (width,)}


def _sites(block: str, width: int) -> tuple[Site, Site]:
    operands = tuple(f"{block}.attention.{name}" for name in ("q_proj", "k_proj", "v_proj"))
    return (
        Site(f"{block}.layernorm_before", operands, width),
        Site(f"{block}.layernorm_after", (f"{block}.mlp.fc1",), width),
    )


def _attention(block: str) -> Attention:
    module = f"{block}.attention"
    query, key, value, output = (f"{module}.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    return Attention(module, query, key, value, output, f"{block}.layernorm_after", block)


def _points(block: str) -> list[tuple[str, str]]:
    return [
        *((f"{block}.attention.{operand}", "attention") for operand in OPERANDS),
        *((f"{block}.{place}_{side}", "residual") for place in ("attention", "mlp") for side in SIDES),
    ]
