"""A line from a stock module to its folded form, with layers and sites that a test writes by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompress.models import FAMILIES
from qcompress.models.architecture import Layer, Site, token_inputs
from qcompress.models.folded import assemble
from qcompress.models.plan import LayerPlan
from qcompress.models.prepare import Prepared, initialise, quantize, replace_module
from qcompress.models.rebuild import rebuild
from qcompress.pipeline.stages.fold import fold
from qcompress.quant.layers import QuantizedWeight
from qcompress.quant.ranges import Statistics
from qcompress.quant.rescaling import FixedScale
from qcompress.schema.formats import ActivationFormat, WeightFormat
from qcompress.schema.quantizers import MinMax
from qcompress.system.artifacts import FloatModel, FoldedModel, TrainedModel
from qcompress.training.artifact import save_trained

Forward = Callable[[nn.Module], Tensor]
"""Runs a model on fixed inputs."""


@dataclass
class HandMade:
    """A stock model in evaluation mode with its layers, sites and inputs."""

    model: nn.Module
    layers: Sequence[Layer]
    sites: Sequence[Site]
    forward: Forward
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    quantizer: Any = MinMax()
    scales: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        family = SimpleNamespace(
            load_float=lambda source, path: copy.deepcopy(self.model),
            empty=lambda path: unset(copy.deepcopy(self.model)),
            install_points=lambda model, points: None,
            tie=lambda model: None,
            signature=lambda config: token_inputs(("input_ids",)),
            graph_inputs=lambda ids: {"input_ids": ids},
            INPUTS=("input_ids",),
            DEPTH=None,
        )
        self.monkeypatch.setitem(FAMILIES, "hand-made", family)
        for seed, site in enumerate(self.sites):
            generator = torch.Generator().manual_seed(seed)
            self.scales[site.writer] = (0.7 * torch.randn(site.channels, generator=generator)).exp()

    def prepared(self, activations: bool = True) -> Prepared:
        """The model with int8 weights, calibrated on its inputs, and with every site rescaled."""
        plan = tuple(
            LayerPlan(
                layer, WeightFormat(bits=8),
                ActivationFormat() if activations and layer.kind != "embedding" else None,
                self.quantizer, MinMax(),
            )
            for layer in self.layers
        )  # fmt: skip
        model = copy.deepcopy(self.model)
        statistics = observed(model, plan, self.forward)
        prepared = quantize(model, "hand-made", plan)
        for site in self.sites:
            prepared.rescale(site, FixedScale(self.scales[site.writer]))
        initialise(prepared, statistics)
        prepared.model.eval()
        return prepared

    def rescaled(self) -> nn.Module:
        """The rescaled model in fp64, without rounding."""
        prepared = self.prepared(activations=False)
        for layer in prepared.layers.values():
            if isinstance(layer, QuantizedWeight):
                layer.weight_quantizer = None
        return prepared.model.double()

    def folded(self, prepared: Prepared) -> tuple[Prepared, nn.Module]:
        """The model of the train stage's files, and the folded model."""
        folders = [self.folder / name for name in ("load", "train", "fold")]
        for folder in folders:
            folder.mkdir()
        (folders[0] / "config.json").write_text("{}")
        training = SimpleNamespace(
            recipe=SimpleNamespace(format=SimpleNamespace(compute="fp32")),
            prepared=prepared, architecture=SimpleNamespace(sites=self.sites), facts=[],
        )  # fmt: skip
        adapter = SimpleNamespace(fold=lambda: self.scales)
        names = {name for name, _ in self.model.named_parameters()}
        save_trained(training, adapter, names, False, None, {}, folders[1])
        start, trained = FloatModel(folders[0], source=folders[0]), TrainedModel(folders[1])
        again = rebuild(start, trained)
        fold(start, trained, folders[2])
        return again, assemble(FoldedModel(folders[2]))


def observed(model: nn.Module, plan: Sequence[LayerPlan], forward: Forward) -> dict[str, Statistics]:
    """Statistics of the inputs of all layers but tables."""
    statistics: dict[str, Statistics] = {}

    def watch(item: LayerPlan):
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach()
            rows = x.movedim(1, -1).flatten(0, -2) if item.layer.kind == "conv" else x.flatten(0, -2)
            statistics[item.name] = Statistics(rows.abs().amax(0), rows.abs().mean(0), rows)

        return model.get_submodule(item.name).register_forward_pre_hook(hook)

    handles = [watch(item) for item in plan if item.layer.kind != "embedding"]
    with torch.no_grad():
        forward(model)
    for handle in handles:
        handle.remove()
    return statistics


def unset(model: nn.Module) -> nn.Module:
    """The model with parameters that have no values, shared as they were; buffers keep theirs."""
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        empty = nn.Parameter(torch.empty_like(parameter, device="meta"))
        replace_module(model, name, made.setdefault(id(parameter), empty))
    return model


def linear(model: nn.Module, *names: str, kind: str = "linear", tied_to: str | None = None) -> list[Layer]:
    """Layers of nn.Linear, nn.Embedding or nn.Conv2d modules."""
    layers = []
    for name in names:
        weight = model.get_submodule(name).weight
        kernel = tuple(weight.shape[2:]) or None
        layers.append(Layer(name, kind, weight[0].numel(), len(weight), tied_to, kernel=kernel))
    return layers


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation mode with random parameters: norms near 1, biases and tables far from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(draw * (0.5 if parameter.shape[-1] < 8 else parameter[0].numel() ** -0.5))
            else:
                parameter.copy_(0.2 * draw + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()
