"""nvidia-modelopt's max calibration as an oracle for absmax scales and codes: an implementation by others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import Line
from tiny_bert import StandInExamples, encoder_line, save_encoder
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, GPT2LMHeadModel

from qcompress.models import load_tokenizer
from qcompress.quant.affine import Grid, to_codes
from qcompress.quant.conv import QuantizedConv
from qcompress.quant.quantizers import MinMaxActivation, MinMaxWeight
from qcompress.quant.ranges import Statistics
from qcompress.schema.quantizers import MinMax
from qcompress.tasks import TASKS

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


# Whole models ----------------------------------------------------------------------------------------


def hold_against_modelopt(
    model: nn.Module, layers: list[str], weights: dict, block: int | None, inputs: Iterable[dict],
    trained: dict[str, Tensor], folded: dict[str, Tensor],
) -> None:  # fmt: skip
    """Calibrate the stock model with modelopt, and compare every scale and every code of our artifacts."""
    import modelopt.torch.quantization as mtq

    config: dict = {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"}
    for name in layers:
        config["quant_cfg"].append({"quantizer_name": f"{name}.weight_quantizer", "cfg": weights})
        if f"{name}.input.scale" in trained:
            attributes = {"num_bits": 8, "axis": None}
            config["quant_cfg"].append({"quantizer_name": f"{name}.input_quantizer", "cfg": attributes})

    def forward(model: nn.Module) -> None:
        for batch in inputs:
            model(**batch)

    with torch.no_grad():
        mtq.quantize(model, config, forward)
    top, differ, total = 2 ** (weights["num_bits"] - 1) - 1, 0, 0
    for name in layers:
        theirs = model.get_submodule(name)
        scale, codes = folded[f"{name}.weight.scale"], folded[f"{name}.weight.codes"]  # of [in, out]
        amax = theirs.weight_quantizer.amax.detach().reshape(scale.t().shape).t()
        assert torch.equal(scale, amax / top), name
        if f"{name}.input.scale" in trained:
            # batches of other shapes sum in another order: a unit in the last place of an activation
            expected = float(theirs.input_quantizer.amax.float() / 127)
            assert float(trained[f"{name}.input.scale"]) == pytest.approx(expected, rel=1e-6)
        rounded = theirs.weight_quantizer(theirs.weight).detach().t()  # modelopt keeps [out, in]
        spread = scale if block is None else scale.repeat_interleave(block, 0)
        steps = (rounded / spread).round()
        # it multiplies by qmax / amax where ONNX divides by the scale: another code at ties, one step away
        assert (steps - codes).abs().max() <= 1
        differ, total = differ + int((steps != codes).sum()), total + codes.numel()
    assert differ <= 2e-4 * total


@pytest.mark.parametrize(
    ("form", "weights", "block"),
    [
        ("w8a8", {"num_bits": 8, "axis": 0}, None),
        ("w4a8", {"num_bits": 4, "axis": 0}, None),
        ("w4a16-g32", {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}}, 32),
    ],
)
def test_a_whole_gpt2_has_modelopts_ranges_and_codes(
    line: Callable[..., Line], outlier_model: Path, form: str, weights: dict, block: int | None
) -> None:
    made = line(source=outlier_model, method="ptq", format=form).train().fold()
    recipe, tokenizer = made.recipe, load_tokenizer(made.source)
    data = TASKS["causal-lm"].examples(recipe.data.calibration, made.text.parent, tokenizer, recipe.task)
    layers = [item.name for item in made.plan if item.layer.kind == "linear"]
    assert len(layers) == 8 and (f"{layers[0]}.input.scale" in made.tensors()) == ("a8" in form)
    model = GPT2LMHeadModel.from_pretrained(made.source, attn_implementation="eager").eval()
    inputs = [{"input_ids": data.ids}]
    hold_against_modelopt(model, layers, weights, block, inputs, made.tensors(), made.tensors("fold"))


@pytest.mark.parametrize(
    ("form", "weights", "block"),
    [
        ("w8a8", {"num_bits": 8, "axis": 0}, None),
        ("w4a16-g32", {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}}, 32),
    ],
)
def test_a_whole_bert_has_modelopts_ranges_and_codes(
    tmp_path: Path, text_file: Path, form: str, weights: dict, block: int | None
) -> None:
    """Its inputs are padded for us; modelopt is shown one sequence at a time."""
    source = save_encoder(tmp_path / "checkpoint", text_file, "bert")
    made = (
        encoder_line(tmp_path / "line", source, text_file, "bert", method="ptq", format=form).train().fold()
    )
    trained = load_file(made.trained.path / "trained.safetensors")
    folded = load_file(made.folded.path / "folded.safetensors")
    data = StandInExamples(made.recipe.task)
    layers = [item.name for item in made.plan if item.layer.kind == "linear"]
    assert len(layers) == 13  # six in each block, and the pooler
    inputs = [
        {name: tensor for name, tensor in data.batch([row]).items() if name != "labels"}
        for row in range(len(data))
    ]
    model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    hold_against_modelopt(model, layers, weights, block, inputs, trained, folded)


@pytest.mark.parametrize("groups", [1, 4, 16], ids=["dense", "groups", "depthwise"])
def test_a_quantized_convolution_is_that_of_max_calibration(groups: int) -> None:
    """Its weight has a scale for each output channel, its input one; what comes out differs by ties alone."""
    import modelopt.torch.quantization as mtq

    torch.manual_seed(1)
    stock = nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(8, 16, 14, 14)
    model = nn.Sequential(stock)
    theirs = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda model: model(x))[0]
    weight = MinMaxWeight(MinMax(), Grid(0), (-128, 127), stock.weight.flatten(1).shape)
    weight.init(stock.weight.detach().flatten(1))
    vectors = x.movedim(1, -1).flatten(0, -2)
    input_quantizer = MinMaxActivation(MinMax(), (-128, 127), 16)
    input_quantizer.init(Statistics(vectors.abs().amax(0), vectors.abs().mean(0), vectors))
    ours = QuantizedConv(
        nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=groups), None, weight, input_quantizer
    )
    ours.weight, ours.bias = nn.Parameter(stock.weight.detach()), nn.Parameter(stock.bias.detach())
    with torch.no_grad():
        wanted, found = theirs(x), ours(x)
    amax = theirs.weight_quantizer.amax.detach().flatten() / 127
    torch.testing.assert_close(
        ours.weight_quantizer.scale_of(ours.coded_weight()).detach(), amax, rtol=0, atol=0
    )
    step = float(input_quantizer.scale_of()) * float(stock.weight.detach().abs().max())
    error = (found - wanted).abs()
    assert float((error > 1e-4).float().mean()) < 5e-3 and float(error.max()) <= 1.01 * step
