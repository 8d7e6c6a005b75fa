"""Layers with fake-quantized weights and inputs, for training.

A weight keeps the orientation of its checkpoint: [in, out] (`channel_axis` 1, GPT-2's Conv1D) or [out, in]
(`channel_axis` 0, nn.Linear, tables). A rescaling `a` [in] (`quant/rescaling.py`) divides the rows of the
reader's weight *before* the weight quantizer, and multiplies the reader's input, in the norm or in the weight
and bias of the linear layer that computes it: training uses the fused form that is deployed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.quant.noise import QuantNoise
from qcompress.quant.stock_forward import StockForward
from qcompress.quant.weight_quantizer import CodedWeight


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, channel_axis: int) -> Tensor:
    """x @ w + b, x [..., in]. Every form of a layer calls it, so that they agree to the last bit."""
    y = torch.matmul(x, weight if channel_axis == 1 else weight.t())
    if bias is None:
        return y
    # in place it costs half; under autocast the sum has the bias's precision and needs memory of its own
    return y.add_(bias) if y.dtype == bias.dtype else y + bias


Place = Literal["latent", "rounded"]
"""Position of a tap: latent, before the weight quantizer; rounded, after it."""


@dataclass
class Tap:
    """Offset and gradient of a weight at one position of its layer; all tensors have the weight's shape."""

    place: Place
    offset: Tensor | None = None
    """Added to the weight."""
    listens: bool = False
    gradient: Tensor | None = None
    """Gradient of the loss with respect to the weight at this position, summed over all uses in a forward
    pass.
    """

    def through(self, weight: Tensor) -> Tensor:
        if self.offset is not None:
            weight = weight + self.offset
        if self.listens and torch.is_grad_enabled():
            # a view, because a hook on the parameter itself would outlive the pass; without earlier
            # gradients, the backward pass ends here
            weight = weight.view_as(weight) if weight.requires_grad else weight.detach().requires_grad_()
            weight.register_hook(self._collect)
        return weight

    def _collect(self, gradient: Tensor) -> None:
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


@contextmanager
def tapped(layers: Sequence[QuantizedWeight], taps: Sequence[Tap]) -> Iterator[None]:
    """Context manager in which each layer has its tap; afterwards no layer has one, even after an
    exception.
    """
    try:
        for layer, tap in zip(layers, taps, strict=True):
            layer.tap = tap
        yield
    finally:
        for layer in layers:
            layer.tap = None


class QuantizedWeight(nn.Module):
    """Base class of layers: a weight, its quantizer, and the quantized weight, cached while neither
    changes.
    """

    def __init__(self, weight: nn.Parameter, quantizer: nn.Module | None, channel_axis: int) -> None:
        super().__init__()
        self.weight = weight
        self.channel_axis = channel_axis
        self.weight_quantizer = quantizer
        self.bias: nn.Parameter | None = None
        self.rescale: nn.Module | None = None
        """Scale of the input's channels, [in]."""
        self.gain: nn.Module | None = None
        """Scale of the output's channels, [out]."""
        self.tap: Tap | None = None
        self.noise: QuantNoise | None = None
        self.noisy = True
        self._kept: tuple[tuple[tuple[int, int], ...], Tensor] | None = None

    def rescaled_weight(self) -> Tensor:
        """The deployed weight before rounding: rows divided by the rescaling of the input, columns multiplied
        by that of the output.
        """
        weight = self.weight
        if self.rescale is not None:
            weight = weight / self.rescale().unsqueeze(self.channel_axis)
        if self.gain is not None:
            weight = weight * self.gain().unsqueeze(1 - self.channel_axis)
        return weight

    def rescaled_bias(self) -> Tensor | None:
        """The deployed bias, [out]."""
        if self.bias is None or self.gain is None:
            return self.bias
        return self.bias * self.gain()

    def largest_of_inputs(self) -> Tensor:
        """Largest |w| that reads each input channel, [in], without rescalings."""
        return self.weight.abs().amax(self.channel_axis)

    def quantized_weight(self) -> Tensor:
        """The quantized weight, with a tap's offset."""
        if self.tap is None:
            return self._rounded_weight()
        if self.tap.place == "latent" and self.weight_quantizer is not None:
            return self._round(self.tap.through(self.rescaled_weight()))
        return self.tap.through(self._rounded_weight())

    def coded_weight(self) -> Tensor:
        """The deployed weight in the quantizer's shape, with two axes."""
        return self.rescaled_weight()

    def _rounded_weight(self) -> Tensor:
        """The quantized weight without a tap. Cached while neither the weight nor a scale can change."""
        if self.weight_quantizer is None:
            return self.rescaled_weight()
        if self._moves() or self.tap is not None or self._is_noisy():
            self._kept = None
            return self._round(self.rescaled_weight())
        state = tuple((id(tensor), tensor._version) for tensor in self._depends_on())
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self._laid_out(self._round(self.rescaled_weight())))
        return self._kept[1]

    def _round(self, weight: Tensor) -> Tensor:
        """Quantize a weight; in training mode with Quant-Noise, if enabled."""
        if not self._is_noisy():
            return self.weight_quantizer(weight)
        return self.noise(weight, lambda: self.weight_quantizer(weight))

    def _is_noisy(self) -> bool:
        return self.noise is not None and self.training and self.noisy and self.weight_quantizer.takes_noise

    def _depends_on(self) -> tuple[Tensor, ...]:
        """All tensors from which the quantized weight is computed."""
        return (*self.parameters(), *self.buffers())

    def refresh(self) -> None:
        """Renew buffers of the quantizer that follow the weight, unless noise replaces the quantizer."""
        quantizer = self.weight_quantizer
        if isinstance(quantizer, CodedWeight) and (not self._is_noisy() or self.noise.rounds):
            quantizer.refresh(self.coded_weight)

    def forget(self) -> None:
        """Clear the cached quantized weight: an update changes weights, and fused optimizers do so without
        incrementing their versions.
        """
        self._kept = None

    def _moves(self) -> bool:
        """True if a gradient reaches the weight or a scale."""
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

    def _laid_out(self, weight: Tensor) -> Tensor:
        """The quantized weight in the memory layout of its folded form."""
        return weight

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """Codes of the weight (int8, the weight's shape) and their scale, in the grid's shape."""
        return self.weight_quantizer.codes_of(self.coded_weight())


def refresh(layers: Iterable[nn.Module]) -> None:
    """Renew what the quantizers of these layers derive from their weights. Training calls it before each
    pass, because a forward pass writes to no parameter and to no buffer.
    """
    for layer in layers:
        owner = layer.owner if isinstance(layer, QuantizedTied) else layer
        if isinstance(owner, QuantizedWeight):
            owner.refresh()


class QuantizedLinear(QuantizedWeight):
    """y = Q(x) @ Q(w) + b, for weights stored [in, out] or [out, in]."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        channel_axis: int,
        weight_quantizer: nn.Module | None,
        input_quantizer: nn.Module | None,
    ) -> None:
        super().__init__(weight, weight_quantizer, channel_axis)
        self.bias = bias
        self.input_quantizer = input_quantizer

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        return matmul(x, self.quantized_weight(), self.rescaled_bias(), self.channel_axis)

    @property
    def in_features(self) -> int:
        """Number of inputs, as nn.Linear has it."""
        return self.weight.shape[1 - self.channel_axis]

    @property
    def out_features(self) -> int:
        """Number of outputs, as nn.Linear has it."""
        return self.weight.shape[self.channel_axis]

    def _laid_out(self, weight: Tensor) -> Tensor:
        # folded weights are [in, out] in memory; with another layout, a matmul sums in another order
        return weight if self.channel_axis == 1 else weight.t().contiguous().t()


class TableSize:
    """Attributes of nn.Embedding that the code around a table reads."""

    weight: Tensor

    @property
    def num_embeddings(self) -> int:
        """Number of rows."""
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Width of a row."""
        return self.weight.shape[1]


class QuantizedEmbedding(TableSize, QuantizedWeight):
    """Embedding lookup in a quantized table, [rows, width]."""

    def __init__(self, table: nn.Parameter, quantizer: nn.Module) -> None:
        super().__init__(table, quantizer, channel_axis=0)

    def forward(self, ids: Tensor) -> Tensor:
        quantizer, training = self.weight_quantizer, torch.is_grad_enabled()
        if self.tap is None and quantizer is not None and quantizer.grid.by_row and training:
            # a batch reads few rows of a vocabulary, and quantizing all of them costs as much as an encoder
            rows, places = ids.unique(return_inverse=True)
            return F.embedding(places, self._rounded_rows(rows))
        return F.embedding(ids, self.quantized_weight())

    def _rounded_rows(self, rows: Tensor) -> Tensor:
        """Quantized rows [n] of the table, [n, width]; in training mode with Quant-Noise, if enabled."""
        weight, quantizer = self.rescaled_weight(), self.weight_quantizer
        if not self._is_noisy():
            return quantizer.of_rows(weight, rows)
        return self.noise(F.embedding(rows, weight), lambda: quantizer.of_rows(weight, rows))


class QuantizedStockEmbedding(QuantizedEmbedding, StockForward):
    """Embedding whose class computes more than a lookup, such as a scale, or positions with an offset: the
    stock forward, with the quantized table [rows, width].
    """

    def __init__(self, stock: nn.Embedding, quantizer: nn.Module) -> None:
        super().__init__(stock.weight, quantizer)
        self.hold(stock)

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        return self.run_stock({"weight": self.quantized_weight()}, *arguments, **named)


class QuantizedSharedTable(TableSize, StockForward):
    """Embedding that looks up rows of another one's quantized table, as a decoder's does in the encoder's."""

    def __init__(self, owner: QuantizedEmbedding, stock: nn.Embedding) -> None:
        super().__init__()
        # a tuple, so that the weight is registered once, under the owner's name
        self._owner = (owner,)
        self.hold(stock)

    @property
    def weight(self) -> Tensor:
        """The shared table."""
        return self._owner[0].weight

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        return self.run_stock({"weight": self._owner[0].quantized_weight()}, *arguments, **named)


def is_lookup(table: nn.Embedding) -> bool:
    """True if an embedding's class computes a lookup and nothing else."""
    return type(table).forward is nn.Embedding.forward


class QuantizedTied(nn.Module):
    """A layer that shares the quantized weight of another: logits from an embedding's table, or a linear
    layer of a block that shares weights with an earlier one, and then its bias as well. It has its own input
    quantizer. `bias`: the bias [rows] of a layer behind a table.
    """

    def __init__(
        self,
        owner: QuantizedEmbedding | QuantizedLinear,
        input_quantizer: nn.Module | None,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.bias = bias
        # a tuple, so that the weight is registered once, under the owner's name
        self._owner = (owner,)
        self.input_quantizer = input_quantizer

    @property
    def weight(self) -> Tensor:
        """The shared weight."""
        return self.owner.weight

    @property
    def in_features(self) -> int:
        """Number of inputs, as nn.Linear has it."""
        return self.weight.shape[1 - self.owner.channel_axis]

    @property
    def out_features(self) -> int:
        """Number of outputs, as nn.Linear has it."""
        return self.weight.shape[self.owner.channel_axis]

    @property
    def owner(self) -> QuantizedEmbedding | QuantizedLinear:
        """The layer that stores the weight."""
        return self._owner[0]

    def forward(self, x: Tensor) -> Tensor:
        owner = self.owner
        bias = owner.rescaled_bias() if isinstance(owner, QuantizedLinear) else self.bias
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        return matmul(x, owner.quantized_weight(), bias, owner.channel_axis)
