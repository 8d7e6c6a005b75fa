"""Readers of files that were named or written by others. Standard library only.

A path may be a pipe without a writer, an endless device, or a file of petabytes: `demand_file` accepts
regular files only, `read_json` bounds the bytes that are read and parsed.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import stat
from pathlib import Path
from typing import Any

from qcompress.errors import QcompressError, UsageError

JSON_LIMIT = 2**28
"""Largest JSON file that is read; a tokenizer of 250,000 words has 20 MB."""

PLAIN_MIB = 48
"""Unpacked size that is allowed for every packed file."""

_KINDS = (
    (stat.S_ISDIR, "is a folder"),
    (stat.S_ISFIFO, "is a pipe"),
    (stat.S_ISSOCK, "is a socket"),
    (stat.S_ISCHR, "is a device"),
    (stat.S_ISBLK, "is a device"),
)


def misfit_of(path: Path) -> str:
    """Reason why a path is not a regular file; empty for a regular file. Links are followed."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return (
            "is a link to itself" if error.errno == errno.ELOOP else f"cannot be reached ({error.strerror})"
        )
    except ValueError:
        return "holds a NUL character in its name"
    if stat.S_ISREG(mode):
        return ""
    return next((word for is_kind, word in _KINDS if is_kind(mode)), "is not a regular file")


def demand_file(
    path: Path,
    refusal: type[QcompressError] = UsageError,
    *,
    limit: int | None = None,
    fix: str = "name a regular file",
) -> Path:
    """Return the path of a regular file of at most `limit` bytes; raise `refusal` for any other path."""
    if misfit := misfit_of(path):
        raise refusal(f"{path} {misfit}", fix=fix)
    if limit is not None and (size := os.stat(path).st_size) > limit:
        raise refusal(f"{path} has {size:,} bytes, and at most {limit:,} are read", fix=fix)
    return path


def parse_json(text: str | bytes, name: object, refusal: type[QcompressError], *, fix: str) -> Any:
    """Parse a JSON text; raises `refusal` for invalid text, and for nesting beyond Python's limit."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise refusal(f"{name} is not JSON ({error})", fix=fix) from None
    except RecursionError:
        raise refusal(f"{name} is nested too deeply", fix=fix) from None


def read_json(path: Path, refusal: type[QcompressError], *, fix: str, limit: int = JSON_LIMIT) -> Any:
    """Parse a JSON file in UTF-8; raises `refusal` like `parse_json`."""
    demand_file(path, refusal, limit=limit, fix=fix)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise refusal(f"{path} cannot be read ({error.strerror})", fix=fix) from None
    return parse_json(content, path, refusal, fix=fix)


def unpacked_limit(path: Path, ratio: int, least_mib: int) -> int:
    """Largest allowed unpacked size of a packed file: a bomb grows a thousand times, a data file
    ten times.
    """
    return max(least_mib << 20, ratio * os.stat(path).st_size)


def read_gzip(path: Path, *, ratio: int = 20) -> bytes:
    """Content of a gzip file. Raises ValueError if it unpacks to more than `unpacked_limit`."""
    if misfit := misfit_of(path):
        raise ValueError(misfit)
    limit = unpacked_limit(path, ratio, PLAIN_MIB)
    with gzip.open(path, "rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it unpacks to more than {limit:,} bytes")
    return content
