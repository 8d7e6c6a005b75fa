"""What calibration sees: ranges of the float model's activations, and of a trained one's.

Both leave padding out, and both know layers' inputs and points alike. Shapes: activations [batch, tokens,
channels] or, of images, [batch, channels, height, width], masks bool [batch, tokens].
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
from qcompress.quant.quantizers import FrozenActivation
from qcompress.quant.ranges import Statistics
from qcompress.tasks.examples import Batch, inputs_of

ROWS = 512
"""Token vectors kept of each layer's input when a range needs a distribution."""


@torch.no_grad()
def observe(
    model: nn.Module, plan: tuple[LayerPlan, ...], batches: Iterable[Batch], tokens: int | None,
    points: tuple[PointPlan, ...] = (), examples: int = 0,
) -> dict[str, Statistics]:  # fmt: skip
    """Statistics of the inputs of all layers whose activations are quantized, and of what points round, by
    the names of layers and points.

    `tokens` is how many tokens the batches have in all; None where a model makes its own positions of an
    input (images), and `examples` are how many. Padding is left out. Points need a module at their place
    (`open_points`, or quantizers).
    """
    watched = [item for item in plan if item.weights and item.activations]
    stride = None if tokens is None else max(1, tokens // ROWS)
    seen = {item.name: _Seen(stride, item) for item in [*watched, *rounded(points)]}
    real: list[Tensor | None] = [None]
    share = 1.0

    def watch(name: str, vectors: Callable[[Tensor, Tensor | None], Tensor]):
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[name].add(vectors(arguments[0].detach().float(), real[0]), share)

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
    return {name: found.statistics() for name, found in seen.items()}


def _vectors_of(item: LayerPlan | PointPlan) -> Callable[[Tensor, Tensor | None], Tensor]:
    """From what a layer or a point is given, and which tokens are real, to its vectors [vectors, width]."""
    point = isinstance(item, PointPlan)
    own = partial(token_vectors, item.name) if point else _layer_vectors
    image = item.point.kind == "residual" if point else item.layer.kind == "conv"

    def vectors(x: Tensor, mask: Tensor | None) -> Tensor:
        # of an image every pixel has one
        return x.movedim(1, -1).flatten(0, -2) if image and x.dim() == 4 else own(x, mask)

    return vectors


def _layer_vectors(x: Tensor, mask: Tensor | None) -> Tensor:
    """Token vectors of a layer's input, [tokens, channels]: those of padding left out."""
    # a pooled input has one vector for each sequence, and no padding
    return x.flatten(0, -2) if mask is None or x.shape[:-1] != mask.shape else x[mask]


class _Seen:
    """Gathers the statistics of one activation, whose vectors come in pieces [vectors, channels].

    `stride` None: so that about `ROWS` vectors are kept of all, as the first piece promises them.
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
        """Take in some vectors, of which `share` is the part of all."""
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
        """What was seen."""
        rows = torch.cat(self.rows) if self.rows else self.largest.new_empty(0, len(self.largest))
        return Statistics(self.largest, (self.total / self.count).float(), rows)


@torch.no_grad()
def make_static(prepared: Prepared, batches: Iterable[Batch]) -> dict[str, dict[str, float]]:
    """Replace every dynamic activation quantizer by one with a static scale: the largest range that the
    calibration data calls for, at most the clip.

    The range is that of the *quantized* model, whose weights training has moved, and not of the float one.
    One pass observes all layers, each with dynamic ranges before it: that is the model that was trained, and
    a pass for each layer would only add the static rounding of the layers before it, which no value leaves
    the range by. Padding is left out. Called when training has ended; the result is the same at every call.

    What static ranges cost is measured by the stage verify, which puts the dynamic ones back.

    Returns for each layer and point its range, the largest magnitude seen, and the scale; empty if none is
    dynamic.
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
    """Which tokens of a batch are no padding, bool [batch, sequence]; None: all of them."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()
