"""Batch norm in the scales of a convolution, against torch's own batch norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompress.quant.affine import Grid
from qcompress.quant.batchnorm import fold_batch_norm, statistics
from qcompress.quant.conv import QuantizedConv
from qcompress.quant.quantizers import LsqWeight
from qcompress.schema.quantizers import Lsq


def made(bits: int, bias: bool, seed: int = 0) -> tuple[QuantizedConv, nn.BatchNorm2d, Tensor]:
    """A convolution with weights beyond both ends of its codes, and a batch norm with nothing trivial."""
    torch.manual_seed(seed)
    module, norm = nn.Conv2d(6, 8, 3, bias=bias), nn.BatchNorm2d(8, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.5, -0.7, 0.3, -2.0, 1e-9, 0.0, -1e-9, 1.0]))
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 3.0)
    bounds = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    quantizer = LsqWeight(Lsq(init="absmax"), Grid(0), bounds, torch.Size((8, 54)))
    conv = QuantizedConv(module, norm.eval(), quantizer, None)
    quantizer.init(conv.coded_weight().detach())
    quantizer.start_at(0.4 * quantizer.start)  # so that weights leave the range on both sides
    return conv, norm, torch.randn(4, 6, 9, 9)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("bias", [False, True], ids=["bare", "biased"])
def test_one_convolution_computes_what_two_modules_did(bits: int, bias: bool) -> None:
    conv, norm, x = made(bits, bias)
    if bias:
        assert float(conv.bias.detach().abs().min()) > 0
    codes, scale = conv.codes()
    folded, scales, shifts, gone = fold_batch_norm(codes, scale, conv.bias, norm, torch.float32)
    weight = folded.double() * scales.double().view(-1, 1, 1, 1)
    with torch.no_grad():
        wanted = norm.double()(
            torch.nn.functional.conv2d(
                x.double(),
                conv.quantized_weight().double(),
                None if conv.bias is None else conv.bias.double(),
            )
        )
    found = torch.nn.functional.conv2d(x.double(), weight, shifts.double())
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
    assert bool((scales > 0).all()) and gone == 1
    low, high = conv.weight_quantizer.bounds
    assert int(folded.min()) == low and int(folded.max()) == high  # every level is in use
    assert int(folded[1].min()) == low and int(folded[3].min()) == low  # where the factor is negative too
    # and nothing flipped: only the channel that is multiplied by 0 has other codes
    assert torch.equal(folded[[0, 1, 2, 3, 4, 6, 7]], codes[[0, 1, 2, 3, 4, 6, 7]])
    assert not bool(folded[5].any()) and float(scales[5]) == float(scale[5])


def test_a_hand_worked_channel() -> None:
    """gamma -2, var 3.75, eps 0.25: the factor is -1. Weight 3 at scale 2 has code -2 (of -3), 2 * -2 * 5 *
    -1... the sum 2 * 2 * 5 = 20, minus the mean 4, times -1, plus beta 7, is -9.
    """
    module, norm = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.25)
    with torch.no_grad():
        module.weight.fill_(3.0)
        norm.weight.fill_(-2.0)
        norm.bias.fill_(7.0)
        norm.running_mean.fill_(4.0)
        norm.running_var.fill_(3.75)
    quantizer = LsqWeight(Lsq(), Grid(0), (-128, 127), torch.Size((1, 1)))
    quantizer.start_at(torch.tensor([2.0]))
    conv = QuantizedConv(module, norm.eval(), quantizer, None)
    x = torch.full((1, 1, 1, 1), 5.0)
    codes, scale = conv.codes()
    assert codes.flatten().tolist() == [-2]  # -1.5 to even
    folded, scales, shift, gone = fold_batch_norm(codes, scale, None, norm, torch.float32)
    assert (folded.flatten().tolist(), scales.tolist(), shift.tolist(), gone) == ([-2], [2.0], [11.0], 0)
    with torch.no_grad():
        assert float(norm(conv(x))) == -9.0 == float(folded * scales * x + shift)


@pytest.mark.parametrize(("compute", "gone"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float16, 3)])
def test_a_channel_whose_scale_the_compute_type_loses_keeps_its_shift(
    compute: torch.dtype, gone: int
) -> None:
    conv, norm, _ = made(4, False)
    codes, scale = conv.codes()
    folded, scales, _, found = fold_batch_norm(codes, scale, None, norm, compute)
    assert found == gone
    assert bool((scales.to(compute) > 0).all())
    assert sum(not bool(channel.any()) for channel in folded) == gone


def test_statistics_are_those_of_batch_norms_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))
    net.register_buffer("other", torch.zeros(1))
    names = [name for name, _ in statistics(net)]
    assert names == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
