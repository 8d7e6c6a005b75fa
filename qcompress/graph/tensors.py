"""Stored tensors of an ONNX file: byte counts, and a check of data against shapes. No torch."""

from __future__ import annotations

import math
from pathlib import Path

from onnx import TensorProto

BITS = {
    "FLOAT": 32, "FLOAT16": 16, "BFLOAT16": 16, "DOUBLE": 64, "COMPLEX64": 64, "COMPLEX128": 128,
    "INT64": 64, "UINT64": 64, "INT32": 32, "UINT32": 32, "INT16": 16, "UINT16": 16, "INT8": 8, "UINT8": 8,
    "BOOL": 8, "INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8,
    "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8, "FLOAT8E8M0": 8, "FLOAT4E2M1": 4,
}  # fmt: skip
"""Bits of one element in ONNX's packing, by type."""

FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def type_word(kind: int) -> str:
    """ONNX name of an element type, such as INT8."""
    return _WORDS.get(kind, f"type {kind}")


_WORDS = {value: word for word, value in TensorProto.DataType.items()}


def stored_bytes(tensor: TensorProto) -> int:
    """Bytes of a tensor, with sub-byte types packed; 0 for types without a fixed size."""
    return bytes_as(tensor, type_word(tensor.data_type))


def bytes_as(tensor: TensorProto, word: str) -> int:
    """Bytes of a tensor if its elements had the type `word`."""
    return -(-math.prod(tensor.dims) * BITS.get(word, 0) // 8)


def misfit(tensor: TensorProto, folder: Path) -> str:
    """Describe a mismatch of a tensor's shape and data, empty if they fit. Does not read external data."""
    if type_word(tensor.data_type) not in (*BITS, "STRING"):
        return f"element {type_word(tensor.data_type).lower()}"
    if any(length < 0 for length in tensor.dims):
        return f"shape {list(tensor.dims)}"
    needed = stored_bytes(tensor)
    if tensor.data_location == TensorProto.EXTERNAL:
        return _misplaced(tensor, folder, needed)
    if tensor.HasField("raw_data"):
        stored = len(tensor.raw_data)
        return (
            ""
            if stored == needed
            else f"{stored:,} bytes for shape {list(tensor.dims)}, which takes {needed:,}"
        )
    values, wanted = sum(len(getattr(tensor, field)) for field in FIELDS), math.prod(tensor.dims)
    if BITS.get(type_word(tensor.data_type), 8) < 8:
        wanted = needed  # two or four codes per number
    wanted *= 2 if type_word(tensor.data_type).startswith("COMPLEX") else 1
    return "" if values == wanted else f"{values:,} values for shape {list(tensor.dims)}"


def location_of(tensor: TensorProto) -> str:
    """Name of the file with a tensor's external data, as the tensor states it."""
    return next((item.value for item in tensor.external_data if item.key == "location"), "")


def _misplaced(tensor: TensorProto, folder: Path, needed: int) -> str:
    """Describe a wrong offset or length of external data, empty if they fit."""
    entries = {item.key: item.value for item in tensor.external_data}
    size = (folder / location_of(tensor)).stat().st_size
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or needed)
    except ValueError:
        return f"offset {entries.get('offset')!r}, length {entries.get('length')!r}"
    if offset < 0 or length != needed or offset + length > size:
        return f"{length:,} bytes from {offset:,} of a file of {size:,}, and its shape takes {needed:,}"
    return ""
