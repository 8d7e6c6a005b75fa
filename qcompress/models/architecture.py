"""What the pipeline needs to know about an architecture, as plain values. No torch.

Built by a family from `config.json` and the header of the safetensors files alone, so that a recipe is
checked against a model's layers and shapes in milliseconds.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qcompress.errors import ModelError

CHUNK = 2**24

PAST, PRESENT = "past_key_values.", "present."
"""How the names of a cached graph's inputs and outputs begin."""

OPERANDS = ("query_point", "key_point", "probability_point", "value_point")
"""Points of an attention module: the four operands of its two matmuls, in the order of their use."""

HEADER_LIMIT = 100 * 2**20
"""Largest believable safetensors header; the format's own limit."""


@dataclass(frozen=True)
class Input:
    """One input of the exported graph, as the family states it (`signature`)."""

    name: str
    axes: tuple[str | int, ...]
    """Each dimension: the name of a dynamic axis, or a size."""
    element: Literal["int64", "float32"] = "int64"
    """Type of its values; a graph of half precision casts floats by itself."""


def token_inputs(names: tuple[str, ...]) -> tuple[Input, ...]:
    """Inputs with a value for each token, int64 [batch, sequence]."""
    return tuple(Input(name, ("batch", "sequence")) for name in names)


PIXELS = "pixel_values"
"""The one input of a model of images."""


def image_inputs(channels: int, height: int, width: int) -> tuple[Input, ...]:
    """The input of a model of images, fp32 [batch, channels, height, width]; only the batch is dynamic."""
    return (Input(PIXELS, ("batch", channels, height, width), "float32"),)


@dataclass(frozen=True)
class Layer:
    """One quantizable layer.

    `in_features` and `out_features` are what a matmul sees: a tied head has the table's width as
    `in_features`; an embedding looks up rows, so `out_features` rows of `in_features`; an output of a
    convolution is a sum over `in_features` products, in / groups * height * width.
    """

    name: str
    kind: Literal["linear", "embedding", "head", "conv"]
    in_features: int
    out_features: int
    tied_to: str | None = None
    """The embedding whose table this layer reads, or the linear layer with the same weight and bias in the
    first block with the same weights."""
    part: Literal["ffn", "attention", "rest"] = "rest"
    """Which part of a block it belongs to, as far as it is one of these two."""
    kernel: tuple[int, int] | None = None
    """Height and width of a convolution's kernel."""
    groups: int = 1
    """Groups of a convolution."""
    norm: str | None = None
    """The batch norm that alone reads this convolution: `fold` makes one of the two."""
    nonnegative: bool = False
    """The layer's input is never below 0, as behind a ReLU."""

    @property
    def weights(self) -> int:
        """Count of the weights."""
        return self.in_features * self.out_features

    @property
    def section(self) -> Literal["weights", "embeddings"]:
        """The key of `format`, and of `quantizer`, that decides about the weight."""
        return "weights" if self.kind in ("linear", "conv") else "embeddings"

    @property
    def channels(self) -> int:
        """Channels of the input, which is [..., channels], or [batch, channels, height, width]."""
        if self.kernel is None:
            return self.in_features
        return self.in_features // (self.kernel[0] * self.kernel[1]) * self.groups

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a convolution's weight, [out, in / groups, height, width]; of others [out, in]."""
        if self.kernel is None:
            return self.out_features, self.in_features
        return self.out_features, self.channels // self.groups, *self.kernel


def convolution(
    name: str, inputs: int, outputs: int, kernel: int, *, groups: int = 1, norm: str | None = None,
    nonnegative: bool = False,
) -> Layer:  # fmt: skip
    """A convolution with a square kernel.

    >>> layer = convolution("conv", 16, 32, 3)
    >>> layer.shape, layer.in_features, layer.channels
    ((32, 16, 3, 3), 144, 16)
    """
    features = inputs // groups * kernel * kernel
    return Layer(
        name, "conv", features, outputs, kernel=(kernel, kernel), groups=groups, norm=norm,
        nonnegative=nonnegative,
    )  # fmt: skip


@dataclass(frozen=True)
class Site:
    """A place for a channel-wise rescaling: channels that `writer` makes, that nothing but `readers` reads,
    and that every step in between takes one by one and linearly. So a positive factor of a channel can be
    multiplied into the writer and divided out of the readers' weights: the function stays the same.
    """

    writer: str
    readers: tuple[str, ...]
    channels: int
    kind: Literal["norm", "value"] = "norm"
    """norm: the writer is a LayerNorm; value: it is the value projection of an attention, whose outputs the
    probabilities mix over tokens, each channel by itself, before the output projection reads them."""
    first: int = 0
    """Where the channels begin among the outputs of the writer."""
    point: str | None = None
    """The point that sees the channels on their way to the readers."""


@dataclass(frozen=True)
class Attention:
    """One self-attention with separate query, key and value layers, by module names."""

    module: str
    """The module whose attention function runs; probes and points hang on it."""
    query: str
    key: str
    value: str
    output: str
    """The linear layer after the attention: its output is the attention block's, before dropout, residual and
    norm."""
    norm: str
    """The LayerNorm after the residual."""
    block: str
    """The block it belongs to, whose output is a hidden state."""


@dataclass(frozen=True)
class Point:
    """An activation that may be rounded without being the input of a weight's layer."""

    name: str
    kind: Literal["attention", "residual"]
    """attention: an operand of one of the two matmuls; residual: an input of a residual addition."""
    features: int
    """Values of one token: the model's width (for probabilities as well, whose number is the sequence's);
    channels of an image's feature map."""
    nonnegative: bool = False
    """What it rounds is never below 0, as behind a ReLU."""


@dataclass(frozen=True)
class CacheLayout:
    """What a key-value cache holds: keys and values of each attention, [batch, heads, tokens, width]."""

    attentions: tuple[str, ...]
    """Attention modules, in the order of the forward pass; their points are `key_point`, `value_point`."""
    heads: int
    width: int

    @property
    def past(self) -> tuple[str, ...]:
        """Names of the graph's inputs, keys and values of each attention one after another."""
        return self._names(PAST)

    @property
    def present(self) -> tuple[str, ...]:
        """Names of its outputs, in the same order."""
        return self._names(PRESENT)

    def _names(self, word: str) -> tuple[str, ...]:
        places = range(len(self.attentions))
        return tuple(f"{word}{place}.{part}" for place in places for part in ("key", "value"))


@dataclass(frozen=True)
class Head:
    """What a task needs at the end of a model."""

    task: str = "causal-lm"
    labels: tuple[str, ...] | None = None
    """Names of the outputs, in order; None: those of the checkpoint's config.json (or none at all)."""
    problem: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None
    """transformers' `problem_type`."""


CAUSAL_LM = Head()
"""The head of a language model."""


@dataclass(frozen=True)
class Architecture:
    """A model, as far as compression goes. Blocks are in the order of the forward pass."""

    family: str
    layers: tuple[Layer, ...]
    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    context: int
    vocabulary: int
    parameters: int
    attentions: tuple[Attention, ...] = ()
    """Empty where query, key and value are one fused layer."""
    points: tuple[Point, ...] = ()
    embeddings: str = ""
    """Module whose output is the first hidden state."""
    new_head: tuple[str, ...] = ()
    """Tensors of the task's head that the checkpoint lacks; training has to make them."""

    def layer(self, name: str) -> Layer:
        """The layer of that name."""
        return next(layer for layer in self.layers if layer.name == name)


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, types and shapes of the tensors in a safetensors file, without reading the tensors."""
    return {name: (value["dtype"], tuple(value["shape"])) for name, value in _header(file)[0].items()}


def _header(file: Path) -> tuple[dict[str, dict], int]:
    """The entries of a safetensors header, and where the tensors begin."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > HEADER_LIMIT:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        size = 8 + length + max((value["data_offsets"][1] for value in tensors.values()), default=0)
        if file.stat().st_size != size:
            raise ValueError(f"{file.stat().st_size} bytes, and its header promises {size}")
        for value in tensors.values():
            _ = value["dtype"], tuple(value["shape"])
        return tensors, 8 + length
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{file} is not a readable safetensors file ({error})",
            fix="save the model again with model.save_pretrained(directory)",
        ) from None


def weight_files(directory: Path) -> list[Path]:
    """Safetensors files of a checkpoint in transformers' layout; a pickle checkpoint is refused."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / name for name in _shards(index)]
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    pickles = sorted(directory.glob("pytorch_model*.bin"))
    if pickles:
        raise ModelError(
            f"{pickles[0]} is a pickle file, and loading a pickle runs whatever code it holds",
            fix="where you trust it, convert it once: AutoModelForCausalLM.from_pretrained(directory)"
            ".save_pretrained(new_directory), and name the new directory",
        )
    raise ModelError(
        f"{directory} holds no model.safetensors",
        fix="name a directory that transformers' save_pretrained wrote",
    )


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        inside = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index} is not an index of shards ({type(error).__name__}: {error})",
            fix="copy the checkpoint again, with all its files",
        ) from None
    if not inside:
        raise ModelError(f"{index} names files outside its directory", fix="do not trust this checkpoint")
    return names


def read_tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, types and shapes of all tensors of a checkpoint."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in weight_files(directory):
        if not file.is_file():
            raise ModelError(f"{file} is missing", fix="copy the checkpoint again, with all its shards")
        tensors.update(read_header(file))
    return tensors


def copy_tensors(source: Path, out: Path, names: Callable[[str], str | None]) -> None:
    """Write one safetensors file with the tensors of a checkpoint, byte for byte, under the names that
    `names` gives them; those without one are left out.
    """
    entries: dict[str, dict[str, object]] = {}
    pieces: list[tuple[Path, int, int]] = []
    offset = 0
    for file in weight_files(source):
        header, start = _header(file)
        for name, value in header.items():
            low, high = value["data_offsets"]
            if new := names(name):
                entries[new] = {**value, "data_offsets": [offset, offset + high - low]}
                pieces.append((file, start + low, high - low))
                offset += high - low
    head = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with out.open("wb") as stream:
        stream.write(struct.pack("<Q", len(head)) + head)
        for file, start, length in pieces:
            with file.open("rb") as tensors:
                tensors.seek(start)
                while length:
                    chunk = tensors.read(min(length, CHUNK))
                    if not chunk:
                        raise ModelError(f"{file} ended early: it was changed while it was read")
                    stream.write(chunk)
                    length -= len(chunk)


def read_config(directory: Path) -> dict[str, object]:
    """The checkpoint's config.json."""
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{directory} holds no config.json", fix="name a directory in transformers' layout"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} must hold a JSON object, found {type(config).__name__}")
    return config
