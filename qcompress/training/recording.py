"""What a log point of training looks at: the terms of a loss, and learned scales."""

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
    from qcompress.training.loop import Training

DIGITS = 6
"""Digits of a recorded scale."""


@runtime_checkable
class OfTerms(Protocol):
    """An objective whose loss is a sum, and which remembers its terms."""

    terms: Mapping[str, Tensor]
    """Those of the last loss, [] each, weighted as they are summed."""


class Heard:
    """The losses of one update with their terms: a stepper may ask for several, and reports one."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._losses: list[tuple[Tensor, dict[str, Tensor]]] = []

    def of(self, loss: Tensor) -> Tensor:
        """Remember a loss and hand it on."""
        terms = dict(self._objective.terms) if isinstance(self._objective, OfTerms) else {}
        self._losses.append((loss.detach(), terms))
        return loss

    def terms_of(self, reported: float) -> dict[str, float]:
        """The terms of the loss that was reported; none where it is no loss that was asked for."""
        for loss, terms in self._losses:
            if loss.item() == reported:
                return {name: term.item() for name, term in terms.items()}
        return {}


def learned(prepared: Prepared, scope: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What has a learned scale under `scope`, by the name of the scale: the quantizers of `<layer>.weight`,
    `<layer>.input` and `<point>`, the rescaling `<writer>.rescale`. Codebooks have none to speak of, and
    dynamic activations none, though one behind an adapter holds the parameters of its rescaling.
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
    """Record the learned scales under `scope` behind an update, if that is a log point; the `last` ones of a
    block are recorded in any case.
    """
    history, prepared = training.history, training.prepared
    if history.scales_due(number, step) or (last and training.processes.first):
        found = {name: _summary(_scale(prepared, name, part)) for name, part in learned(prepared, scope)}
        history.scales(number, step, found)


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
