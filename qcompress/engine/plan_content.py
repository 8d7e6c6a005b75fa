"""Search for float copies of quantized weights inside a serialized engine. No torch.

TensorRT may decode integer weights at build time and store them as floats: the engine runs, but the
compression is lost. The engine's size does not prove it, since kernels take megabytes too. The search
compares values: codes * scale is known exactly, and a copy holds each value as often as the weight does, in
any layout.

    fp32         single values, independent of the layout
    fp16, bf16   pairs of neighbours along one axis, since single 16-bit words occur everywhere

A sample of the values of each weight is counted in the plan at every byte offset, each value at most as often
as in the weight. A weight has a copy if half of its sample is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from qcompress.graph.view import View
from qcompress.graph.weights import stored_weights

SAMPLE = 1024
"""Number of values, or pairs, of a weight that are searched for."""

PORTION = 2**20
"""Maximum number of elements of a weight that are decoded."""

LEAST = 256
"""Elements of the smallest weight that is searched for: a few equal words are not evidence."""

SHARE = 0.5
"""Fraction of the sample that a float copy contains."""

CHUNK = 2**24
"""Bytes of a plan that are searched at once."""

HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


@dataclass(frozen=True)
class _Form:
    """One float representation of a weight, with a sample of its words."""

    weight: str
    words: np.ndarray
    """Sampled words, uint32, sorted."""
    times: np.ndarray
    """Occurrences of each word in the weight."""
    more_bytes: int
    """Bytes that this representation takes beyond the weight's integers."""


def float_copies(plan: Path, view: View) -> dict[str, int]:
    """Find quantized weights that the plan stores as floats; returns the bytes beyond the integers, by
    weight.
    """
    forms = [form for name, values, stored in _weights(view) for form in _forms(name, values, stored)]
    if not forms:
        return {}
    counts = _counted(plan, np.unique(np.concatenate([form.words for form in forms])))
    copies: dict[str, int] = {}
    for form in forms:
        if np.minimum(counts(form.words), form.times).sum() >= SHARE * form.times.sum():
            copies[form.weight] = max(copies.get(form.weight, 0), form.more_bytes)
    return copies


# Weights ------------------------------------------------------------------------------------------


def _weights(view: View) -> Iterator[tuple[str, np.ndarray, tuple[int, float]]]:
    """Name, decoded values (a portion of a large weight), element count and stored bits."""
    for weight in stored_weights(view):
        if weight.name in view.constants and len(view.constants[weight.name].dims) >= 2:
            bits = weight.information_bits() if weight.indices else 4 if weight.stored_bits == 4 else 8
            for values in weight.decoded(PORTION):
                yield weight.name, values, (math.prod(weight.shape), bits)


def _forms(name: str, values: np.ndarray, stored: tuple[int, float]) -> Iterator[_Form]:
    """Representations of a weight in every float type and pair axis."""
    count, bits = stored
    if count < LEAST:
        return
    integers = int(count * bits / 8)
    words = np.ascontiguousarray(values, np.float32).ravel().view(np.uint32)
    yield from _form(name, words[words << 1 != 0], 4 * count - integers)  # without +0 and -0
    for half in HALVES:
        for axis in range(values.ndim):
            if values.shape[axis] > 1:
                row = np.ascontiguousarray(np.moveaxis(values, axis, -1)).ravel().astype(half)
                pairs = row.view(np.uint16)[: row.size // 2 * 2].view(np.uint32)
                yield from _form(name, pairs[_ordinary(row, half)], 2 * count - integers)


def _form(name: str, words: np.ndarray, more_bytes: int) -> Iterator[_Form]:
    """Sample the words of one representation; nothing for too few words."""
    if words.size >= LEAST // 2:
        chosen = np.unique(words[:: max(1, words.size // SAMPLE)])
        words, times = np.unique(words[np.isin(words, chosen)], return_counts=True)
        yield _Form(name, words, times, more_bytes)


def _ordinary(row: np.ndarray, half: np.dtype) -> np.ndarray:
    """Mask of the pairs of two normal numbers: other pairs look like small integers, which are common in a
    plan.
    """
    normal = np.abs(row.astype(np.float32)) >= float(ml_dtypes.finfo(half).tiny)
    return normal[: row.size // 2 * 2].reshape(-1, 2).all(1)


# The plan -----------------------------------------------------------------------------------------


def _counted(plan: Path, wanted: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Count the sorted words `wanted` in the plan; returns a function from words to counts."""
    counts = np.zeros(len(wanted), np.int64)
    # the upper 16 bits of most words of a plan differ from those of all wanted words
    beginnings = np.zeros(2**16, bool)
    beginnings[wanted >> 16] = True
    data = np.memmap(plan, np.uint8, "r") if plan.stat().st_size else np.empty(0, np.uint8)
    for start in range(0, len(data), CHUNK):
        piece = np.asarray(data[start : start + CHUNK + 3])
        for offset in range(4):
            end = offset + (len(piece) - offset) // 4 * 4
            words = np.ascontiguousarray(piece[offset:end]).view(np.uint32)
            words = words[beginnings[words >> 16]]
            places = np.searchsorted(wanted, words)
            places = places[wanted[np.minimum(places, len(wanted) - 1)] == words]
            counts += np.bincount(places, minlength=len(wanted))[: len(wanted)]

    return lambda words: counts[np.searchsorted(wanted, words)]
