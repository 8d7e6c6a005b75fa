"""Weight scales that keep an int32 bias in range.

A runtime that multiplies int8 codes adds the bias in the accumulator, as an integer at input scale times
weight scale. ONNX Runtime's default session rounds it there:

    b_q = round(b / (s_x * s_w))        saturates where |b| > s_x * s_w * 2^31

This happens in a channel of tiny weights with a bias of ordinary size: a batch norm with gamma 1e-12 folds to
a weight scale of 5e-23. Such a scale is raised, and the channel's codes are rounded again:

    s_w >= |b| / (s_x * 2^30)

Half of int32 is left for the sum of the products. A weight changes by at most half of the new scale, and an
input is at most 128 * s_x, so a product moves by at most |b| * 2^-24: the rounding of b itself in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 2.0**30
"""Upper limit of a bias in units of the accumulator."""


@torch.no_grad()
def least_scales(bias: Tensor, input_scale: Tensor) -> Tensor:
    """Smallest weight scale of each output channel, [out] in fp64, for one input scale []."""
    return bias.double().abs() / (input_scale.double() * LARGEST)


@torch.no_grad()
def raise_scales(
    codes: Tensor, scale: Tensor, least: Tensor, compute: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, int, int]:
    """Raise every scale to at least `least` and round the codes again; returns codes, scale, the number of
    raised scales and the number of changed codes.

    codes: int8 [out, ...]; scale: fp32 [out], or [] for all of it; least: fp64 of the scale's shape. A raised
    scale is a value of the type `compute`, in which it is deployed.
    """
    short = scale.double() < least
    raised = torch.where(short, _rounded_up(least, compute).float(), scale)
    # a ratio above 1 could push a code out of its range
    ratio = torch.where(short, (scale.double() / raised.double()).clamp_max(1.0), 1.0)
    ratio = ratio.view(*ratio.shape, *[1] * (codes.dim() - ratio.dim()))
    changed = (codes.double() * ratio).round().to(torch.int8)
    return changed, raised, int(short.sum()), int((changed != codes).sum())


def _rounded_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round positive values up to the next value of a type."""
    cast = values.to(dtype)
    bits = {2: torch.int16, 4: torch.int32}[cast.element_size()]
    following = (cast.view(bits) + 1).view(dtype)  # for positive values, the next larger one
    return torch.where(cast.double() < values, following, cast)
