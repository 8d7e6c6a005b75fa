"""JSON Schema (draft 2020-12) of a recipe, for editors: keys, values, defaults and help. No torch.

pydantic writes the schema of the long forms. Short forms (`format: w8a8`, `quantizer: lsq`, `noise: 0.2`) are
expanded before pydantic validates, and names of methods, targets and phases are in tables: both are added
here, from the tables that `check` reads.

A recipe without `extends` must be complete. For a recipe with `extends` the schema checks only the keys and
values that it writes, because others may be in the extended file; `check` reads both. Rules between values
(`source` or `run`, axes that do not combine) are checked by `check` only.
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
from qcompress.schema.tasks import ALIASES

DRAFT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


def recipe_schema() -> Schema:
    """JSON Schema of a recipe file."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    for section in (schema, *definitions.values()):
        _remove_titles(section)
    _any_branch(schema)
    _short_words(schema)
    _short_names(schema)
    _known_names(schema)
    _require_unless_extending(schema)
    properties = {"extends": {"type": "string", "minLength": 1, "description": EXTENDS}}
    schema["properties"] = properties | schema["properties"]
    head = {"$schema": DRAFT, "title": "A recipe of qcompress", "description": schema.pop("description")}
    return head | schema


EXTENDS = (
    "Another recipe, relative to this file, that this one lies over: mappings are merged, all else replaced."
)


def _remove_titles(section: Schema) -> None:
    """Remove pydantic's titles, which repeat the keys."""
    section.pop("title", None)
    for field in section.get("properties", {}).values():
        field.pop("title", None)


def _any_branch(value: Any) -> None:
    """Replace `oneOf` by `anyOf`: options without a name (`stepper: {clip_norm: 2}`) belong to the method's
    choice, and several values of an axis may have them.
    """
    if isinstance(value, dict):
        value.pop("discriminator", None)
        if "oneOf" in value:
            value["anyOf"] = value.pop("oneOf")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _any_branch(item)


def _short_words(schema: Schema) -> None:
    """Add the words of `WORDS` to the long forms; a format of None is written `float`."""
    for key, words, kinds in WORDS:
        parent, name = _parent(schema, key)
        field = parent[name]
        long = [branch for branch in _branches(field) if "$ref" in branch and dict in kinds]
        parent[name] = {
            **{attribute: field[attribute] for attribute in ("description",) if attribute in field},
            "anyOf": [{"enum": list(words)}, *long, *([{"type": "null"}] if type(None) in kinds else [])],
            **({"default": "float" if field["default"] is None else field["default"]}
               if "default" in field and key != ("format", "preset") else {}),
        }  # fmt: skip


def _short_names(schema: Schema) -> None:
    """Allow an axis, a task or a tracker to be written as its name."""
    for key in ("task", *(axis for axis in AXES if axis != "quantizer")):
        names = _names(schema, schema["properties"][key])
        if key == "task":
            _allow_aliases(schema, names)
            names += ALIASES
        _allow_short_form(schema["properties"], key, {"enum": names})
    _allow_short_form(schema["properties"], "tracking", {"enum": list(TRACKERS)})
    roles = schema["$defs"]["Quantizers"]["properties"]
    options: list[Schema] = []
    for role in (*ROLES, "codebook"):
        names = _names(schema, roles[role])
        options += [branch for branch in _branches(roles[role]) if branch not in options]
        _allow_short_form(roles, role, {"enum": names})
    shares = [{"type": "number", "minimum": 0, "maximum": 1}, {"const": "none"}]
    roles["noise"]["anyOf"] += shares
    every = [value.model_fields["name"].default for value in AXES["quantizer"]]
    _allow_short_form(schema["properties"], "quantizer", {"enum": every})
    schema["properties"]["quantizer"]["anyOf"] += [
        _with_noise(schema, branch, roles["noise"]) for branch in options
    ]


def _allow_aliases(schema: Schema, names: list[str]) -> None:
    """Allow a task's names in other tools where its own stands."""
    sections = [_target(schema, branch) for branch in _branches(schema["properties"]["task"])]
    for name, section in zip(names, sections, strict=True):
        if others := [alias for alias, task in ALIASES.items() if task == name]:
            field = section["properties"]["name"]
            field["enum"] = [field.pop("const"), *others]


def _with_noise(schema: Schema, branch: Schema, noise: Schema) -> Schema:
    """A quantizer's options for all roles at once, to which `noise` may be added."""
    section = _target(schema, branch)
    return {**section, "properties": {**section["properties"], "noise": noise}}


def _known_names(schema: Schema) -> None:
    """Add names from the tables of methods, targets, phases and metrics."""
    properties, definitions = schema["properties"], schema["$defs"]
    properties["method"]["description"] += " " + "; ".join(
        f"{name}: {', '.join(map(_short_form, axes.values()))}" for name, axes in METHODS.items()
    )
    definitions["Build"]["properties"]["target"]["enum"] = list(TARGETS)
    phases = sorted({phase for phases_of_schedule in PHASES.values() for phase in phases_of_schedule})
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


def _short_form(value: object) -> str:
    return str(value["name"]) if isinstance(value, dict) else str(value)


def _require_unless_extending(schema: Schema) -> None:
    """Move `required` from the sections into a condition on `extends`."""
    needed: Schema = {"required": schema.pop("required"), "properties": {}}
    for key in ("model", "data"):
        section = _target(schema, schema["properties"][key])
        needed["properties"][key] = {"required": section.pop("required")}
    steps = schema["$defs"]["PhaseOptions"].pop("required")
    phase = {"additionalProperties": {"required": steps}}
    needed["properties"]["train"] = {"properties": {"phases": phase}}
    needed["properties"]["task"] = {"if": {"type": "object"}, "then": {"required": ["name"]}}
    schema["if"], schema["else"] = {"required": ["extends"]}, needed


# Navigation in the schema -------------------------------------------------------------------------


def _parent(schema: Schema, key: tuple[Any, ...]) -> tuple[Schema, str]:
    """Schema section and name of a recipe key; `*` is any key of a mapping."""
    section: Schema = schema
    for part in key[:-1]:
        field = section["additionalProperties"] if part == "*" else section["properties"][part]
        section = field if "additionalProperties" in field else _target(schema, field)
    return (section, "additionalProperties") if key[-1] == "*" else (section["properties"], str(key[-1]))


def _target(schema: Schema, field: Schema) -> Schema:
    """Section that a field refers to, ignoring short forms."""
    reference = next(branch["$ref"] for branch in _branches(field) if "$ref" in branch)
    return schema["$defs"][reference.rpartition("/")[2]]


def _branches(field: Schema) -> Iterator[Schema]:
    if "anyOf" in field:
        for branch in field["anyOf"]:
            yield from _branches(branch)
    else:
        yield {"$ref": field["$ref"]} if "$ref" in field else field


def _allow_short_form(parent: Schema, key: str, short: Schema) -> None:
    """Allow a short form in place of a field's value."""
    field = parent[key]
    kept = {attribute: field[attribute] for attribute in ("description", "default") if attribute in field}
    parent[key] = {**kept, "anyOf": [short, *_branches(field)]}


def _names(schema: Schema, field: Schema) -> list[str]:
    """Names of the values among which a field chooses."""
    sections = [_target(schema, branch) for branch in _branches(field)]
    return [section["properties"]["name"]["const"] for section in sections]
