"""iPQ: product quantization of one layer set after another (Quant-Noise, arXiv:2004.07320, section 3.3).

    finetune     training in float, with noise that prepares weights for quantization
    ffn ...      k-means of the layer set, then training of its centroids and of all float parameters

Quantizing everything at once leaves an error that grows from layer to layer; here the layers after a set
adapt to its error before their own turn. The published code trains the sets in the order FFN, embeddings,
attention, and adds no noise in their phases.
"""

from __future__ import annotations

from qcompress.models.architecture import Architecture, Layer
from qcompress.models.plan import LayerPlan
from qcompress.schema.axes import PHASES
from qcompress.schema.formats import CodebookFormat
from qcompress.schema.method_options import Staged
from qcompress.schema.recipe import Train
from qcompress.training.methods.protocols import Phase


class QuantizeInTurn:
    """Schedule of `finetune` and one phase for each layer set; a set without codebook layers has no phase."""

    def __init__(self, options: Staged, train: Train) -> None:
        self.options, self.train = options, train

    def phases(self, architecture: Architecture, plan: tuple[LayerPlan, ...]) -> tuple[Phase, ...]:
        """`finetune`, then the layer sets in the order of the options."""
        books = [item for item in plan if isinstance(item.weights, CodebookFormat) and not item.layer.tied_to]
        phases = [self._phase("finetune")]
        for name in self.options.order:
            members = tuple(item.name for item in books if set_of(item.layer) == name)
            if members:
                phases.append(self._phase(name, members))
        return tuple(phases)

    def _phase(self, name: str, members: tuple[str, ...] = ()) -> Phase:
        defaults, chosen = PHASES["staged"][name], self.train.phases.get(name)
        steps = chosen.steps if chosen else defaults.steps
        return Phase(name, steps, defaults.roles, quantizes=members, noise=not members)


def set_of(layer: Layer) -> str:
    """Name of the layer set in which a layer is quantized."""
    if layer.kind == "embedding":
        return "embeddings"
    return layer.part
