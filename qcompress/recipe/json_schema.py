"""The JSON Schema (draft 2020-12) of a recipe, for editors: keys, words, defaults and help. No torch.

pydantic writes the schema of the long forms. Short forms (`format: w8a8`, `quantizer: lsq`, `noise: 0.2`) are
expanded before pydantic looks, and the names of methods, targets and phases are tables of ours: both are
added here, from the tables that `check` reads.

A recipe without `extends` must be whole. Of one that extends another file only the keys and values that it
writes are judged, because what it lacks may stand in the other; `check` reads both. Rules between values
(`source` or `run`, axes that do not combine) are `check`'s alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qcompress.recipe.rules.values import SLUG
from qcompress.recipe.validate import WORDS
from qcompress.schema.axes import AXES, METHODS, PHASES
from qcompress.schema.goals import METRICS, RESOURCES
from qcompress.schema.quantizers import ROLES
from qcompress.schema.recipe import TRACKERS, Recipe
from qcompress.schema.targets import TARGETS

DRAFT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


def recipe_schema() -> Schema:
    """The schema of a recipe file."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    for section in (schema, *definitions.values()):
        _forget_titles(section)
    _any_branch(schema)
    _short_words(schema)
    _short_names(schema)
    _known_names(schema)
    _whole_unless_it_extends(schema)
    properties = {"extends": {"type": "string", "minLength": 1, "description": EXTENDS}}
    schema["properties"] = properties | schema["properties"]
    head = {"$schema": DRAFT, "title": "A recipe of qcompress", "description": schema.pop("description")}
    return head | schema


EXTENDS = (
    "Another recipe, relative to this file, that this one lies over: mappings are merged, all else replaced."
)


def _forget_titles(section: Schema) -> None:
    """pydantic's titles are the keys again, in capitals."""
    section.pop("title", None)
    for field in section.get("properties", {}).values():
        field.pop("title", None)


def _any_branch(value: Any) -> None:
    """Options without a name (`stepper: {clip_norm: 2}`) belong to what the method chose, and several values
    of an axis may have them: one branch that fits is enough.
    """
    if isinstance(value, dict):
        value.pop("discriminator", None)
        if "oneOf" in value:
            value["anyOf"] = value.pop("oneOf")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _any_branch(item)


def _short_words(schema: Schema) -> None:
    """The words of `WORDS` beside the long forms; `float` is how a recipe writes that there is no format."""
    for key, words, kinds in WORDS:
        parent, name = _parent(schema, key)
        field = parent[name]
        long = [branch for branch in _branches(field) if "$ref" in branch and dict in kinds]
        parent[name] = {
            **{part: field[part] for part in ("description",) if part in field},
            "anyOf": [{"enum": list(words)}, *long, *([{"type": "null"}] if type(None) in kinds else [])],
            **({"default": "float" if field["default"] is None else field["default"]}
               if "default" in field and key != ("format", "preset") else {}),
        }  # fmt: skip


def _short_names(schema: Schema) -> None:
    """An axis, a task or a tracker by its name alone."""
    for key in ("task", *(axis for axis in AXES if axis != "quantizer")):
        _beside(schema["properties"], key, {"enum": _names(schema, schema["properties"][key])})
    _beside(schema["properties"], "tracking", {"enum": list(TRACKERS)})
    roles = schema["$defs"]["Quantizers"]["properties"]
    options: list[Schema] = []
    for role in (*ROLES, "codebook"):
        found = _names(schema, roles[role])
        options += [branch for branch in _branches(roles[role]) if branch not in options]
        _beside(roles, role, {"enum": found})
    shares = [{"type": "number", "minimum": 0, "maximum": 1}, {"const": "none"}]
    roles["noise"]["anyOf"] += shares
    every = [value.model_fields["name"].default for value in AXES["quantizer"]]
    _beside(schema["properties"], "quantizer", {"enum": every})
    schema["properties"]["quantizer"]["anyOf"] += [
        _with_noise(schema, branch, roles["noise"]) for branch in options
    ]


def _with_noise(schema: Schema, branch: Schema, noise: Schema) -> Schema:
    """A quantizer's options for all roles at once, which `noise` may stand beside."""
    section = _target(schema, branch)
    return {**section, "properties": {**section["properties"], "noise": noise}}


def _known_names(schema: Schema) -> None:
    """Names that a table of ours knows."""
    properties, definitions = schema["properties"], schema["$defs"]
    properties["method"]["description"] += " " + "; ".join(
        f"{name}: {', '.join(map(_spelled, axes.values()))}" for name, axes in METHODS.items()
    )
    definitions["Build"]["properties"]["target"]["enum"] = list(TARGETS)
    phases = sorted({phase for found in PHASES.values() for phase in found})
    definitions["Train"]["properties"]["phases"]["propertyNames"] = {"enum": phases}
    definitions["Data"]["properties"]["evaluate"]["propertyNames"] = {
        "pattern": f"^(?:{SLUG.pattern})$",
        "maxLength": 100,
    }
    metric = rf"^.+\.(?:{'|'.join(METRICS)})"
    gate = definitions["Gate"]["properties"]
    for goals in ("float_floor", "recovery"):
        gate[goals]["propertyNames"] = {"pattern": f"{metric}$"}
    gate["regression"]["propertyNames"] = {"pattern": rf"{metric}(?:@[^=]+=.+)?$|^(?:{'|'.join(RESOURCES)})$"}


def _spelled(value: object) -> str:
    return str(value["name"]) if isinstance(value, dict) else str(value)


def _whole_unless_it_extends(schema: Schema) -> None:
    """Move what is required out of the sections, to where it depends on `extends`."""
    needed: Schema = {"required": schema.pop("required"), "properties": {}}
    for key in ("model", "data"):
        section = _target(schema, schema["properties"][key])
        needed["properties"][key] = {"required": section.pop("required")}
    steps = schema["$defs"]["PhaseOptions"].pop("required")
    phase = {"additionalProperties": {"required": steps}}
    needed["properties"]["train"] = {"properties": {"phases": phase}}
    needed["properties"]["task"] = {"if": {"type": "object"}, "then": {"required": ["name"]}}
    schema["if"], schema["else"] = {"required": ["extends"]}, needed


# Walking ------------------------------------------------------------------------------------------


def _parent(schema: Schema, key: tuple[Any, ...]) -> tuple[Schema, str]:
    """Where a key of a recipe stands in the schema; `*` is any key of a mapping."""
    section: Schema = schema
    for part in key[:-1]:
        field = section["additionalProperties"] if part == "*" else section["properties"][part]
        section = field if "additionalProperties" in field else _target(schema, field)
    return (section, "additionalProperties") if key[-1] == "*" else (section["properties"], str(key[-1]))


def _target(schema: Schema, field: Schema) -> Schema:
    """What a field refers to: its one section, whatever words may stand in its place."""
    reference = next(branch["$ref"] for branch in _branches(field) if "$ref" in branch)
    return schema["$defs"][reference.rpartition("/")[2]]


def _branches(field: Schema) -> Iterator[Schema]:
    if "anyOf" in field:
        for branch in field["anyOf"]:
            yield from _branches(branch)
    else:
        yield {"$ref": field["$ref"]} if "$ref" in field else field


def _beside(parent: Schema, key: str, short: Schema) -> None:
    """Let a short form stand in the place of a field's value."""
    field = parent[key]
    kept = {part: field[part] for part in ("description", "default") if part in field}
    parent[key] = {**kept, "anyOf": [short, *_branches(field)]}


def _names(schema: Schema, field: Schema) -> list[str]:
    """The names of the values that a field chooses among."""
    sections = [_target(schema, branch) for branch in _branches(field)]
    return [section["properties"]["name"]["const"] for section in sections]
