"""How scales lie over a weight, against loops over its elements."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from qcompress.quant.affine import Grid

SHAPES = [(64, 32), (32, 64), (96, 160), (128, 128)]
GRIDS = [Grid(axis, block) for axis, block in itertools.product((0, 1), (None, 32))]
GRIDS += [Grid(axis, None, "tensor") for axis in (0, 1)]
CASES = [(grid, shape) for grid, shape in itertools.product(GRIDS, SHAPES)]


def element_scales(grid: Grid, scale: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The scale of every element, by the definition: same output channel, same block of input channels."""
    found = np.empty(shape, scale.dtype)
    for row, column in np.ndindex(*shape):
        out, into = (column, row) if grid.channel_axis == 1 else (row, column)
        if grid.granularity == "tensor":
            found[row, column] = scale
        elif grid.block is None:
            found[row, column] = scale[out]
        else:
            part = into // grid.block
            found[row, column] = scale[part, out] if grid.channel_axis == 1 else scale[out, part]
    return found


@pytest.mark.parametrize(("grid", "shape"), CASES)
def test_every_element_meets_the_scale_of_its_channel_and_block(grid: Grid, shape: tuple[int, int]) -> None:
    scale_shape = grid.scale_shape(torch.Size(shape))
    scale = np.arange(np.prod(scale_shape), dtype=np.float32).reshape(scale_shape)
    weight = torch.ones(shape)
    broadcast = grid.join(grid.divide(weight) * grid.align(torch.from_numpy(scale)))
    np.testing.assert_array_equal(broadcast.numpy(), element_scales(grid, scale, shape))


@pytest.mark.parametrize(("grid", "shape"), CASES)
def test_join_undoes_divide(grid: Grid, shape: tuple[int, int]) -> None:
    weight = torch.arange(shape[0] * shape[1]).view(shape)
    assert torch.equal(grid.join(grid.divide(weight)), weight)
    assert grid.divide(weight).data_ptr() == weight.data_ptr()  # a view: no copy of a large table


@pytest.mark.parametrize(("grid", "shape"), CASES)
def test_largest_and_mean_are_over_the_weights_that_share_a_scale(grid: Grid, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    scale_shape = grid.scale_shape(torch.Size(shape))
    numbers = np.arange(np.prod(scale_shape)).reshape(scale_shape)
    owner = element_scales(grid, numbers, shape)
    magnitude = np.abs(weight.numpy())
    largest = np.array([magnitude[owner == number].max() for number in numbers.flat]).reshape(scale_shape)
    mean = np.array([magnitude[owner == number].mean() for number in numbers.flat]).reshape(scale_shape)
    assert len(np.unique(owner)) == numbers.size
    np.testing.assert_array_equal(grid.largest(weight).numpy(), largest)
    total = np.array([magnitude[owner == number].sum() for number in numbers.flat]).reshape(scale_shape)
    np.testing.assert_allclose(grid.mean(weight.abs()).numpy(), mean, rtol=1e-6)
    np.testing.assert_allclose(grid.sum(weight.abs()).numpy(), total, rtol=1e-6)


@pytest.mark.parametrize(("grid", "shape"), CASES)
def test_a_scale_that_is_spread_over_its_channels_decodes_the_same_values(
    grid: Grid, shape: tuple[int, int]
) -> None:
    """A file knows scales per channel and per block alone."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    scale = torch.rand(grid.scale_shape(torch.Size(shape)), generator=torch.Generator().manual_seed(6))
    channels = shape[grid.channel_axis]
    spread, deployed = grid.spread(scale, channels), Grid(grid.channel_axis, grid.block)
    assert tuple(spread.shape) == deployed.scale_shape(torch.Size(shape))
    ours = grid.join(grid.divide(weight) * grid.align(scale))
    assert torch.equal(deployed.join(deployed.divide(weight) * deployed.align(spread)), ours)


@pytest.mark.parametrize(
    ("grid", "axis"), [(Grid(1), 1), (Grid(0), 0), (Grid(1, 32), 0), (Grid(0, 32), 1)], ids=str
)
def test_axis_is_that_of_the_dequantize_node(grid: Grid, axis: int) -> None:
    """ONNX: the axis that a scale runs along per channel; the axis that is blocked otherwise."""
    assert grid.axis == axis
    shape = torch.Size((64, 96))
    scale_shape = grid.scale_shape(shape)
    if grid.block is None:
        assert scale_shape == (shape[axis],)
    else:
        assert scale_shape[axis] == shape[axis] // 32 and scale_shape[1 - axis] == shape[1 - axis]
