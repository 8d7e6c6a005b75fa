"""Activations with the range of the tensor at hand, against the formula and against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qcompress.errors import ContractError
from qcompress.quant.dynamic import DynamicActivation
from qcompress.quant.quantizers import FrozenActivation
from qcompress.schema.quantizers import Dynamic

INT8 = (-128, 127)


def quantizer(clip: float | None = 2.5) -> DynamicActivation:
    return DynamicActivation(Dynamic(clip=clip), INT8, 16)


def activation(seed: int = 0, size: float = 1.0) -> Tensor:
    return size * torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1e-3, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("clip", [2.5, 1.0, None])
def test_values_are_those_of_the_formula(clip: float | None, size: float) -> None:
    """Clamped, divided by max|x| / 127, rounded to even. The quotient is rounded to fp32 first."""
    for seed in range(10):
        x = activation(seed, size)
        values = x.double().numpy()
        limit = np.abs(values).max() if clip is None else min(np.abs(values).max(), clip)
        scale = np.float64(np.float32(np.float32(limit) / np.float32(127)))
        codes = np.clip(np.rint((values / scale).astype(np.float32)), -128, 127)
        found = quantizer(clip)(x)
        np.testing.assert_array_equal(found.numpy(), (codes * scale).astype(np.float32))
        if clip is not None:  # what the clip cuts off lies at it; a negative code may lie one further
            assert float(found.abs().max()) <= min(limit, clip) * 128 / 127 * (1 + 1e-6)
        clamped = np.clip(values, -limit, limit)
        assert np.abs(found.double().numpy() - clamped).max() <= scale * (1 + 1e-5)


def test_the_range_follows_the_tensor() -> None:
    ours, x = quantizer(None), activation()
    torch.testing.assert_close(ours(3 * x), 3 * ours(x), rtol=1e-5, atol=1e-6)
    assert len(ours(x).unique()) > 100


@pytest.mark.parametrize("clip", [2.5, None])
def test_the_gradient_is_that_of_the_straight_through_composition(clip: float | None) -> None:
    """The largest value passes its gradient on as well, and none reaches the range."""
    x, upstream = activation(1, 1.5), activation(2)
    x[0, 0, :4] = torch.tensor([2.5, -2.5, 2.4999, 0.0])
    ours, composed = x.clone().requires_grad_(), x.clone().requires_grad_()
    quantizer(clip)(ours).backward(upstream)
    limit = torch.inf if clip is None else clip
    inside = torch.where(composed.abs() < limit, composed, composed.detach())
    (inside + (quantizer(clip)(x) - inside).detach()).backward(upstream)
    assert torch.equal(ours.grad, composed.grad)
    assert bool((ours.grad == 0).any()) is (clip is not None)
    small = activation(3, 0.3).requires_grad_()
    quantizer(clip)(small).sum().backward()
    assert torch.equal(small.grad, torch.ones_like(small))
    small = activation(3, 0.3)
    small[0, 0, 0] = 2.5  # the largest value is at the clip, and beyond it there is none
    small.requires_grad_()
    quantizer(clip)(small).sum().backward()
    assert small.grad[0, 0, 0] == (clip is None) and small.grad.sum() == small.numel() - (clip is not None)


def test_half_precision_is_rounded_with_an_fp32_scale() -> None:
    x = activation().bfloat16().requires_grad_()
    found = quantizer()(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, quantizer()(x.detach().float()).bfloat16())
    found.sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_zeros_stay_zeros_and_a_nan_stays_a_nan() -> None:
    assert torch.equal(quantizer()(torch.zeros(3, 16)), torch.zeros(3, 16))
    assert quantizer()(torch.tensor([1.0, torch.nan])).isnan().all()


def test_there_is_no_scale_to_deploy_before_the_range_is_static() -> None:
    with pytest.raises(ContractError, match="dynamic activation has no scale"):
        quantizer().scale_of()


def test_a_static_scale_covers_the_range_up_to_the_clip() -> None:
    ours, x = quantizer(), activation(4, 0.4)
    largest = x.abs().max()
    scale = ours.scale_for(largest)
    assert torch.equal(FrozenActivation(scale, INT8)(x), ours(x))  # the tensor that has that range
    assert float(ours.scale_for(torch.tensor(100.0))) == pytest.approx(2.5 / 127)
    assert float(quantizer(None).scale_for(torch.tensor(100.0))) == pytest.approx(100 / 127)
    assert float(ours.scale_for(torch.tensor(0.0))) > 0
    assert not ours.state_dict() and not list(ours.parameters())
