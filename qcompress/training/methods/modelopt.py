"""Channel scales computed by nvidia-modelopt, for the adapters `smoothquant` and `awq`. The only module that
imports modelopt.

modelopt calibrates a separate float model, of which only `pre_quant_scale` is kept: for each linear layer the
scale [in] that multiplies its input and divides its weight. Scales are requested only for the layers that
read a rescaled site. Layers that read one norm share the mean of their scales, as in modelopt's own export.
A channel that reaches several inputs of one layer takes the smallest of their scales.
Scales in front of other layers, which fold nowhere and would remain a multiplication at run time, are not
requested.

The layers see float inputs, as in modelopt's own calibration, and no padding: each batch holds sequences of
one length. modelopt gives batches equal weight where it averages.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qcompress.errors import MachineError, ModelError
from qcompress.models.architecture import Site
from qcompress.models.plan import LayerPlan
from qcompress.models.prepare import Prepared
from qcompress.quant.ranges import Statistics
from qcompress.quant.rescaling import FixedScale, largest_by_channel
from qcompress.schema.formats import Options
from qcompress.tasks.examples import Batch, inputs_of

NEEDED = ("modelopt", "requests")
"""Required packages; modelopt imports requests and does not declare it."""


def demand_modelopt(adapter: str) -> None:
    """Raise MachineError, before any expensive step, if nvidia-modelopt is not installed."""
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise MachineError(
            f"adapter: {adapter} takes its scales from nvidia-modelopt, and {missing[0]} is not installed",
            fix="pip install nvidia-modelopt requests",
        )


class FixedRescaling:
    """Base class of adapters whose scales modelopt computes and training leaves unchanged."""

    algorithm: ClassVar[str]

    def __init__(self, options: Options) -> None:
        demand_modelopt(options.name)
        self.options = options
        self.fitted: dict[str, Tensor] = {}
        self.scales: dict[str, FixedScale] = {}

    def settings(self) -> dict[str, Any]:
        """modelopt's `algorithm`."""
        raise NotImplementedError

    def quantizers(self, item: LayerPlan) -> dict[str, dict[str, Any]]:
        """modelopt's quantizer attributes for a layer, under `weight_quantizer` and `input_quantizer`."""
        raise NotImplementedError

    def fit(
        self, model: nn.Module, plan: tuple[LayerPlan, ...], sites: Sequence[Site],
        batches: Callable[[], Iterable[Batch]],
    ) -> None:  # fmt: skip
        """Compute the scale of every site. Consumes the float model, which holds modelopt's weights
        afterwards.

        Raises ModelError for a scale that is not positive and finite, and so cannot be folded.
        """
        plans = {item.name: item for item in plan}
        requested = {name: self.quantizers(plans[name]) for site in sites for name in site.readers}
        if not requested:
            return
        scales = pre_quant_scales(model, requested, self.settings(), batches)
        for site in sites:
            scale = site_scale(site, scales)
            if not bool((scale.isfinite() & (scale > 0)).all()):
                raise ModelError(
                    f"nvidia-modelopt's {self.options.name} gives {', '.join(site.readers)} scales that "
                    f"are not positive and finite, from {float(scale.min()):.3g} to {float(scale.max()):.3g}",
                    fix="look for NaN in the checkpoint, or choose `adapter: quadapter`",
                )
            self.fitted[site.writer] = scale

    def attach(self, prepared: Prepared, sites: Sequence[Site], statistics: dict[str, Statistics]) -> None:
        """Install the scales, or ones on a resumed run, whose scales the checkpoint fills."""
        for site in sites:
            scale = FixedScale(self.fitted.get(site.writer, torch.ones(site.channels)).clone())
            prepared.rescale(site, scale)
            self.scales[site.writer] = scale

    @torch.no_grad()
    def fold(self) -> dict[str, Tensor]:
        """Final scales, [channels] each, by the name of the site's writer."""
        return {writer: scale() for writer, scale in self.scales.items()}


def site_scale(site: Site, scales: Mapping[str, Tensor]) -> Tensor:
    """Scale of a site, [channels], from the input scale [in] of each reader: the mean over the readers. Of
    the inputs of one reader that a channel reaches, the one with the smallest scale counts, which is the one
    with the largest activations.
    """
    if not any(index is not None for index in site.maps):
        return torch.stack([scales[name] for name in site.readers]).mean(0)
    inverse = torch.stack([
        largest_by_channel(1 / scales[name], index, site.channels)
        for name, index in zip(site.readers, site.maps, strict=True)
    ])  # fmt: skip
    reached = inverse > 0
    count = reached.sum(0)
    mean = torch.where(reached, 1 / inverse, 0.0).sum(0) / count.clamp_min(1)
    return torch.where(count > 0, mean, 1.0)


def pre_quant_scales(
    model: nn.Module,
    requested: Mapping[str, Mapping[str, dict[str, Any]]],
    algorithm: dict[str, Any],
    batches: Callable[[], Iterable[Batch]],
) -> dict[str, Tensor]:
    """Compute modelopt's input scale [in] of each requested layer, in fp32; every other layer stays float.
    `requested`: quantizer attributes by layer; `algorithm`: modelopt's.
    """
    config: dict[str, Any] = {"algorithm": algorithm, "quant_cfg": [{"quantizer_name": "*", "enable": False}]}
    for name, quantizers in requested.items():
        for kind, attributes in quantizers.items():
            config["quant_cfg"].append({"quantizer_name": f"{name}.{kind}", "cfg": attributes})

    def forward(model: nn.Module) -> None:
        for batch in batches():
            model(**inputs_of(batch))

    # modelopt prints progress to stdout, which `--json` reserves for one document, and warns of unused layers
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

        with torch.no_grad():
            mtq.quantize(model, config, forward)
    scales: dict[str, Tensor] = {}
    for name in requested:
        scale = getattr(model.get_submodule(name).input_quantizer, "pre_quant_scale", None)
        if scale is None:
            raise ModelError(
                f"nvidia-modelopt gives {name} no scale: no calibration data reached it",
                fix="give more calibration data, or leave the layer in float under format.layers",
            )
        scales[name] = scale.detach().float().flatten().clone()
    return scales
