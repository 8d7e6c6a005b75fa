"""Weights of a graph of any origin, as the encodings find them. No torch."""

from __future__ import annotations

from qcompress.encodings import ENCODINGS
from qcompress.encodings.base import Stored
from qcompress.graph.view import View


def find_weights(view: View) -> list[Stored]:
    """All weights that any encoding finds, each encoding's in the order of the nodes. A weight that is a part
    of another one is included: DequantizeLinear decodes the int8 table of a codebook.
    """
    return [stored for encoding in ENCODINGS for stored in encoding.find(view)]


def stored_weights(view: View) -> list[Stored]:
    """The weights of a graph without those that are a part of a weight in a later encoding of ENCODINGS."""
    weights: list[Stored] = []
    for encoding in reversed(ENCODINGS):
        claimed = {part for stored in weights for part in stored.parts()}
        weights += [stored for stored in encoding.find(view) if stored.name not in claimed]
    return weights
