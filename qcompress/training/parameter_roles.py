"""Role of every trainable parameter, read from declarations of the classes and never guessed from a name.

A parameter of the float model is a `weight` (of a layer of the architecture) or `other`. Every other
parameter belongs to a quantizer or to an adapter's rescaling, whose class declares its role:

    class Mine(CodedWeight):
        parameter_roles = {"alpha": "scale", "levels": "centroid"}

The names are those of the module's `named_parameters()`. A parameter that no class declares ends the run
before the first update, because its learning rate would be a guess.

Steppers that perturb parameters also need their kind (`method_options.Ball`): the scales of weights and of
activations, centroids, norms, biases, other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import get_args

from torch import nn

from qcompress.errors import UsageError
from qcompress.models.architecture import Layer
from qcompress.models.prepare import Prepared
from qcompress.quant.batchnorm import BATCH_NORMS
from qcompress.quant.rescaling import RescaledNorm
from qcompress.schema.method_options import Role

ROLES: tuple[str, ...] = get_args(Role)
NORMS = (nn.LayerNorm, nn.GroupNorm, *BATCH_NORMS, RescaledNorm)


@dataclass(frozen=True)
class ParameterRole:
    """Role of one parameter, and its kind for steppers that perturb selected kinds."""

    role: str
    kind: str
    declared: bool = False
    """True for a parameter of a quantizer or adapter, False for one of the float model."""


def parameter_roles(
    prepared: Prepared, layers: Iterable[Layer], float_names: Collection[str]
) -> dict[str, ParameterRole]:
    """Role and kind of each parameter of a prepared model, by name. `float_names`: the tensors of the float
    model. Raises UsageError for a parameter that its class does not declare.
    """
    declared: dict[int, ParameterRole] = {}
    for name, rescaling in prepared.rescalings.items():
        _declare(declared, f"the rescaling of {name}", rescaling, "other")
    for name, quantizer in prepared.weight_quantizers():
        _declare(declared, f"the weight quantizer of {name}", quantizer, "weight-scale")
    for name, quantizer in prepared.activation_quantizers():
        _declare(declared, f"the quantizer of {name}", quantizer, "activation-scale")
    weights = {f"{layer.name}.weight" for layer in layers}
    roles: dict[str, ParameterRole] = {}
    for name, parameter in prepared.model.named_parameters():
        if id(parameter) in declared:
            roles[name] = declared[id(parameter)]
        elif name in float_names:
            role = "weight" if name in weights else "other"
            roles[name] = ParameterRole(role, kind_of_float(prepared.model, name))
        else:
            raise UsageError(
                f"the parameter {name} belongs neither to the float model nor to a quantizer or a rescaling, "
                "so that its learning rate is unknown and it would not be in the trained model",
                fix="keep parameters in a quantizer, or in the module given to Prepared.rescale",
            )
    return roles


def kind_of_float(model: nn.Module, name: str) -> str:
    """Kind of a parameter of the float model: norm, bias or other, by the module that holds it."""
    owner, _, attribute = name.rpartition(".")
    if isinstance(model.get_submodule(owner), NORMS):
        return "norm"
    return "bias" if attribute == "bias" else "other"


def _declare(declared: dict[int, ParameterRole], owner: str, module: nn.Module, scale_kind: str) -> None:
    """Add the roles of one module's parameters. Parameters of a shared rescaling are added once, for the
    adapter.
    """
    roles: Mapping[str, str] = getattr(module, "parameter_roles", {})
    for name, parameter in module.named_parameters():
        if id(parameter) in declared:
            continue
        role = roles.get(name)
        if role not in ROLES:
            problem = "is not declared" if role is None else f"has the role {role!r}, which does not exist"
            raise UsageError(
                f"{type(module).__name__} ({owner}): the parameter {name!r} {problem}, so that its learning "
                "rate is unknown",
                fix=f"declare it in the class: parameter_roles = {_wanted(module, name)}, where the role is "
                f"one of {', '.join(ROLES)}",
            )
        kinds = {"scale": scale_kind, "centroid": "centroid"}
        declared[id(parameter)] = ParameterRole(role, kinds.get(role, "other"), declared=True)


def _wanted(module: nn.Module, name: str) -> str:
    roles = {**getattr(module, "parameter_roles", {}), name: "scale"}
    return "{" + ", ".join(f'"{key}": "{role}"' for key, role in roles.items()) + "}"
