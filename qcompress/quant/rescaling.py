"""Rescaling of channels: positive scales, the part of a scale that one layer sees, and norms that take it in.

A site's scale has one entry for each rescaled channel of its writer. The writer may have other channels as
well (a fused projection), and a reader may read one channel several times (grouped-query attention), in
another order, or beside other inputs. `MappedScale` gives each of them its own scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.quant.ranges import Statistics
from qcompress.quant.stock_forward import StockForward


class ChannelScale(nn.Module):
    """A positive scale for each channel, exp(theta) with |theta| <= log(bound). Shape [channels].

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
        """Clamp theta to its bound, beyond which it has no gradient and would never return."""
        self.theta.clamp_(-self.limit, self.limit)


class FixedScale(nn.Module):
    """A channel scale that training does not change. Shape [channels]."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self) -> Tensor:
        return self.scale

    def advance(self) -> None:
        """No-op."""


class MappedScale(nn.Module):
    """A scale, [channels], as one layer sees it: entry index[i] at place i, 1 where index[i] is -1."""

    def __init__(self, scale: nn.Module, index: Sequence[int]) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("index", torch.tensor(index), persistent=False)

    def forward(self) -> Tensor:
        return F.pad(self.scale(), (0, 1), value=1.0)[self.index]


class ProductScale(nn.Module):
    """The scale of an input that several sites write, such as a concatenation: the product of theirs."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self) -> Tensor:
        return self.first() * self.second()


class Gain(nn.Module):
    """Forward hook that multiplies a norm's output, [batch, channels, height, width], by a scale."""

    def __init__(self, scale: nn.Module) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, norm: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * self.scale().view(-1, 1, 1)


def mapped(scale: nn.Module, index: Sequence[int] | None) -> nn.Module:
    """The scale behind an index; the scale itself if the index is None or maps one by one."""
    if index is None or list(index) == list(range(len(scale()))):
        return scale
    return MappedScale(scale, index)


def combined(first: nn.Module | None, second: nn.Module) -> nn.Module:
    """The product of two scales; the second one alone without a first."""
    return second if first is None else ProductScale(first, second)


def output_index(outputs: Sequence[int], count: int) -> list[int]:
    """Index into a site's scale at each of the writer's `count` outputs, -1 for one that is not rescaled.

    >>> output_index([3, 1], 4)
    [-1, 1, -1, 0]
    """
    entries = {output: entry for entry, output in enumerate(outputs)}
    return [entries.get(output, -1) for output in range(count)]


def largest_by_channel(values: Tensor, index: Sequence[int] | None, channels: int) -> Tensor:
    """Largest value over the inputs that one channel of a site reaches, [channels]; 0 where it reaches none.

    values: nonnegative, [inputs]; index: entry of the site's scale at each input, None for one by one.
    """
    if index is None:
        return values
    places = torch.tensor(index, device=values.device)
    read = places >= 0
    return values.new_zeros(channels).scatter_reduce(0, places[read], values[read], "amax")


def site_largest(
    seen: Mapping[str, Statistics],
    readers: Sequence[str],
    maps: Sequence[Sequence[int] | None],
    channels: int,
) -> Tensor | None:
    """Largest |x| of each channel of a site, [channels], from the statistics of its readers' inputs; None if
    the first reader was not observed. Readers that see the channels one by one have equal statistics, so that
    the first of them stands for all.
    """
    if readers[0] not in seen:
        return None
    if not any(index is not None for index in maps):
        return seen[readers[0]].largest
    return torch.stack([
        largest_by_channel(seen[reader].largest, index, channels)
        for reader, index in zip(readers, maps, strict=True) if reader in seen
    ]).amax(0)  # fmt: skip


class RescaledNorm(StockForward):
    """A norm whose output channels are multiplied by a scale, computed by the stock norm with folded
    parameters.

    A norm multiplies channel c by offset + weight_c, where the offset is 0, or 1 in Gemma's:

        weight' = (offset + weight) * scale - offset        bias' = bias * scale

    Args:
        norm: a norm with a weight [channels], and perhaps a bias [channels].
        rescale: gives the scale, [channels].
        offset: 0 or 1; None runs the norm to see which one it is.

    Raises ModelError for a norm that neither offset describes.
    """

    def __init__(self, norm: nn.Module, rescale: nn.Module, offset: int | None = None) -> None:
        super().__init__()
        self.hold(norm)
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        tensors = dict(norm.named_parameters())
        if weight is None or set(tensors) - {"weight", "bias"}:
            raise ModelError(
                f"{type(norm).__name__} has the parameters {sorted(tensors)}, and a norm that takes a "
                "rescaling has `weight` and perhaps `bias`",
                fix=NORM_FIX,
            )
        self.is_layer_norm = type(norm).forward is nn.LayerNorm.forward and bias is not None
        if offset is None:
            offset = 0 if self.is_layer_norm else offset_of(norm)
        self.offset = offset
        self.weight, self.bias = weight, bias
        self.rescale = rescale

    def forward(self, x: Tensor) -> Tensor:
        if self.is_layer_norm:
            folded = self.folded()
            return F.layer_norm(
                x, self.stock.normalized_shape, folded["weight"], folded["bias"], self.stock.eps
            )
        return self.run_stock(self.folded(), x)

    def folded(self) -> dict[str, Tensor]:
        """Parameters of the equivalent stock norm by name, [channels] each."""
        return folded_parameters(self.weight, self.bias, self.rescale(), self.offset)


NORM_FIX = "choose `adapter: none`, or an adapter with `sites: value`"


def folded_parameters(weight: Tensor, bias: Tensor | None, scale: Tensor, offset: int) -> dict[str, Tensor]:
    """Parameters of a norm whose output is `scale` times as large; see `RescaledNorm`."""
    scaled = (offset + weight) * scale - offset if offset else weight * scale
    return {"weight": scaled} if bias is None else {"weight": scaled, "bias": bias * scale}


@torch.no_grad()
def offset_of(norm: nn.Module) -> int:
    """The offset of a norm, 0 or 1, with which a random scale in its parameters multiplies its output.

    The norm runs in evaluation mode on random inputs, [batch, ..., channels] or [batch, channels, ...], with
    random parameters. Raises ModelError if neither offset fits.
    """
    channels, training = norm.weight.numel(), norm.training
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) + 0.5).to(norm.weight)

    weight, bias, scale = draw(channels), None, draw(channels)
    if getattr(norm, "bias", None) is not None:
        bias = draw(channels)
    ones = torch.ones_like(scale)
    try:
        norm.eval()
        for shape, axis in (
            ((2, channels + 1, channels), -1),
            ((2, channels, 3, 3), 1),
            ((2, channels, 3), 1),
        ):
            x = draw(*shape) - 1
            for offset in (0, 1):
                try:
                    plain, folded = (
                        torch.func.functional_call(norm, folded_parameters(weight, bias, one, offset), (x,))
                        for one in (ones, scale)
                    )
                except (RuntimeError, ValueError, IndexError):
                    break  # another number of axes
                wanted = (plain.movedim(axis, -1) * scale).movedim(-1, axis)
                if torch.allclose(folded, wanted, rtol=1e-3, atol=1e-4):
                    return offset
    finally:
        norm.train(training)
    raise ModelError(
        f"{type(norm).__name__}: neither weight * s nor (1 + weight) * s - 1 multiplies its output by s, so "
        "that it takes no rescaling",
        fix=NORM_FIX,
    )
