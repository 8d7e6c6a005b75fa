"""Encodings: the ways in which a weight is stored in folded.safetensors and in model.onnx.

Each encoding is one class and one entry of `ENCODINGS`. Fold, export, the certificate, the byte counts, the
linter, `inspect` and the recipe rules call encodings and do not switch on formats themselves. Torch and onnx
are imported inside the functions that need them.
"""

from __future__ import annotations

from qcompress.encodings.base import Certified, Encoding
from qcompress.encodings.codebook import GatheredCodebook
from qcompress.encodings.int_qdq import IntegerQdq
from qcompress.schema.formats import AnyWeightFormat

__all__ = ["CODES", "ENCODINGS", "Certified", "Encoding", "encoding_of"]

ENCODINGS: tuple[Encoding, ...] = (IntegerQdq(), GatheredCodebook())
"""All encodings; each weight format belongs to exactly one. In a graph, a tensor that two encodings find
belongs to the later one: DequantizeLinear also decodes the int8 table of a codebook.
"""

CODES: tuple[str, ...] = tuple(encoding.parts[0] for encoding in ENCODINGS)
"""Names of the integer tensors: the first part of each encoding."""


def encoding_of(form: AnyWeightFormat) -> Encoding:
    """Return the encoding of a weight format.

    >>> from qcompress.schema.formats import WEIGHT_WORDS
    >>> encoding_of(WEIGHT_WORDS["int4"]).name, encoding_of(WEIGHT_WORDS["codebook"]).name
    ('int-qdq', 'codebook')
    """
    (encoding,) = [encoding for encoding in ENCODINGS if encoding.holds(form)]
    return encoding
