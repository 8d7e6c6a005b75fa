"""Parameters of a norm that take a factor of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.models.structure.probe import channel_axis


def is_norm(module: nn.Module) -> bool:
    """True for a module without children whose weight has one axis, one factor for each channel."""
    parameters = dict(module.named_parameters(recurse=False))
    is_alone = not any(True for _ in module.children()) and not isinstance(module, nn.PReLU)
    return is_alone and "weight" in parameters and parameters["weight"].dim() == 1


def norm_factors(model: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> dict[str, str]:
    """Norm -> "weight" or "1 + weight": the value that a factor of the output multiplies (a bias is
    multiplied as well). A norm that takes a factor in neither way is left out. `run` calls the model.
    """
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if isinstance(output, Tensor):
                calls[name] = (
                    _copied(args),
                    dict(zip(keywords, _copied(keywords.values()), strict=True)),
                    output.clone(),
                )

        return keep

    modules = {name: model.get_submodule(name) for name in names}
    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    rules = {name: _rule(modules[name], *call) for name, call in calls.items()}
    return {name: rule for name, rule in rules.items() if rule is not None}


def _copied(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in values)


def _rule(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> str | None:
    """The rule that reproduces the norm's output times a factor of 1/4 to 4 for each channel."""
    values = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
    if "weight" not in values or values.keys() - {"weight", "bias"}:
        return None
    axis = channel_axis(module, output)
    if axis is None:
        return None
    generator = torch.Generator().manual_seed(0)
    factor = torch.exp2(torch.randint(-2, 3, values["weight"].shape, generator=generator)).to(output)
    shape = [1] * output.dim()
    shape[axis] = -1
    expected = output * factor.view(shape)
    for rule, offset in (("weight", 0.0), ("1 + weight", 1.0)):
        changed = {name: value * factor for name, value in values.items()}
        changed["weight"] = (values["weight"] + offset) * factor - offset
        actual = torch.func.functional_call(module, changed, args, keywords)
        if torch.allclose(actual, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())):
            return rule
    return None
