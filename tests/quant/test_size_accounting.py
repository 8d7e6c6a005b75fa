"""The published sizes of Quant-Noise's language model (arXiv:2004.07320, table 1) from its shapes alone.

WikiText-103, 16 layers of width 1024 with inner layers of 4096, adaptive input and softmax with cutoffs of
20,000 and 60,000 and a factor of 4: 942 MB as floats and 38 MB as iPQ, in MiB.
Indices take log2(256) = 8 bits a vector, centroids 16 bits a value, the rest 32.
"""

from __future__ import annotations

import pytest

from qcompress.formats import CodebookFormat

MIB = 2**20
WIDTH, INNER, LAYERS, VOCABULARY, CUTOFFS = 1024, 4096, 16, 267_744, (20_000, 60_000)


def shapes() -> dict[str, list[tuple[int, int]]]:
    """Matrices by part, [rows, inputs]."""
    sizes = (CUTOFFS[0], CUTOFFS[1] - CUTOFFS[0], VOCABULARY - CUTOFFS[1])
    widths = (WIDTH, WIDTH // 4, WIDTH // 16)
    return {
        "ffn": [(INNER, WIDTH), (WIDTH, INNER)] * LAYERS,
        "attention": [(WIDTH, WIDTH)] * 4 * LAYERS,
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
    blocks = {"ffn": 8, "attention": 4, "embeddings": 8, "projections": 4}
    others = LAYERS * (4 * WIDTH + INNER + WIDTH + 4 * WIDTH) + 2 * WIDTH  # biases and norms
    weights = sum(rows * inputs for group in parts.values() for rows, inputs in group)
    assert weights * 4 / MIB == pytest.approx(941.2, abs=0.05)
    assert (weights + others) * 4 / MIB == pytest.approx(942, abs=0.05)
    total = others * 4.0
    for part, group in parts.items():
        form = CodebookFormat(block=blocks[part])
        assert form.information_bits == form.stored_bits == 8 / blocks[part]
        total += sum(looked_up(form, shape) for shape in group)
    assert total / MIB == pytest.approx(38.7, abs=0.15)


@pytest.mark.parametrize(("bits", "published"), [(8, 236), (4, 118)])
def test_the_published_sizes_of_integers(bits: int, published: float) -> None:
    """Of the 942: every float becomes that many bits."""
    weights = sum(rows * inputs for group in shapes().values() for rows, inputs in group)
    assert weights * bits / 8 / MIB == pytest.approx(published, rel=0.01)
