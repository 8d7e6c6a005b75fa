"""Layers whose weights and inputs pass through quantizers while training.

A weight keeps the orientation of its checkpoint: [in, out] (`channel_axis` 1, GPT-2's Conv1D) or [out, in]
(`channel_axis` 0, nn.Linear, tables). A rescaling `a` [in] divides the rows of the reader's weight *before*
the weight quantizer, and multiplies what it reads, in the norm or in the weight and bias of the linear layer
that makes it: what is trained is the fused form that is deployed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.quant.noise import QuantNoise


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, channel_axis: int) -> Tensor:
    """x @ w + b, x [..., in]. Every form of a layer calls it, so that they agree to the last bit."""
    y = torch.matmul(x, weight if channel_axis == 1 else weight.t())
    if bias is None:
        return y
    # in place it costs half; under autocast the sum has the bias's precision and needs memory of its own
    return y.add_(bias) if y.dtype == bias.dtype else y + bias


class ChannelScale(nn.Module):
    """A positive scale for each channel, exp(theta) with theta within log(bound). Shape [channels].

    Source: Quadapter (arXiv:2211.16912) learns channel-wise scales; the exponential keeps them positive,
    without which they could not be folded.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"theta": "adapter"}

    def __init__(self, channels: int, bound: float) -> None:
        super().__init__()
        self.limit = float(torch.tensor(bound).log())
        self.theta = nn.Parameter(torch.zeros(channels))

    def forward(self) -> Tensor:
        return self.theta.clamp(-self.limit, self.limit).exp()

    @torch.no_grad()
    def advance(self) -> None:
        """Bring theta back to its bound, beyond which it has no gradient and would never return."""
        self.theta.clamp_(-self.limit, self.limit)


class FixedScale(nn.Module):
    """A channel scale that no training moves. Shape [channels]."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self) -> Tensor:
        return self.scale

    def advance(self) -> None:
        """Nothing is learned."""


class RescaledNorm(nn.Module):
    """LayerNorm with its output channels multiplied by a scale, as one LayerNorm with other parameters."""

    def __init__(self, norm: nn.LayerNorm, rescale: nn.Module) -> None:
        super().__init__()
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.rescale = rescale

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, *self.folded(), self.eps)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the LayerNorm that this is, [channels] each."""
        scale = self.rescale()
        return self.weight * scale, self.bias * scale


Place = Literal["latent", "rounded"]
"""Where a weight can be tapped: latent, as it enters its quantizer; rounded, as it leaves it."""


@dataclass
class Tap:
    """What happens to a weight at one place while it is tapped; all tensors have the weight's shape."""

    place: Place
    offset: Tensor | None = None
    """Added to the weight."""
    listens: bool = False
    gradient: Tensor | None = None
    """Of the loss with respect to the weight at this place, summed over all uses in a forward pass."""

    def through(self, weight: Tensor) -> Tensor:
        if self.offset is not None:
            weight = weight + self.offset
        if self.listens and torch.is_grad_enabled():
            # a view, since a hook on the parameter itself would outlive the pass; and where nothing before
            # this place wants a gradient, the backward pass ends here
            weight = weight.view_as(weight) if weight.requires_grad else weight.detach().requires_grad_()
            weight.register_hook(self._collect)
        return weight

    def _collect(self, gradient: Tensor) -> None:
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


@contextmanager
def tapped(layers: Sequence[QuantizedWeight], taps: Sequence[Tap]) -> Iterator[None]:
    """Each layer with its tap, and none of them with any afterwards, whatever is raised."""
    try:
        for layer, tap in zip(layers, taps, strict=True):
            layer.tap = tap
        yield
    finally:
        for layer in layers:
            layer.tap = None


class QuantizedWeight(nn.Module):
    """Base of the layers below: a weight, its quantizer, and the rounded weight, kept while nothing moves."""

    def __init__(self, weight: nn.Parameter, quantizer: nn.Module | None, channel_axis: int) -> None:
        super().__init__()
        self.weight = weight
        self.channel_axis = channel_axis
        self.weight_quantizer = quantizer
        self.rescale: nn.Module | None = None
        """Scale of the input's channels."""
        self.gain: nn.Module | None = None
        """Scale of output channels, beginning with `gain_first`; the others keep theirs."""
        self.gain_first = 0
        self.tap: Tap | None = None
        self.noise: QuantNoise | None = None
        self.noisy = True
        self._kept: tuple[tuple[tuple[int, int], ...], Tensor] | None = None

    def rescaled_weight(self) -> Tensor:
        """The weight that will be deployed, before rounding: rows divided by the rescaling of the input,
        columns multiplied by that of the output.
        """
        weight = self.weight
        if self.rescale is not None:
            weight = weight / self.rescale().unsqueeze(self.channel_axis)
        if self.gain is not None:
            weight = weight * self._gains().unsqueeze(1 - self.channel_axis)
        return weight

    def _gains(self) -> Tensor:
        """Scale of every output channel, [out]."""
        scale = self.gain()
        after = self.weight.shape[self.channel_axis] - self.gain_first - len(scale)
        return F.pad(scale, (self.gain_first, after), value=1.0)

    def quantized_weight(self) -> Tensor:
        """The rounded weight, and what a tap makes of it."""
        if self.tap is None:
            return self._rounded_weight()
        if self.tap.place == "latent" and self.weight_quantizer is not None:
            return self._round(self.tap.through(self.rescaled_weight()))
        return self.tap.through(self._rounded_weight())

    def coded_weight(self) -> Tensor:
        """The weight that will be deployed, as the quantizer sees it: with two axes."""
        return self.rescaled_weight()

    def _rounded_weight(self) -> Tensor:
        """Untapped. It is computed once while neither the weight nor a scale can change."""
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
        """The quantizer's value of a weight; while training, with noise where there is any."""
        if not self._is_noisy():
            return self.weight_quantizer(weight)
        return self.noise(weight, lambda: self.weight_quantizer(weight))

    def _is_noisy(self) -> bool:
        return self.noise is not None and self.training and self.noisy and self.weight_quantizer.takes_noise

    def _depends_on(self) -> tuple[Tensor, ...]:
        """Every tensor that the rounded weight is made of."""
        return (*self.parameters(), *self.buffers())

    def forget(self) -> None:
        """Let go of the rounded weight that is kept: an update changes weights, and fused optimizers do so
        without counting up their versions.
        """
        self._kept = None

    def _moves(self) -> bool:
        """Whether a gradient reaches the weight or a scale."""
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

    def _laid_out(self, weight: Tensor) -> Tensor:
        """The rounded weight in the memory layout of its folded form."""
        return weight

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """Integers of the weight (int8, the weight's shape) and their scale, in the grid's shape."""
        return self.weight_quantizer.codes_of(self.coded_weight())


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

    def rescaled_bias(self) -> Tensor | None:
        """The bias that will be deployed, [out]."""
        if self.bias is None or self.gain is None:
            return self.bias
        return self.bias * self._gains()

    def _laid_out(self, weight: Tensor) -> Tensor:
        # folded weights are [in, out] in memory; from another layout, a matmul sums in another order
        return weight if self.channel_axis == 1 else weight.t().contiguous().t()


class QuantizedEmbedding(QuantizedWeight):
    """Rows of a rounded table, [rows, width]."""

    def __init__(self, table: nn.Parameter, quantizer: nn.Module) -> None:
        super().__init__(table, quantizer, channel_axis=0)

    def forward(self, ids: Tensor) -> Tensor:
        quantizer, training = self.weight_quantizer, torch.is_grad_enabled()
        if self.tap is None and quantizer is not None and quantizer.grid.by_row and training:
            # of a vocabulary a batch reads little, and rounding all of it costs as much as a small encoder
            rows, places = ids.unique(return_inverse=True)
            return F.embedding(places, self._rounded_rows(rows))
        return F.embedding(ids, self.quantized_weight())

    def _rounded_rows(self, rows: Tensor) -> Tensor:
        """Some rows [n] of the table, [n, width]; while training, with noise where there is any."""
        weight, quantizer = self.rescaled_weight(), self.weight_quantizer
        if not self._is_noisy():
            return quantizer.of_rows(weight, rows)
        return self.noise(F.embedding(rows, weight), lambda: quantizer.of_rows(weight, rows))


class QuantizedTied(nn.Module):
    """A layer that has another one's rounded weight, and its bias: logits from the table of an embedding, or
    a linear layer of a block that shares weights with an earlier one. It rounds what it reads for itself.
    """

    def __init__(
        self, owner: QuantizedEmbedding | QuantizedLinear, input_quantizer: nn.Module | None
    ) -> None:
        super().__init__()
        # a tuple, so that the weight is registered once, under the owner's name
        self._owner = (owner,)
        self.input_quantizer = input_quantizer

    @property
    def weight(self) -> Tensor:
        """The shared weight."""
        return self.owner.weight

    @property
    def owner(self) -> QuantizedEmbedding | QuantizedLinear:
        """The layer that stores the weight."""
        return self._owner[0]

    def forward(self, x: Tensor) -> Tensor:
        owner = self.owner
        bias = owner.rescaled_bias() if isinstance(owner, QuantizedLinear) else None
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        return matmul(x, owner.quantized_weight(), bias, owner.channel_axis)
