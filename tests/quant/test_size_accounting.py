"""The published sizes of Quant-Noise's language model (arXiv:2004.07320, table 1) from its shapes alone.

WikiText-103, 16 layers of width 1024 with inner layers of 4096, adaptive input and softmax with cutoffs of
20,000 and 60,000 and a factor of 4: 942 MB as floats and 38 MB as iPQ, in MiB.
Indices take log2(256) = 8 bits a vector, centroids 16 bits a value, the rest 32.
"""

from __future__ import annotations

import pytest

from qcompress.schema.formats import CodebookFormat

MIB = 2**20
WIDTH, INNER, LAYERS, VOCABULARY, CUTOFFS = 1024, 4096, 16, 267_744, (20_000, 60_000)


BLOCKS = {"ffn": 8, "attention": 4, "embeddings": 8, "projections": 4}
"""Lengths of the vectors, as the published configuration has them."""


def shapes(layers: int = LAYERS) -> dict[str, list[tuple[int, int]]]:
    """Matrices by part, [rows, inputs]."""
    sizes = (CUTOFFS[0], CUTOFFS[1] - CUTOFFS[0], VOCABULARY - CUTOFFS[1])
    widths = (WIDTH, WIDTH // 4, WIDTH // 16)
    return {
        "ffn": [(INNER, WIDTH), (WIDTH, INNER)] * layers,
        "attention": [(WIDTH, WIDTH)] * 4 * layers,
        "embeddings": list(zip(sizes, widths, strict=True)),
        "projections": [(WIDTH, width) for width in widths],
    }


def looked_up(form: CodebookFormat, shape: tuple[int, int]) -> float:
    """Bytes of a matrix of this shape; centroids in fp16."""
    rows, inputs = shape
    assert inputs % form.block == 0
    return rows * inputs * form.stored_bits / 8 + form.centroids * form.block * 2


def test_the_published_sizes_of_the_language_model() -> None:
    parts = shapes()
    others = biases_and_norms()
    weights = sum(rows * inputs for group in parts.values() for rows, inputs in group)
    assert weights * 4 / MIB == pytest.approx(941.2, abs=0.05)
    assert (weights + others) * 4 / MIB == pytest.approx(942, abs=0.05)
    assert product_quantized() / MIB == pytest.approx(38.7, abs=0.15)


def biases_and_norms(layers: int = LAYERS) -> int:
    return layers * (4 * WIDTH + INNER + WIDTH + 4 * WIDTH) + 2 * WIDTH


def product_quantized(layers: int = LAYERS) -> float:
    """Bytes with weights of so many layers."""
    total = biases_and_norms(layers) * 4.0
    for part, group in shapes(layers).items():
        form = CodebookFormat(block=BLOCKS[part])
        assert form.information_bits == form.stored_bits == 8 / BLOCKS[part]
        total += sum(looked_up(form, shape) for shape in group)
    return total


@pytest.mark.parametrize(("layers", "found", "published"), [(8, 22.2, 19), (4, 13.9, 10)])
def test_sharing_in_pairs_and_dropping_every_other_pair(layers: int, found: float, published: float) -> None:
    """Halving the layers does not give the paper's sizes: 3 and 4 MiB more are left, so that it must have
    made something else smaller as well, of which nothing was to be found.
    """
    size = product_quantized(layers) / MIB
    assert size == pytest.approx(found, abs=0.1) and published < size < published + 4.5


@pytest.mark.parametrize(("bits", "published"), [(8, 236), (4, 118)])
def test_the_published_sizes_of_integers(bits: int, published: float) -> None:
    """Of the 942: every float becomes that many bits."""
    weights = sum(rows * inputs for group in shapes().values() for rows, inputs in group)
    assert weights * bits / 8 / MIB == pytest.approx(published, rel=0.01)
