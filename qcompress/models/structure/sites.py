"""Rescaling sites of a model, proven by runs with powers of two (`probe.py`).

A proof gives every channel of the writer a number, written in digits of base 16, and runs the model once for
each digit: the exponent of two of a channel stands for its digit. The exponents that arrive at a reader say
which channel of the writer each of its inputs is. They are 16 to 23 in size, far from 1 in both directions,
because near 1 a step like ReLU6 looks linear; a last run negates the exponents of the first, so that every
channel grows once and shrinks once. Every run must leave the outputs bit-identical.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from qcompress.models.architecture import Site
from qcompress.models.structure.probe import Exponents, Probe

BASE = 16
DIGITS = torch.tensor([*range(16, 24), *range(-16, -24, -1)])
"""Digit -> exponent of two."""

FAR = 20
"""Exponent of two of trial runs."""


def prove(probe: Probe, writer: str, kind: str, channels: Sequence[int]) -> Site | None:
    """Site of a writer with the channels that were seen to arrive, of those given; None without a proof."""
    total = probe.channels(writer)
    digits = len(f"{total - 1:x}")  # of the largest number, in base 16
    chosen = torch.tensor(channels)
    numbers: dict[str, Tensor] = {}
    first: dict[str, Exponents] = {}
    for digit in range(digits):
        arrived = probe.scaled({writer: _coded(total, chosen, digit)})
        if not arrived or (digit and arrived.keys() != numbers.keys()):
            return None
        first = first or arrived
        for reader, exponents in arrived.items():
            codes = (exponents[:, None] == DIGITS).long()
            if not torch.equal(codes.sum(1) > 0, exponents != 0):
                return None
            step = codes.argmax(1) * BASE**digit
            numbers[reader] = numbers.get(reader, torch.zeros_like(step)) + step
    negated = probe.scaled({writer: -_coded(total, chosen, 0)})
    if negated is None or negated.keys() != first.keys():
        return None
    if not all(torch.equal(-exponents, first[reader]) for reader, exponents in negated.items()):
        return None
    indices = {reader: torch.where(first[reader] != 0, number, -1) for reader, number in numbers.items()}
    kept = _arrived_everywhere(probe, indices)
    if not kept <= set(channels):
        return None
    return _site(writer, kind, sorted(kept), indices) if kept else None


def _coded(total: int, channels: Tensor, digit: int) -> Exponents:
    """Exponents of all channels, 0 for those that are not chosen."""
    exponents = torch.zeros(total, dtype=torch.long)
    exponents[channels] = DIGITS[channels // BASE**digit % BASE]
    return exponents


def _arrived_everywhere(probe: Probe, indices: Mapping[str, Tensor]) -> set[int]:
    """Channels that arrive at each reader as often as any other channel does.

    A silent input of a reader could be any channel. A channel that arrives less often there than others may
    be that one, and would not be divided out.
    """
    counts = {
        reader: torch.bincount(index[index >= 0], minlength=int(index.max()) + 1)
        for reader, index in indices.items()
    }
    kept = {int(channel) for index in indices.values() for channel in index[index >= 0]}
    for reader, count in counts.items():
        if bool(probe.silent[reader].any()):
            kept &= set((count == count.max()).nonzero().flatten().tolist())
    return kept


def _site(writer: str, kind: str, outputs: Sequence[int], indices: Mapping[str, Tensor]) -> Site:
    places = {channel: place for place, channel in enumerate(outputs)}
    one_by_one = tuple(range(len(outputs)))
    maps = tuple(tuple(places.get(channel, -1) for channel in index.tolist()) for index in indices.values())
    maps = tuple(None if item == one_by_one else item for item in maps)
    is_range = outputs[-1] - outputs[0] + 1 == len(outputs)
    return Site(
        writer, tuple(indices), len(outputs), kind="norm" if kind == "norm" else "value", first=outputs[0],
        outputs=None if is_range else tuple(outputs), maps=maps if any(maps) else (),
    )  # fmt: skip


# Search -------------------------------------------------------------------------------------------


def search(probe: Probe, writer: str, kind: str) -> Site | None:
    """Proven site of a writer: all channels, or else a part of a layer's channels, such as the values of a
    fused projection.
    """
    total = probe.channels(writer)
    whole = prove(probe, writer, kind, range(total))
    if whole is not None or kind == "norm":
        return whole
    for seed in dict.fromkeys((total - 1, 0, total // 2)):
        if _holds(probe, writer, (seed,)):
            return prove(probe, writer, kind, _grown(probe, writer, seed))
    return None


def _holds(probe: Probe, writer: str, channels: Iterable[int]) -> bool:
    """True if the outputs stay equal with these channels far away, and a reader sees them."""
    exponents = torch.zeros(probe.channels(writer), dtype=torch.long)
    exponents[list(channels)] = FAR
    return bool(probe.scaled({writer: exponents}))


def _grown(probe: Probe, writer: str, seed: int) -> list[int]:
    """Channels that hold with the seed: the largest run around it, repeated with the shortest period.

    Projections interleave query, key and value for each head (GPT-NeoX, BLOOM) or each group of heads: runs
    of one length at equal distances.
    """
    total = probe.channels(writer)
    below = _farthest(seed, lambda steps: _holds(probe, writer, range(seed - steps, seed + 1)))
    above = _farthest(
        total - 1 - seed, lambda steps: _holds(probe, writer, range(seed - below, seed + steps + 1))
    )
    first, length = seed - below, below + 1 + above
    for period in range(2 * length, total // 2 + 1, length):
        if total % period == 0:
            start = first % period
            repeated = [start + place for place in range(total) if place % period < length]
            if repeated[-1] < total and _holds(probe, writer, repeated):
                return repeated
    return list(range(first, first + length))


def _farthest(limit: int, holds) -> int:
    """Largest number of steps up to a limit that holds, where every smaller number holds too."""
    low, high = 0, limit + 1
    step = 1
    while low + step < high:  # gallop: runs are often short
        if not holds(low + step):
            high = low + step
            break
        low, step = low + step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


# Statements about other blocks, and their proof -----------------------------------------------------


def stated_for(site: Site, block: str, other: str) -> Site | None:
    """The site of a block stated for another block; None for a site that leaves its block."""
    names = (site.writer, *site.readers)
    if not all(name.startswith(f"{block}.") for name in names):
        return None
    writer, *readers = (other + name.removeprefix(block) for name in names)
    return dataclasses.replace(site, writer=writer, readers=tuple(readers))


def verified(probe: Probe, sites: Sequence[Site], *, silent: bool) -> list[Site]:
    """The sites that a run with random factors confirms; all in one run, and one by one if that fails.

    `silent`: accept a channel that is zero in this run; False: it has to be seen.
    """
    if not sites or _is_confirmed(probe, sites, silent):
        return list(sites)
    return [site for site in sites if _is_confirmed(probe, [site], silent)]


def _is_confirmed(probe: Probe, sites: Sequence[Site], silent: bool) -> bool:
    generator = torch.Generator().manual_seed(len(sites))
    factors: dict[str, Exponents] = {}
    expected: dict[str, Exponents] = {}
    for site in sites:
        scale = DIGITS[torch.randint(BASE, (site.channels,), generator=generator)]
        factors[site.writer] = torch.zeros(probe.channels(site.writer), dtype=torch.long)
        outputs = site.outputs or range(site.first, site.first + site.channels)
        factors[site.writer][torch.tensor(list(outputs))] = scale
        for place, reader in enumerate(site.readers):
            index = torch.tensor((site.maps[place] if site.maps else None) or range(site.channels))
            if not silent and bool(probe.silent[reader][index >= 0].any()):
                return False
            arriving = torch.where(index >= 0, scale[index], 0)
            expected[reader] = expected.get(reader, torch.zeros_like(arriving)) + arriving
    for sign in (1, -1):
        arrived = probe.scaled({writer: sign * exponents for writer, exponents in factors.items()})
        if arrived is None or not arrived.keys() <= expected.keys():
            return False
        for reader, exponents in expected.items():
            visible = torch.where(probe.silent[reader], 0, sign * exponents)
            if not torch.equal(arrived.get(reader, torch.zeros_like(visible)), visible):
                return False
    return True
