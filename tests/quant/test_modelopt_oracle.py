"""nvidia-modelopt's max calibration as an oracle for absmax scales and codes: an implementation by others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompress.quant.affine import Grid, to_codes
from qcompress.quant.quantizers import MinMaxActivation, MinMaxWeight
from qcompress.quant.ranges import Statistics
from qcompress.quantizer_options import MinMax

pytestmark = [
    pytest.mark.slow,  # importing nvidia-modelopt takes 5 to 10 seconds
    # it compiles helpers with a deprecated function of torch while being imported
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    # it names the newest transformers that it was tested with
    pytest.mark.filterwarnings("ignore:transformers .* is not tested with:UserWarning"),
]


def calibrated(config: str, weight: Tensor, x: Tensor) -> nn.Module:
    """The weight [out, in] in a linear layer that nvidia-modelopt has calibrated on x."""
    import modelopt.torch.quantization as mtq

    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return mtq.quantize(model, getattr(mtq, config), lambda model: model(x))[0]


def sample() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(48, 256, generator=random), torch.randn(500, 256, generator=random)


@pytest.mark.parametrize(
    ("config", "block", "bounds"),
    [("INT8_DEFAULT_CFG", None, (-128, 127)), ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", 128, (-8, 7))],
)
def test_weight_ranges_and_codes_are_those_of_max_calibration(
    config: str, block: int | None, bounds: tuple[int, int]
) -> None:
    weight, x = sample()
    layer = calibrated(config, weight, x)
    amax = layer.weight_quantizer.amax.detach()
    rounded = layer.weight_quantizer(weight).detach()
    for axis in (0, 1):  # [out, in] and [in, out] hold the same numbers
        grid, own = Grid(axis, block), weight if axis == 0 else weight.t().contiguous()
        quantizer = MinMaxWeight(MinMax(), grid, bounds, own.shape)
        quantizer.init(own)
        scale = quantizer.scale_of(own)
        ours = scale if axis == 0 or block is None else scale.t()
        torch.testing.assert_close(ours.flatten(), (amax / bounds[1]).flatten(), rtol=0, atol=0)
        codes = grid.join(to_codes(grid.divide(own), grid.align(scale), bounds))
        theirs = rounded if axis == 0 else rounded.t()
        steps = grid.join((grid.divide(theirs.contiguous()) / grid.align(scale)).round())
        # it multiplies by qmax / amax where ONNX divides by the scale: another code at ties, one step away
        differ = (codes != steps).float().mean()
        assert differ < 2e-4 and (codes - steps).abs().max() <= 1


def test_the_activation_range_is_that_of_max_calibration() -> None:
    weight, x = sample()
    layer = calibrated("INT8_DEFAULT_CFG", weight, x)
    quantizer = MinMaxActivation(MinMax(), (-128, 127), 256)
    quantizer.init(Statistics(largest=x.abs().amax(0), mean=x.abs().mean(0), rows=x))
    assert float(quantizer.scale_of()) == float(layer.input_quantizer.amax.float() / 127)
