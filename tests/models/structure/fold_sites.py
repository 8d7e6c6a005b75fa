"""Rescaling sites folded by hand into a model in fp64, with random factors.

Written from the definition of `Site` alone; it shares no code with the proofs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qcompress.models.architecture import Site
from qcompress.models.structure import Structure


class _Double(TorchFunctionMode):
    """Casts to fp32 inside a model, such as those of softmax and RMSNorm, become casts to fp64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {
            name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()
        }
        return function(*args, **kwargs)


def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """All float tensors of a model's output, computed in fp64."""

    def flat(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from (tensor for item in value.values() for tensor in flat(item))
        elif isinstance(value, list | tuple):
            yield from (tensor for item in value for tensor in flat(item))

    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad(), _Double():
        return [x for x in flat(model(**wide)) if x.is_floating_point()]


def in_double(model: nn.Module) -> nn.Module:
    """A copy in fp64 and evaluation mode that returns no cache."""
    wide = copy.deepcopy(model).double().eval()
    for module in wide.modules():
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")  # the grouped product of experts has no fp64
    return wide


def factors(site: Site, generator: torch.Generator) -> Tensor:
    """Positive factors from about 1/30 to 30, fp64 [channels]."""
    return torch.randn(site.channels, generator=generator, dtype=torch.float64).mul(1.5).exp()


@contextmanager
def folded(model: nn.Module, structure: Structure, site: Site, scale: Tensor) -> Iterator[None]:
    """The model with a site's scale multiplied into the writer and divided out of the readers."""
    layers = {layer.name: layer for layer in structure.layers}
    changed = [site.writer, *site.readers, *(layer.norm for layer in structure.layers if layer.norm)]
    kept = {name: copy.deepcopy(model.get_submodule(name).state_dict()) for name in changed}
    try:
        with torch.no_grad():
            _multiply_writer(model, structure, site, scale)
            for place, name in enumerate(site.readers):
                index = site.maps[place] if site.maps else None
                index = range(site.channels) if index is None else index
                inverse = torch.tensor([1.0 if entry < 0 else 1 / scale[entry] for entry in index]).double()
                _multiply_inputs(model.get_submodule(name), layers[name].axis, inverse)
        yield
    finally:
        for name, state in kept.items():
            model.get_submodule(name).load_state_dict(state)


def _multiply_writer(model: nn.Module, structure: Structure, site: Site, scale: Tensor) -> None:
    writer = model.get_submodule(site.writer)
    channels = list(site.outputs) if site.outputs else list(range(site.first, site.first + site.channels))
    if site.kind == "norm":
        offset = {"weight": 0.0, "1 + weight": 1.0}[structure.norms[site.writer]]
        writer.weight[channels] = (writer.weight[channels] + offset) * scale - offset
    else:
        layer = structure.layer(site.writer)
        writer = model.get_submodule(layer.norm) if layer.norm else writer
        if layer.axis == 1:
            writer.weight[:, channels] *= scale
        else:
            writer.weight[channels] *= scale.view(-1, *[1] * (writer.weight.dim() - 1))
    if getattr(writer, "bias", None) is not None:
        writer.bias[channels] *= scale


def _multiply_inputs(reader: nn.Module, axis: int, factor: Tensor) -> None:
    """Multiply the weights of each input channel."""
    if axis == 1:
        reader.weight *= factor[:, None]
    elif reader.weight.dim() == 2:
        reader.weight *= factor
    else:
        outputs, inputs = reader.weight.shape[:2]
        for output in range(outputs):
            group = output // (outputs // reader.groups)
            reader.weight[output] *= factor[group * inputs : (group + 1) * inputs, None, None]


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference over the largest value, of all outputs."""
    assert len(actual) == len(expected) > 0
    return max(
        float((one - other).abs().max() / other.abs().max())
        for one, other in zip(actual, expected, strict=True)
    )
