"""JSON that every parser reads: RFC 8259 has no NaN and no infinity. Standard library only.

A number that is not finite is written as null. The outermost object then has the key `not_finite`, which maps
the places of such numbers, as JSON pointers (RFC 6901), to their values:

    {"rows": [{"loss": null}], "not_finite": {"/rows/0/loss": "nan"}}

`loads` puts the numbers back and takes that key out. The file is a part of the probe kit too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

MARK = "not_finite"
"""Key of the pointers; values are nan, inf and -inf."""


def dumps(value: object, **options: object) -> str:
    """`json.dumps`, without NaN and infinity; `options` are those of json.dumps."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        pass
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: object) -> object:
    """A copy with null for every number that is not finite; of a dict, with the pointers to them."""
    places: dict[str, str] = {}
    copy = _finite(value, "", places)
    return {**copy, MARK: places} if places and isinstance(copy, dict) else copy


def loads(text: str | bytes) -> object:
    """`json.loads`, with the numbers back that are not finite. Reads NaN of older files too."""
    value = json.loads(text)
    places = value.pop(MARK, None) if isinstance(value, dict) else None
    for pointer, word in (places or {}).items():
        *above, last = list(_steps(pointer))
        holder = value
        for step in above:
            holder = holder[int(step) if isinstance(holder, list) else step]
        holder[int(last) if isinstance(holder, list) else last] = float(word)
    return value


def _finite(value: object, pointer: str, places: dict[str, str]) -> object:
    """A copy with null for each number that is not finite, which `places` gets."""
    if isinstance(value, float) and not math.isfinite(value):
        places[pointer] = repr(float(value))
        return None
    if isinstance(value, dict):
        return {key: _finite(item, f"{pointer}/{_escape(key)}", places) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item, f"{pointer}/{place}", places) for place, item in enumerate(value)]
    return value


def _escape(key: object) -> str:
    return str(key).replace("~", "~0").replace("/", "~1")


def _steps(pointer: str) -> Iterator[str]:
    for step in pointer.split("/")[1:]:
        yield step.replace("~1", "/").replace("~0", "~")
