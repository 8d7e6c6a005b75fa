"""How far a model is from its float self when single layers are rounded, and when single layers are not.

The distance is the mean over a sample's positions of the Kullback-Leibler divergence KL(float || rounded) of
what the model predicts, in nats; of several labels at once the sum over labels of that of each; of a number
the squared difference. It needs no labels, and its zero is the float model. Samples are independent: a mean
comes with its standard error over samples, and what leaving a layer float wins is paired, sample by sample.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.models.prepare import Prepared, replace_module
from qcompress.parity.measure import batches
from qcompress.parity.runners import TorchRunner
from qcompress.system.reporter import Reporter

Kind = Literal["single", "multi", "regression"]


@dataclass(frozen=True)
class Cost:
    """Mean over samples, its standard error, and what each sample said [samples]."""

    mean: float
    error: float
    samples: np.ndarray

    @classmethod
    def of(cls, samples: np.ndarray) -> Cost:
        """Of what each sample said; one sample alone has no error."""
        error = float(samples.std(ddof=1) / len(samples) ** 0.5) if len(samples) > 1 else float("nan")
        return cls(float(samples.mean()), error, samples)

    def to_json(self) -> list[float]:
        """[mean, standard error]."""
        return [self.mean, self.error]


@dataclass(frozen=True)
class Costs:
    """Of one format: all layers rounded, each one alone, and what each one wins by staying float."""

    all: Cost
    alone: dict[str, Cost]
    wins: dict[str, Cost]
    """Empty where that was not asked for."""


def divergence(reference: np.ndarray, found: np.ndarray, kind: Kind = "single") -> float:
    """Distance of logits [positions, outputs] from those of the float model, mean over positions."""
    return _apart(_predicted(reference, kind), _predicted(found, kind), kind)


def _predicted(logits: np.ndarray, kind: Kind) -> Tensor:
    """Log-probabilities [positions, outputs], of several labels [2, positions, outputs]; or the numbers."""
    values = torch.from_numpy(np.ascontiguousarray(logits)).double()
    if kind == "regression":
        return values
    if kind == "multi":
        return torch.stack([F.logsigmoid(values), F.logsigmoid(-values)])
    return values.log_softmax(-1)


def _apart(p: Tensor, q: Tensor, kind: Kind) -> float:
    if kind == "regression":
        return float((p - q).square().mean())
    return float(F.kl_div(q, p, reduction="sum", log_target=True) / p.shape[-2])


class Switches:
    """Turns the rounding of a model's weights, of their layers' inputs, and of its points off and on."""

    def __init__(self, prepared: Prepared, groups: Mapping[str, Collection[str]]) -> None:
        self.model, self.groups, self.points = prepared.model, groups, dict(prepared.rounding)
        self._own = {
            name: {part: getattr(layer, part, None) for part in ("weight_quantizer", "input_quantizer")}
            for name, layer in prepared.layers.items()
        }
        self._layers = prepared.layers

    def only(self, names: Collection[str], points: bool) -> None:
        """Round these weights, with the inputs of the layers that use them, and no others."""
        for owner, members in self.groups.items():
            for name in members:
                for part, quantizer in self._own[name].items():
                    if quantizer is not None:
                        setattr(self._layers[name], part, quantizer if owner in names else None)
        for name, rounding in self.points.items():
            replace_module(self.model, name, rounding if points else nn.Identity())


def measure_costs(
    prepared: Prepared,
    groups: Mapping[str, Collection[str]],
    task: Any,
    windows: list[Any],
    size: int,
    device: torch.device,
    reporter: Reporter,
    title: str,
    kind: Kind = "single",
    each: bool = True,
    wins: bool = True,
) -> Costs:
    """Costs of one format, on `windows` in batches of `size`; without `each`, of all layers together alone;
    without `wins`, not of what a layer wins by staying float, which takes the larger half of the time. Every
    batch goes through all settings, so that the float model's logits of one batch are all that is kept.
    """
    switches = Switches(prepared, groups)
    runner = TorchRunner(prepared.model, prepared.family, device)
    settings: dict[tuple[str, str], tuple[Collection[str], bool]] = {("all", ""): (groups, True)}
    single = list(groups) if each else []
    settings |= {("alone", name): ((name,), False) for name in single}
    floats = single if wins else []
    settings |= {("without", name): ([other for other in groups if other != name], True) for name in floats}
    found = {key: np.zeros(len(windows)) for key in settings}
    order = list(batches(task, windows, size))
    with reporter.bar(title, len(order) * len(settings)) as bar:
        for rows in order:
            batch = [windows[row] for row in rows]
            inputs = task.collate(batch)
            switches.only((), False)
            reference = [
                _predicted(task.compared(window, logits), kind)
                for window, logits in zip(batch, runner(inputs), strict=True)
            ]
            for key, (names, points) in settings.items():
                switches.only(names, points)
                for row, window, before, now in zip(rows, batch, reference, runner(inputs), strict=True):
                    found[key][row] = _apart(before, _predicted(task.compared(window, now), kind), kind)
                bar.advance(key[1] or "all")
    switches.only(groups, True)
    every = found["all", ""]
    return Costs(
        all=Cost.of(every),
        alone={name: Cost.of(found["alone", name]) for name in single},
        wins={name: Cost.of(every - found["without", name]) for name in floats},
    )


@torch.no_grad()
def weight_errors(prepared: Prepared, groups: Collection[str]) -> dict[str, float]:
    """What rounding does to each weight by itself: the energy of its error over that of the weight."""
    found = {}
    for name in groups:
        layer = prepared.layers[name]
        weight, rounded = layer.rescaled_weight().double(), layer.quantized_weight().double()
        energy = float(weight.square().sum())
        found[name] = float((rounded - weight).square().sum()) / energy if energy else 0.0
    return found
