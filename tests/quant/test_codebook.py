"""Codebooks: where an index lies, what decodes from it, and the gradient of a centroid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompress.errors import ContractError
from qcompress.quant.codebook import TABLE, CodebookWeight, FrozenCodebook, to_vectors
from qcompress.quant.folded_codebook import FoldedCodebook
from qcompress.quant.layers import QuantizedEmbedding, QuantizedLinear
from qcompress.quant.noise import QuantNoise
from qcompress.schema.formats import CodebookFormat
from qcompress.schema.quantizers import Codebook, Noise

OUT, IN, BLOCK, K = 12, 16, 4, 8


def weight_of(axis: int) -> Tensor:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    return weight if axis == 0 else weight.t().contiguous()


def book(axis: int, *, settled: bool = True, table: str = "float", estimates: bool = False,
         **options: Any) -> CodebookWeight:  # fmt: skip
    form = CodebookFormat(centroids=K, block=BLOCK, table=table)
    made = CodebookWeight(Codebook(**options), form, axis, weight_of(axis).shape, estimates)
    torch.manual_seed(0)
    if settled:
        made.settle(weight_of(axis))
    return made


@pytest.mark.parametrize("axis", [0, 1])
def test_an_index_is_the_vector_of_consecutive_inputs_of_one_output(axis: int) -> None:
    made = book(axis)
    found = made(weight_of(axis)).detach()
    found = found if axis == 0 else found.t()
    indices = made.assignments if axis == 0 else made.assignments.t()
    assert indices.shape == (OUT, IN // BLOCK)
    for o in range(OUT):
        for j in range(IN // BLOCK):
            expected = made.centroids[int(indices[o, j])]
            assert torch.equal(found[o, j * BLOCK : (j + 1) * BLOCK], expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_each_vector_has_its_nearest_centroid(axis: int) -> None:
    made = book(axis)
    vectors = to_vectors(weight_of(axis), axis, BLOCK)
    distances = torch.cdist(vectors.flatten(0, 1), made.centroids.detach())
    chosen = distances.gather(1, made.assignments.flatten().long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values)


@pytest.mark.parametrize("gradient", ["sum", "mean"])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_gradient_of_a_centroid_is_the_sum_or_the_mean_over_its_vectors(axis: int, gradient: str) -> None:
    made = book(axis, gradient=gradient)
    upstream = torch.randn(weight_of(axis).shape, generator=torch.Generator().manual_seed(1))
    latent = nn.Parameter(weight_of(axis))
    (made(latent) * upstream).sum().backward()
    assert latent.grad is None  # nothing of the latent weight is left
    pieces = to_vectors(upstream, axis, BLOCK).flatten(0, 1)
    chosen = made.assignments.flatten().tolist()
    for index in range(K):
        mine = torch.stack([pieces[place] for place, own in enumerate(chosen) if own == index])
        expected = mine.sum(0) if gradient == "sum" else mine.mean(0)
        torch.testing.assert_close(made.centroids.grad[index], expected)


def test_an_int8_table_is_codes_of_one_scale() -> None:
    made = book(0, table="int8")
    found = made(weight_of(0)).detach()
    scale = made.centroids.detach().abs().max() / 127
    codes = (found / scale).round()
    torch.testing.assert_close(found, codes * scale)
    assert codes.abs().max() == 127 and TABLE == (-127, 127)
    (made(weight_of(0)) ** 2).sum().backward()
    assert made.centroids.grad.abs().sum() > 0
    frozen = FrozenCodebook(made.assignments, made.centroids.detach(), made.scale_of(), 0)
    folded = FoldedCodebook(made.assignments, frozen.codes(), made.scale_of(), 0)
    assert torch.equal(frozen(weight_of(0)), found) and torch.equal(folded.decoded(), found)


def test_until_it_settles_a_weight_is_itself_and_afterwards_its_centroids() -> None:
    made, weight = book(0, settled=False), nn.Parameter(weight_of(0))
    assert torch.equal(made(weight), weight) and made.takes_noise
    made.settle(weight)
    assert not made.takes_noise and not torch.equal(made(weight), weight)


def test_noise_rounds_blocks_to_their_centroids_until_the_weight_settles() -> None:
    quantizer = book(0, settled=False, estimates=True, renew=3)
    layer = QuantizedLinear(nn.Parameter(weight_of(0)), None, 0, quantizer, None).train()
    layer.noise = QuantNoise(Noise(p=0.5), BLOCK, 0)
    layer.refresh()
    torch.manual_seed(1)
    found = layer.quantized_weight()
    decoded, latent = quantizer.decoded(quantizer.assignments), layer.weight
    blocks = (OUT, IN // BLOCK, BLOCK)
    rounded = torch.isclose(found, decoded, atol=1e-6).view(blocks).all(2)
    kept = (found == latent).view(blocks).all(2)
    assert (rounded | kept).all() and rounded.any() and kept.any()
    (found * 2).sum().backward()
    assert torch.equal(latent.grad, torch.full_like(latent, 2.0))  # straight through
    assert quantizer.centroids.grad is None
    torch.manual_seed(4)
    quantizer.settle(latent)
    assert torch.equal(layer.quantized_weight(), quantizer.decoded(quantizer.assignments))


def test_estimates_are_renewed_every_so_many_updates_and_a_repeated_pass_changes_nothing() -> None:
    quantizer = book(0, settled=False, estimates=True, renew=3)
    weight = weight_of(0)
    state = torch.random.get_rng_state()
    with pytest.raises(ContractError, match="no estimate yet"):
        quantizer(weight)
    quantizer.refresh(lambda: weight)
    first = quantizer.centroids.detach().clone()
    quantizer.refresh(lambda: weight * 2)
    assert torch.equal(quantizer.centroids, first) and torch.equal(torch.random.get_rng_state(), state)
    for _ in range(2):
        quantizer.advance()
    quantizer.refresh(lambda: weight * 2)
    assert torch.equal(quantizer.centroids, first)
    quantizer.advance()
    quantizer.refresh(lambda: weight * 2)
    assert not torch.equal(quantizer.centroids, first)


@pytest.mark.parametrize("table", ["float", "int8"])
def test_rows_of_a_table_are_those_of_the_decoded_one(table: str) -> None:
    quantizer = book(0, table=table)
    layer = QuantizedEmbedding(nn.Parameter(weight_of(0)), quantizer)
    ids = torch.tensor([[3, 3, 11], [0, 7, 3]])
    assert torch.equal(layer(ids), quantizer(weight_of(0))[ids])
    codes = FrozenCodebook(quantizer.assignments, quantizer.centroids.detach(), quantizer.scale_of(), 0)
    parts = (codes.codes(), quantizer.scale_of()) if table == "int8" else (quantizer.centroids.detach(), None)
    folded = FoldedCodebook(quantizer.assignments, *parts, 0)
    assert torch.equal(folded.rows(ids), layer(ids))


def test_few_different_vectors_are_stored_without_error() -> None:
    points = torch.randn(K, BLOCK, generator=torch.Generator().manual_seed(2))
    weight = points[torch.randint(K, (OUT, IN // BLOCK), generator=torch.Generator().manual_seed(3))].flatten(
        1
    )
    made = book(0, settled=False)
    clusters = made.settle(weight)
    assert torch.equal(made(weight), weight) and clusters.objective == 0


def test_a_layer_that_waits_for_its_turn_trains_as_the_float_that_it_is() -> None:
    quantizer = book(0, settled=False, estimates=True)
    layer = QuantizedLinear(nn.Parameter(weight_of(0)), None, 0, quantizer, None).train()
    layer.noise, layer.noisy, quantizer.waiting = QuantNoise(Noise(p=0.5), BLOCK, 0), False, True
    layer.refresh()
    assert torch.equal(layer.quantized_weight(), layer.weight) and int(quantizer.estimated) == -1
    quantizer.waiting = False
    layer.refresh()
    assert not torch.equal(layer.quantized_weight(), layer.weight)
