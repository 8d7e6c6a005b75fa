"""Batch norm behind a convolution: trained beside it, folded into it.

In evaluation mode a batch norm is, for each channel c, a factor and a shift:

    f_c = gamma_c / sqrt(var_c + eps)        y_c = f_c * x_c + (beta_c - mean_c * f_c)

With x_c = s_c * sum(q * input), whose codes q are integers, the factor goes into the scale and the codes
stay what they were, but for their sign, because a scale has to be positive:

    s'_c = s_c * |f_c|       q'_c = sign(gamma_c) * q_c       bias_c = beta_c + (b_c - mean_c) * f_c

Negation has no code for -(-2^(bits - 1)). So a convolution in front of a batch norm rounds its weight the
way that it will be deployed, sign(gamma_c) * w_c, and turns it back (`quant/conv.py`): its codes are q'
already, use every level, and no code changes when they are folded. Where gamma crosses 0 in training the grid
turns around, and there the channel is multiplied by next to nothing.

gamma_c = 0 leaves a channel of nothing but its shift: its codes become 0 and its scale stays, since a scale
of 0 is refused. So does a channel whose scale the compute type would round to 0.

Source: Jacob et al. (arXiv:1712.05877), section 3.2, for the formula; there the fused weight is rounded, here
the scale takes the factor, so that statistics may move while the weight's grid does not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._NormBase

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""What a batch norm knows beside its parameters."""


def signs_of(norm: nn.Module | None, weight: Tensor) -> Tensor | None:
    """1 or -1 for each output channel of a weight [out, ...], as what is behind it will multiply it; None
    where nothing turns a channel around.
    """
    gamma = getattr(norm, "weight", None)
    if gamma is None:
        return None
    negative = gamma.detach() < 0
    if not bool(negative.any()):
        return None
    return torch.where(negative, -1.0, 1.0).to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))


@torch.no_grad()
def factor_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A batch norm in evaluation mode as y = factor * x + shift, [channels] each, in fp64."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    factor = gamma / torch.sqrt(var + norm.eps)
    return factor, beta - mean * factor


@torch.no_grad()
def fold_batch_norm(
    codes: Tensor, scale: Tensor, bias: Tensor | None, norm: nn.Module, compute: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Codes, scale [out] and bias [out] of a convolution and the batch norm behind it as one convolution, and
    the count of channels of which only the shift is left.

    codes: int8 [out, ...] of sign(gamma) * weight; scale: fp32 [out]; `compute`: the type that will hold the
    scale.
    """
    factor, shift = factor_and_shift(norm)
    folded = (scale.double() * factor.abs()).float()
    gone = folded.to(compute) == 0
    codes = codes.masked_fill(gone.view(-1, *[1] * (codes.dim() - 1)), 0)
    if bias is not None:
        shift = shift + bias.double() * factor
    return codes, torch.where(gone, scale, folded), shift.float(), int(gone.sum())


@torch.no_grad()
def gain_and_bias(bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a convolution of sign(gamma) * weight is multiplied by and what is added to it, [out] each, to be
    the convolution and the batch norm behind it: for weights that no scale can take in.
    """
    factor, shift = factor_and_shift(norm)
    if bias is not None:
        shift = shift + bias.double() * factor
    return factor.abs().float(), shift.float()


def statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every buffer that a batch norm of the model keeps, by name."""
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm) and module.track_running_stats:
            for own in STATISTICS:
                tensor = getattr(module, own, None)
                if tensor is not None:
                    yield f"{name}.{own}", tensor
