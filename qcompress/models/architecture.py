"""Architecture of a model as plain values: layers, blocks, rescaling sites and quantization points. No torch.

Built by a family from `config.json` and the header of the safetensors files alone, so that a recipe is
checked against a model's layers and shapes in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PAST, PRESENT = "past_key_values.", "present."
"""Prefixes of a cached graph's inputs and outputs."""

OPERANDS = ("query_point", "key_point", "probability_point", "value_point")
"""Quantization points of an attention module: the four operands of its two matmuls, in the order of their
use.
"""


@dataclass(frozen=True)
class Input:
    """One input of the exported graph, as declared by the family (`signature`)."""

    name: str
    axes: tuple[str | int, ...]
    """Each dimension: the name of a dynamic axis, or a size."""
    element: Literal["int64", "float32", "int32", "bool"] = "int64"
    """Type of its values; a graph of half precision casts floats by itself."""


def token_inputs(names: tuple[str, ...]) -> tuple[Input, ...]:
    """Inputs with one value for each token, int64 [batch, sequence]."""
    return tuple(Input(name, ("batch", "sequence")) for name in names)


PIXELS = "pixel_values"
"""The only input of an image model."""


def image_inputs(channels: int, height: int, width: int) -> tuple[Input, ...]:
    """The input of an image model, fp32 [batch, channels, height, width]; only the batch is dynamic."""
    return (Input(PIXELS, ("batch", channels, height, width), "float32"),)


@dataclass(frozen=True)
class Layer:
    """One quantizable layer.

    `in_features` and `out_features` are those of its matmul: a tied head has the table's width as
    `in_features`; an embedding looks up rows, so `out_features` rows of `in_features`; an output of a
    convolution is a sum over `in_features` products, in / groups * height * width.
    """

    name: str
    kind: Literal["linear", "embedding", "head", "conv"]
    in_features: int
    out_features: int
    tied_to: str | None = None
    """The embedding whose table this layer reads or, in a block with shared weights, the linear layer of
    the first such block.
    """
    part: Literal["ffn", "attention", "rest"] = "rest"
    """Sublayer of the block; `rest` for others."""
    kernel: tuple[int, int] | None = None
    """Height and width of a convolution's kernel."""
    groups: int = 1
    """Groups of a convolution."""
    norm: str | None = None
    """The batch norm that is the only reader of this convolution: `fold` merges the two."""
    nonnegative: bool = False
    """True if the layer's input is never negative, as after a ReLU."""
    axis: Literal[0, 1] = 0
    """Axis of the output channels in the stored weight; 1 for Conv1D."""
    calls: int = 1
    """Number of calls in a forward pass. All calls share the weight and the scale of the input."""

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.in_features * self.out_features

    @property
    def section(self) -> Literal["weights", "embeddings"]:
        """Key of `format`, and of `quantizer`, that applies to the weight."""
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
    """Describe a convolution with a square kernel.

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
    """A site for channel-wise rescaling: channels that `writer` produces, that only `readers` read, and that
    every step in between maps linearly and without mixing them. A positive factor of a channel can therefore
    be multiplied into the writer and divided out of the readers' weights without changing the function.

    `channels` counts the entries of the site's scale.
    """

    writer: str
    readers: tuple[str, ...]
    channels: int
    kind: Literal["norm", "value"] = "norm"
    """norm: the writer is a norm; value: it is a linear or convolution layer, such as the value projection of
    an attention, whose outputs the probabilities mix over tokens, each channel by itself, before the output
    projection reads them.
    """
    first: int = 0
    """Index of the first channel among the writer's outputs."""
    point: str | None = None
    """Quantization point between the writer and the readers."""
    outputs: tuple[int, ...] | None = None
    """Channels of the writer that are rescaled, in the order of the scale's entries; None: `first` and the
    `channels - 1` after it. Fused and interleaved projections need it.
    """
    maps: tuple[tuple[int, ...] | None, ...] = ()
    """For each reader: index into the site's scale at each of its input channels, -1 for an input that is not
    rescaled; None (or no `maps`): one by one. Grouped-query attention repeats channels, gates permute them.
    """


@dataclass(frozen=True)
class Attention:
    """One self-attention with separate query, key and value layers, by module names."""

    module: str
    """The module whose attention function runs; probes and points are its children."""
    query: str
    key: str
    value: str
    output: str
    """The linear layer after the attention: its output is the attention block's, before dropout, residual
    and norm.
    """
    norm: str
    """The LayerNorm after the residual."""
    block: str
    """The block it belongs to, whose output is a hidden state."""


@dataclass(frozen=True)
class Point:
    """A quantization point: an activation that can be quantized without being the input of a layer with a
    weight.
    """

    name: str
    kind: Literal["attention", "residual"]
    """attention: an operand of one of the two matmuls; residual: an input of a residual addition or of a
    squeeze-and-excite product.
    """
    features: int
    """Values of one token: the model's width (for probabilities as well, which have as many as the sequence);
    channels of an image's feature map.
    """
    nonnegative: bool = False
    """True if its values are never negative, as after a ReLU."""


@dataclass(frozen=True)
class CacheLayout:
    """Contents of a key-value cache: keys and values of each attention, [batch, heads, tokens, width]."""

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
        """Names of the graph's outputs, in the order of `past`."""
        return self._names(PRESENT)

    def _names(self, word: str) -> tuple[str, ...]:
        places = range(len(self.attentions))
        return tuple(f"{word}{place}.{part}" for place in places for part in ("key", "value"))


@dataclass(frozen=True)
class Head:
    """Requirements of a task on the end of a model."""

    task: str = "causal-lm"
    labels: tuple[str, ...] | None = None
    """Names of the outputs, in order; None: those of the checkpoint's config.json (or none at all)."""
    problem: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None
    """transformers' `problem_type`."""
    any_order: bool = False
    """True if the order of `labels` is a default (GLUE's own): the checkpoint's order replaces it."""


CAUSAL_LM = Head()
"""The head of a language model."""


@dataclass(frozen=True)
class Architecture:
    """Structure of a model as far as compression needs it. Blocks are in the order of the forward pass."""

    family: str
    layers: tuple[Layer, ...]
    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    context: int
    vocabulary: int
    parameters: int
    attentions: tuple[Attention, ...] = ()
    """Empty if query, key and value are one fused layer."""
    points: tuple[Point, ...] = ()
    embeddings: str = ""
    """Module whose output is the first hidden state."""
    new_head: tuple[str, ...] = ()
    """Tensors of the task's head that the checkpoint lacks and that training creates."""
    floats: tuple[tuple[str, str], ...] = ()
    """Modules that cannot be quantized, and the reason."""
    covered: float = 1.0
    """Share of the layers in the values of the model's matrices."""
    uncovered: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """The other matrices and their shapes, the largest first."""

    def layer(self, name: str) -> Layer:
        """The layer of this name."""
        return next(layer for layer in self.layers if layer.name == name)
