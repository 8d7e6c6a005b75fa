"""Files of a checkpoint in transformers' layout: config.json, and safetensors whose headers are read without
their tensors. No torch.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qcompress.errors import ModelError
from qcompress.system.filesystem import writes_to

CHUNK = 2**24

DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Files of a distributed checkpoint, which transformers prefers to model.safetensors."""

ADAPTER = "adapter_config.json"
"""A file of PEFT, which transformers applies by itself if PEFT is installed."""

INDEX = "model.safetensors.index.json"
"""File that maps tensors to shards."""

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of torch's DataParallel (and DistributedDataParallel), and of torch.compile."""

HEADER_LIMIT = 100 * 2**20
"""Upper limit of a safetensors header in bytes; the format's own limit."""


MOST_TENSORS = 200_000
"""Upper limit of tensors in one file; a model of a supported family has some thousands."""

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Bits of a value for each type of the format."""

LARGEST = 2**63 - 1

MOST_BYTES = 256 * 2**20
"""Upper limit of a checkpoint's JSON file in bytes."""


def read_object(file: Path, fix: str = "copy it again from the checkpoint") -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint. Raises ModelError."""
    try:
        if not file.is_file():
            raise ModelError(f"{file} is not a regular file", fix=fix)
        if file.stat().st_size > MOST_BYTES:
            raise ModelError(
                f"{file} has {file.stat().st_size} bytes, and at most {MOST_BYTES} are read", fix=fix
            )
        text = file.read_bytes()
        if text.startswith(codecs.BOM_UTF8):
            raise ModelError(
                f"{file} is not valid JSON (it begins with a byte order mark)",
                fix="save it as UTF-8 without a byte order mark (BOM)",
            )
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON ({error})", fix=fix) from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} must hold a JSON object, found {type(value).__name__}", fix=fix)
    return value


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read names, types and shapes of the tensors in a safetensors file, without reading the tensors."""
    return {name: (value["dtype"], tuple(value["shape"])) for name, value in _header(file)[0].items()}


def _header(file: Path) -> tuple[dict[str, dict], int]:
    """Entries of a safetensors header, and the offset of the first tensor."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > HEADER_LIMIT:
                raise ValueError(f"header of {length} bytes")
            header = stream.read(length)
        tensors = _entries(header)
        size = 8 + length + max((value["data_offsets"][1] for value in tensors.values()), default=0)
        if file.stat().st_size != size:
            raise ValueError(f"{file.stat().st_size} bytes, and its header promises {size}")
        _check_places(tensors)
        return tensors, 8 + length
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ModelError(
            f"{file} is not a readable safetensors file ({error})",
            fix="save the model again with model.save_pretrained(directory)",
        ) from None


def _entries(header: bytes) -> dict[str, dict]:
    """Parse the tensors of a header and check each. Raises exceptions that `_header` catches."""
    count = header.count(b'"data_offsets"')
    if count > MOST_TENSORS:
        raise ValueError(f"its header names {count} tensors, and at most {MOST_TENSORS} are read")
    if header[:1] != b"{":
        raise ValueError("its header is not a JSON object")
    entries = json.loads(header.decode("utf-8"), object_pairs_hook=_without_twins)
    notes = entries.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise ValueError("its __metadata__ is not a map of texts")
    for name, value in entries.items():
        _check_entry(name, value["dtype"], value["shape"], value["data_offsets"])
    return entries


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for index, name in enumerate(names) if name in names[:index])
        raise ValueError(f"its header has the name {twin} twice")
    return entries


def _check_entry(name: str, dtype: object, shape: object, offsets: object) -> None:
    """Check that a tensor's bytes fit its type and shape."""
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"the type of {name} is {dtype!r:.40}, which is not one of safetensors")
    if not _are_counts(shape):
        raise ValueError(f"the shape of {name} is {shape!r:.60}, and must be integers from 0")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the data_offsets of {name} are {offsets!r:.60}, and must be a begin and an end")
    bits = math.prod(shape) * BITS[dtype]
    if bits != (offsets[1] - offsets[0]) * 8:
        raise ValueError(
            f"{name} takes {offsets[1] - offsets[0]} bytes, and {dtype} of shape {shape!r:.60} takes "
            f"{-(-bits // 8):.10g}"
        )


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= LARGEST for value in values)


def _check_places(tensors: dict[str, dict]) -> None:
    """Check that tensors are contiguous: no overlaps, no gaps."""
    end, before = 0, "the header"
    for low, high, name in sorted((*value["data_offsets"], name) for name, value in tensors.items()):
        if low != end:
            problem = "overlaps" if low < end else "leaves a gap behind"
            raise ValueError(
                f"{name} {problem} {before} (it begins at byte {low}, and {before} ends at {end})"
            )
        end, before = high, name


def weight_files(directory: Path) -> list[Path]:
    """Safetensors files of a checkpoint in transformers' layout. Refuses a pickle checkpoint, and a directory
    with ambiguous weights.
    """
    index = directory / INDEX
    if (directory / ADAPTER).exists():
        raise ModelError(
            f"{directory} holds an {ADAPTER}: an adapter changes what the weights beside it compute",
            fix="merge it first: PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(new)",
        )
    if shards := [file.name for file in directory.glob("shard-*") if DISTRIBUTED.fullmatch(file.name)]:
        raise ModelError(
            f"{directory} holds {min(shards)}, a file of a distributed checkpoint",
            fix="save the whole model with model.save_pretrained(directory), and name that directory",
        )
    if index.is_file():
        files = [directory / name for name in sorted(set(_weight_map(index).values()))]
        single = directory / "model.safetensors"
        if single.is_file() and files != [single]:
            raise ModelError(
                f"{directory} holds a model.safetensors and a {INDEX}, and each defines the weights",
                fix="remove the one that is not the model's: the index with its shards, or the single file",
            )
        for file in files:
            if not file.is_file():
                raise ModelError(f"{file} is missing", fix="copy the checkpoint again, with all its shards")
        return files
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    pickles = sorted(directory.glob("pytorch_model*.bin"))
    if pickles:
        raise ModelError(
            f"{pickles[0]} is a pickle file, and loading a pickle runs whatever code it holds",
            fix="where you trust it, convert it once: AutoModelForCausalLM.from_pretrained(directory)"
            ".save_pretrained(new_directory), and name the new directory",
        )
    raise ModelError(
        f"{directory} holds no model.safetensors",
        fix="name a directory that transformers' save_pretrained wrote",
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Map of tensor names to shards."""
    try:
        files = dict(read_object(index)["weight_map"])
        inside = all(Path(name).name == name for name in files.values())
        if not files:
            raise ValueError("it names no tensor")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index} is not an index of shards ({type(error).__name__}: {error})",
            fix="copy the checkpoint again, with all its files",
        ) from None
    if not inside:
        raise ModelError(f"{index} names files outside its directory", fix="do not trust this checkpoint")
    return files


def read_tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read names, types and shapes of all tensors of a checkpoint."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    holder: dict[str, str] = {}
    for file in weight_files(directory):
        header = read_header(file)
        if twice := header.keys() & holder.keys():
            name = min(twice)
            raise ModelError(
                f"{directory}: {name} is in {holder[name]} and in {file.name}",
                fix="copy the checkpoint again, with all its shards and their own index",
            )
        tensors.update(header)
        holder |= dict.fromkeys(header, file.name)
    index = directory / INDEX
    for name, shard in _weight_map(index).items() if index.is_file() else ():
        if holder.get(name) != shard:
            where = f"it is in {holder[name]}" if name in holder else "no shard holds it"
            raise ModelError(
                f"{index} says that {name} is in {shard}, and {where}",
                fix="copy the checkpoint again, with all its shards and their own index",
            )
    return tensors


def wrapper_of(names: Iterable[str]) -> str:
    """Prefix that a wrapper gave to every name of a checkpoint; empty without one.

    >>> wrapper_of(["module.h.0.w", "module.h.1.w"]), wrapper_of(["module.w", "bias"])
    ('module.', '')
    """
    left = list(names)
    for wrapper in WRAPPERS:
        if left and all(name.startswith(wrapper) for name in left):
            return wrapper + wrapper_of(name.removeprefix(wrapper) for name in left)
    return ""


def copy_tensors(source: Path, out: Path, names: Callable[[str], str | None]) -> None:
    """Write one safetensors file with the tensors of a checkpoint, byte for byte, renamed by `names`; tensors
    that it maps to None are left out.
    """
    entries: dict[str, dict[str, object]] = {}
    pieces: list[tuple[Path, int, int]] = []
    offset = 0
    for file in weight_files(source):
        header, start = _header(file)
        for name, value in header.items():
            low, high = value["data_offsets"]
            if new := names(name):
                entries[new] = {**value, "data_offsets": [offset, offset + high - low]}
                pieces.append((file, start + low, high - low))
                offset += high - low
    head = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with writes_to(out), out.open("wb") as stream:
        stream.write(struct.pack("<Q", len(head)) + head)
        for file, start, length in pieces:
            with file.open("rb") as tensors:
                tensors.seek(start)
                while length:
                    chunk = tensors.read(min(length, CHUNK))
                    if not chunk:
                        raise ModelError(f"{file} ended early: it was changed while it was read")
                    stream.write(chunk)
                    length -= len(chunk)


def read_config(directory: Path) -> dict[str, object]:
    """Read the checkpoint's config.json."""
    file = directory / "config.json"
    if not file.exists():
        raise ModelError(f"{directory} holds no config.json", fix="name a directory in transformers' layout")
    return read_object(file)
