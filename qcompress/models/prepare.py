"""Quantized models in three forms, built from a float model and layer plans.

    quantize(model, plan)            layers with trainable quantizers
    rebuild(float, trained)          the trained layers with fixed scales
    assemble(folded)                 layers with int8 codes and scales (`quant/folded.py`)

Train, fold, export and the runners build their models here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qcompress.encodings import encoding_of
from qcompress.errors import ContractError
from qcompress.models import FAMILIES
from qcompress.models.architecture import Site
from qcompress.models.plan import (
    LayerPlan,
    PointPlan,
    plans_from_json,
    points_from_json,
    rounded,
    site_from_json,
)
from qcompress.quant.batchnorm import statistics
from qcompress.quant.conv import Geometry, QuantizedConv
from qcompress.quant.folded import FoldedEmbedding, FoldedLinear, FoldedTiedHead, Rounding
from qcompress.quant.folded_conv import FoldedConv
from qcompress.quant.layers import (
    FixedScale,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedTied,
    QuantizedWeight,
    RescaledNorm,
)
from qcompress.quant.learned_scale import PARAMETRIZATIONS, LearnedScale
from qcompress.quant.noise import QuantNoise
from qcompress.quant.quantizers import (
    ACTIVATION_QUANTIZERS,
    FrozenActivation,
)
from qcompress.quant.ranges import Statistics
from qcompress.quant.weight_formats import quantizers_of
from qcompress.quant.weight_quantizer import CodedWeight
from qcompress.schema.custom import class_of
from qcompress.system.artifacts import FloatModel, FoldedModel, TrainedModel, read_json

QuantizedLayer = QuantizedLinear | QuantizedEmbedding | QuantizedTied | QuantizedConv


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

    def rescale(self, site: Site, scale: nn.Module) -> None:
        """Multiply the output channels of a site's writer by `scale` [channels] and divide the matching
        weight rows of its readers by it. The linear layers of the site must be quantized.
        """
        if site.kind == "norm":
            wrapped = RescaledNorm(self.model.get_submodule(site.writer), scale)
            replace_module(self.model, site.writer, wrapped)
            self.norms[site.writer] = wrapped
        else:
            writer = self.layers[site.writer]
            writer.gain, writer.gain_first = scale, site.first
        self.rescalings[site.writer] = scale
        for reader in site.readers:
            layer = self.layers[reader]
            layer.rescale = scale
            if layer.input_quantizer is not None:
                layer.input_quantizer.rescale = scale
        if site.point in self.rounding:
            self.rounding[site.point].rescale = scale


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
    linear_axis = FAMILIES[family].LINEAR_AXIS

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

    prepared = _install(model, family, plan, linear_axis, weight_quantizer, input_quantizer)
    for item in plan:
        layer = prepared.layers.get(item.name)
        if item.noise is not None and isinstance(layer, QuantizedWeight):
            layer.noise = QuantNoise(item.noise, item.noise.block or item.weights.vector, layer.channel_axis)
    return _round(prepared, points, point_quantizer)


def _round(
    prepared: Prepared, points: tuple[PointPlan, ...], quantizer: Callable[[PointPlan], nn.Module]
) -> Prepared:
    """Install quantizers at the points of a prepared model."""
    rounding = {item.name: quantizer(item) for item in rounded(points)}
    FAMILIES[prepared.family].install_points(prepared.model, rounding)
    return replace(prepared, points=points, rounding=rounding)


def open_points(model: nn.Module, family: str, points: tuple[PointPlan, ...]) -> None:
    """Install identity modules at the points, so that `observe` can record their activations."""
    FAMILIES[family].install_points(model, {item.name: nn.Identity() for item in rounded(points)})


def frozen_weight(item: LayerPlan, tensors: Mapping[str, Tensor], axis: int) -> CodedWeight:
    """Build a layer's weight quantizer from the tensors of trained.safetensors; `axis`: axis of the output
    channels.
    """
    maker = quantizers_of(item.weights)
    parts = {part: tensors.get(f"{item.name}.weight.{part}") for part in maker.parts}
    return maker.frozen(parts, item.weights, axis)


def _install(model, family, plan, linear_axis, weight_quantizer, input_quantizer) -> Prepared:
    layers: dict[str, QuantizedLayer] = {}
    for item in plan:
        if item.weights is None:
            continue
        module = model.get_submodule(item.name)
        if item.layer.tied_to:
            layer = QuantizedTied(layers[item.layer.tied_to], input_quantizer(item))
        elif item.layer.kind == "embedding":
            layer = QuantizedEmbedding(module.weight, weight_quantizer(item, module.weight, 0))
        elif item.layer.kind == "conv":
            weights = weight_quantizer(item, module.weight.flatten(1), 0)
            norm = model.get_submodule(item.layer.norm) if item.layer.norm else None
            layer = QuantizedConv(module, norm, weights, input_quantizer(item))
        else:
            axis = linear_axis if item.layer.kind == "linear" else 0
            weights = weight_quantizer(item, module.weight, axis)
            bias = getattr(module, "bias", None)
            layer = QuantizedLinear(module.weight, bias, axis, weights, input_quantizer(item))
        replace_module(model, item.name, layer)
        layers[item.name] = layer
    return Prepared(family=family, model=model, plan=plan, layers=layers)


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


def rebuild(float_model: FloatModel, trained: TrainedModel) -> Prepared:
    """Rebuild the trained model from its artifact, with fixed scales and no trainable parameter."""
    facts = read_json(trained.path / "trained.json")
    tensors = load_file(trained.path / "trained.safetensors")
    family = facts["family"]
    plan = plans_from_json(facts["plan"])
    points = points_from_json(facts.get("points", []))
    model = FAMILIES[family].load_float(float_model.source, float_model.path)
    with torch.no_grad():
        own = own_tensors(model)
        for name in facts["changed"]:
            own[name].copy_(tensors[name])

    def weight_quantizer(item: LayerPlan, weight: Tensor, axis: int) -> nn.Module:
        return frozen_weight(item, tensors, axis)

    def input_quantizer(item: LayerPlan) -> nn.Module | None:
        if item.activations is None:
            return None
        return FrozenActivation(tensors[f"{item.name}.input.scale"], item.activations.bounds)

    def point_quantizer(item: PointPlan) -> nn.Module:
        return FrozenActivation(tensors[f"{item.name}.scale"], item.activations.bounds)

    axis = FAMILIES[family].LINEAR_AXIS
    prepared = _install(model, family, plan, axis, weight_quantizer, input_quantizer)
    prepared = _round(prepared, points, point_quantizer)
    for value in facts["rescalings"]:
        site = site_from_json(value)
        prepared.rescale(site, FixedScale(tensors[f"{site.writer}.rescale"]))
    prepared.model.requires_grad_(False).eval()
    return prepared


def _stored_weight(item: LayerPlan, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Build the decoder of a folded weight; its tensors are removed from `tensors`."""
    encoding = encoding_of(item.weights)
    parts = {part: tensors.pop(f"{item.name}.weight.{part}", None) for part in encoding.parts}
    return encoding.decoder(parts, item, dtype)


def assemble(folded: FoldedModel, dtype: torch.dtype = torch.float32, integer: bool = False) -> nn.Module:
    """Build the folded model in torch; scales and unquantized tensors have type `dtype`. With `integer`,
    matmuls are computed like int8 GEMMs. Raises ContractError if the tensors do not fit the model.
    """
    facts = read_json(folded.path / "folded.json")
    tensors = load_file(folded.path / "folded.safetensors")
    plan = plans_from_json(facts["plan"])
    model = FAMILIES[facts["family"]].empty(folded.path)
    layers: dict[str, nn.Module] = {}
    for item in plan:
        if item.weights is None:
            continue
        rounding = None
        if item.activations is not None:
            scale = tensors.pop(f"{item.name}.input.scale").to(dtype)
            rounding = Rounding(scale, item.activations.bounds)
        bias = tensors.pop(f"{item.name}.bias", None)
        bias = None if bias is None else bias.to(dtype)
        owner = layers.get(item.layer.tied_to or "")
        if isinstance(owner, FoldedLinear):
            layer = FoldedLinear(owner.weight, owner.bias, rounding, integer)
        elif owner is not None:
            layer = FoldedTiedHead(owner.weight, rounding, integer)
        elif item.layer.kind == "conv":
            weight = _stored_weight(item, tensors, dtype)
            gain = tensors.pop(f"{item.name}.gain", None)
            geometry = Geometry.of(model.get_submodule(item.name))
            layer = FoldedConv(
                weight, bias, rounding, geometry, integer, None if gain is None else gain.to(dtype)
            )
        else:
            table = item.layer.kind == "embedding"
            weight = _stored_weight(item, tensors, dtype)
            layer = FoldedEmbedding(weight) if table else FoldedLinear(weight, bias, rounding, integer)
        replace_module(model, item.name, layer)
        layers[item.name] = layer
        if item.layer.norm:
            replace_module(model, item.layer.norm, nn.Identity())
    points = rounded(points_from_json(facts.get("points", [])))
    rounding = {
        item.name: Rounding(tensors.pop(f"{item.name}.scale").to(dtype), item.activations.bounds)
        for item in points
    }
    FAMILIES[facts["family"]].install_points(model, rounding)
    own = own_tensors(model)
    if set(own) != set(tensors):
        raise ContractError(
            f"{folded.path}: the model and the file differ in {sorted(set(own) ^ set(tensors))[:5]}"
        )
    for name, value in tensors.items():
        value = value.to(dtype) if value.is_floating_point() else value
        is_parameter = isinstance(own[name], nn.Parameter)
        replace_module(model, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    FAMILIES[facts["family"]].tie(model)
    return model.requires_grad_(False).eval()
