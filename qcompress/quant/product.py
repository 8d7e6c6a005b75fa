"""The product of a layer whose input has a learned scale, and what its backward pass knows about that scale.

LSQ's gradient of the scale of x needs sum(g * y) over the rounded activation y, where g = dL/dy. With
z = y @ w and u = dL/dz, g is u @ w.T and the gradient of w is y.T @ u, so that

    sum(g * y) = trace(w @ u.T @ y) = sum(w * dw)

A weight is several times smaller than the activations of a batch, and its gradient has just been made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.quant.affine import Told


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, channel_axis: int) -> Tensor:
    """x @ w + b. Every form of a layer calls this one, so that they agree to the last bit."""
    y = torch.matmul(x, weight if channel_axis == 1 else weight.t())
    if bias is None:
        return y
    # in place it costs half; under autocast the sum has the bias's precision and needs memory of its own
    return y.add_(bias) if y.dtype == bias.dtype else y + bias


def product(x: Tensor, weight: Tensor, bias: Tensor | None, channel_axis: int) -> Tensor:
    """`matmul` and its gradients to the last bit. Where x was rounded with one learned scale, the rounding is
    told its sum(g * y) in the backward pass.
    """
    tells = getattr(x.grad_fn, "wants_sum", False) and weight.requires_grad
    single = all(tensor is None or tensor.dtype == torch.float32 for tensor in (x, weight, bias))
    if tells and single and x.is_cpu and _is_exact():
        return _Product.apply(x, weight, bias, channel_axis, x.grad_fn)
    return matmul(x, weight, bias, channel_axis)


def _is_exact() -> bool:
    """Whether products of fp32 have fp32's precision: less would do for a gradient, but not for its sum."""
    if torch.is_autocast_enabled("cpu"):
        return False
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for one backend, which this function cannot put in one word
        return False


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, channel_axis: int, rounding) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.channel_axis, ctx.rounding = channel_axis, rounding
        ctx.bias_shape = None if bias is None else bias.shape
        return matmul(x, weight, bias, channel_axis)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, inputs = upstream.reshape(-1, upstream.shape[-1]), x.reshape(-1, x.shape[-1])
        if ctx.channel_axis == 1:
            of_weight, of_x = inputs.t().mm(rows), rows.mm(weight.t())
        else:
            of_weight, of_x = rows.t().mm(inputs), rows.mm(weight)
        of_x = of_x.view(x.shape)
        # under a graph of gradients the rounding would hold what holds it, and the graph would never be freed
        if not torch.is_grad_enabled() and of_weight.dtype == weight.dtype:  # another one under autocast
            total = torch.dot(of_weight.flatten(), weight.flatten())
            ctx.rounding.told = Told(of_x, of_x._version, total)
        of_bias = upstream.sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None, None
