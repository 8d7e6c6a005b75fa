"""Error messages of recipes: pydantic's errors in the terms of a recipe. No torch.

`locate` follows the path of an error through the schema and the recipe at once: pydantic's path has names of
unions and of validators, and keys that only a short form implies; no user has written those.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from qcompress.models import FAMILIES
from qcompress.recipe.yaml_file import Key, dotted
from qcompress.schema.axes import AXES
from qcompress.schema.formats import Options
from qcompress.schema.recipe import RECIPE

EXAMPLES = {
    "name": "name: gpt2-w8a8",
    "model": f"model: {{family: {next(iter(FAMILIES))}, source: openai-community/gpt2}}",
    "family": f"family: {next(iter(FAMILIES))}",
    "task": "task: {name: causal-lm, context: 1024}",
    "data": "data: {calibration: {text: [train.txt]}, evaluate: {test: {text: [test.txt]}}}",
    "evaluate": "evaluate: {test: {text: [test.txt]}}",
    "steps": "steps: 200",
}
"""Example of each required key."""

NEEDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "finite_number": "finite",
    "string_pattern_mismatch": "a slug (lower-case letters, digits, `-` and `.`)",
    "string_too_long": "at most {max_length} characters long",
    "too_short": "{min_length} or more entries long",
    "too_long": "{max_length} or fewer entries long",
}
"""Description of valid values, by type of pydantic's error."""

SWITCHES = {"on": "true", "yes": "true", "y": "true", "off": "false", "no": "false", "n": "false"}


@dataclass(frozen=True)
class Spot:
    """Location of an error: the key as the recipe writes it, its value, and the type that the
    schema expects.
    """

    key: Key
    value: Any
    annotation: Any
    """Type of the value; for an unknown key the type of the enclosing mapping."""
    field: FieldInfo | None
    siblings: tuple[str, ...]
    """Keys allowed in place of the key's last part; empty if any is allowed."""
    alternative: bool
    """The error is about one branch of a union; another branch has an error of its own."""


def locate(path: Sequence[str | int], values: dict[str, Any]) -> Spot:
    """Location at the end of one of pydantic's paths."""
    annotation: Any = RECIPE.get()
    value: Any = values
    key: Key = ()
    field, siblings, alternative = None, (), False
    for part in path:
        sections, items, label = sections_of(annotation), _items(annotation), str(part)
        if items:
            siblings, annotation, field = _literals(items[0]) if len(items) == 2 else (), items[-1], None
        elif len(sections) > 1 and label in (
            tags := {tag_of(section) or section.__name__: section for section in sections}
        ):
            annotation = tags[label]
            continue
        elif label.startswith(("function-", "nullable[", "literal[", "[key]")) and not _has(value, part):
            alternative = alternative or label.startswith("literal[")
            continue
        elif sections:
            fields = {info.alias or name: info for name, info in sections[0].model_fields.items()}
            siblings, field = tuple(fields), fields.get(label)
            annotation = field.annotation if field else annotation
        if _has(value, part):
            key, value = (*key, part), value[part]
    return Spot(key, value, annotation, field, tuple(map(str, siblings)), alternative)


def explain(detail: ErrorDetails, spot: Spot) -> tuple[str, str, Key | None]:
    """Message, fix, and the key that was probably meant in place of an unknown one."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden" or detail["loc"][-1] == "[key]":
        return _unknown_key(spot)
    if kind == "missing":
        name = str(detail["loc"][-1])
        return "is missing", f"write `{EXAMPLES[name]}`" if name in EXAMPLES else f"write `{name}: ...`", None
    if kind == "value_error":
        return str(context["error"]), "", None
    words = _words(spot.annotation)
    if kind.startswith("union_tag"):
        value = spot.value.get("name") if isinstance(spot.value, dict) else spot.value
        return f"must be one of {', '.join(words)}, {describe_value(value)}", choose(value, words), None
    if spot.value is None:
        return "is empty", "write its value, or drop the line", None
    if words and kind not in NEEDS:
        return (
            f"must be one of {', '.join(words)}, {describe_value(spot.value)}",
            choose(spot.value, words),
            None,
        )
    need = NEEDS.get(kind, "another value").format(**context)
    if "mapping of keys" in need and words:
        return (
            f"must be one of {', '.join(words)}, {describe_value(spot.value)}",
            choose(spot.value, words),
            None,
        )
    return f"must be {need}, {describe_value(spot.value)}", _fix(need, spot), None


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Closest known word; None if none is close."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return close[0] if close else None


def choose(value: object, words: Sequence[str], these: str = "these") -> str:
    """Fix for a value outside a closed set of words."""
    if isinstance(value, str) and value in words:
        return f"write {value} without quotes"
    close = nearest(value, words) if isinstance(value, str) else None
    begun = [word for word in words if isinstance(value, str) and value and _begins(word, value)]
    if begun:
        return f"did you mean {' or '.join(f'`{word}`' for word in begun)}?"
    return f"did you mean `{close}`?" if close else f"write one of {these}, such as {words[0]}"


def _begins(word: str, value: str) -> bool:
    return len(value) > 1 and word.casefold().startswith(value.casefold())


def describe_value(value: object) -> str:
    """Describe a value, as `found ...`."""
    if value is None:
        return "found nothing"
    if isinstance(value, bool):
        return f"found {str(value).lower()}"
    if isinstance(value, str):
        return f"found text {value[:60]!r}"
    if isinstance(value, dict):
        return "found a mapping" if value else "found an empty mapping"
    return f"found a list of {len(value)}" if isinstance(value, list) else f"found {str(value)[:60]}"


def tag_of(section: type[Options]) -> str | None:
    """The `name` that selects a section among others, such as `lsq`."""
    field = section.model_fields.get("name")
    return field.default if field and get_origin(field.annotation) is Literal else None


def sections_of(annotation: Any) -> list[type[Options]]:
    """Sections that a value of this type may be."""
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return [annotation]
    return [section for branch in _branches(annotation) for section in sections_of(branch)]


def _branches(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[:1]
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()


def _items(annotation: Any) -> tuple[Any, ...]:
    """Types of a mapping's keys and values, or of a list's items; empty for other types."""
    if get_origin(annotation) in (dict, list):
        return get_args(annotation)
    return next((items for branch in _branches(annotation) if (items := _items(branch))), ())


def _literals(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(literal for branch in _branches(annotation) for literal in _literals(branch))


def _least(annotation: Any) -> int:
    """Smallest allowed length of a list of this type, at least 1."""
    fields = [
        annotated for annotated in getattr(annotation, "__metadata__", ()) if isinstance(annotated, FieldInfo)
    ]
    limits = [limit for field in fields for limit in field.metadata]
    lengths = [getattr(limit, "min_length", 1) for limit in limits]
    return max([1, *lengths, *map(_least, get_args(annotation))])


def _words(annotation: Any) -> list[str]:
    """Words allowed as a value: literals, or the names of sections."""
    tags = [tag for section in sections_of(annotation) if (tag := tag_of(section))]
    return tags or [str(literal) for literal in _literals(annotation)]


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, dict) and part in value


def _unknown_key(spot: Spot) -> tuple[str, str, Key | None]:
    word, section, recipe = str(spot.key[-1]), spot.key[:-1], RECIPE.get()
    homes = [
        (name,)
        for name, field in recipe.model_fields.items()
        if name not in AXES and any(word in known.model_fields for known in sections_of(field.annotation))
    ]
    homes += [()] if word in recipe.model_fields else []
    if len(homes) == 1 and homes[0] != section:
        where = f"under `{dotted(homes[0])}`" if homes[0] else "at the top of the recipe"
        return "unknown key", f"it belongs {where}", (*homes[0], word)
    close = nearest(word, spot.siblings)
    if close:
        return "unknown key", f"did you mean `{close}`?", (*section, close)
    return "unknown key", f"drop it, or write one of: {', '.join(spot.siblings)}", None


def _fix(need: str, spot: Spot) -> str:
    """Imperative fix for a value of the wrong type or size."""
    value, default = spot.value, spot.field.default if spot.field else None
    example = f", such as {default}" if isinstance(default, (int, float, str)) else ""
    if need == "true or false":
        return f"write {SWITCHES.get(str(value).lower(), need)}"
    if need in ("a whole number", "a number") and isinstance(value, (str, float)):
        number = str(value).replace("_", "").strip()
        if re.fullmatch(r"-?[0-9]+(\.0+)?", number):
            return f"write {number.partition('.')[0]}"
    if need == "a list" and not isinstance(value, dict):
        many = _least(spot.field.annotation if spot.field else None)
        what = "it" if many == 1 else f"{many} values"
        return f"put {what} in brackets: [{', '.join([str(value)] * many)}]"
    if need == "text" and not isinstance(value, (dict, list)):
        return f'put it in quotes: "{value}"'
    if need == "a mapping of keys":
        names = [name for section in sections_of(spot.annotation)[:1] for name in section.model_fields]
        return (
            f"write keys below it: {', '.join(names[:8])}" if names else "write `key: value` lines below it"
        )
    if need.startswith("a slug"):
        slug = re.sub(r"[^a-z0-9]+", "-", str(value).lower()).strip("-")
        return f"write {slug}" if slug else "write a slug, such as gpt2-w8a8"
    return f"write {need}{example}" if need.startswith("a ") else f"write a value that is {need}{example}"


def spelling(words: Sequence[str], kinds: Sequence[type]) -> str:
    """Words of a closed set, with a remark if a mapping is allowed too."""
    return ", ".join(words) + (" (or a mapping)" if dict in kinds else "")
