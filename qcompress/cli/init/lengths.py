"""Token counts of texts. No torch.

The checkpoint's tokenizer counts if the package `tokenizers` is installed (transformers depends on it).
Otherwise words and punctuation marks are counted, times 1.5 for words that are split.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

SPECIAL = 3
"""Special tokens of a pair of texts."""

PIECES = 1.5
"""Estimated tokens of a word or punctuation mark."""

MOST = 5000
"""Number of texts that are counted, spread over all of them."""


def token_counts(texts: Sequence[str], model: Path) -> tuple[list[int], str]:
    """Token counts of a sample of the texts, in ascending order, and the way of counting."""
    step = -(-len(texts) // MOST)
    sample = list(texts[::step])
    file = model / "tokenizer.json"
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return _estimate(sample), "estimated from words: the package tokenizers is not installed"
    if not file.is_file():
        return _estimate(sample), "estimated from words: the checkpoint has no tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return sorted(
        len(encoding.ids) for encoding in tokenizer.encode_batch(sample)
    ), "counted by the tokenizer"


def _estimate(texts: Sequence[str]) -> list[int]:
    return sorted(int(PIECES * len(re.findall(r"\w+|[^\w\s]", text))) + SPECIAL for text in texts)


SIZES = (16, 32, 64, 128, 256, 512, 1024)

HELD = 0.99
"""Share of the texts that fit into the context without being cut."""


def context_for(counts: Sequence[int], positions: int) -> int:
    """Smallest of `SIZES` that fits nearly all texts, at most the model's positions.

    >>> context_for([7, 9, 40], positions=512), context_for([7, 9, 40], positions=48)
    (64, 48)
    >>> context_for([900, 1000], positions=512)
    512
    """
    wanted = counts[min(len(counts) - 1, int(HELD * len(counts)))]
    return min(next((size for size in SIZES if size >= wanted), SIZES[-1]), positions)


LEAST_WINDOWS = 32


def window_for(tokens: int, positions: int) -> int:
    """Largest of `SIZES` that the model takes and that yields enough windows from a text of this length.

    >>> window_for(100_000, positions=1024), window_for(5_000, positions=1024), window_for(9, positions=1024)
    (1024, 128, 16)
    """
    fit = [size for size in SIZES if size <= positions and size * LEAST_WINDOWS <= tokens]
    return max(fit, default=min(SIZES[0], positions))
