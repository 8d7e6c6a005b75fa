"""The files of a checkpoint in transformers' layout: config.json, and safetensors whose headers are read
without their tensors. No torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

from qcompress.errors import ModelError

CHUNK = 2**24

INDEX = "model.safetensors.index.json"
"""Which shard holds which tensor."""

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of torch's DataParallel (and DistributedDataParallel), and of torch.compile."""

HEADER_LIMIT = 100 * 2**20
"""Largest believable safetensors header; the format's own limit."""


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, types and shapes of the tensors in a safetensors file, without reading the tensors."""
    return {name: (value["dtype"], tuple(value["shape"])) for name, value in _header(file)[0].items()}


def _header(file: Path) -> tuple[dict[str, dict], int]:
    """The entries of a safetensors header, and where the tensors begin."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > HEADER_LIMIT:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        size = 8 + length + max((value["data_offsets"][1] for value in tensors.values()), default=0)
        if file.stat().st_size != size:
            raise ValueError(f"{file.stat().st_size} bytes, and its header promises {size}")
        for value in tensors.values():
            _ = value["dtype"], tuple(value["shape"])
        return tensors, 8 + length
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ModelError(
            f"{file} is not a readable safetensors file ({error})",
            fix="save the model again with model.save_pretrained(directory)",
        ) from None


def weight_files(directory: Path) -> list[Path]:
    """Safetensors files of a checkpoint in transformers' layout; a pickle checkpoint is refused."""
    index = directory / INDEX
    if index.is_file():
        files = [directory / name for name in sorted(set(_weight_map(index).values()))]
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
    """The shard of each tensor."""
    try:
        files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
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
    """Names, types and shapes of all tensors of a checkpoint."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    holder: dict[str, str] = {}
    for file in weight_files(directory):
        header = read_header(file)
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
    """The prefix that a wrapper gave to every name of a checkpoint, or nothing.

    >>> wrapper_of(["module.h.0.w", "module.h.1.w"]), wrapper_of(["module.w", "bias"])
    ('module.', '')
    """
    left = list(names)
    for wrapper in WRAPPERS:
        if left and all(name.startswith(wrapper) for name in left):
            return wrapper + wrapper_of(name.removeprefix(wrapper) for name in left)
    return ""


def copy_tensors(source: Path, out: Path, names: Callable[[str], str | None]) -> None:
    """Write one safetensors file with the tensors of a checkpoint, byte for byte, under the names that
    `names` gives them; those without one are left out.
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
    with out.open("wb") as stream:
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
    """The checkpoint's config.json."""
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{directory} holds no config.json", fix="name a directory in transformers' layout"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} must hold a JSON object, found {type(config).__name__}")
    return config
