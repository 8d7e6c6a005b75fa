"""Run a model of any kind, collect the tensors that it returns, and keep its state unchanged."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of a forward's output, in a fixed order, from nested containers and dataclasses."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        parts = list(output.values())
    elif isinstance(output, list | tuple):
        parts = list(output)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        parts = [getattr(output, field.name) for field in dataclasses.fields(output)]
    else:
        parts = []
    return [tensor for part in parts for tensor in tensors_of(part)]


def configs_of(model: nn.Module) -> list[Any]:
    """The different `config` objects of a model's modules."""
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None))
    }
    return list(configs.values())


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, key-value caches and torch's fused encoder layer, which calls no
    modules; afterwards every module has its mode again, and torch its random state.
    """
    is_fused = torch.backends.mha.get_fastpath_enabled()
    modes = {module: module.training for module in model.modules()}
    caching = [config for config in configs_of(model) if getattr(config, "use_cache", None) is True]
    try:
        for config in caching:
            config.use_cache = False
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fused)
        for config in caching:
            config.use_cache = True
        for module, training in modes.items():
            module.training = training


def without_constants(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random replacements of the parameters and batch statistics that hold one value only, by name.

    An untrained norm multiplies by 1 and adds 0, an untrained gate multiplies by 0: proofs with these values
    would accept a site that a trained model breaks.
    """
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        is_statistic = name.endswith(("running_mean", "running_var"))
        if not isinstance(tensor, nn.Parameter) and not is_statistic:
            continue
        if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            noise = torch.rand(tensor.shape, generator=generator) * 0.2 + 0.05
            values[name] = tensor.detach() + noise.to(tensor)
    return values
