"""Methods of a user's own, for one call of the Python API: no fork, and no list here changes. No torch.

    class Mine(CodedWeight): ...
    qcompress.run("recipe.yaml", quantizers={"mine": Mine})     # quantizer: {weights: mine, activations: lsq}

A class fulfils its axis's protocol (`methods/protocols.py`) and is built as this package's own are:

    quantizers   of a weight (with `codes_of`, best a CodedWeight of `quant/weight_quantizer.py`):
                 cls(options, grid, bounds, shape); of an activation: cls(options, bounds, channels)
    adapters     cls(options)
    objectives   cls(options, task_loss), with task_loss(logits, batch)
    steppers     cls(options)

Its options are the attribute `Options`, a subclass of `qcompress.schema.formats.Options`, so that a recipe's
mistakes in them are found and worded as in all others; without the attribute it has none. Quantizers, and
the rescalings that an adapter installs, declare the role of each parameter, which chooses its learning rate:

    parameter_roles = {"alpha": "scale"}        one of weight, scale, adapter, centroid, other

The train stage's key covers the code that the class can run (`custom_code.py`): its bases, the user's files
that they import, installed packages by version, and modules of this package. Folding erases the method: a run
that was made with a class of one's own is opened, judged and deployed without it. Schedules are not offered
here: their phases' names are keys of the recipe, which is checked before anything is trained.
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
"""What a class must have, by axis."""

DEFAULTS = {"adapter": NoAdapter(), "objective": TaskObjective(), "stepper": PlainStepper()}


class Unchecked(Options):
    """Options of a class that is not here: of a finished run, which does not need them."""

    model_config = ConfigDict(extra="allow")


@dataclass(frozen=True)
class Own:
    """Classes by axis and name."""

    classes: Mapping[str, Mapping[str, type]] = field(default_factory=dict)

    def used(self, recipe: Recipe) -> dict[str, list[str]]:
        """Names that a recipe uses, by axis; without axes where it uses none."""
        tables = recipe.quantizer
        named = {
            "quantizer": {tables.weights.name, tables.activations.name, tables.embeddings.name},
            "adapter": {recipe.adapter.name},
            "objective": {recipe.objective.name},
            "stepper": {recipe.stepper.name},
        }
        found = {axis: sorted(named[axis] & classes.keys()) for axis, classes in self.classes.items()}
        return {axis: names for axis, names in found.items() if names}

    def code(self, recipe: Recipe) -> CustomCode:
        """The code that the classes of a recipe can run."""
        used = self.used(recipe)
        return code_of(
            {f"{axis} {name}": self.classes[axis][name] for axis, names in used.items() for name in names}
        )


_NONE = Own()
_ACTIVE: ContextVar[Own] = ContextVar("own", default=_NONE)


def active() -> Own:
    """What the call that is running was given."""
    return _ACTIVE.get()


def class_of(axis: str, name: str, table: Mapping[str, type]) -> type:
    """The class of an axis's value: the user's own, or that of this package's table."""
    return active().classes.get(axis, {}).get(name) or table[name]


@contextmanager
def among(classes: Mapping[str, Mapping[str, type] | None]) -> Iterator[None]:
    """Inside, recipes may name these classes, by axis. Raises UsageError for one that cannot be used."""
    own = Own({axis: dict(found or {}) for axis, found in classes.items()})
    for axis, found in own.classes.items():
        for name, kind in found.items():
            _check(axis, name, kind)
    sections = {
        axis: {name: _section(name, getattr(kind, "Options", Options)) for name, kind in found.items()}
        for axis, found in own.classes.items()
    }
    weights = {name for name, kind in own.classes.get("quantizer", {}).items() if hasattr(kind, "codes_of")}
    active_token, recipe_token = _ACTIVE.set(own), RECIPE.set(_recipe(sections, weights))
    try:
        yield
    finally:
        _ACTIVE.reset(active_token)
        RECIPE.reset(recipe_token)


@contextmanager
def recorded(names: Mapping[str, list[str]]) -> Iterator[None]:
    """Inside, recipes may name what a finished run was made with; nothing can be trained with it."""
    sections = {axis: {name: _section(name, Unchecked) for name in found} for axis, found in names.items()}
    token = RECIPE.set(_recipe(sections, None))
    try:
        yield
    finally:
        RECIPE.reset(token)


def _check(axis: str, name: str, kind: object) -> None:
    what = f"{axis} {name!r}"
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise UsageError(f"{what} is no name for a recipe", fix="lower case, digits and hyphens")
    taken = [section.model_fields["name"].default for section in AXES[axis]]
    if name in taken:
        raise UsageError(f"{what} is taken", fix=f"another name than {', '.join(taken)}")
    if not isinstance(kind, type):
        raise UsageError(f"{what} must be a class, found {kind!r}", fix="pass the class, not an instance")
    missing = [method for method in PROTOCOLS[axis] if not callable(getattr(kind, method, None))]
    if missing:
        raise UsageError(
            f"{what} ({kind.__name__}) has no {', '.join(missing)}",
            fix=f"fulfil the protocol {axis.capitalize()} of qcompress/training/methods/protocols.py",
        )
    options = getattr(kind, "Options", Options)
    if not (isinstance(options, type) and issubclass(options, Options)):
        raise UsageError(
            f"{what}: {kind.__name__}.Options is no section of a recipe",
            fix="derive it from qcompress.schema.formats.Options",
        )


def _section(name: str, base: type[Options]) -> type[Options]:
    return create_model(base.__name__, __base__=base, name=(Literal[name], name))


def _recipe(sections: Mapping[str, Mapping[str, type[Options]]], weights: set[str] | None) -> type[Recipe]:
    """The schema of recipes with these sections beside the usual ones; `weights` names the quantizers of
    weights among them, None: each may be either.
    """
    fields: dict[str, Any] = {}
    for axis, default in DEFAULTS.items():
        if sections.get(axis):
            fields[axis] = (_union([*AXES[axis], *sections[axis].values()]), default)
    own = sections.get("quantizer", {})
    if own:
        parts: dict[str, Any] = {}
        for part in ROLES:
            usual = Quantizers.model_fields[part]
            known = get_args(usual.annotation)
            for_weights = part != "activations"
            mine = [
                section
                for name, section in own.items()
                if weights is None or (name in weights) == for_weights
            ]
            parts[part] = (_union([*known, *mine]), usual.default)
        both = create_model("Quantizers", __base__=Quantizers, **parts)
        fields["quantizer"] = (Annotated[both, BeforeValidator(quantizers)], both())
    return create_model("Recipe", __base__=Recipe, **fields) if fields else Recipe


def _union(sections: list[type[Options]]) -> Any:
    either = functools.reduce(operator.or_, sections)
    return Annotated[either, Field(discriminator="name"), BeforeValidator(named)]
