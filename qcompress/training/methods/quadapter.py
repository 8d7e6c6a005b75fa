"""Quadapter: Adapter for GPT-2 Quantization (Park, You, Nagel, Chang; Findings of EMNLP 2022;
arXiv:2211.16912).

A few channels of GPT-2's LayerNorm outputs are much larger than the rest, and a per-tensor activation scale
wastes its integers on them. Quadapter learns a positive scale a for each channel:

    y = Q_a(x * a) @ Q_w(W / a) + b          x = LayerNorm(h), W [in, out]

which equals the float layer without rounding. It folds: gamma * a and beta * a into the LayerNorm, W / a into
the reader, and costs nothing at run time. The weight quantizer sees W / a during training too (the fused
form); scaling the activation alone would train another network than the deployed one. All other model
parameters stay unchanged, which is the paper's point: the model cannot overfit the data it is adapted on.

From the paper: two sites in each block, a block-wise calibration with an L2 loss, then an end-to-end
fine-tuning with the task's loss. Our choices, because no text of it was available to us: the sites ln_1 ->
c_attn and ln_2 -> c_fc (the norms of GPT-2, none of which feeds the residual), a = exp(theta), float inputs
to each block ("independent" calibration), symmetric activations (TensorRT takes no zero point), and the
initial value, with the options `identity` and `balanced`.

A third site is our addition: the value projection -> the output projection of an attention (`sites: value`,
`all`). Probabilities mix values over tokens, each channel by itself, so V's weight and bias are multiplied by
a, and the output projection's rows divided. It is the only site of BERT and its relatives, whose norms feed
the residual as well (`models/encoder.py`); in GPT-2 it has to be selected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompress.models.architecture import Architecture, Site
from qcompress.models.plan import LayerPlan
from qcompress.models.prepare import Prepared
from qcompress.quant.layers import QuantizedWeight
from qcompress.quant.ranges import TINY, Statistics
from qcompress.quant.rescaling import ChannelScale, largest_by_channel, site_largest
from qcompress.schema.adapters import QuadapterOptions
from qcompress.schema.axes import PHASES
from qcompress.schema.method_options import BlockwiseThenEndToEnd
from qcompress.schema.recipe import Train
from qcompress.training.methods.protocols import Phase


class Quadapter:
    """Adapter with one learned `ChannelScale` for each site."""

    def __init__(self, options: QuadapterOptions) -> None:
        self.options = options
        self.scales: dict[str, ChannelScale] = {}

    def attach(self, prepared: Prepared, sites: Sequence[Site], statistics: dict[str, Statistics]) -> None:
        """Install a scale at every site; `balanced` needs the statistics of the readers' inputs."""
        for site in sites:
            scale = ChannelScale(site.channels, self.options.bound)
            largest = site_largest(statistics, site.readers, site.maps, site.channels)
            if self.options.init == "balanced" and largest is not None:
                weights = [prepared.layers[name] for name in site.readers]
                start = balanced(largest, weights, self.options.bound, site.maps)
                scale.theta.data.copy_(start.log())
            prepared.rescale(site, scale)
            self.scales[site.writer] = scale

    @torch.no_grad()
    def fold(self) -> dict[str, Tensor]:
        """Final scales, [channels] each, by the name of the site's writer."""
        return {writer: scale() for writer, scale in self.scales.items()}


@torch.no_grad()
def balanced(
    largest: Tensor,
    readers: Sequence[QuantizedWeight],
    bound: float,
    maps: Sequence[Sequence[int] | None] = (),
) -> Tensor:
    """Initial scale sqrt(max|W_i| / max|x_i|) with geometric mean 1, [channels], within [1 / bound, bound].

    This is SmoothQuant's scale with alpha 1/2 (arXiv:2211.10438, equation 4), inverted since it multiplies x.
    A channel that is never active (or never read) keeps scale 1.

    Args:
        largest: max|x_i| of each channel, [channels].
        readers: the layers that read the channels.
        bound: largest scale.
        maps: `Site.maps`.
    """
    weights = [
        largest_by_channel(layer.largest_of_inputs(), index, len(largest))
        for layer, index in zip(readers, maps or (None,) * len(readers), strict=True)
    ]
    weight = torch.stack(weights).amax(0)
    live = (weight > TINY) & (largest > TINY)
    scale = torch.where(live, (weight.clamp_min(TINY) / largest.clamp_min(TINY)).sqrt(), 1.0)
    middle = scale[live].log().mean().exp() if bool(live.any()) else torch.ones(())
    return torch.where(live, scale / middle, 1.0).clamp(1 / bound, bound)


class BlocksThenModel:
    """Quadapter's two phases, without dropout, because no weight is trained."""

    def __init__(self, options: BlockwiseThenEndToEnd, train: Train) -> None:
        self.options, self.train = options, train

    def phases(self, architecture: Architecture, plan: tuple[LayerPlan, ...]) -> tuple[Phase, ...]:
        """`calibrate` block by block, then `finetune` end to end."""
        scopes = {"calibrate": "blocks", "finetune": "model"}
        return tuple(
            Phase(
                name=name,
                steps=self.train.phases[name].steps if name in self.train.phases else defaults.steps,
                roles=defaults.roles,
                scope=scopes[name],
                dropout=False,
                evaluate_every=self.options.evaluate_every,
            )
            for name, defaults in PHASES["blockwise-then-end-to-end"].items()
        )
