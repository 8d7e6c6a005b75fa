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

from qcompress.prepare import Prepared, replace_module
from qcompress.progress import Reporter
from qcompress.rows import batches
from qcompress.runners import TorchRunner

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


def divergence(reference: np.ndarray, found: np.ndarray, kind: Kind = "single") -> float:
    """Distance of logits [positions, outputs] from those of the float model, mean over positions."""
    p, q = (torch.from_numpy(np.ascontiguousarray(logits)).double() for logits in (reference, found))
    if kind == "regression":
        return float((p - q).square().mean())
    if kind == "multi":
        return float(
            sum(_kl(*(F.logsigmoid(sign * logits) for logits in (p, q))) for sign in (1, -1)) / len(p)
        )
    return float(_kl(p.log_softmax(-1), q.log_softmax(-1)) / len(p))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q, p, reduction="sum", log_target=True)


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
) -> Costs:
    """Costs of one format, on `windows` in batches of `size`; without `each`, of all layers together alone.
    Every batch goes through all settings, so that the float model's logits of one batch are all that is kept.
    """
    switches = Switches(prepared, groups)
    runner = TorchRunner(prepared.model, prepared.family, device)
    settings: dict[tuple[str, str], tuple[Collection[str], bool]] = {("all", ""): (groups, True)}
    single = list(groups) if each else []
    settings |= {("alone", name): ((name,), False) for name in single}
    settings |= {("without", name): ([other for other in groups if other != name], True) for name in single}
    found = {key: np.zeros(len(windows)) for key in settings}
    order = list(batches(task, windows, size))
    with reporter.bar(title, len(order) * len(settings)) as bar:
        for rows in order:
            batch = [windows[row] for row in rows]
            inputs = task.collate(batch)
            switches.only((), False)
            reference = runner(inputs)
            for key, (names, points) in settings.items():
                switches.only(names, points)
                for row, window, before, now in zip(rows, batch, reference, runner(inputs), strict=True):
                    pair = (task.compared(window, logits) for logits in (before, now))
                    found[key][row] = divergence(*pair, kind)
                bar.advance(key[1] or "all")
    switches.only(groups, True)
    every = found["all", ""]
    return Costs(
        all=Cost.of(every),
        alone={name: Cost.of(found["alone", name]) for name in single},
        wins={name: Cost.of(every - found["without", name]) for name in single},
    )
