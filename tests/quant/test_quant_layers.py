"""Layers that round: the trained form, the folded form, and the rounded weight that is kept between calls."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.quant.affine import Grid
from qcompress.quant.folded import (
    FoldedEmbedding,
    FoldedLinear,
    FoldedTiedHead,
    FoldedWeight,
    Rounding,
    integer_matmul,
)
from qcompress.quant.layers import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedTied,
    QuantizedWeight,
)
from qcompress.quant.quantizers import (
    WEIGHT_QUANTIZERS,
    FrozenActivation,
    FrozenWeight,
    LsqActivation,
    LsqWeight,
    MinMaxWeight,
)
from qcompress.quant.rescaling import ChannelScale, FixedScale, RescaledNorm
from qcompress.schema.formats import WeightFormat
from qcompress.schema.quantizers import Lsq, MinMax, Ternary

FORMATS = {
    "int8": WeightFormat(bits=8),
    "int8 blocks": WeightFormat(bits=8, block=32),
    "int4 blocks": WeightFormat(bits=4, block=32),
    "int4": WeightFormat(bits=4),
    "int4 in int8": WeightFormat(bits=4, container="int8"),
    "int2 in int8": WeightFormat(bits=2, container="int8"),
    "int3 blocks": WeightFormat(bits=3, block=32),
}
INPUTS, OUTPUTS = 96, 40
QUANTIZER_OPTIONS = {"minmax": MinMax, "lsq": Lsq, "ternary": Ternary}


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def minmax(weight: Tensor, grid: Grid, bounds: tuple[int, int]) -> MinMaxWeight:
    quantizer = MinMaxWeight(MinMax(), grid, bounds, weight.shape)
    quantizer.init(weight.detach())
    return quantizer


def linear(form: WeightFormat, axis: int, rescale: Tensor | None = None) -> QuantizedLinear:
    """A layer after training, its weight [in, out] for axis 1 and [out, in] for axis 0."""
    weight = nn.Parameter(random((INPUTS, OUTPUTS) if axis == 1 else (OUTPUTS, INPUTS)))
    layer = QuantizedLinear(
        weight,
        nn.Parameter(random((OUTPUTS,), 1)),
        axis,
        None,
        FrozenActivation(torch.tensor(0.031), (-128, 127)),
    )
    if rescale is not None:
        layer.rescale = FixedScale(rescale)
    scale = minmax(layer.rescaled_weight(), Grid(axis, form.block), form.bounds).scale_of(
        layer.rescaled_weight()
    )
    layer.weight_quantizer = FrozenWeight(scale.detach(), Grid(axis, form.block), form.bounds)
    return layer.requires_grad_(False)


def folded_linear(layer: QuantizedLinear, form: WeightFormat, integer: bool = False) -> FoldedLinear:
    codes, scale = layer.codes()
    if layer.channel_axis == 0:
        codes, scale = codes.t().contiguous(), scale if form.block is None else scale.t().contiguous()
    weight = FoldedWeight(codes, scale, Grid(1, form.block), form.stored_bits)
    return FoldedLinear(weight, layer.bias, Rounding(layer.input_quantizer.scale), integer)


@pytest.mark.parametrize("shape", [(1, INPUTS), (1, 1, INPUTS), (2, 5, INPUTS), (4, 32, INPUTS)], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_linear_layer_computes_the_same_bits_after_folding(
    form: WeightFormat, axis: int, shape: tuple[int, ...]
) -> None:
    layer = linear(form, axis, rescale=random((INPUTS,), 3).mul(0.7).exp())
    x = 3 * random(shape, 2)
    assert torch.equal(layer(x), folded_linear(layer, form)(x))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_linear_layer_is_its_formula_in_integers(form: WeightFormat, axis: int) -> None:
    """sum of integer products, times the scales, plus the bias: what an int8 kernel computes."""
    rescale = random((INPUTS,), 3).mul(0.7).exp()
    layer = linear(form, axis, rescale)
    weight = (layer.weight if axis == 1 else layer.weight.t()).double().numpy() / rescale.double().numpy()[
        :, None
    ]
    blocks = weight.reshape(INPUTS // (form.block or INPUTS), -1, OUTPUTS)
    scale = np.abs(blocks).max(1, keepdims=True) / form.bounds[1]
    codes = np.clip(np.rint(blocks / scale), *form.bounds)
    found, _ = layer.codes()
    own = (found if axis == 1 else found.t()).numpy().reshape(blocks.shape)
    assert (own != codes).mean() < 1e-3  # the subject rounds an fp32 quotient: ties may fall otherwise
    x = 3 * random((4, INPUTS), 2)
    rounded = np.clip(np.rint(x.double().numpy() / np.float32(0.031)), -128, 127) * np.float64(
        np.float32(0.031)
    )
    expected = rounded @ (own * scale).reshape(INPUTS, OUTPUTS) + layer.bias.double().numpy()
    np.testing.assert_allclose(layer(x).double().numpy(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_the_integer_form_is_an_exact_sum_of_integer_products(form: WeightFormat) -> None:
    """Layers that no int8 GEMM computes, those with blocks, stay as they are."""
    layer = linear(form, axis=1)
    plain, integer = (folded_linear(layer, form, integer) for integer in (False, True))
    x = 3 * random((4, INPUTS), 2)
    torch.testing.assert_close(integer(x), plain(x), rtol=0, atol=1e-4)
    if form.block:
        assert torch.equal(integer(x), plain(x))
        return
    total = integer.input.codes(x).numpy().astype(np.int64) @ integer.weight.codes.numpy().astype(np.int64)
    scales = np.float32(0.031) * integer.weight.scale.numpy()
    expected = total.astype(np.float32) * scales + layer.bias.numpy()
    np.testing.assert_array_equal(integer(x).numpy(), expected)


def test_in_half_precision_the_product_of_two_scales_does_not_vanish() -> None:
    """1e-4 * 1e-4 is below what fp16 holds; the sums that it multiplies are large."""
    scale = torch.full((3,), 1e-4).half()
    weight = FoldedWeight(torch.full((INPUTS, 3), 100, dtype=torch.int8), scale, Grid(1), 8)
    layer = FoldedLinear(weight, None, Rounding(torch.tensor(1e-4).half()), integer=True)
    found = layer(torch.full((1, INPUTS), 0.01).half())
    torch.testing.assert_close(found.float(), torch.full((1, 3), INPUTS * 1e-2 * 1e-2), rtol=1e-2, atol=0)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_table_and_the_head_tied_to_it_compute_the_same_bits_after_folding(form: WeightFormat) -> None:
    table = nn.Parameter(random((50, INPUTS)), requires_grad=False)
    grid = Grid(0, form.block)
    scale = minmax(table, grid, form.bounds).scale_of(table)
    embedding = QuantizedEmbedding(table, FrozenWeight(scale, grid, form.bounds))
    head = QuantizedTied(embedding, FrozenActivation(torch.tensor(0.02), (-128, 127)))
    codes, _ = embedding.codes()
    weight = FoldedWeight(codes, scale, grid, form.stored_bits)
    folded = FoldedTiedHead(weight, Rounding(torch.tensor(0.02)))
    ids = torch.tensor([[0, 7, 49], [7, 7, 1]])
    assert torch.equal(embedding(ids), FoldedEmbedding(weight)(ids))
    expected = F.embedding(ids, grid.join(grid.divide(codes.float()) * grid.align(scale)))
    assert torch.equal(embedding(ids), expected)
    integer = FoldedTiedHead(weight, Rounding(torch.tensor(0.02)), integer=True)
    for x in (random((1, INPUTS)), random((2, 5, INPUTS)), random((4, 32, INPUTS))):
        assert torch.equal(head(x), folded(x))
        torch.testing.assert_close(integer(x), folded(x), rtol=0, atol=1e-4)
    assert head.weight is table and not dict(head.named_parameters())


def test_a_rescaled_norm_is_one_layer_norm_with_other_parameters() -> None:
    norm = nn.LayerNorm(INPUTS)
    with torch.no_grad():
        norm.weight.copy_(1 + random((INPUTS,)) / 4)
        norm.bias.copy_(random((INPUTS,), 1))
    scale = random((INPUTS,), 2).mul(0.7).exp()
    rescaled, x = RescaledNorm(norm, FixedScale(scale)), random((3, 7, INPUTS), 3)
    torch.testing.assert_close(rescaled(x), norm(x) * scale, rtol=1e-5, atol=1e-5)
    plain = nn.LayerNorm(INPUTS)
    with torch.no_grad():
        for name, value in rescaled.folded().items():
            plain.get_parameter(name).copy_(value)
    assert torch.equal(rescaled(x), plain(x))


def test_a_channel_scale_is_positive_and_within_its_bound_whatever_theta() -> None:
    scale = ChannelScale(5, bound=10.0)
    assert torch.equal(scale(), torch.ones(5))
    with torch.no_grad():
        scale.theta.copy_(torch.tensor([-1e9, -1.0, 0.0, 1.0, 1e9]))
    expected = torch.tensor([0.1, 0.3678794, 1.0, 2.7182818, 10.0])
    torch.testing.assert_close(scale().detach(), expected, rtol=1e-6, atol=0)


# The rounded weight that is kept ---------------------------------------------------------------------


def trainable() -> QuantizedLinear:
    weight = nn.Parameter(random((INPUTS, OUTPUTS)))
    quantizer = LsqWeight(Lsq(), Grid(1), (-8, 7), weight.shape)
    quantizer.init(weight.detach())
    layer = QuantizedLinear(weight, None, 1, quantizer, LsqActivation(Lsq(), (-128, 127), INPUTS))
    layer.rescale = ChannelScale(INPUTS, 100.0)
    return layer


def fresh(layer: QuantizedWeight) -> Tensor:
    """The rounded weight, computed by a copy that has never computed one."""
    other = copy.deepcopy(layer)
    other._kept = None
    with torch.no_grad():
        return other.quantized_weight()


@torch.enable_grad()
def step(layer: QuantizedLinear, **options: bool) -> None:
    layer(random((3, INPUTS))).square().sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.1, **options).step()
    layer.zero_grad()


CHANGES: dict[str, Callable[[QuantizedLinear], None]] = {
    "the weight in place": lambda layer: layer.weight.mul_(1.3),
    "one element": lambda layer: layer.weight[3, 4].add_(1.0),
    "the scale": lambda layer: layer.weight_quantizer.ratio.mul_(1.3),
    "the unit of the scale": lambda layer: layer.weight_quantizer.unit.mul_(1.3),
    "advance": lambda layer: (layer.weight_quantizer.ratio.fill_(-1.0), layer.weight_quantizer.advance()),
    "the rescaling": lambda layer: layer.rescale.theta.add_(0.3),
    "another rescaling": lambda layer: setattr(layer, "rescale", FixedScale(torch.full((INPUTS,), 2.0))),
    "AdamW": lambda layer: step(layer),
    "AdamW, foreach": lambda layer: step(layer, foreach=True),
    "AdamW, fused": lambda layer: step(layer, fused=True),
    "load_state_dict": lambda layer: layer.load_state_dict(
        {k: 1.1 * v for k, v in layer.state_dict().items()}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_kept_weight_is_computed_again_when_anything_it_depends_on_changes(change: str) -> None:
    layer = trainable()
    with torch.no_grad():
        first = layer.quantized_weight()
        assert layer.quantized_weight() is first
        CHANGES[change](layer)
        second = layer.quantized_weight()
    assert not torch.equal(first, second)
    assert torch.equal(second, fresh(layer))


def test_the_kept_weight_moves_with_its_layer() -> None:
    layer = linear(FORMATS["int8"], axis=1)
    layer(random((3, INPUTS)))
    layer.double()
    assert layer(random((3, INPUTS)).double()).dtype == torch.float64


@pytest.mark.parametrize("wanted", ["weight", "weight_quantizer.ratio", "rescale.theta"])
def test_the_kept_weight_is_not_returned_when_a_gradient_is_wanted(wanted: str) -> None:
    layer = trainable().requires_grad_(False)
    with torch.no_grad():
        layer.quantized_weight()
    layer.get_parameter(wanted).requires_grad_()
    x = random((3, INPUTS))
    layer(x).square().sum().backward()
    gradient = layer.get_parameter(wanted).grad
    assert gradient is not None and gradient.abs().sum() > 0
    assert layer._kept is None  # memory of a large table is given back while training


def test_a_weight_kept_without_gradients_serves_a_frozen_layer_with_them() -> None:
    """The gradient of an input passes through a kept weight as through any constant."""
    layer = linear(FORMATS["int8"], axis=1)
    first = layer.quantized_weight()
    x = random((3, INPUTS)).requires_grad_()
    layer(x).sum().backward()
    assert layer.quantized_weight() is first
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_no_forward_writes_to_a_parameter_or_a_buffer() -> None:
    layer = trainable()
    embedding = QuantizedEmbedding(
        nn.Parameter(random((20, INPUTS))), minmax(random((20, INPUTS)), Grid(0), (-128, 127))
    )
    head = QuantizedTied(embedding, LsqActivation(Lsq(), (-128, 127), INPUTS))
    modules = nn.ModuleList(
        [layer, embedding, head, folded_linear(linear(FORMATS["int4"], 1), FORMATS["int4"])]
    )
    state = {
        name: (tensor._version, tensor.clone()) for name, tensor in modules.state_dict(keep_vars=True).items()
    }
    assert len(state) > 10
    for _ in range(2):
        x = embedding(torch.tensor([[1, 2], [3, 4]]))
        (layer(x).sum() + head(x).sum()).backward()
        modules[3](x.detach())
        with torch.no_grad():
            layer(x)
    for name, tensor in modules.state_dict(keep_vars=True).items():
        assert tensor._version == state[name][0] and torch.equal(tensor, state[name][1]), name


@pytest.mark.parametrize("name", ["minmax", "lsq", "ternary"])
def test_the_rows_of_a_table_that_a_batch_reads_are_rounded_as_in_the_whole_table(name: str) -> None:
    """Values to the last bit; gradients of table and learned scales too, rows read twice among them."""
    table = random((20, INPUTS))
    table[7] = 0.0
    quantizer = WEIGHT_QUANTIZERS[name](QUANTIZER_OPTIONS[name](), Grid(0), (-2, 1), table.shape)
    quantizer.init(table)
    layer = QuantizedEmbedding(nn.Parameter(table.clone()), quantizer)
    if name != "ternary":  # so that a ratio of another row would be noticed
        quantizer.ratio.data = 1 + random((20,), 3).abs()
    ids, upstream = torch.tensor([[1, 7, 19], [1, 1, 0]]), random((2, 3, INPUTS), 4)
    found = layer(ids)
    (found * upstream).sum().backward()
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    expected = F.embedding(ids, quantizer(layer.weight))
    (expected * upstream).sum().backward()
    assert torch.equal(found, expected)
    for gradient, parameter in zip(gradients, layer.parameters(), strict=True):
        assert parameter.grad.abs().sum() > 0
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-6)


def test_training_rounds_no_row_that_the_batch_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    table = random((500, INPUTS))
    layer = QuantizedEmbedding(nn.Parameter(table), minmax(table, Grid(0), (-128, 127)))
    seen: list[int] = []
    largest = Grid.largest
    monkeypatch.setattr(
        Grid, "largest", lambda grid, weight: seen.append(len(weight)) or largest(grid, weight)
    )
    layer(torch.tensor([[5, 5, 6], [5, 499, 6]]))
    with torch.no_grad():
        layer(torch.tensor([[5]]))
    layer.requires_grad_(False)  # as in the search for a perturbation, whose ball has no table
    layer(torch.tensor([[5, 6]]))
    assert seen == [3, 500, 2]
    table = random((500, INPUTS))
    one = QuantizedEmbedding(nn.Parameter(table), minmax(table, Grid(0, granularity="tensor"), (-2, 1)))
    torch.testing.assert_close(one(torch.tensor([5])), one.quantized_weight()[5:6], rtol=0, atol=0)


def test_a_theta_beyond_its_bound_returns_and_can_move_again() -> None:
    scale = ChannelScale(2, bound=4.0)
    scale.theta.data = torch.tensor([9.0, -9.0])
    before = scale()
    scale.advance()
    assert torch.equal(scale(), before)
    scale().log().sum().backward()
    assert torch.equal(scale.theta.grad, torch.ones(2))


@pytest.mark.parametrize("bounds", [(-8, 7), (0, 15), (-128, 127)])
def test_a_folded_activation_has_the_bounds_of_the_trained_one(bounds: tuple[int, int]) -> None:
    x, scale = torch.linspace(-40.0, 40.0, 81), torch.tensor(0.3)
    folded = Rounding(scale, bounds)
    codes = torch.from_numpy(np.clip(np.rint(x.numpy() / np.float32(0.3)), *bounds))
    assert torch.equal(folded.codes(x), codes.to(torch.int8))
    assert torch.equal(folded(x), codes * scale)
    assert torch.equal(FrozenActivation(scale, bounds)(x), folded(x))


# What an int8 GEMM computes --------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [1, 1024, 1025, 3072])
@pytest.mark.parametrize("kind", ["extreme", "any", "large"])
def test_integer_sums_are_exact_however_long_they_are(inputs: int, kind: str) -> None:
    """Sums of large codes lie beyond 2**24, where fp32 rounds each addition in an order of its own."""
    random = np.random.default_rng(inputs)
    low = {"extreme": 127, "any": -128, "large": 96}[kind]
    x, codes = (random.integers(low, 128, shape) for shape in ((2, 3, inputs), (inputs, 5)))
    if kind == "extreme":
        codes[0, 1] = 126  # sums of odd products, beyond 2**24: adding them in fp32 rounds at every step
    rounding = Rounding(torch.tensor(1.0))
    found = integer_matmul(
        rounding, torch.from_numpy(x).float(), torch.from_numpy(codes).to(torch.int8), torch.ones(5)
    )
    expected = (x.astype(np.int64) @ codes.astype(np.int64)).astype(np.float32)
    np.testing.assert_array_equal(found.numpy(), expected)
