"""From a float model and layer plans to a model that rounds, in three forms.

    quantize(model, plan)            quantizers that can train
    rebuild(float, trained)          the same layers with nothing but their final scales
    assemble(folded)                 int8 codes and scales (`quant/folded.py`)

Train, fold, export and the runners share these, so there is one way to build each form.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qcompress.artifacts import FloatModel, FoldedModel, TrainedModel, read_json
from qcompress.errors import ContractError
from qcompress.models import FAMILIES
from qcompress.plan import LayerPlan, plans_from_json
from qcompress.quant.affine import Grid
from qcompress.quant.dynamic import DynamicActivation
from qcompress.quant.folded import FoldedEmbedding, FoldedLinear, FoldedTiedHead, FoldedWeight, Rounding
from qcompress.quant.layers import (
    FixedScale,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedTiedHead,
    RescaledNorm,
)
from qcompress.quant.quantizers import (
    ACTIVATION_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    FrozenActivation,
    FrozenWeight,
)
from qcompress.quant.ranges import Statistics
from qcompress.tasks.examples import Batch, inputs_of

ROWS = 512
"""Token vectors kept of each layer's input when a range needs a distribution."""

QuantizedLayer = QuantizedLinear | QuantizedEmbedding | QuantizedTiedHead


@dataclass(frozen=True)
class Prepared:
    """A model with quantizers. `layers` by layer name, `norms` by norm name."""

    family: str
    model: nn.Module
    plan: tuple[LayerPlan, ...]
    layers: dict[str, QuantizedLayer]
    norms: dict[str, RescaledNorm] = field(default_factory=dict)

    def weight_quantizers(self) -> Iterable[tuple[str, nn.Module]]:
        """Every weight quantizer with its layer's name."""
        for name, layer in self.layers.items():
            if getattr(layer, "weight_quantizer", None) is not None:
                yield name, layer.weight_quantizer

    def input_quantizers(self) -> Iterable[tuple[str, nn.Module]]:
        """Every activation quantizer with its layer's name."""
        for name, layer in self.layers.items():
            if getattr(layer, "input_quantizer", None) is not None:
                yield name, layer.input_quantizer

    def rescale(self, norm: str, readers: Iterable[str], scale: nn.Module) -> None:
        """Multiply a norm's output by `scale` and divide the rows of its readers' weights by it."""
        wrapped = RescaledNorm(self.model.get_submodule(norm), scale)
        replace_module(self.model, norm, wrapped)
        self.norms[norm] = wrapped
        for reader in readers:
            layer = self.layers[reader]
            layer.rescale = scale
            if layer.input_quantizer is not None:
                layer.input_quantizer.rescale = scale


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another one was."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def quantize(model: nn.Module, family: str, plan: tuple[LayerPlan, ...]) -> Prepared:
    """Install trainable quantizers; they still have to be initialised."""
    linear_axis = FAMILIES[family].LINEAR_AXIS

    def weight_quantizer(item: LayerPlan, weight: Tensor, axis: int) -> nn.Module:
        kind = WEIGHT_QUANTIZERS[item.weight_quantizer.name]
        return kind(item.weight_quantizer, _grid(item, axis), item.weights.bounds, weight.shape)

    def input_quantizer(item: LayerPlan) -> nn.Module | None:
        if item.activations is None:
            return None
        kind = ACTIVATION_QUANTIZERS[item.activation_quantizer.name]
        return kind(item.activation_quantizer, item.activations.bounds, item.layer.in_features)

    return _install(model, family, plan, linear_axis, weight_quantizer, input_quantizer)


def _grid(item: LayerPlan, axis: int) -> Grid:
    """How the scales of a layer's weight lie over it while training; `axis` is its output channels'."""
    return Grid(axis, item.block, item.weights.granularity)


def _install(model, family, plan, linear_axis, weight_quantizer, input_quantizer) -> Prepared:
    layers: dict[str, QuantizedLayer] = {}
    for item in plan:
        if item.weights is None:
            continue
        module = model.get_submodule(item.name)
        if item.layer.tied_to:
            layer = QuantizedTiedHead(layers[item.layer.tied_to], input_quantizer(item))
        elif item.layer.kind == "embedding":
            layer = QuantizedEmbedding(module.weight, weight_quantizer(item, module.weight, 0))
        else:
            axis = linear_axis if item.layer.kind == "linear" else 0
            weights = weight_quantizer(item, module.weight, axis)
            bias = getattr(module, "bias", None)
            layer = QuantizedLinear(module.weight, bias, axis, weights, input_quantizer(item))
        replace_module(model, item.name, layer)
        layers[item.name] = layer
    return Prepared(family=family, model=model, plan=plan, layers=layers)


@torch.no_grad()
def observe(
    model: nn.Module, plan: tuple[LayerPlan, ...], batches: Iterable[Batch], tokens: int
) -> dict[str, Statistics]:
    """Statistics of the inputs of all layers whose activations are quantized, from the float model.

    `tokens` is how many tokens the batches have in all. Padding is left out.
    """
    watched = [item for item in plan if item.weights and item.activations]
    largest: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {item.name: [] for item in watched}
    stride = max(1, tokens // ROWS)
    counts = dict.fromkeys(rows, 0)
    real: list[Tensor | None] = [None]

    def watch(item: LayerPlan):
        options = item.activation_quantizer
        keep = getattr(options, "range", getattr(options, "init", "")) in ("percentile", "mse")

        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x, name = real_rows(arguments[0].detach().float(), real[0]), item.name
            magnitude = x.abs()
            peak = magnitude.amax(0)
            largest[name] = torch.maximum(largest[name], peak) if name in largest else peak
            total[name] = total.get(name, 0) + magnitude.sum(0, dtype=torch.float64)
            if keep:
                rows[name].append(x[-counts[name] % stride :: stride].clone())
            counts[name] += len(x)

        return hook

    handles = [model.get_submodule(item.name).register_forward_pre_hook(watch(item)) for item in watched]
    try:
        for batch in batches:
            real[0] = batch.get("attention_mask")
            model(**inputs_of(batch))
    finally:
        for handle in handles:
            handle.remove()
    return {
        item.name: Statistics(
            largest=largest[item.name],
            mean=(total[item.name] / counts[item.name]).float(),
            rows=torch.cat(rows[item.name]) if rows[item.name] else torch.empty(0, item.layer.in_features),
        )
        for item in watched
    }


def initialise(prepared: Prepared, statistics: dict[str, Statistics]) -> None:
    """Starting scales of all quantizers, after adapters are in place: they see rescaled tensors."""
    for name, quantizer in prepared.weight_quantizers():
        quantizer.init(prepared.layers[name].rescaled_weight().detach())
    for name, quantizer in prepared.input_quantizers():
        quantizer.init(statistics[name])


@torch.no_grad()
def make_static(prepared: Prepared, batches: Iterable[Batch]) -> dict[str, dict[str, float]]:
    """Replace every dynamic activation quantizer by one with a static scale: the largest range that the
    calibration data calls for, at most the clip.

    The range is that of the *quantized* model, whose weights training has moved, and not of the float one.
    One pass observes all layers, each with dynamic ranges before it: that is the model that was trained, and
    a pass for each layer would only add the static rounding of the layers before it, which no value leaves
    the range by. Padding is left out. Called when training has ended; the result is the same at every call.

    Returns for each layer its range, the largest magnitude seen, and the scale. Empty if none is dynamic.
    """
    dynamic = {
        name: quantizer
        for name, quantizer in prepared.input_quantizers()
        if isinstance(quantizer, DynamicActivation)
    }
    if not dynamic:
        return {}
    largest: dict[str, Tensor] = {}
    mask: list[Tensor | None] = [None]

    def watch(name: str):
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            peak = real_rows(arguments[0].detach(), mask[0]).float().abs().amax()
            largest[name] = torch.maximum(largest[name], peak) if name in largest else peak

        return hook

    handles = [quantizer.register_forward_pre_hook(watch(name)) for name, quantizer in dynamic.items()]
    training = prepared.model.training
    prepared.model.eval()
    try:
        for batch in batches:
            mask[0] = batch.get("attention_mask")
            prepared.model(**inputs_of(batch))
    finally:
        prepared.model.train(training)
        for handle in handles:
            handle.remove()
    facts = {}
    for name, quantizer in dynamic.items():
        scale = quantizer.scale_for(largest[name])
        prepared.layers[name].input_quantizer = FrozenActivation(scale, quantizer.bounds)
        facts[name] = {"range": float(largest[name]), "scale": float(scale)}
    return facts


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Token vectors [rows, channels] without padding; `mask` [batch, sequence], 0 where it is.

    A pooled input has one vector for each sequence, and no padding.
    """
    return x.flatten(0, -2) if mask is None or x.shape[:-1] != mask.shape else x[mask.bool()]


def rebuild(float_model: FloatModel, trained: TrainedModel) -> Prepared:
    """The trained model from its artifact: rounding with the final scales, nothing trainable."""
    facts = read_json(trained.path / "trained.json")
    tensors = load_file(trained.path / "trained.safetensors")
    family = facts["family"]
    plan = plans_from_json(facts["plan"])
    model = FAMILIES[family].load_float(float_model.source)
    with torch.no_grad():
        own = dict(model.named_parameters())
        for name in facts["changed"]:
            own[name].copy_(tensors[name])

    def weight_quantizer(item: LayerPlan, weight: Tensor, axis: int) -> nn.Module:
        scale = tensors[f"{item.name}.weight.scale"]
        threshold = tensors.get(f"{item.name}.weight.threshold")
        return FrozenWeight(scale, _grid(item, axis), item.weights.bounds, threshold)

    def input_quantizer(item: LayerPlan) -> nn.Module | None:
        if item.activations is None:
            return None
        return FrozenActivation(tensors[f"{item.name}.input.scale"], item.activations.bounds)

    axis = FAMILIES[family].LINEAR_AXIS
    prepared = _install(model, family, plan, axis, weight_quantizer, input_quantizer)
    for site in facts["rescalings"]:
        prepared.rescale(site["norm"], site["readers"], FixedScale(tensors[f"{site['norm']}.rescale"]))
    prepared.model.requires_grad_(False).eval()
    return prepared


def assemble(folded: FoldedModel, dtype: torch.dtype = torch.float32, integer: bool = False) -> nn.Module:
    """The folded model in torch, its float rest and scales in `dtype`; `integer`: as int8 GEMMs compute
    it.
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
            rounding = Rounding(tensors.pop(f"{item.name}.input.scale").to(dtype))
        if item.layer.tied_to:
            layer = FoldedTiedHead(layers[item.layer.tied_to].weight, rounding, integer)
        else:
            codes, scale = (tensors.pop(f"{item.name}.weight.{part}") for part in ("codes", "scale"))
            table = item.layer.kind == "embedding"
            weight = FoldedWeight(
                codes, scale.to(dtype), Grid(0 if table else 1, item.block), item.weights.stored_bits
            )
            bias = tensors.pop(f"{item.name}.bias", None)
            bias = None if bias is None else bias.to(dtype)
            layer = FoldedEmbedding(weight) if table else FoldedLinear(weight, bias, rounding, integer)
        replace_module(model, item.name, layer)
        layers[item.name] = layer
    own = dict(model.named_parameters())
    if set(own) != set(tensors):
        raise ContractError(
            f"{folded.path}: the model and the file differ in {sorted(set(own) ^ set(tensors))[:5]}"
        )
    for name, value in tensors.items():
        replace_module(model, name, nn.Parameter(value.to(dtype), requires_grad=False))
    FAMILIES[facts["family"]].tie(model)
    return model.requires_grad_(False).eval()
