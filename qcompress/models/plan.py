"""Layer plans: the recipe's formats and quantizers for each layer and point of an architecture. No torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass
from itertools import count, takewhile
from typing import Any, Literal

from qcompress.models.architecture import Architecture, Layer, Point, Site
from qcompress.schema.formats import ActivationFormat, AnyWeightFormat, weight_format_class
from qcompress.schema.quantizers import ActivationQuantizer, Codebook, MinMax, Noise, WeightQuantizer
from qcompress.schema.recipe import Recipe


@dataclass(frozen=True)
class LayerPlan:
    """One layer with its formats and quantizers; None means float."""

    layer: Layer
    weights: AnyWeightFormat | None
    activations: ActivationFormat | None
    weight_quantizer: WeightQuantizer | Codebook = MinMax()
    activation_quantizer: ActivationQuantizer = MinMax()
    noise: Noise | None = None

    @property
    def name(self) -> str:
        """The layer's name in the model."""
        return self.layer.name

    @property
    def block(self) -> int | None:
        """Input channels that share a weight scale, None for one scale per output channel."""
        return self.weights and self.weights.scale_block

    @property
    def integers(self) -> bool:
        """True for a weight that is stored as multiples of a scale."""
        return self.weights is not None and self.weights.integers


@dataclass(frozen=True)
class PointPlan:
    """One point with its format and quantizer; None means float."""

    point: Point
    activations: ActivationFormat | None
    activation_quantizer: ActivationQuantizer = MinMax()

    @property
    def name(self) -> str:
        """The point's name in the model."""
        return self.point.name


CACHED = ("key_point", "value_point")
"""Name endings of the points whose tensors a key-value cache stores."""


def matches(pattern: str, name: str) -> bool:
    """True if a glob matches the full layer name.

    >>> matches("transformer.h.1.*", "transformer.h.10.attn.c_attn")
    False
    """
    return fnmatch.fnmatchcase(name, pattern)


def plan_layers(recipe: Recipe, architecture: Architecture) -> tuple[LayerPlan, ...]:
    """Plan each layer, in the architecture's order; of the recipe's patterns, the last match wins.

    The input of a layer is quantized only if its weight is: an int8 input of a float matmul saves nothing.
    """
    return tuple(_plan_layer(recipe, layer) for layer in architecture.layers)


def _plan_layer(recipe: Recipe, layer: Layer) -> LayerPlan:
    form = recipe.format
    weights = getattr(form, layer.section)
    activations = form.activations
    for pattern, exception in form.layers.items():
        if matches(pattern, layer.name):
            weights = weights if exception.weights == "inherit" else exception.weights
            activations = activations if exception.activations == "inherit" else exception.activations
    if layer.kind == "embedding" or weights is None:
        activations = None
    quantizers = recipe.quantizer
    key = (weights and weights.quantizer_key) or layer.section
    return LayerPlan(
        layer=layer,
        weights=weights,
        activations=activations and activations.settled(layer.nonnegative),
        weight_quantizer=getattr(quantizers, key),
        activation_quantizer=quantizers.activations,
        noise=quantizers.noise,
    )


def sharers(plan: tuple[LayerPlan, ...]) -> dict[str, list[str]]:
    """Group the layers with a matmul by the layer that owns their weight, in the order of the forward pass. A
    layer that shares no weight is a group of one.
    """
    groups: dict[str, list[str]] = {}
    for item in plan:
        if item.layer.kind != "embedding":
            groups.setdefault(item.layer.tied_to or item.name, []).append(item.name)
    return groups


def call_name(name: str, call: int) -> str:
    """Name of a call of a layer or point, counted from 0; the first has the name of the layer.

    >>> call_name("head", 0), call_name("head", 1)
    ('head', 'head (call 2)')
    """
    return f"{name} (call {call + 1})" if call else name


def calls_in(names: Container[str], name: str) -> Iterator[str]:
    """The names of the calls of a layer or point that `names` holds, in order."""
    return takewhile(names.__contains__, (call_name(name, call) for call in count()))


def new_call(names: Container[str], name: str) -> str:
    """Name of the first call of a layer or point that `names` lacks."""
    return next(one for call in count() if (one := call_name(name, call)) not in names)


def plan_points(recipe: Recipe, architecture: Architecture) -> tuple[PointPlan, ...]:
    """Plan each point, in the architecture's order. Patterns of `format.layers` match point names too; only
    their `activations` apply. A pattern quantizes a float point only if the pattern ends in `point`, so
    `transformer.h.0.*: {activations: int8}` changes only the layers of the block.
    """
    plans = []
    for point in architecture.points:
        form = recipe.format.attention if point.kind == "attention" else recipe.format.residual
        if point.name.endswith(CACHED):
            form = recipe.format.cache or form
        for pattern, exception in recipe.format.layers.items():
            meant = exception.activations != "inherit" and (form or pattern.endswith("point"))
            if meant and matches(pattern, point.name):
                form = exception.activations
        form = form and form.settled(point.nonnegative)
        plans.append(PointPlan(point, form, recipe.quantizer.activations))
    return tuple(plans)


def rounded(points: tuple[PointPlan, ...]) -> tuple[PointPlan, ...]:
    """Points with an activation format."""
    return tuple(item for item in points if item.activations is not None)


def plan_sites(recipe: Recipe, architecture: Architecture, plan: tuple[LayerPlan, ...]) -> tuple[Site, ...]:
    """Sites that the recipe's adapter rescales, in the architecture's order: those of the requested kind
    whose linear layers all have quantized weights. The weight of a float reader must not change, so sites
    with a float reader are left out.
    """
    integer = {item.name for item in plan if item.weights}
    return tuple(
        site
        for site in sites_asked(recipe, architecture)
        if integer.issuperset(site.readers) and (site.kind == "norm" or site.writer in integer)
    )


def sites_asked(recipe: Recipe, architecture: Architecture) -> tuple[Site, ...]:
    """Sites of the kind that the recipe's adapter requests, for all formats; empty without an adapter."""
    asked = "none" if recipe.adapter.name == "none" else getattr(recipe.adapter, "sites", "auto")
    if asked == "auto":
        asked = "norm" if any(site.kind == "norm" for site in architecture.sites) else "value"
    return tuple(site for site in architecture.sites if asked in ("all", site.kind))


def site_to_json(site: Site) -> dict[str, object]:
    """JSON values of a site, as in trained.json; `outputs` and `maps` only where a site has them."""
    values: dict[str, object] = {site.kind: site.writer, "readers": list(site.readers)}
    if site.kind == "value":
        values |= {"first": site.first, "point": site.point}
    if site.outputs is not None:
        values["outputs"] = list(site.outputs)
    if any(index is not None for index in site.maps):
        values["maps"] = [index and list(index) for index in site.maps]
    return values


def site_from_json(value: dict[str, Any]) -> Site:
    """Inverse of `site_to_json`; `channels` is 0, since the scale's length gives it."""
    kind: Literal["norm", "value"] = "norm" if "norm" in value else "value"
    outputs = value.get("outputs")
    return Site(
        writer=value[kind],
        readers=tuple(value["readers"]),
        channels=0,
        kind=kind,
        first=value.get("first", 0),
        point=value.get("point"),
        outputs=None if outputs is None else tuple(outputs),
        maps=tuple(index and tuple(index) for index in value.get("maps", ())),
    )


def points_to_json(points: tuple[PointPlan, ...]) -> list[dict[str, object]]:
    """JSON values of the points, as in trained.json and folded.json. Float points are included, because the
    certificate counts all points.
    """
    return [
        {"point": asdict(item.point), "activations": item.activations and item.activations.model_dump()}
        for item in points
    ]


def points_from_json(values: list[dict[str, object]]) -> tuple[PointPlan, ...]:
    """Inverse of `points_to_json`."""
    return tuple(
        PointPlan(
            point=Point(**value["point"]),
            activations=ActivationFormat(**value["activations"]) if value["activations"] else None,
        )
        for value in values
    )


def plans_to_json(plan: tuple[LayerPlan, ...]) -> list[dict[str, object]]:
    """JSON values of the layer plans, as in trained.json and folded.json."""
    return [
        {
            "layer": _layer_values(item.layer),
            "weights": item.weights.model_dump() if item.weights else None,
            "activations": item.activations.model_dump() if item.activations else None,
        }
        for item in plan
    ]


def plans_from_json(values: list[dict[str, object]]) -> tuple[LayerPlan, ...]:
    """Inverse of `plans_to_json`; the quantizers have default options, since JSON does not record them."""
    return tuple(
        LayerPlan(
            layer=_layer(value["layer"]),
            weights=_weights(value["weights"]),
            activations=ActivationFormat(**value["activations"]) if value["activations"] else None,
        )
        for value in values
    )


def _weights(value: dict[str, object] | None) -> AnyWeightFormat | None:
    if not value:
        return None
    return weight_format_class(value)(**value)


def _layer_values(layer: Layer) -> dict[str, Any]:
    """JSON values of a layer; `axis` and `calls` only where they differ from the default."""
    values = asdict(layer)
    if not layer.axis:
        del values["axis"]
    if layer.calls == 1:
        del values["calls"]
    return values


def _layer(value: dict[str, Any]) -> Layer:
    """Read a layer from JSON: lists become tuples, and older files have no `kernel`."""
    kernel = value.get("kernel")
    return Layer(**{**value, "kernel": tuple(kernel) if kernel else None})
