"""How many tokens texts have. No torch.

The checkpoint's own tokenizer counts where the package `tokenizers` is installed (transformers brings it);
without it words and marks are counted, with half as many again for words that are cut in pieces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

SPECIAL = 3
"""Tokens around a pair of texts."""

PIECES = 1.5
"""Tokens of a word or mark, in an estimate."""

MOST = 5000
"""Texts that are looked at, spread over all of them."""


def token_counts(texts: Sequence[str], model: Path) -> tuple[list[int], str]:
    """Tokens of some of the texts, in ascending order, and how they were counted."""
    step = -(-len(texts) // MOST)
    some = list(texts[::step])
    file = model / "tokenizer.json"
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return _estimate(some), "estimated from words: the package tokenizers is not installed"
    if not file.is_file():
        return _estimate(some), "estimated from words: the checkpoint has no tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return sorted(len(one.ids) for one in tokenizer.encode_batch(some)), "counted by the tokenizer"


def _estimate(texts: Sequence[str]) -> list[int]:
    return sorted(int(PIECES * len(re.findall(r"\w+|[^\w\s]", text))) + SPECIAL for text in texts)


SIZES = (16, 32, 64, 128, 256, 512, 1024)

HELD = 0.99
"""Share of the texts that a context holds whole."""


def context_for(counts: Sequence[int], positions: int) -> int:
    """The smallest of `SIZES` that holds nearly all texts, or all that the model takes.

    >>> context_for([7, 9, 40], positions=512), context_for([7, 9, 40], positions=48)
    (64, 48)
    >>> context_for([900, 1000], positions=512)
    512
    """
    wanted = counts[min(len(counts) - 1, int(HELD * len(counts)))]
    return min(next((size for size in SIZES if size >= wanted), SIZES[-1]), positions)


LEAST_WINDOWS = 32


def window_for(tokens: int, positions: int) -> int:
    """The largest of `SIZES` that the model takes and that leaves a text of so many tokens enough windows.

    >>> window_for(100_000, positions=1024), window_for(5_000, positions=1024), window_for(9, positions=1024)
    (1024, 128, 16)
    """
    fit = [size for size in SIZES if size <= positions and size * LEAST_WINDOWS <= tokens]
    return max(fit, default=min(SIZES[0], positions))
