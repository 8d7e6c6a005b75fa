"""Activation observers: ranges of the float model's activations, and static ranges for a trained model's
dynamic ones.

Both mask padding, and both cover layer inputs and quantization points. Shapes: activations [batch, tokens,
channels] or, for images, [batch, channels, height, width]; masks bool [batch, tokens].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from qcompress.models.attention import token_vectors
from qcompress.models.plan import LayerPlan, PointPlan, rounded
from qcompress.models.prepare import Prepared, replace_module
from qcompress.quant.dynamic import DynamicActivation
from qcompress.quant.layers import refresh
from qcompress.quant.quantizers import FrozenActivation
from qcompress.quant.ranges import Statistics
from qcompress.tasks.examples import Batch, inputs_of

ROWS = 512
"""Token vectors kept of each activation whose range needs a distribution."""


@torch.no_grad()
def observe(
    model: nn.Module, plan: tuple[LayerPlan, ...], batches: Iterable[Batch], tokens: int | None,
    points: tuple[PointPlan, ...] = (), examples: int = 0,
) -> dict[str, Statistics]:  # fmt: skip
    """Statistics of the inputs of all layers with quantized activations, and of all rounded points, by the
    name of the layer or point.

    `tokens`: total number of tokens in the batches; None where a model computes its own positions (images),
    and then `examples` is the number of examples. Padding is masked. Every point needs a module at its name
    (`open_points`, or quantizers).
    """
    watched = [item for item in plan if item.weights and item.activations]
    stride = None if tokens is None else max(1, tokens // ROWS)
    observers = {item.name: _Observer(stride, item) for item in [*watched, *rounded(points)]}
    real: list[Tensor | None] = [None]
    share = 1.0

    def watch(name: str, vectors: Callable[[Tensor, Tensor | None], Tensor]):
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            observers[name].add(vectors(arguments[0].detach().float(), real[0]), share)

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [watch(item.name, _vectors_of(item)) for item in [*watched, *rounded(points)]]
    try:
        for batch in batches:
            real[0] = real_tokens(batch)
            share = len(next(iter(batch.values()))) / examples if examples else 1.0
            model(**inputs_of(batch))
    finally:
        for handle in handles:
            handle.remove()
    return {name: observer.statistics() for name, observer in observers.items()}


def _vectors_of(item: LayerPlan | PointPlan) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Function from the input of a layer or point and its padding mask to vectors [vectors, width]."""
    point = isinstance(item, PointPlan)
    tokens_of = partial(token_vectors, item.name) if point else _layer_vectors
    image = item.point.kind == "residual" if point else item.layer.kind == "conv"

    def vectors(x: Tensor, mask: Tensor | None) -> Tensor:
        # one vector for each pixel of an image
        return x.movedim(1, -1).flatten(0, -2) if image and x.dim() == 4 else tokens_of(x, mask)

    return vectors


def _layer_vectors(x: Tensor, mask: Tensor | None) -> Tensor:
    """Token vectors of a layer's input, [tokens, channels], without padding."""
    # a pooled input has one vector for each sequence, and no padding
    return x.flatten(0, -2) if mask is None or x.shape[:-1] != mask.shape else x[mask]


class _Observer:
    """Accumulates statistics of one activation from chunks of vectors [vectors, channels].

    `stride` None: chosen at the first chunk so that about `ROWS` vectors are kept in all.
    """

    def __init__(self, stride: int | None, item: LayerPlan | PointPlan) -> None:
        options = item.activation_quantizer
        self.stride = stride
        self.keep = getattr(options, "range", getattr(options, "init", "")) in ("percentile", "mse")
        self.largest: Tensor | None = None
        self.total: Tensor | None = None
        self.rows: list[Tensor] = []
        self.count = 0

    def add(self, x: Tensor, share: float = 1.0) -> None:
        """Add a chunk of vectors; `share` is its fraction of all data."""
        if self.stride is None:
            self.stride = max(1, round(len(x) / share) // ROWS)
        magnitude = x.abs()
        peak, total = magnitude.amax(0), magnitude.sum(0, dtype=torch.float64)
        self.largest = peak if self.largest is None else torch.maximum(self.largest, peak)
        self.total = total if self.total is None else self.total + total
        if self.keep:
            self.rows.append(x[-self.count % self.stride :: self.stride].clone())
        self.count += len(x)

    def statistics(self) -> Statistics:
        """Statistics of all chunks added so far."""
        rows = torch.cat(self.rows) if self.rows else self.largest.new_empty(0, len(self.largest))
        return Statistics(self.largest, (self.total / self.count).float(), rows)


@torch.no_grad()
def make_static(prepared: Prepared, batches: Iterable[Batch]) -> dict[str, dict[str, float]]:
    """Replace every dynamic activation quantizer by one with a static scale: the largest range on the
    calibration data, limited by the clip.

    The range is that of the *quantized* model, whose weights training has moved, and not of the float one.
    One pass observes all layers, each preceded by dynamic ranges: that is the trained model, and a pass for
    each layer would only add the static rounding of the layers before it, which cannot leave the range.
    Padding is masked. Called when training has ended; repeated calls give equal results. The verify stage
    measures the cost of static ranges by restoring the dynamic ones.

    Returns for each layer and point its range (the largest magnitude) and its scale; empty without dynamic
    quantizers.
    """
    dynamic = {
        name: quantizer
        for name, quantizer in [*prepared.input_quantizers(), *prepared.rounding.items()]
        if isinstance(quantizer, DynamicActivation)
    }
    if not dynamic:
        return {}
    largest: dict[str, Tensor] = {}
    real: list[Tensor | None] = [None]

    def watch(name: str):
        vectors = partial(token_vectors, name) if name in prepared.rounding else _layer_vectors

        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            peak = vectors(arguments[0].detach(), real[0]).float().abs().amax()
            largest[name] = torch.maximum(largest[name], peak) if name in largest else peak

        return hook

    handles = [quantizer.register_forward_pre_hook(watch(name)) for name, quantizer in dynamic.items()]
    training = prepared.model.training
    prepared.model.eval()
    refresh(prepared.layers.values())
    try:
        for batch in batches:
            real[0] = real_tokens(batch)
            prepared.model(**inputs_of(batch))
    finally:
        prepared.model.train(training)
        for handle in handles:
            handle.remove()
    facts, static = {}, {}
    for name, quantizer in dynamic.items():
        scale = quantizer.scale_for(largest[name])
        static[name] = FrozenActivation(scale, quantizer.bounds)
        facts[name] = {"range": float(largest[name]), "scale": float(scale)}
    for name, quantizer in static.items():
        if name in prepared.rounding:
            prepared.rounding[name] = quantizer
            replace_module(prepared.model, name, quantizer)
        else:
            prepared.layers[name].input_quantizer = quantizer
    return facts


def real_tokens(batch: Batch) -> Tensor | None:
    """Mask of the tokens that are not padding, bool [batch, sequence]; None: no padding."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()
