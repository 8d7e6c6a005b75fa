"""Channel scales of nvidia-modelopt: the one door to that package, for the adapters `smoothquant` and `awq`.

modelopt calibrates a float model of its own here, of which everything is thrown away but `pre_quant_scale`:
for each linear layer the scale [in] that its input is multiplied by and its weight divided by. Asked are only
the layers that read a rescaled site. Where several layers read one norm they share the mean of their scales,
as modelopt's own export makes them share one. What modelopt would scale elsewhere, in front of layers whose
scale folds nowhere, is not asked for: at run time it would be a multiplication of its own.

The layers see float inputs, as modelopt's own calibration gives them, and no padding: sequences come in
batches of one length. modelopt weighs batches equally where it averages.
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
from qcompress.quant.layers import FixedScale
from qcompress.quant.ranges import Statistics
from qcompress.schema.formats import Options
from qcompress.tasks.examples import Batch, inputs_of

NEEDED = ("modelopt", "requests")
"""modelopt imports requests and does not declare it."""


def demand_modelopt(adapter: str) -> None:
    """Raise MachineError, before anything expensive, where nvidia-modelopt is not installed."""
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise MachineError(
            f"adapter: {adapter} takes its scales from nvidia-modelopt, and {missing[0]} is not installed",
            fix="pip install nvidia-modelopt requests",
        )


class FixedRescaling:
    """Base of the adapters whose scales modelopt computes and nothing trains."""

    algorithm: ClassVar[str]

    def __init__(self, options: Options) -> None:
        demand_modelopt(options.name)
        self.options = options
        self.found: dict[str, Tensor] = {}
        self.scales: dict[str, FixedScale] = {}

    def settings(self) -> dict[str, Any]:
        """modelopt's `algorithm`."""
        raise NotImplementedError

    def quantizers(self, item: LayerPlan) -> dict[str, dict[str, Any]]:
        """modelopt's attributes of a layer's quantizers, by `weight_quantizer` and `input_quantizer`."""
        raise NotImplementedError

    def fit(
        self, model: nn.Module, plan: tuple[LayerPlan, ...], sites: Sequence[Site],
        batches: Callable[[], Iterable[Batch]],
    ) -> None:  # fmt: skip
        """Compute the scale of every site. The float model is spent: it holds modelopt's weights afterwards.

        Raises ModelError where modelopt finds no scale that could be folded.
        """
        plans = {item.name: item for item in plan}
        asked = {name: self.quantizers(plans[name]) for site in sites for name in site.readers}
        if not asked:
            return
        scales = pre_quant_scales(model, asked, self.settings(), batches)
        for site in sites:
            scale = torch.stack([scales[name] for name in site.readers]).mean(0)
            if not bool((scale.isfinite() & (scale > 0)).all()):
                raise ModelError(
                    f"nvidia-modelopt's {self.options.name} gives {', '.join(site.readers)} scales that "
                    f"are not positive and finite, from {float(scale.min()):.3g} to {float(scale.max()):.3g}",
                    fix="look for NaN in the checkpoint, or choose `adapter: quadapter`",
                )
            self.found[site.writer] = scale

    def attach(self, prepared: Prepared, sites: Sequence[Site], statistics: dict[str, Statistics]) -> None:
        """Install the scales; where training goes on, the checkpoint has them."""
        for site in sites:
            scale = FixedScale(self.found.get(site.writer, torch.ones(site.channels)).clone())
            prepared.rescale(site, scale)
            self.scales[site.writer] = scale

    @torch.no_grad()
    def fold(self) -> dict[str, Tensor]:
        """The scales, [channels] each."""
        return {writer: scale() for writer, scale in self.scales.items()}


def pre_quant_scales(
    model: nn.Module,
    asked: Mapping[str, Mapping[str, dict[str, Any]]],
    algorithm: dict[str, Any],
    batches: Callable[[], Iterable[Batch]],
) -> dict[str, Tensor]:
    """The scale [in] that modelopt would multiply the input of each layer by, in fp32; every other layer
    stays float. `asked` has the attributes of each layer's quantizers, `algorithm` is modelopt's.
    """
    config: dict[str, Any] = {"algorithm": algorithm, "quant_cfg": [{"quantizer_name": "*", "enable": False}]}
    for name, quantizers in asked.items():
        for kind, attributes in quantizers.items():
            config["quant_cfg"].append({"quantizer_name": f"{name}.{kind}", "cfg": attributes})

    def forward(model: nn.Module) -> None:
        for batch in batches():
            model(**inputs_of(batch))

    # it prints its progress, where `--json` promises one document, and warns of what it was not asked for
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

        with torch.no_grad():
            mtq.quantize(model, config, forward)
    found: dict[str, Tensor] = {}
    for name in asked:
        scale = getattr(model.get_submodule(name).input_quantizer, "pre_quant_scale", None)
        if scale is None:
            raise ModelError(
                f"nvidia-modelopt gives {name} no scale: no calibration data reached it",
                fix="give more calibration data, or leave the layer in float under format.layers",
            )
        found[name] = scale.detach().float().flatten().clone()
    return found
