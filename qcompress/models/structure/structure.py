"""Discovered structure of a model as plain values. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from qcompress.models.architecture import Layer, Site


@dataclass(frozen=True)
class Structure:
    """Layers, blocks, rescaling sites and attentions of a model, by module names and in call order."""

    layers: tuple[Layer, ...]
    """Modules whose weight can be quantized. `tied_to` is the first layer with the same parameter."""
    floats: dict[str, str]
    """Linear, embedding and convolution modules that stay float, and the reason."""
    blocks: tuple[str, ...]
    """Repeated modules of the model's stacks: a transformer's blocks, a network's residual blocks."""
    sites: tuple[Site, ...]
    """Proven rescaling sites. For a convolution with a batch norm (`Layer.norm`), the writer is the
    convolution, and the norm's weight and bias take the factor.
    """
    norms: dict[str, str]
    """Writers of sites of kind "norm" -> how the weight takes a factor s: "weight" (weight * s) or "1 +
    weight" ((1 + weight) * s - 1). A bias takes it as bias * s.
    """
    attentions: tuple[str, ...]
    """Modules that call the attention interface of transformers."""
    parameters: int
    """Number of values of all parameters; shared ones count once."""
    covered: float
    """Share of the layers in the values of parameters with two axes or more; 1.0 if none has two."""
    uncovered: tuple[tuple[str, tuple[int, ...]], ...]
    """Names and shapes of the parameters with two axes or more that no layer holds, the largest first."""
    key_values: tuple[tuple[int, int], ...] = ()
    """Key/value heads and width of a head of each attention, as a key-value cache holds them."""

    def layer(self, name: str) -> Layer:
        """The layer of this name. Raises KeyError."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """Values for `json.dumps`; `from_json` restores an equal structure."""
        layers, sites = ([vars(item) for item in items] for items in (self.layers, self.sites))
        return {**vars(self), "layers": layers, "sites": sites}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Structure:
        """Inverse of `to_json`, also after a round trip through a file."""
        plain = {field.name: _tuples(values[field.name]) for field in fields(cls)}
        plain["layers"] = tuple(Layer(**_values(layer)) for layer in values["layers"])
        plain["sites"] = tuple(Site(**_values(site)) for site in values["sites"])
        return cls(**plain)


def _values(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: _tuples(value) for name, value in entry.items()}


def _tuples(value: Any) -> Any:
    """Lists as tuples, at any depth."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value
