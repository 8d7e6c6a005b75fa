"""Layers on which the logits depend: a graph has no others, since an exporter drops what nothing reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.models.structure.running import tensors_of

GRAPH = ("logits", "start_logits", "end_logits")
"""Outputs that a graph has, of a model that names its outputs."""


def unreached(model: nn.Module, run: Callable[[], Any], layers: Iterable[str]) -> list[str]:
    """Names of layers on whose weight no output of the graph depends, as the pooler of a masked language
    model. `run` calls the model. Follows autograd's graph; no gradient is computed.
    """
    weights = {name: model.get_submodule(name).weight for name in layers}
    before = {name: weight.requires_grad for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            reached = _leaves(_graph_outputs(run()))
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(before[name])
    return [name for name, weight in weights.items() if id(weight) not in reached]


def _graph_outputs(output: Any) -> list[Tensor]:
    if isinstance(output, Mapping):
        named = [output[name] for name in GRAPH if output.get(name) is not None]
        if named:
            return named
    return tensors_of(output)


def _leaves(outputs: Iterable[Tensor]) -> set[int]:
    """Identities of the parameters from which outputs were computed."""
    waiting = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    seen: set[Any] = set(waiting)
    leaves = set()
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        for other, _ in node.next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                waiting.append(other)
    return leaves
