"""iPQ: product quantization of one set of layers after another (Quant-Noise, arXiv:2004.07320, section 3.3).

    finetune     training in float, with noise that prepares the weights for what follows
    ffn ...      k-means of the set, then training of its centroids and of everything that is still float

Quantizing everything at once leaves an error that grows from layer to layer; here the layers behind a set
learn to live with it before their own turn comes. The published code trains the sets in the order FFN,
embeddings, attention, and adds no noise in their phases.
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
    """`finetune`, then a phase for each set of layers; a set of which no layer is a codebook has none."""

    def __init__(self, options: Staged, train: Train) -> None:
        self.options, self.train = options, train

    def phases(self, architecture: Architecture, plan: tuple[LayerPlan, ...]) -> tuple[Phase, ...]:
        """In the order of the options."""
        books = [item for item in plan if isinstance(item.weights, CodebookFormat) and not item.layer.tied_to]
        found = [self._phase("finetune")]
        for name in self.options.order:
            members = tuple(item.name for item in books if set_of(item.layer) == name)
            if members:
                found.append(self._phase(name, members))
        return tuple(found)

    def _phase(self, name: str, members: tuple[str, ...] = ()) -> Phase:
        defaults, chosen = PHASES["staged"][name], self.train.phases.get(name)
        steps = chosen.steps if chosen else defaults.steps
        return Phase(name, steps, defaults.roles, quantizes=members, noise=not members)


def set_of(layer: Layer) -> str:
    """The set that a layer becomes a codebook with."""
    if layer.kind == "embedding":
        return "embeddings"
    return layer.part
