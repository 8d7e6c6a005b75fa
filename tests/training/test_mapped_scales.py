"""Starting values and statistics of a rescaling whose channels reach several inputs, or other ones."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress.models.architecture import Site
from qcompress.quant.layers import QuantizedLinear
from qcompress.quant.ranges import Statistics
from qcompress.quant.rescaling import site_largest
from qcompress.schema.adapters import QuadapterOptions
from qcompress.training.methods.modelopt import site_scale
from qcompress.training.methods.quadapter import Quadapter

MAPS = ((0, 1, 0, -1, 2), None)
SITE = Site("writer", ("first", "second"), 3, "value", maps=MAPS)
SEEN = {"first": [1.0, 2.0, 5.0, 90.0, 4.0], "second": [3.0, 7.0, 1.0]}


def statistics() -> dict[str, Statistics]:
    tensors = {name: torch.tensor(values) for name, values in SEEN.items()}
    return {name: Statistics(largest, largest, largest[None]) for name, largest in tensors.items()}


def reader(weight: Tensor) -> QuantizedLinear:
    return QuantizedLinear(nn.Parameter(weight), None, 0, None, None)


def test_a_channel_has_the_largest_of_the_inputs_that_it_reaches() -> None:
    found = site_largest(statistics(), SITE.readers, SITE.maps, SITE.channels)
    assert found.tolist() == [5.0, 7.0, 4.0]
    one_by_one = site_largest(statistics(), SITE.readers, (), 5)
    assert one_by_one.tolist() == SEEN["first"]
    assert site_largest({"second": statistics()["second"]}, SITE.readers, SITE.maps, 3) is None


def test_a_balanced_start_counts_every_input_of_a_channel() -> None:
    weights = {
        "first": torch.tensor([[0.5, 1.0, 0.0, 9.0, 2.0], [0.0, -3.0, -8.0, 0.0, 1.0]]),
        "second": torch.tensor([[2.0, 4.0, -6.0]]),
    }
    given: list[tuple[Site, nn.Module]] = []
    prepared = SimpleNamespace(
        layers={name: reader(weight) for name, weight in weights.items()},
        rescale=lambda site, scale: given.append((site, scale)),
    )
    adapter = Quadapter(QuadapterOptions())
    adapter.attach(prepared, [SITE], statistics())
    ratio = np.sqrt(np.array([8.0, 4.0, 6.0]) / np.array([5.0, 7.0, 4.0]))
    expected = ratio / np.exp(np.log(ratio).mean())
    ((site, scale),) = given
    assert site is SITE
    np.testing.assert_allclose(scale().detach().numpy(), expected, rtol=1e-6)


def test_readers_share_the_mean_of_the_smallest_scales_of_a_channel() -> None:
    scales = {"first": torch.tensor([1.0, 0.5, 0.25, 0.01, 4.0]), "second": torch.tensor([0.75, 1.5, 2.0])}
    assert site_scale(SITE, scales).tolist() == pytest.approx([(0.25 + 0.75) / 2, 1.0, 3.0])
    partial = Site("writer", ("first", "second"), 4, "value", maps=((0, 1, 0, -1, 2), (3, 3, 1)))
    assert site_scale(partial, scales).tolist() == pytest.approx([0.25, 1.25, 4.0, 0.75])
    alone = Site("writer", ("second",), 3)
    assert torch.equal(site_scale(alone, scales), scales["second"])
