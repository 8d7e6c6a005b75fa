"""Divergence of a model from its float form with single layers quantized, and with single layers left float.

The divergence is the mean over a sample's positions of the Kullback-Leibler divergence KL(float || quantized)
of the predictions, in nats; for several labels the sum over labels; for a regression the squared difference.
It needs no labels, and is 0 for the float model. Samples are independent: a mean has a standard error over
samples, and the gain of leaving a layer float is paired, sample by sample.
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
    """Mean over samples, its standard error, and the cost of each sample [samples]."""

    mean: float
    error: float
    samples: np.ndarray

    @classmethod
    def of(cls, samples: np.ndarray) -> Cost:
        """Mean and standard error of the samples' costs; the error of a single sample is NaN."""
        error = float(samples.std(ddof=1) / len(samples) ** 0.5) if len(samples) > 1 else float("nan")
        return cls(float(samples.mean()), error, samples)

    def to_json(self) -> list[float]:
        """[mean, standard error]."""
        return [self.mean, self.error]


@dataclass(frozen=True)
class Costs:
    """Costs of one format: all layers quantized, each one alone, and the gain of leaving each one float."""

    all: Cost
    alone: dict[str, Cost]
    wins: dict[str, Cost]
    """Empty if not requested."""


def divergence(reference: np.ndarray, logits: np.ndarray, kind: Kind = "single") -> float:
    """Divergence of logits [positions, outputs] from the float model's, mean over positions."""
    return _apart(_predicted(reference, kind), _predicted(logits, kind), kind)


def _predicted(logits: np.ndarray, kind: Kind) -> Tensor:
    """Log-probabilities [positions, outputs], for several labels [2, positions, outputs]; for a regression
    the values.
    """
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
    """Switches the quantization of weights, of their layers' inputs, and of points off and on."""

    def __init__(self, prepared: Prepared, groups: Mapping[str, Collection[str]]) -> None:
        self.model, self.groups, self.points = prepared.model, groups, dict(prepared.rounding)
        self._quantizers = {
            name: {part: getattr(layer, part, None) for part in ("weight_quantizer", "input_quantizer")}
            for name, layer in prepared.layers.items()
        }
        self._layers = prepared.layers

    def only(self, names: Collection[str], points: bool) -> None:
        """Quantize these weights and the inputs of the layers that use them, and no others."""
        for owner, members in self.groups.items():
            for name in members:
                for part, quantizer in self._quantizers[name].items():
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
    """Measure the costs of one format on `windows`, in batches of `size`. `each` False: only of all layers
    together; `wins` False: without the gain of leaving a layer float, which takes more than half of the time.
    Every batch goes through all settings, so that only one batch of the float model's logits is kept.
    """
    switches = Switches(prepared, groups)
    runner = TorchRunner(prepared.model, prepared.family, device)
    settings: dict[tuple[str, str], tuple[Collection[str], bool]] = {("all", ""): (groups, True)}
    single = list(groups) if each else []
    settings |= {("alone", name): ((name,), False) for name in single}
    floats = single if wins else []
    settings |= {("without", name): ([layer for layer in groups if layer != name], True) for name in floats}
    costs = {key: np.zeros(len(windows)) for key in settings}
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
                    costs[key][row] = _apart(before, _predicted(task.compared(window, now), kind), kind)
                bar.advance(key[1] or "all")
    switches.only(groups, True)
    every = costs["all", ""]
    return Costs(
        all=Cost.of(every),
        alone={name: Cost.of(costs["alone", name]) for name in single},
        wins={name: Cost.of(every - costs["without", name]) for name in floats},
    )


@torch.no_grad()
def weight_errors(prepared: Prepared, groups: Collection[str]) -> dict[str, float]:
    """Energy of each weight's rounding error relative to the weight's energy."""
    errors = {}
    for name in groups:
        layer = prepared.layers[name]
        weight, rounded = layer.rescaled_weight().double(), layer.quantized_weight().double()
        energy = float(weight.square().sum())
        errors[name] = float((rounded - weight).square().sum()) / energy if energy else 0.0
    return errors
