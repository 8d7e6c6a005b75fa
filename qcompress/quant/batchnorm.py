"""Batch norm after a convolution: trained as a separate module, folded into the convolution.

In evaluation mode a batch norm is, for each channel c, a factor and a shift:

    f_c = gamma_c / sqrt(var_c + eps)        y_c = f_c * x_c + (beta_c - mean_c * f_c)

With x_c = s_c * sum(q * input), whose codes q are integers, the factor is multiplied into the scale, and the
codes change only in their sign, because a scale has to be positive:

    s'_c = s_c * |f_c|       q'_c = sign(gamma_c) * q_c       bias_c = beta_c + (b_c - mean_c) * f_c

The code -2^(bits - 1) has no negation. Therefore a convolution before a batch norm quantizes its weight with
the deployed sign, sign(gamma_c) * w_c, and restores the sign afterwards (`quant/conv.py`): its codes are
already q', use every level, and do not change when they are folded. When gamma crosses 0 in training the grid
is mirrored, while the channel's factor is near 0.

gamma_c = 0 leaves only the shift of a channel: its codes become 0 and its scale is kept, since a scale of 0
is refused. A channel whose scale the compute type would round to 0 is treated likewise.

Source: Jacob et al. (arXiv:1712.05877), section 3.2, for the formula; there the fused weight is rounded, here
the scale takes the factor, so that statistics may move while the weight's grid does not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qcompress.quant.rescaling import RescaledNorm

BATCH_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
"""Norms over a batch or an image, which may keep running statistics."""

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers of a batch norm."""


def signs_of(norm: nn.Module | None, weight: Tensor) -> Tensor | None:
    """Sign, 1 or -1, of the batch norm's factor for each output channel of a weight [out, ...]; None if no
    factor is negative.
    """
    gamma = getattr(norm, "weight", None)
    if gamma is None:
        return None
    negative = gamma.detach() < 0
    if not bool(negative.any()):
        return None
    return torch.where(negative, -1.0, 1.0).to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))


@torch.no_grad()
def factor_and_shift(norm: nn.Module, gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Express a batch norm in evaluation mode as y = factor * x + shift, [channels] each, in fp64; `gain`
    [channels] multiplies its output.
    """
    mean, var = norm.running_mean.double(), norm.running_var.double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    factor = gamma / torch.sqrt(var + norm.eps)
    shift = beta - mean * factor
    return (factor, shift) if gain is None else (factor * gain.double(), shift * gain.double())


@torch.no_grad()
def fold_batch_norm(
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    norm: nn.Module,
    compute: torch.dtype,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Fold the batch norm after a convolution into its codes, scale [out] and bias [out]; also returns the
    number of channels of which only the shift is left.

    codes: int8 [out, ...] of sign(gamma) * weight; scale: fp32 [out]; `compute`: the type that will hold the
    scale; `gain` [out] multiplies the norm's output.
    """
    factor, shift = factor_and_shift(norm, gain)
    folded = (scale.double() * factor.abs()).float()
    gone = folded.to(compute) == 0
    codes = codes.masked_fill(gone.view(-1, *[1] * (codes.dim() - 1)), 0)
    if bias is not None:
        shift = shift + bias.double() * factor
    return codes, torch.where(gone, scale, folded), shift.float(), int(gone.sum())


@torch.no_grad()
def gain_and_bias(bias: Tensor | None, norm: nn.Module, gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factor and bias, [out] each, that turn a convolution of sign(gamma) * weight into the convolution and
    its batch norm: for weights without a scale that could take the factor. `gain` [out] multiplies the norm's
    output.
    """
    factor, shift = factor_and_shift(norm, gain)
    if bias is not None:
        shift = shift + bias.double() * factor
    return factor.abs().float(), shift.float()


def after_norm(norm: nn.Module) -> nn.Module:
    """The part of a batch norm that stays when the norm is folded: the children of a class such as timm's
    BatchNormAct2d, which drops and activates its output, in the order in which they were registered. An
    identity for a stock norm.
    """
    children = dict(norm.named_children())
    return nn.Sequential(OrderedDict(children)) if children else nn.Identity()


def are_folded(norms: list[nn.Module]) -> bool:
    """True if batch norms were folded into the convolutions in front of them and kept as identities: all have
    mean 0 and one variance in all channels (1, or 1 - eps), but a trained shift or factor.
    """
    kept = [norm for norm in norms if norm.running_mean is not None]
    constant = all(
        bool((norm.running_mean == 0).all()) and bool((norm.running_var == norm.running_var[0]).all())
        for norm in kept
    )
    return constant and not all(_is_initial(norm) for norm in kept)


def _is_initial(norm: nn.Module) -> bool:
    """True before training; factors may start at 0 (the last ones of residual blocks)."""
    factors = norm.weight is None or bool(((norm.weight == 1) | (norm.weight == 0)).all())
    return (
        factors and (norm.bias is None or not bool(norm.bias.any())) and bool((norm.running_var == 1).all())
    )


def statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers of all batch norms of a model, by name."""
    for name, module in model.named_modules():
        stock = module.stock if isinstance(module, RescaledNorm) else module
        if isinstance(stock, BATCH_NORMS) and stock.track_running_stats:
            for buffer in STATISTICS:
                tensor = getattr(module, buffer, None)
                if tensor is not None:
                    yield f"{name}.{buffer}", tensor
