"""Validation of a recipe against the schema: pydantic finds mistakes, `messages.py` words them. No torch.

pydantic stops early: a section with a wrong value never reaches its own checks, and one cause can fail in
several places. So a reported value is removed and the rest is validated again, until no error is left. Errors
that follow from a removal are not reported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import NoneType
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qcompress.errors import ContractError
from qcompress.models import FAMILIES
from qcompress.recipe.messages import Spot, choose, describe_value, explain, locate, spelling
from qcompress.recipe.yaml_file import Document, Key
from qcompress.schema.axes import AXES, METHODS
from qcompress.schema.formats import ACTIVATION_WORDS, FORMAT_PRESETS, WEIGHT_WORDS
from qcompress.schema.recipe import RECIPE, Recipe

ROUNDS_LIMIT = 200
"""Largest number of validations of one recipe; each removes at least one value."""

_LAYER_WORDS = [*WEIGHT_WORDS, *(word for word in FORMAT_PRESETS if word not in WEIGHT_WORDS)]

WORDS: tuple[tuple[Key, list[str], tuple[type, ...]], ...] = (
    (("method",), list(METHODS), (str,)),
    (("format",), list(FORMAT_PRESETS), (str, dict)),
    (("format", "preset"), list(FORMAT_PRESETS), (str, NoneType)),
    (("format", "weights"), list(WEIGHT_WORDS), (str, dict)),
    (("format", "embeddings"), list(WEIGHT_WORDS), (str, dict)),
    (("format", "activations"), list(ACTIVATION_WORDS), (str, dict)),
    (("format", "attention"), list(ACTIVATION_WORDS), (str, dict)),
    (("format", "cache"), list(ACTIVATION_WORDS), (str, dict)),
    (("format", "residual"), list(ACTIVATION_WORDS), (str, dict)),
    (("format", "layers", "*"), _LAYER_WORDS, (str, dict)),
    (("format", "layers", "*", "weights"), [*WEIGHT_WORDS, "inherit"], (str, dict)),
    (("format", "layers", "*", "activations"), [*ACTIVATION_WORDS, "inherit"], (str, dict)),
)
"""Keys whose short forms the schema expands before it validates: the words, and other types allowed there."""

STANDINS: tuple[tuple[Key, Any], ...] = (
    (("name",), "unnamed"),
    (("model",), {"family": next(iter(FAMILIES)), "source": "."}),
    (("model", "family"), next(iter(FAMILIES))),
    (("task",), {"name": "causal-lm"}),
    (("data",), {"evaluate": {"unnamed": {"dataset": "unnamed"}}}),
    (("data", "evaluate"), {"unnamed": {"dataset": "unnamed"}}),
    (("data", "evaluate", "*"), {"dataset": "unnamed"}),
    (("build", "profiles", "*"), {}),
    (("format", "layers", "*"), {}),
    (("train", "phases", "*"), {"steps": 1}),
    (("train", "phases", "*", "steps"), 1),
    (("gate", "recovery", "*"), {"threshold": 0.0}),
    (("gate", "regression", "*"), {"threshold": 0.0}),
    (("gate", "float_floor", "*"), 0.0),
)
"""Stand-ins for a wrong value that the schema requires, or whose name other checks still need."""


def validate(document: Document) -> Recipe | None:
    """Validate a document; returns the recipe with stand-ins for wrong values, and adds mistakes to the
    document.

    None if not even stand-ins make it a recipe.
    """
    values = copy.deepcopy(document.value)
    _report_wrong_words(values, document)
    _report_empty_text(values, (), document)
    for key in sorted(document.tainted, key=len, reverse=True):
        _take_out(values, key)
    for _ in range(ROUNDS_LIMIT):
        _taint_axes_of_invalid_method(document)
        try:
            return RECIPE.get().model_validate(values)
        except ValidationError as error:
            details = error.errors(include_url=False)
        written = copy.deepcopy(values)
        for detail in sorted(details, key=_causes_first):
            spot = locate(detail["loc"], written)
            if not spot.alternative:
                _take_out(values, _judge(detail, spot, document))
    if not document.mistakes:
        raise ContractError(
            f"the schema refuses a recipe for a reason without a message: {details[0]['type']}"
        )
    return None


def _report_wrong_words(values: dict[str, Any], document: Document) -> None:
    for pattern, words, kinds in WORDS:
        for key, value in list(_matching(pattern, values)):
            if not document.present(key):
                continue
            if value is None and NoneType not in kinds:
                document.report(key, "is empty", f"write one of: {', '.join(words)}; or drop the line")
            elif not isinstance(value, kinds) or (isinstance(value, str) and value not in words):
                document.report(
                    key,
                    f"must be one of {spelling(words, kinds)}, {describe_value(value)}",
                    choose(value, words),
                )


def _report_empty_text(value: Any, key: Key, document: Document) -> None:
    """Report empty texts: no key accepts one, and as a path it would be the recipe's own folder."""
    if value == "" and document.present(key):
        document.report(key, "is empty", "write its value, or drop the line")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, item in items:
        _report_empty_text(item, (*key, part), document)


def _taint_axes_of_invalid_method(document: Document) -> None:
    """If `method` is invalid, do not report errors on the axes it would have set."""
    if not document.present(("method",)):
        document.tainted |= {(axis,) for axis in AXES if axis not in document.value}


def _causes_first(detail: ErrorDetails) -> tuple[int, int]:
    """Sort key: an unknown key explains a missing one; a wrong value explains an inconsistent section."""
    order = {"extra_forbidden": 0, "missing": 2, "value_error": 2}
    return order.get(detail["type"], 1), -len(detail["loc"])


def _judge(detail: ErrorDetails, spot: Spot, document: Document) -> Key:
    """Report one of pydantic's errors, unless it follows from another; returns the key to remove."""
    key, kind = spot.key, detail["type"]
    if kind == "missing":
        key = (*key, str(detail["loc"][-1]))
    shown = (*key, "name") if kind.startswith("union_tag") and isinstance(spot.value, dict) else key
    follows = kind in ("missing", "value_error") and not document.sound(key)
    by_method = kind == "union_tag_not_found" and key[0] in AXES
    follows = follows or (by_method and not document.present(("method",)))
    if document.present(shown) and not follows:
        message, fix, meant = explain(detail, spot)
        document.report(shown, message, fix)
        if meant is not None and not _is_written(meant, document.value):
            document.tainted.add(meant)
    document.tainted.add(key)
    return key


def _take_out(values: dict[str, Any], key: Key) -> None:
    """Remove the value at a key, or replace it by its stand-in. A list without stand-ins is removed as a
    whole.
    """
    if not key:
        return
    parent: Any = values
    for part in key[:-1]:
        if not _holds(parent, part):
            return
        parent = parent[part]
    standin = next((value for pattern, value in STANDINS if _fits(pattern, key)), None)
    if isinstance(parent, list):
        if standin is None:
            _take_out(values, key[:-1])
        else:
            parent[key[-1]] = copy.deepcopy(standin)
    elif isinstance(parent, dict):
        if standin is None:
            parent.pop(key[-1], None)
        else:
            parent[key[-1]] = copy.deepcopy(standin)


def _matching(pattern: Key, values: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Keys that a pattern matches, with their values; `*` is any key of a mapping."""
    if not pattern:
        yield key, values
    elif isinstance(values, dict):
        names = values if pattern[0] == "*" else [pattern[0]] if pattern[0] in values else []
        for name in names:
            yield from _matching(pattern[1:], values[name], (*key, name))


def _fits(pattern: Key, key: Key) -> bool:
    return len(pattern) == len(key) and all(
        part in ("*", name) for part, name in zip(pattern, key, strict=True)
    )


def _holds(parent: Any, part: str | int) -> bool:
    if isinstance(parent, list):
        return isinstance(part, int) and part < len(parent)
    return isinstance(parent, dict) and part in parent


def _is_written(key: Key, values: Any) -> bool:
    for part in key:
        if not _holds(values, part):
            return False
        values = values[part]
    return True
