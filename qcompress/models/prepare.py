"""Quantized models for training: layers with trainable quantizers, built from a float model and layer plans.

prepare.quantize(model, plan)     trainable quantizers
rebuild.rebuild(float, trained)   the trained layers with fixed scales (`models/rebuild.py`)
folded.assemble(folded)           layers with stored codes and scales (`models/folded.py`)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from qcompress.errors import ContractError, ModelError
from qcompress.models import FAMILIES
from qcompress.models.architecture import Site
from qcompress.models.plan import (
    LayerPlan,
    PointPlan,
    rounded,
)
from qcompress.quant.batchnorm import statistics
from qcompress.quant.conv import QuantizedConv
from qcompress.quant.layers import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedSharedTable,
    QuantizedStockEmbedding,
    QuantizedTied,
    QuantizedWeight,
    is_lookup,
)
from qcompress.quant.learned_scale import PARAMETRIZATIONS, LearnedScale
from qcompress.quant.noise import QuantNoise
from qcompress.quant.quantizers import (
    ACTIVATION_QUANTIZERS,
)
from qcompress.quant.ranges import Statistics
from qcompress.quant.rescaling import Gain, RescaledNorm, combined, mapped, output_index
from qcompress.quant.weight_formats import quantizers_of
from qcompress.schema.custom import class_of
from qcompress.schema.formats import CodebookFormat

QuantizedLayer = QuantizedLinear | QuantizedEmbedding | QuantizedSharedTable | QuantizedTied | QuantizedConv


@dataclass(frozen=True)
class Prepared:
    """A model with quantizers.

    `layers` by layer name, `norms` by norm name, `rounding` (activation quantizers) by point name,
    `rescalings` by the name of the norm or layer that writes the rescaled channels.
    """

    family: str
    model: nn.Module
    plan: tuple[LayerPlan, ...]
    layers: dict[str, QuantizedLayer]
    norms: dict[str, RescaledNorm] = field(default_factory=dict)
    rescalings: dict[str, nn.Module] = field(default_factory=dict)
    points: tuple[PointPlan, ...] = ()
    rounding: dict[str, nn.Module] = field(default_factory=dict)

    def weight_quantizers(self) -> Iterable[tuple[str, nn.Module]]:
        """Yield each weight quantizer with its layer's name."""
        for name, layer in self.layers.items():
            if getattr(layer, "weight_quantizer", None) is not None:
                yield name, layer.weight_quantizer

    def input_quantizers(self) -> Iterable[tuple[str, nn.Module]]:
        """Yield the quantizer of each layer input with the layer's name."""
        for name, layer in self.layers.items():
            if getattr(layer, "input_quantizer", None) is not None:
                yield name, layer.input_quantizer

    def activation_quantizers(self) -> Iterable[tuple[str, nn.Module]]:
        """Yield each activation quantizer with the stored name of its scale: `<layer>.input` or `<point>`."""
        for name, quantizer in self.input_quantizers():
            yield f"{name}.input", quantizer
        yield from self.rounding.items()

    def rescale(self, site: Site, scale: nn.Module, offset: int | None = None) -> None:
        """Multiply the output channels of a site's writer by `scale` [channels] and divide the matching
        weight rows of its readers by it. The linear layers and convolutions of the site must be quantized.
        `offset`: that of a norm's weight, if it is known (see `RescaledNorm`).

        Raises ContractError for a reader that shares its weight with another layer.
        """
        self.rescalings[site.writer] = scale
        norm = self.model.get_submodule(site.writer)
        before = next((layer for layer in self.layers.values() if getattr(layer, "norm", None) is norm), None)
        if site.kind == "norm" and before is None:
            seen = _seen_by_writer(site, scale, norm.weight.numel())
            self.norms[site.writer] = RescaledNorm(norm, seen, offset)
            replace_module(self.model, site.writer, self.norms[site.writer])
        else:
            writer = before or self.layers[site.writer]
            writer.gain = _seen_by_writer(site, scale, writer.weight.shape[writer.channel_axis])
            if isinstance(writer, QuantizedConv) and writer.norm is not None:
                writer.norm.register_forward_hook(Gain(writer.gain))
        for reader, index in zip(site.readers, site.maps or (None,) * len(site.readers), strict=True):
            layer = self.layers[reader]
            if isinstance(layer, QuantizedTied):
                raise ContractError(f"{reader} shares its weight, so that its input cannot be rescaled")
            layer.rescale = combined(layer.rescale, mapped(scale, index))
            if layer.input_quantizer is not None:
                layer.input_quantizer.rescale = layer.rescale
        if site.point in self.rounding:
            self.rounding[site.point].rescale = scale


def _seen_by_writer(site: Site, scale: nn.Module, count: int) -> nn.Module:
    """The scale of each of the writer's `count` outputs."""
    outputs = site.outputs
    if outputs is None:
        outputs = range(site.first, site.first + len(scale()))
    return mapped(scale, output_index(outputs, count))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule `name` of a model."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and batch-norm statistics of a model, by name."""
    return {**dict(model.named_parameters()), **dict(statistics(model))}


def quantize(
    model: nn.Module, family: str, plan: tuple[LayerPlan, ...], points: tuple[PointPlan, ...] = ()
) -> Prepared:
    """Install trainable quantizers; call `initialise` before training."""

    def weight_quantizer(item: LayerPlan, weight: Tensor, axis: int) -> nn.Module:
        maker = quantizers_of(item.weights)
        return maker.trainable(item.weight_quantizer, item.weights, axis, weight.shape, item.noise)

    def input_quantizer(item: LayerPlan) -> nn.Module | None:
        if item.activations is None:
            return None
        kind = class_of("quantizer", item.activation_quantizer.name, ACTIVATION_QUANTIZERS)
        return kind(item.activation_quantizer, item.activations.bounds, item.layer.channels)

    def point_quantizer(item: PointPlan) -> nn.Module:
        kind = class_of("quantizer", item.activation_quantizer.name, ACTIVATION_QUANTIZERS)
        return kind(item.activation_quantizer, item.activations.bounds, item.point.features)

    prepared = install(model, family, plan, weight_quantizer, input_quantizer)
    for item in plan:
        layer = prepared.layers.get(item.name)
        if item.noise is not None and isinstance(layer, QuantizedWeight):
            layer.noise = QuantNoise(item.noise, item.noise.block or item.weights.vector, layer.channel_axis)
    return round_points(prepared, points, point_quantizer)


def round_points(
    prepared: Prepared, points: tuple[PointPlan, ...], quantizer: Callable[[PointPlan], nn.Module]
) -> Prepared:
    """Install quantizers at the points of a prepared model."""
    rounding = {item.name: quantizer(item) for item in rounded(points)}
    FAMILIES[prepared.family].install_points(prepared.model, rounding)
    return replace(prepared, points=points, rounding=rounding)


def open_points(model: nn.Module, family: str, points: tuple[PointPlan, ...]) -> None:
    """Install identity modules at the points, so that `observe` can record their activations."""
    FAMILIES[family].install_points(model, {item.name: nn.Identity() for item in rounded(points)})


def install(
    model: nn.Module,
    family: str,
    plan: tuple[LayerPlan, ...],
    weight_quantizer: Callable[[LayerPlan, Tensor, int], nn.Module],
    input_quantizer: Callable[[LayerPlan], nn.Module | None],
) -> Prepared:
    """Replace the planned layers by quantized ones, with the quantizers that the two functions make. A weight
    quantizer gets the layer's plan, its weight and the axis of the output channels.
    """
    layers: dict[str, QuantizedLayer] = {}
    for item in plan:
        if item.weights is None:
            continue
        module = model.get_submodule(item.name)
        if item.layer.tied_to and item.layer.kind == "embedding":
            layer = QuantizedSharedTable(layers[item.layer.tied_to], module)
        elif item.layer.tied_to:
            owner = layers[item.layer.tied_to]
            bias = getattr(module, "bias", None) if isinstance(owner, QuantizedEmbedding) else None
            layer = QuantizedTied(owner, input_quantizer(item), bias)
        elif item.layer.kind == "embedding":
            layer = _embedding(item, module, weight_quantizer(item, module.weight, 0))
        elif item.layer.kind == "conv":
            weights = weight_quantizer(item, module.weight.flatten(1), 0)
            norm = model.get_submodule(item.layer.norm) if item.layer.norm else None
            layer = QuantizedConv(module, norm, weights, input_quantizer(item))
        else:
            axis = item.layer.axis
            weights = weight_quantizer(item, module.weight, axis)
            bias = getattr(module, "bias", None)
            layer = QuantizedLinear(module.weight, bias, axis, weights, input_quantizer(item))
        replace_module(model, item.name, layer)
        layers[item.name] = layer
    return Prepared(family=family, model=model, plan=plan, layers=layers)


def _embedding(item: LayerPlan, module: nn.Embedding, quantizer: nn.Module) -> QuantizedEmbedding:
    """Build a quantized table. Raises ModelError for a codebook in a class that computes more than a
    lookup.
    """
    if is_lookup(module):
        return QuantizedEmbedding(module.weight, quantizer)
    if isinstance(item.weights, CodebookFormat) and not item.integers:
        raise ModelError(
            f"{item.name}: {type(module).__name__} computes more than a lookup, and rows of a codebook are "
            "looked up before it could",
            fix=f'keep the table float: `format: {{layers: {{"{item.name}": float}}}}`, or set '
            "`format.embeddings: int8`",
        )
    return QuantizedStockEmbedding(module, quantizer)


def initialise(
    prepared: Prepared,
    statistics: dict[str, Statistics],
    later: Collection[str] = (),
    optimizer: str = "adamw",
) -> None:
    """Set the initial scale of every quantizer. Rescalings must be installed before, since scales depend on
    them.

    Args:
        prepared: the model with its quantizers.
        statistics: activation statistics by layer or point name.
        later: layers that k-means quantizes during training; they have no initial scale.
        optimizer: `train.optimizer` of the recipe; it decides the parametrization of learned scales.
    """
    quantizers = [*prepared.weight_quantizers(), *prepared.activation_quantizers()]
    for quantizer in (part for _, part in quantizers if isinstance(part, LearnedScale)):
        quantizer.parametrization = PARAMETRIZATIONS[optimizer]
    for name, quantizer in prepared.weight_quantizers():
        if name not in later:
            quantizer.init(prepared.layers[name].coded_weight().detach())
    for name, quantizer in [*prepared.input_quantizers(), *prepared.rounding.items()]:
        quantizer.init(statistics[name])
