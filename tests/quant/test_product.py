"""A layer's product tells the rounding of its input a sum that the gradient of the scale needs. Oracles: the
composition of differentiable steps in float64, and stock autograd of the same product.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from qcompress.quant import affine
from qcompress.quant.affine import fake_quantize
from qcompress.quant.product import matmul, product

BOUNDS = (-128, 127)


class Case:
    """x [6, 32, 48] with a learned scale, a weight in one of the two orientations, and a bias."""

    def __init__(self, channel_axis: int, largest: float, bias: bool = True) -> None:
        random = torch.Generator().manual_seed(channel_axis + int(10 * largest))
        self.channel_axis = channel_axis
        shape = (48, 24) if channel_axis == 1 else (24, 48)
        self.x = torch.randn(6, 32, 48, generator=random).requires_grad_()
        self.scale = torch.tensor(largest / 127).requires_grad_()
        self.weight = torch.randn(shape, generator=random).requires_grad_()
        self.bias = torch.randn(24, generator=random).requires_grad_() if bias else None
        self.upstream = torch.randn(6, 32, 24, generator=random)

    @property
    def leaves(self) -> list[Tensor]:
        found = (self.x, self.scale, self.weight, self.bias)
        return [tensor for tensor in found if tensor is not None]

    def rounded(self) -> Tensor:
        return fake_quantize(self.x, self.scale, BOUNDS)

    def output(self, way=product) -> Tensor:
        return way(self.rounded(), self.weight, self.bias, self.channel_axis)

    def gradients(self, output: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(output, self.leaves, self.upstream))

    def scale_gradient_in_float64(self, extra: Tensor | None = None) -> float:
        """Of sum(upstream * output), and of sum(extra * y) where given, by the definition of LSQ."""
        x, scale = self.x.detach().double(), self.scale.detach().double()
        weight = self.weight.detach().double()
        of_y = self.upstream.double() @ (weight.t() if self.channel_axis == 1 else weight)
        of_y = of_y if extra is None else of_y + extra.double()
        v = x / scale
        inside = (v > BOUNDS[0]) & (v < BOUNDS[1])
        return float((of_y * (v.clamp(*BOUNDS).round() - inside * v)).sum())


@pytest.fixture
def dots(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many elements each sum over an activation has that a rounding takes for itself."""
    taken: list[int] = []
    dot = affine._dot

    def counted(a: Tensor, b: Tensor) -> Tensor:
        taken.append(a.numel())
        return dot(a, b)

    monkeypatch.setattr(affine, "_dot", counted)
    return taken


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("largest", [8.0, 2.0])  # nothing is clipped; one in twenty is
@pytest.mark.parametrize("channel_axis", [0, 1])
def test_values_and_gradients_are_those_of_the_plain_product(
    channel_axis: int, largest: float, bias: bool, dots: list[int]
) -> None:
    case = Case(channel_axis, largest, bias)
    told, plain = case.output(), case.output(matmul)
    assert torch.equal(told, plain)
    (dx, ds, *others), count = case.gradients(told), len(dots)
    (plain_dx, plain_ds, *plain_others) = case.gradients(plain)
    assert count == 1 and len(dots) == 3  # sum(through * x) alone; then also sum(g * y)
    assert torch.equal(dx, plain_dx)
    assert all(torch.equal(a, b) for a, b in zip(others, plain_others, strict=True))
    torch.testing.assert_close(ds, plain_ds, rtol=1e-3, atol=0)
    assert float(ds) == pytest.approx(case.scale_gradient_in_float64(), rel=1e-3)


@pytest.mark.parametrize("first", ["product", "other"])
def test_a_second_reader_of_the_rounded_activation_is_counted(first: str, dots: list[int]) -> None:
    case = Case(0, 8.0)
    extra = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(5))
    y = case.rounded()
    if first == "product":  # the backward pass goes the other way round
        loss = (product(y, case.weight, case.bias, 0) * case.upstream).sum() + (y * extra).sum()
    else:
        loss = (y * extra).sum() + (product(y, case.weight, case.bias, 0) * case.upstream).sum()
    (ds,) = torch.autograd.grad(loss, [case.scale])
    assert float(ds) == pytest.approx(case.scale_gradient_in_float64(extra), rel=1e-3)
    assert len(dots) == 2


def test_two_products_of_one_rounded_activation_are_both_counted(dots: list[int]) -> None:
    case = Case(0, 8.0)
    y = case.rounded()
    loss = sum((product(y, case.weight, case.bias, 0) * case.upstream).sum() for _ in range(2))
    (ds,) = torch.autograd.grad(loss, [case.scale])
    assert float(ds) == pytest.approx(2 * case.scale_gradient_in_float64(), rel=1e-3)
    assert len(dots) == 2


def test_a_hook_that_changes_the_gradient_on_its_way_is_heard(dots: list[int]) -> None:
    case = Case(1, 8.0)
    y = case.rounded()
    y.register_hook(lambda gradient: 3 * gradient)
    (ds,) = torch.autograd.grad(product(y, case.weight, None, 1), [case.scale], case.upstream)
    assert float(ds) == pytest.approx(3 * case.scale_gradient_in_float64(), rel=1e-3)
    assert len(dots) == 2


def test_a_gradient_changed_in_its_memory_is_heard(dots: list[int]) -> None:
    case = Case(1, 8.0)
    y = case.rounded()
    output = product(y, case.weight, None, 1)
    (g,) = torch.autograd.grad(output, [y], case.upstream, retain_graph=True)
    g.mul_(3)
    (ds,) = torch.autograd.grad(y, [case.scale], g)
    assert float(ds) == pytest.approx(3 * case.scale_gradient_in_float64(), rel=1e-3)
    assert len(dots) == 2


def test_a_gradient_that_is_seen_in_another_order_is_not_the_one_told() -> None:
    x = torch.randn(24, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    scale, weight = torch.tensor(0.05).requires_grad_(), torch.randn(24, 8).requires_grad_()
    found = []
    for way in (product, matmul):
        y = fake_quantize(x, scale, BOUNDS)
        y.register_hook(lambda gradient: gradient.t())
        found += torch.autograd.grad(way(y, weight, None, 1).sum(), [scale])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0)


def test_a_graph_of_the_last_part_of_a_backward_pass_reaches_its_gradient() -> None:
    """ds = sum(g * (y - x)) / s, so that its gradient in g is (y - x) / s."""
    case = Case(1, 8.0)
    y = case.rounded()
    (g,) = torch.autograd.grad(product(y, case.weight, None, 1), [y], case.upstream, retain_graph=True)
    (ds,) = torch.autograd.grad(y, [case.scale], g.requires_grad_(), create_graph=True)
    (of_g,) = torch.autograd.grad(ds, [g])
    torch.testing.assert_close(of_g, (y - case.x) / case.scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("channel_axis", [0, 1])
def test_a_backward_pass_under_autocast_takes_its_own_sum(channel_axis: int, dots: list[int]) -> None:
    case = Case(channel_axis, 8.0)
    output = case.output()
    with torch.autocast("cpu", torch.bfloat16):
        (ds,) = torch.autograd.grad(output, [case.scale], case.upstream)
    assert len(dots) == 2 and float(ds) == pytest.approx(case.scale_gradient_in_float64(), rel=0.1)


def test_a_precision_set_for_one_backend_is_no_error() -> None:
    case, backend = Case(0, 8.0), torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        assert "_Product" not in type(case.output().grad_fn).__name__
    finally:
        backend.fp32_precision = before
    assert "_Product" in type(case.output().grad_fn).__name__


def test_a_bias_of_another_precision_is_left_to_stock_autograd() -> None:
    case = Case(0, 8.0)
    output = product(case.rounded(), case.weight, case.bias.detach().double().requires_grad_(), 0)
    assert output.dtype == torch.float64 and "_Product" not in type(output.grad_fn).__name__


def test_a_second_backward_pass_through_one_graph_gives_the_same() -> None:
    case = Case(0, 2.0)
    y = case.rounded()
    output = product(y, case.weight, case.bias, 0)
    passes = [torch.autograd.grad(output, case.leaves, case.upstream, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*passes, strict=True))
    assert y.grad_fn.told is None  # whose gradient has the size of the activation
    # what a pass that stops before the rounding told is not what a later pass with another gradient takes
    torch.autograd.grad(output, [case.weight], 5 * case.upstream, retain_graph=True)
    (ds,) = torch.autograd.grad(output, [case.scale], case.upstream)
    torch.testing.assert_close(ds, passes[0][1])


def test_the_gradient_has_a_gradient() -> None:
    """Curvature is measured by products with the Hessian: those of stock autograd of the same layer."""
    case = Case(0, 2.0)

    def curvature(way) -> list[Tensor]:
        loss = (case.output(way) ** 2).sum()
        moving = [case.x, case.weight, case.bias]
        first = torch.autograd.grad(loss, moving, create_graph=True)
        return list(torch.autograd.grad(sum((part**2).sum() for part in first), moving))

    for ours, stock in zip(curvature(product), curvature(matmul), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5 * float(stock.abs().max()))


def test_what_does_not_want_a_sum_or_has_less_precision_is_left_to_stock_autograd() -> None:
    case = Case(0, 8.0)

    def is_told(y: Tensor, weight: Tensor = case.weight) -> bool:
        return "_Product" in type(product(y, weight, case.bias, 0).grad_fn).__name__

    assert is_told(case.rounded())
    assert not is_told(case.x)
    assert not is_told(fake_quantize(case.x, case.scale.detach(), BOUNDS))  # a fixed scale
    assert not is_told(case.rounded(), case.weight.detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_told(case.rounded())
    torch.set_float32_matmul_precision("medium")
    try:
        assert not is_told(case.rounded())
    finally:
        torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        assert torch.equal(case.output(), case.output(matmul))


def test_a_graph_of_gradients_that_stops_before_the_rounding_is_freed() -> None:
    """What is told has a graph of its own then, which holds the rounding, which would hold it."""

    class Life:
        pass

    case, life = Case(0, 8.0), Life()
    y = case.rounded()
    y.grad_fn.metadata["life"] = life
    (dw,) = torch.autograd.grad(
        product(y, case.weight, None, 0), [case.weight], case.upstream, create_graph=True
    )
    alive = weakref.ref(life)
    del life, y, dw
    assert alive() is None
