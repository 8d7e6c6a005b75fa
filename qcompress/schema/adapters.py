"""Options of the axis `adapter`: a function-preserving rescaling of channels that is folded away later. No
torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer

from qcompress.schema.formats import Options
from qcompress.schema.quantizers import named


class NoAdapter(Options):
    """No rescaling."""

    name: Literal["none"] = "none"


Sites = Literal["auto", "norm", "value", "all"]
"""Sites of a family that an adapter rescales."""


class QuadapterOptions(Options):
    """Channel-wise rescaling before the activation quantizer, folded later (Quadapter, arXiv:2211.16912)."""

    name: Literal["quadapter"] = "quadapter"
    init: Literal["identity", "balanced"] = "balanced"
    """identity: every scale 1; balanced: sqrt(max|W_i| / max|x_i|), normalised to geometric mean 1."""
    bound: float = Field(default=100.0, gt=1)
    """Scales stay within [1/bound, bound]."""
    sites: Sites = "auto"
    """Rescaled sites: behind norms, behind value projections, or both; auto: behind norms, and in families
    whose norms feed the residual (BERT, RoBERTa, DistilBERT) behind value projections.
    """

    @model_serializer(mode="wrap")
    def _unless_default(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit the default of `sites`, so that older recipes keep their digests."""
        return {key: value for key, value in spell(self).items() if (key, value) != ("sites", "auto")}


class SmoothQuantOptions(Options):
    """Fixed rescaling that moves outlying channels of activations into the weights, with scales computed by
    nvidia-modelopt (SmoothQuant, arXiv:2211.10438).
    """

    name: Literal["smoothquant"] = "smoothquant"
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Migration strength: scales are max|W|^(1 - alpha) / max|x|^alpha. 0.5, the paper's choice for most
    models, shares the difficulty; 1.0, modelopt's own default, makes all channels of the activation equally
    large and leaves the weights with their outliers.
    """
    sites: Sites = "auto"
    """Rescaled sites: behind norms, behind value projections, or both; auto: behind norms, and in families
    whose norms feed the residual (BERT, RoBERTa, DistilBERT) behind value projections.
    """


class AwqOptions(Options):
    """Fixed rescaling that protects the weights of large input channels, for weight-only formats, with scales
    computed by nvidia-modelopt (AWQ, arXiv:2306.00978; without its search for clipping).
    """

    name: Literal["awq"] = "awq"
    alpha_step: float = Field(default=0.1, gt=0, le=1)
    """Step of the search for each layer's alpha from 0 to 1; a step costs a forward pass of the layer."""
    sites: Sites = "auto"
    """Rescaled sites: behind norms, behind value projections, or both; auto: behind norms, and in families
    whose norms feed the residual (BERT, RoBERTa, DistilBERT) behind value projections.
    """


Adapter = Annotated[
    NoAdapter | QuadapterOptions | SmoothQuantOptions | AwqOptions,
    Field(discriminator="name"),
    BeforeValidator(named),
]
