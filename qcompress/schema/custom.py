"""Custom components: a user's classes of the axes, for one call of the Python API. No torch.

    class Mine(CodedWeight): ...
    qcompress.run("recipe.yaml", quantizers={"mine": Mine})     # quantizer: {weights: mine, activations: lsq}

A class implements its axis's protocol (`Quantizer` of `quant/quantizers.py`, the others are in
`methods/protocols.py`) and is constructed like the built-in ones:

    quantizers   of a weight (with `codes_of`, `parts` and `of_rows`, as a CodedWeight has):
                 cls(options, grid, bounds, shape); of an activation: cls(options, bounds, channels)
    adapters     cls(options)
    objectives   cls(options, task_loss), with task_loss(logits, batch)
    steppers     cls(options)

Its options are the attribute `Options`, a subclass of `qcompress.schema.formats.Options`, so that a recipe's
mistakes in them are reported like all others; without the attribute it has no options. Quantizers, and
the rescalings that an adapter installs, declare the role of each parameter, which chooses its learning rate:

    parameter_roles = {"alpha": "scale"}        one of weight, scale, adapter, centroid, other

The train stage's key covers the code that the class can run (`custom_code.py`): its bases, the user's files
that they import, installed packages by version, and modules of this package. Folding erases the method: a run
with a custom class is opened, judged and deployed without the class. Custom schedules are not supported: the
names of their phases are recipe keys, which are checked before training.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field, create_model

from qcompress.errors import UsageError
from qcompress.schema.adapters import NoAdapter
from qcompress.schema.axes import AXES
from qcompress.schema.custom_code import CustomCode, code_of
from qcompress.schema.formats import Options
from qcompress.schema.method_options import PlainStepper, TaskObjective
from qcompress.schema.quantizers import ROLES, Quantizers, named, quantizers
from qcompress.schema.recipe import RECIPE, Recipe

PROTOCOLS: dict[str, tuple[str, ...]] = {
    "quantizer": ("init", "__call__", "advance", "scale_of"),
    "adapter": ("attach", "fold"),
    "objective": ("attach", "begin", "loss", "detach"),
    "stepper": ("attach", "step", "state_dict", "load_state_dict"),
}
"""Methods that a class must have, by axis: those of its protocol."""

OF_WEIGHTS = ("codes_of", "parts", "of_rows")
"""Methods that a quantizer of weights must have besides, which `CodedWeight` has."""

PROTOCOL_FILES = {"quantizer": "qcompress/quant/quantizers.py"}
OTHER_PROTOCOLS = "qcompress/training/methods/protocols.py"

DEFAULTS = {"adapter": NoAdapter(), "objective": TaskObjective(), "stepper": PlainStepper()}


class Unchecked(Options):
    """Unvalidated options of a custom component, for loading finished runs without its class."""

    model_config = ConfigDict(extra="allow")


@dataclass(frozen=True)
class CustomClasses:
    """Custom classes by axis and name."""

    classes: Mapping[str, Mapping[str, type]] = field(default_factory=dict)

    def used(self, recipe: Recipe) -> dict[str, list[str]]:
        """Names of custom classes that a recipe uses, by axis; axes without any are omitted."""
        tables = recipe.quantizer
        named = {
            "quantizer": {tables.weights.name, tables.activations.name, tables.embeddings.name},
            "adapter": {recipe.adapter.name},
            "objective": {recipe.objective.name},
            "stepper": {recipe.stepper.name},
        }
        names_by_axis = {axis: sorted(named[axis] & classes.keys()) for axis, classes in self.classes.items()}
        return {axis: names for axis, names in names_by_axis.items() if names}

    def code(self, recipe: Recipe) -> CustomCode:
        """Code that the custom classes of a recipe can run."""
        used = self.used(recipe)
        return code_of(
            {f"{axis} {name}": self.classes[axis][name] for axis, names in used.items() for name in names}
        )


_NONE = CustomClasses()
_ACTIVE: ContextVar[CustomClasses] = ContextVar("own", default=_NONE)


def active() -> CustomClasses:
    """Custom components of the current run()."""
    return _ACTIVE.get()


def class_of(axis: str, name: str, table: Mapping[str, type]) -> type:
    """Class of an axis value: a custom one, or that of this package's table."""
    return active().classes.get(axis, {}).get(name) or table[name]


@contextmanager
def among(classes: Mapping[str, Mapping[str, type] | None]) -> Iterator[None]:
    """Context in which recipes may name these classes, by axis. Raises UsageError for an unusable class."""
    custom = CustomClasses({axis: dict(classes_of_axis or {}) for axis, classes_of_axis in classes.items()})
    for axis, classes_of_axis in custom.classes.items():
        for name, kind in classes_of_axis.items():
            _check(axis, name, kind)
    sections = {
        axis: {
            name: _section(name, getattr(kind, "Options", Options)) for name, kind in classes_of_axis.items()
        }
        for axis, classes_of_axis in custom.classes.items()
    }
    weights = {
        name for name, kind in custom.classes.get("quantizer", {}).items() if hasattr(kind, "codes_of")
    }
    active_token, recipe_token = _ACTIVE.set(custom), RECIPE.set(_recipe(sections, weights))
    try:
        yield
    finally:
        _ACTIVE.reset(active_token)
        RECIPE.reset(recipe_token)


@contextmanager
def recorded(names: Mapping[str, list[str]]) -> Iterator[None]:
    """Context in which recipes may name the custom classes of a finished run; they cannot be trained with."""
    sections = {
        axis: {name: _section(name, Unchecked) for name in names_of_axis}
        for axis, names_of_axis in names.items()
    }
    token = RECIPE.set(_recipe(sections, None))
    try:
        yield
    finally:
        RECIPE.reset(token)


def _check(axis: str, name: str, kind: object) -> None:
    what = f"{axis} {name!r}"
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise UsageError(f"{what} is not a valid name in a recipe", fix="lower case, digits and hyphens")
    taken = [section.model_fields["name"].default for section in AXES[axis]]
    if name in taken:
        raise UsageError(f"{what} is taken", fix=f"another name than {', '.join(taken)}")
    if not isinstance(kind, type):
        raise UsageError(f"{what} must be a class, found {kind!r}", fix="pass the class, not an instance")
    missing = [method for method in PROTOCOLS[axis] if not callable(getattr(kind, method, None))]
    if missing:
        raise UsageError(
            f"{what} ({kind.__name__}) has no {', '.join(missing)}",
            fix=f"implement the protocol {axis.capitalize()} of {PROTOCOL_FILES.get(axis, OTHER_PROTOCOLS)}",
        )
    lacking = [method for method in OF_WEIGHTS if not callable(getattr(kind, method, None))]
    if axis == "quantizer" and 0 < len(lacking) < len(OF_WEIGHTS):
        raise UsageError(
            f"{what} ({kind.__name__}) has some methods of a weight's quantizer and no {', '.join(lacking)}",
            fix="derive it from qcompress.quant.weight_quantizer.CodedWeight",
        )
    options = getattr(kind, "Options", Options)
    if not (isinstance(options, type) and issubclass(options, Options)):
        raise UsageError(
            f"{what}: {kind.__name__}.Options is not a section of a recipe",
            fix="derive it from qcompress.schema.formats.Options",
        )


def _section(name: str, base: type[Options]) -> type[Options]:
    return create_model(base.__name__, __base__=base, name=(Literal[name], name))


def _recipe(sections: Mapping[str, Mapping[str, type[Options]]], weights: set[str] | None) -> type[Recipe]:
    """Recipe schema extended by these sections; `weights` names the quantizers of weights among them, None:
    each may quantize weights or activations.
    """
    fields: dict[str, Any] = {}
    for axis, default in DEFAULTS.items():
        if sections.get(axis):
            fields[axis] = (_union([*AXES[axis], *sections[axis].values()]), default)
    custom_quantizers = sections.get("quantizer", {})
    if custom_quantizers:
        roles: dict[str, Any] = {}
        for role in ROLES:
            usual = Quantizers.model_fields[role]
            known = get_args(usual.annotation)
            for_weights = role != "activations"
            mine = [
                section
                for name, section in custom_quantizers.items()
                if weights is None or (name in weights) == for_weights
            ]
            roles[role] = (_union([*known, *mine]), usual.default)
        both = create_model("Quantizers", __base__=Quantizers, **roles)
        fields["quantizer"] = (Annotated[both, BeforeValidator(quantizers)], both())
    return create_model("Recipe", __base__=Recipe, **fields) if fields else Recipe


def _union(sections: list[type[Options]]) -> Any:
    either = functools.reduce(operator.or_, sections)
    return Annotated[either, Field(discriminator="name"), BeforeValidator(named)]
