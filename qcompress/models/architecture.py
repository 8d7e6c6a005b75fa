"""What the pipeline needs to know about an architecture, as plain values. No torch.

Built by a family from `config.json` and the header of the safetensors files alone, so that a recipe is
checked against a model's layers and shapes in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PAST, PRESENT = "past_key_values.", "present."
"""How the names of a cached graph's inputs and outputs begin."""

OPERANDS = ("query_point", "key_point", "probability_point", "value_point")
"""Points of an attention module: the four operands of its two matmuls, in the order of their use."""


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
    any_order: bool = False
    """The order of `labels` is nobody's choice (GLUE's own): the checkpoint's takes its place."""


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
