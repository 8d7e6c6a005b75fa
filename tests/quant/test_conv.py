"""Convolutions that round, against torch's own fake quantization and stock convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.quant.affine import Grid
from qcompress.quant.conv import Geometry, QuantizedConv
from qcompress.quant.folded import Rounding
from qcompress.quant.folded_conv import FoldedConv, FoldedKernel
from qcompress.quant.layers import QuantizedLinear, Tap, tapped
from qcompress.quant.quantizers import FrozenActivation, LsqWeight, MinMaxWeight
from qcompress.quant.ternary import TernaryWeight
from qcompress.schema.quantizers import Lsq, MinMax, Ternary

GEOMETRIES = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "wide": {"kernel_size": (3, 5), "stride": (1, 2), "padding": (0, 2)},
    "groups": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 5, "groups": 8, "padding": "same"},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": "same"},
    "same": {"kernel_size": (3, 5), "padding": "same"},
}
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


def stock(geometry: dict, seed: int = 0) -> tuple[nn.Conv2d, Tensor]:
    """A convolution of 8 channels whose weights' ranges are 127 powers of two, and an input."""
    torch.manual_seed(seed)
    module = nn.Conv2d(8, 8, **geometry)
    with torch.no_grad():
        flat = module.weight.flatten(1)
        flat.div_(flat.abs().amax(1, keepdim=True)).clamp_(-0.99, 0.99)
        flat[:, 0] = 1.0
        flat.mul_(127 * 2.0 ** -torch.arange(4, 12)[:, None])
        module.bias.normal_()
    return module, torch.randn(3, 8, 11, 10)


def weight_quantizer(module: nn.Conv2d, bits: int = 8, granularity: str = "channel", kind=MinMaxWeight):
    options = {MinMaxWeight: MinMax, LsqWeight: Lsq, TernaryWeight: Ternary}[kind]()
    bounds = (-1, 1) if kind is TernaryWeight else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    flat = module.weight.detach().flatten(1)
    made = kind(options, Grid(0, None, granularity), bounds, flat.shape)
    made.init(flat)
    return made


@each_geometry
def test_a_convolution_has_the_attributes_that_the_module_around_it_reads(geometry: dict) -> None:
    """As nn.Conv2d has them: MobileNetV2's layer pads by them."""
    module, _ = stock(geometry)
    trained = QuantizedConv(module, None, weight_quantizer(module), None)
    folded = FoldedConv(FoldedKernel(*trained.codes(), 8), module.bias, None, Geometry.of(module))
    for layer in (trained, folded):
        for name in ("kernel_size", "stride", "dilation"):
            assert getattr(layer, name) == getattr(module, name), name


@each_geometry
def test_a_convolution_is_the_stock_one_of_what_torch_rounds(geometry: dict) -> None:
    module, x = stock(geometry)
    scales, zeros = 2.0 ** -torch.arange(4, 12), torch.zeros(8, dtype=torch.int32)
    weight = torch.fake_quantize_per_channel_affine(module.weight, scales, zeros, 0, -128, 127)
    rounded = torch.fake_quantize_per_tensor_affine(x, 2.0**-5, 0, -128, 127)
    ours = QuantizedConv(
        module, None, weight_quantizer(module), FrozenActivation(torch.tensor(2.0**-5), (-128, 127))
    )
    with torch.no_grad():
        wanted = module._conv_forward(rounded, weight, module.bias)
        torch.testing.assert_close(ours(x), wanted, rtol=0, atol=0)
    codes, scale = ours.codes()
    assert codes.shape == module.weight.shape and codes.dtype == torch.int8
    assert torch.equal(scale, scales)
    assert torch.equal(codes * scale.view(-1, 1, 1, 1), weight.detach())


@each_geometry
@pytest.mark.parametrize("integer", [False, True], ids=["float", "integer"])
def test_the_folded_convolution_is_the_trained_one(geometry: dict, integer: bool) -> None:
    module, x = stock(geometry, seed=1)
    step = torch.tensor(0.037)
    ours = QuantizedConv(module, None, weight_quantizer(module), FrozenActivation(step, (-128, 127)))
    kernel = FoldedKernel(*ours.codes(), 8)
    folded = FoldedConv(kernel, module.bias.detach(), Rounding(step), Geometry.of(module), integer)
    assert folded.integer is integer
    with torch.no_grad():
        # the same fp32 sums, bit for bit; sums of integers differ from them in the last bits
        torch.testing.assert_close(
            folded(x), ours(x), rtol=0, atol=0 if not integer else 2e-6 * float(ours(x).abs().max())
        )


def test_a_pointwise_convolution_learns_as_a_linear_layer_does() -> None:
    """Values and gradients, LSQ's scale among them; the slope counts the weights of a scale either way."""
    module, x = stock({"kernel_size": 1}, seed=2)
    conv = QuantizedConv(module, None, weight_quantizer(module, 4, kind=LsqWeight), None)
    weight = nn.Parameter(module.weight.detach().flatten(1).clone())
    linear = QuantizedLinear(weight, module.bias, 0, weight_quantizer(module, 4, kind=LsqWeight), None)
    y, wanted = conv(x), linear(x.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    torch.manual_seed(3)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(module.weight.grad.flatten(1), weight.grad, rtol=1e-4, atol=1e-3)
    found, known = conv.weight_quantizer.ratio.grad, linear.weight_quantizer.ratio.grad
    assert float(known.abs().min()) > 0
    torch.testing.assert_close(found, known, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "bits", "granularity", "levels"),
    [(MinMaxWeight, 2, "tensor", {-2, -1, 0, 1}), (LsqWeight, 3, "channel", set(range(-4, 4))),
     (TernaryWeight, 2, "tensor", {-1, 0, 1}), (TernaryWeight, 2, "channel", {-1, 0, 1})],
)  # fmt: skip
def test_every_quantizer_takes_a_kernel(kind: type, bits: int, granularity: str, levels: set[int]) -> None:
    module, x = stock({"kernel_size": 3}, seed=4)
    ours = QuantizedConv(module, None, weight_quantizer(module, bits, granularity, kind), None)
    codes, scale = ours.codes()
    assert set(codes.flatten().tolist()) <= levels and len(set(codes.flatten().tolist())) > 2
    assert scale.shape == (() if granularity == "tensor" else (8,))
    decoded = codes * (scale if granularity == "tensor" else scale.view(-1, 1, 1, 1))
    with torch.no_grad():
        assert torch.equal(ours.quantized_weight(), decoded)
        torch.testing.assert_close(ours(x), F.conv2d(x, decoded, module.bias), rtol=0, atol=0)


def test_a_tap_has_the_kernels_shape_and_orientation() -> None:
    """An offset at either place moves the weight by itself, in front of a batch norm that turns it too."""
    module, x = stock({"kernel_size": 3}, seed=5)
    norm = nn.BatchNorm2d(8)
    with torch.no_grad():
        norm.weight[::2] = -1.0
    ours = QuantizedConv(module, norm, weight_quantizer(module), None)
    before = ours.quantized_weight().detach()
    offset = torch.zeros_like(module.weight)
    offset[0, 1, 2, 0], offset[1, 1, 2, 0] = 0.5, -0.25
    with tapped([ours], [Tap("rounded", offset)]):
        assert torch.equal(ours.quantized_weight(), before + offset)
    with tapped([ours], [Tap("latent", offset)]):
        moved = QuantizedConv(module, norm, ours.weight_quantizer, None)._round(module.weight + offset)
        assert torch.equal(ours.quantized_weight(), moved)
    tap = Tap("rounded", listens=True)
    with tapped([ours], [tap]):
        ours(x).sum().backward()
    ones = torch.ones(3, 8, 9, 8)
    torch.testing.assert_close(
        tap.gradient, torch.nn.grad.conv2d_weight(x, module.weight.shape, ones), rtol=1e-4, atol=1e-3
    )


def test_a_weight_that_is_kept_notices_that_its_batch_norm_turned() -> None:
    module, x = stock({"kernel_size": 3}, seed=6)
    norm = nn.BatchNorm2d(8)
    ours = QuantizedConv(module, norm, weight_quantizer(module, 2, kind=LsqWeight), None)
    ours.weight_quantizer.start.mul_(0.2)  # weights beyond -2 and 1: the two ends differ
    with torch.no_grad():
        before = ours(x)
        assert ours.quantized_weight() is ours.quantized_weight()
        norm.weight.neg_()
        after = ours(x)
    ours.forget()
    with torch.no_grad():
        assert torch.equal(ours(x), after) and not torch.equal(before, after)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"padding": 1, "padding_mode": "reflect"}, "only padding with zeros is supported"),
     ({"padding": "same"}, "not equal on both sides")],
)  # fmt: skip
def test_padding_that_rounding_would_change_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        Geometry.of(nn.Conv2d(2, 2, 4, **options))
