"""Strict JSON: RFC 8259 has no NaN and no infinity. Standard library only.

A number that is not finite is written as null. The outermost object then has the key `not_finite`, which maps
JSON pointers (RFC 6901) of such numbers to their values:

    {"rows": [{"loss": null}], "not_finite": {"/rows/0/loss": "nan"}}

`loads` restores the numbers and removes that key. The probe kit contains a copy of this file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

MARK = "not_finite"
"""Key of the pointers."""

WORDS = ("nan", "inf", "-inf")
"""Values of the pointers."""


def dumps(value: object, **options: object) -> str:
    """`json.dumps` without NaN and infinity; `options` are those of json.dumps."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        pass
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: object) -> object:
    """Copy with null in place of numbers that are not finite; for a dict with the pointers to them.

    Raises ValueError for a dict with a key `not_finite` of its own.
    """
    places: dict[str, str] = {}
    copy = _finite(json.loads(json.dumps(value)), "", places)  # keys as JSON spells them
    if not places or not isinstance(copy, dict):
        return copy
    if MARK in copy:
        raise ValueError(f"the key {MARK} is taken, and numbers that are not finite need it")
    return {**copy, MARK: places}


def loads(text: str | bytes) -> object:
    """`json.loads` with numbers that are not finite restored. Reads NaN of older files too.

    Raises ValueError for nesting beyond Python's limit.

    A key `not_finite` that is not a mapping of pointers to nulls is ordinary content.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    places = value.get(MARK) if isinstance(value, dict) else None
    if not isinstance(places, dict) or not places:
        return value
    holders = [(_holder(value, pointer), word) for pointer, word in places.items()]
    if any(holder is None or word not in WORDS for holder, word in holders):
        return value
    for (container, key), word in holders:
        container[key] = float(word)
    del value[MARK]
    return value


def _holder(value: object, pointer: str) -> tuple[dict | list, str | int] | None:
    """Container and key of the null at a pointer; None if there is none."""
    container, key = None, None
    for step in _steps(pointer):
        container, key = value, step
        try:
            key = int(step) if isinstance(value, list) else step
            value = value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return None if container is None or value is not None else (container, key)


def _finite(value: object, pointer: str, places: dict[str, str]) -> object:
    """Copy with null for each number that is not finite; their pointers are added to `places`."""
    if isinstance(value, float) and not math.isfinite(value):
        places[pointer] = repr(value)
        return None
    if isinstance(value, dict):
        return {key: _finite(item, f"{pointer}/{_escape(key)}", places) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item, f"{pointer}/{place}", places) for place, item in enumerate(value)]
    return value


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _steps(pointer: str) -> Iterator[str]:
    for step in pointer.split("/")[1:]:
        yield step.replace("~1", "/").replace("~0", "~")
