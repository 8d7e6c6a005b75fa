"""Rounding and its gradient, against ONNX's own reference, double precision and plain autograd."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from qcompress.quant.affine import Grid, fake_quantize, straight_through, to_codes, to_ternary

INT8, INT4, INT2 = (-128, 127), (-8, 7), (-2, 1)
LAYOUTS = {
    "int8 tensor": (INT8, None, (48, 64)),
    "int8 channel, [in, out]": (INT8, Grid(1), (48, 20)),
    "int8 channel, [out, in]": (INT8, Grid(0), (20, 48)),
    "int4 channel, [in, out]": (INT4, Grid(1), (48, 20)),
    "int4 block, [in, out]": (INT4, Grid(1, 32), (96, 20)),
    "int4 block, [out, in]": (INT4, Grid(0, 32), (20, 96)),
    "int8 whole weight": (INT8, Grid(1, None, "tensor"), (48, 20)),
    "int4 whole weight": (INT4, Grid(0, None, "tensor"), (48, 20)),
}
"""Name -> bounds, grid (None: one scale) and the shape of the tensor."""


def sample(layout: str, seed: int, ties: float = 0.1) -> tuple[Tensor, Tensor]:
    """A tensor with a share of ties and values outside the bounds, and a scale in the layout's shape."""
    bounds, grid, shape = LAYOUTS[layout]
    random = torch.Generator().manual_seed(seed)
    scale = torch.rand(grid.scale_shape(torch.Size(shape)) if grid else (), generator=random) * 0.2 + 1e-3
    aligned = grid.align(scale) if grid else scale
    v = torch.randn(shape, generator=random) * bounds[1] * 0.8
    v = torch.where(torch.rand(shape, generator=random) < ties, v.round() + 0.5, v)
    x = (grid.divide(v) * aligned) if grid else v * aligned
    return (grid.join(x) if grid else x), scale


def ours(x: Tensor, scale: Tensor, layout: str, slope: float = 1.0) -> Tensor:
    bounds, grid, _ = LAYOUTS[layout]
    if grid is None:
        return fake_quantize(x, scale, bounds, slope)
    return grid.join(fake_quantize(grid.divide(x), grid.align(scale), bounds, slope))


def onnx_reference(x: Tensor, scale: Tensor, layout: str) -> np.ndarray:
    """QuantizeLinear and DequantizeLinear of opset 21, evaluated by onnx itself."""
    bounds, grid, _ = LAYOUTS[layout]
    attributes = {} if scale.dim() == 0 else {"axis": grid.axis}
    if grid is not None and grid.block:
        attributes["block_size"] = grid.block
    kind = TensorProto.INT8 if bounds == INT8 else TensorProto.INT4
    zero = helper.make_tensor(
        "zero", kind, tuple(scale.shape), np.zeros(max(scale.numel(), 1), np.int8).tolist()
    )
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], **attributes),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **attributes),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        [numpy_helper.from_array(scale.numpy(), "scale"), zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return ReferenceEvaluator(model).run(None, {"x": x.numpy()})[0]


def by_hand(x: Tensor, scale: Tensor, layout: str) -> np.ndarray:
    """The formula in double precision; the quotient is rounded to fp32 first, which decides the ties."""
    bounds, grid, shape = LAYOUTS[layout]
    values, s = x.double().numpy(), scale.double().numpy()
    if grid is not None and grid.granularity == "channel":
        s = (
            np.expand_dims(s, 1 - grid.channel_axis)
            if grid.block is None
            else s.repeat(grid.block, grid.axis)
        )
    quotient = (values / s).astype(np.float32).astype(np.float64)
    lower = np.floor(quotient)
    rest = quotient - lower
    up = (rest > 0.5) | ((rest == 0.5) & (lower % 2 == 1))
    codes = np.minimum(np.maximum(lower + up, bounds[0]), bounds[1])
    return (codes * s).astype(np.float32) * np.ones(shape, np.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_is_quantize_then_dequantize_of_onnx_to_the_last_bit(layout: str) -> None:
    for seed in range(40):
        x, scale = sample(layout, seed)
        np.testing.assert_array_equal(ours(x, scale, layout).numpy(), onnx_reference(x, scale, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_is_the_formula_worked_in_double_precision(layout: str) -> None:
    """fp32 division is correctly rounded, so rounding the double quotient once gives the same quotient."""
    for seed in range(100, 140):
        x, scale = sample(layout, seed)
        np.testing.assert_array_equal(ours(x, scale, layout).numpy(), by_hand(x, scale, layout))


def test_ties_go_to_the_even_integer_and_large_values_to_the_bounds() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 1e30, -128.5, -129.0, -1e30])
    expected = [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 126.0, 127.0, 127.0, -128.0, -128.0, -128.0]
    assert fake_quantize(x, torch.tensor(1.0), INT8).tolist() == expected
    assert to_codes(x, torch.tensor(1.0), INT8).tolist() == expected


@pytest.mark.parametrize("bounds", [(-4, 3), INT2, (-1, 1)])
def test_narrow_codes_stay_within_their_bounds_and_use_all_of_them(bounds: tuple[int, int]) -> None:
    """A hand example: s = 1/2, values from -3 to 3 in steps of 1/8; ties go to the even code."""
    x = torch.arange(-24, 25) / 8
    codes = to_codes(x, torch.tensor(0.5), bounds).tolist()
    expected = []
    for value in x.tolist():
        low, rest = divmod(2 * value, 1)
        nearest = low + (rest > 0.5 or (rest == 0.5 and low % 2 == 1))
        expected.append(min(max(nearest, bounds[0]), bounds[1]))
    assert codes == expected and set(codes) == set(range(bounds[0], bounds[1] + 1))
    assert (fake_quantize(x, torch.tensor(0.5), bounds) * 2).tolist() == expected


def test_ternary_codes_are_the_sign_beyond_the_threshold() -> None:
    x = torch.tensor([[-2.0, -0.5, -0.4, 0.0, 0.5, 0.6], [-2.0, -0.5, -0.4, 0.0, 0.5, 0.6]])
    codes = to_ternary(x, torch.tensor([[0.5], [0.3]]))
    assert codes.tolist() == [[-1, 0, 0, 0, 0, 1], [-1, -1, -1, 0, 1, 1]]


def test_values_are_divided_by_the_scale_and_not_multiplied_by_its_reciprocal() -> None:
    scale = torch.rand(200_000, generator=torch.Generator().manual_seed(3)) + 0.5
    x = (scale.double() * 2.5).float()  # near a tie, where the last bit of the quotient decides
    divided, multiplied = (x / scale).round(), (x * (1 / scale)).round()
    differ = (divided != multiplied).nonzero().flatten()
    assert len(differ) > 100
    for index in differ[:50]:
        codes = [
            to_codes(x[index], scale[index], INT8),
            fake_quantize(x[index], scale[index], INT8) / scale[index],
        ]
        assert [round(float(code)) for code in codes] == [int(divided[index])] * 2


def test_codes_of_a_half_precision_tensor_are_those_of_an_fp32_division() -> None:
    random = torch.Generator().manual_seed(0)
    x, scale = torch.randn(100_000, generator=random).half(), torch.tensor(0.0137).half()
    expected = (x.double() / scale.double()).float().round().clamp(*INT8).to(torch.int8)
    assert torch.equal(to_codes(x, scale, INT8), expected)
    assert not torch.equal(
        (x / scale).round().clamp(*INT8).to(torch.int8), expected
    )  # what it would be in fp16


# Gradients -------------------------------------------------------------------------------------------


def ste(x: Tensor, scale: Tensor, bounds: tuple[int, int], slope: float) -> Tensor:
    """LSQ composed of differentiable steps; autograd does the rest."""
    scale = (scale - scale * slope).detach() + scale * slope
    v = torch.clamp(x / scale, *bounds)
    return ((v.round() - v).detach() + v) * scale


def gradients(function, x: Tensor, scale: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    function(x, scale).backward(upstream)
    return x.grad, scale.grad


@pytest.mark.parametrize("slope", [1.0, 0.0173])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_composition_with_a_straight_through_estimator(
    layout: str, slope: float
) -> None:
    bounds, grid, _ = LAYOUTS[layout]
    for seed in range(10):
        x, scale = sample(layout, seed, ties=0)  # double precision and fp32 decide ties differently
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1000))

        def composed(x: Tensor, scale: Tensor) -> Tensor:
            if grid is None:
                return ste(x.double(), scale.double(), bounds, slope)
            return grid.join(ste(grid.divide(x.double()), grid.align(scale.double()), bounds, slope))

        dx, ds = gradients(lambda x, s: ours(x, s, layout, slope), x, scale, upstream)
        expected_dx, expected_ds = gradients(composed, x, scale, upstream.double())
        assert 0.05 < (dx == 0).float().mean() < 0.5  # some are outside the bounds, most are not
        inside = (dx != 0) == (expected_dx != 0)
        assert inside.all()
        assert torch.equal(dx, torch.where(expected_dx != 0, upstream, 0.0))
        # ds is a difference of two sums, each larger than it: their last bits are left
        atol = 2e-4 * float(expected_ds.abs().max())
        torch.testing.assert_close(ds, expected_ds.float(), rtol=2e-4, atol=atol)


@pytest.mark.parametrize("scale_shape", [(), (1, 1), (3, 1)])
def test_nothing_passes_at_or_beyond_the_bounds(scale_shape: tuple[int, ...]) -> None:
    """A hand example: s = 1/2, int4, so the open interval is (-4, 3.5)."""
    row = torch.tensor([-5.0, -4.0, -3.999, 0.0, 3.499, 3.5, 9.0])
    x = row.expand(3, -1) if scale_shape == (3, 1) else row[None]
    dx, ds = gradients(
        lambda x, s: fake_quantize(x, s, INT4), x, torch.full(scale_shape, 0.5), torch.ones_like(x)
    )
    assert dx.tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]] * len(x)
    # -8 - 8 (outside) + (-8 + 7.998) (inside, rounding error) + 0 + (7 - 6.998) + 7 + 7
    torch.testing.assert_close(ds.flatten(), torch.full((ds.numel(),), -2.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("largest", [3.499, 3.5])
@pytest.mark.parametrize("smallest", [-3.999, -4.0])
def test_where_all_but_a_bound_is_inside_the_bound_alone_gets_nothing(
    smallest: float, largest: float
) -> None:
    """A hand example: s = 1/2, int4. Where nothing is clipped the gradient is upstream's, unmasked."""
    x, upstream = torch.tensor([smallest, -1.3, 0.0, 1.2, largest]), torch.tensor([0.5, -2.0, 3.0, 1.0, 4.0])
    dx, ds = gradients(lambda x, s: fake_quantize(x, s, INT4), x, torch.tensor(0.5), upstream)
    inside = torch.tensor([smallest > -4, True, True, True, largest < 3.5])
    assert dx.tolist() == (upstream * inside).tolist()
    vbar = torch.tensor([-8.0, -3.0, 0.0, 2.0, 7.0])
    torch.testing.assert_close(ds, (upstream * (vbar - inside * x / 0.5)).sum(), rtol=0, atol=1e-5)
    assert fake_quantize(x, torch.tensor(0.5), INT4).tolist() == (vbar / 2).tolist()


def test_a_tensor_with_a_value_that_is_no_number_is_not_taken_for_unclipped() -> None:
    x = torch.tensor([float("nan"), 9.0, 1.0])
    dx, _ = gradients(lambda x, s: fake_quantize(x, s, INT4), x, torch.tensor(0.5), torch.ones(3))
    assert dx[1:].tolist() == [0.0, 1.0] and fake_quantize(x, torch.tensor(0.5), INT4)[1] == 3.5


def test_a_tensor_without_elements_stays_as_it_is() -> None:
    for scale in (torch.tensor(0.5), torch.ones(3, 1)):
        x = torch.empty(3, 0)
        dx, ds = gradients(lambda x, s: fake_quantize(x, s, INT4), x, scale, torch.empty(3, 0))
        assert dx.shape == (3, 0) and not ds.any()


def test_the_slope_multiplies_the_gradient_of_the_scale_alone() -> None:
    x, scale = sample("int8 channel, [in, out]", 5)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    once, twice = (
        gradients(lambda x, s, k=k: ours(x, s, "int8 channel, [in, out]", k), x, scale, upstream)
        for k in (0.5, 1.0)
    )
    assert torch.equal(once[0], twice[0])
    torch.testing.assert_close(once[1] * 2, twice[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["int8 tensor", "int4 block, [in, out]"])
def test_a_bfloat16_activation_has_a_scale_gradient_as_good_as_its_numbers(layout: str) -> None:
    """Autocast hands over bfloat16. The gradient is a small difference of large sums: fp32 must hold them."""
    x, scale = sample(layout, 0)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    x = x.bfloat16()
    dx, ds = gradients(lambda x, s: ours(x, s, layout), x, scale, upstream)
    expected_dx, expected_ds = gradients(lambda x, s: ours(x, s, layout), x.float(), scale, upstream.float())
    assert dx.dtype == torch.bfloat16 and ds.dtype == torch.float32
    assert torch.equal(dx.float(), expected_dx) and torch.equal(ds, expected_ds)
    assert torch.equal(ours(x, scale, layout), ours(x.float(), scale, layout).bfloat16())


def test_only_wanted_gradients_are_computed() -> None:
    x = torch.randn(4, 4)
    scale = torch.tensor(0.1, requires_grad=True)
    fake_quantize(x, scale, INT8).sum().backward()
    assert x.grad is None and scale.grad is not None
    x.requires_grad_()
    fake_quantize(x, torch.tensor(0.1), INT8).sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 4))


@pytest.mark.parametrize("clip", [2.5, 2.3])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_clipped_gradient_is_that_of_torchs_hardtanh_to_the_last_bit(
    kind: torch.dtype, clip: float
) -> None:
    """Zero on both bounds. bfloat16 has no 2.3: its neighbour 2.296875 lies inside, as hardtanh has it."""
    random = torch.Generator().manual_seed(5)
    x, upstream = (torch.randn(1003, generator=random).mul(2).to(kind) for _ in range(2))
    x[:6] = torch.tensor([clip, -clip, 0.0, -0.0, torch.inf, -torch.inf], dtype=kind)
    upstream[:3] = torch.tensor([torch.nan, torch.inf, -0.0]).to(kind)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(F.hardtanh(x, -clip, clip), x, upstream)
    gradient = straight_through(upstream, x.detach(), clip)
    assert torch.equal(gradient.view(torch.uint8), expected.view(torch.uint8))
    passes = (gradient[:2] != 0).tolist()
    assert passes == [False, False] or (kind, clip) == (torch.bfloat16, 2.3)


def test_a_nan_stays_a_nan_so_that_the_loss_shows_it() -> None:
    assert fake_quantize(torch.tensor([1.0, torch.nan]), torch.tensor(0.1), INT8).isnan().tolist() == [
        False,
        True,
    ]
