"""Values recorded at a training log point: the terms of a loss, and learned scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from qcompress.models.prepare import Prepared
from qcompress.quant.codebook import is_codebook
from qcompress.quant.dynamic import DynamicActivation
from qcompress.training.history import Scale
from qcompress.training.methods.protocols import Objective

if TYPE_CHECKING:
    from qcompress.training.state import Training

DIGITS = 6
"""Digits of a recorded scale."""


@runtime_checkable
class OfTerms(Protocol):
    """An objective that sums several losses and keeps the terms of the last sum."""

    terms: Mapping[str, Tensor]
    """Terms of the last loss, [] each, with their weights applied."""


class LossRecorder:
    """Losses of one update with their terms. A stepper may evaluate several losses and report one of them."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._losses: list[tuple[Tensor, dict[str, Tensor]]] = []

    def record(self, loss: Tensor) -> Tensor:
        """Record a loss and return it."""
        terms = dict(self._objective.terms) if isinstance(self._objective, OfTerms) else {}
        self._losses.append((loss.detach(), terms))
        return loss

    def terms_of(self, reported: float) -> dict[str, float]:
        """Terms of the reported loss; empty if it was not recorded."""
        for loss, terms in self._losses:
            if loss.item() == reported:
                return {name: term.item() for name, term in terms.items()}
        return {}


def learned(prepared: Prepared, scope: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules with a learned scale under `scope`, by the scale's name: the quantizers of `<layer>.weight`,
    `<layer>.input` and `<point>`, and the rescaling `<writer>.rescale`.

    Codebooks and dynamic activation quantizers are left out; a dynamic quantizer behind an adapter holds only
    the parameters of the rescaling.
    """
    weights = ((f"{name}.weight", part) for name, part in prepared.weight_quantizers())
    rescalings = ((f"{name}.rescale", part) for name, part in prepared.rescalings.items())
    for name, part in (*weights, *prepared.activation_quantizers(), *rescalings):
        if name.startswith(scope) and not _without_scale(part) and any(True for _ in part.parameters()):
            yield name, part


def _without_scale(part: nn.Module) -> bool:
    return is_codebook(part) or isinstance(part, DynamicActivation)


@torch.no_grad()
def log_scales(training: Training, number: int, step: int, scope: str = "", last: bool = False) -> None:
    """Record the learned scales under `scope` after an update, if it is a log point. `last`: record the final
    scales of a block in any case.
    """
    history, prepared = training.history, training.prepared
    if history.scales_due(number, step) or (last and training.processes.first):
        summaries = {name: _summary(_scale(prepared, name, part)) for name, part in learned(prepared, scope)}
        history.scales(number, step, summaries)


def _scale(prepared: Prepared, name: str, part: nn.Module) -> Tensor:
    if name.endswith(".rescale"):
        return part()
    if name.endswith(".weight"):
        return part.scale_of(prepared.layers[name.removesuffix(".weight")].coded_weight())
    return part.scale_of()


def _summary(scale: Tensor) -> Scale:
    values = scale.detach().float().flatten().cpu()
    if values.numel() == 1:
        return _rounded(values[0])
    return [_rounded(value) for value in (values.min(), values.median(), values.max())]


def _rounded(value: Tensor) -> float:
    return float(f"{value.item():.{DIGITS}g}")
