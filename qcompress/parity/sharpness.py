"""Sharpness of a model: the rise of the loss around its quantized weights.

Two numbers, both with respect to Q(w), the weights as they enter the matmuls, of all linear layers together
(without embedding tables, which the steppers' ball excludes by default as well):

    loss_rise     mean over random directions d with ||d||_2 = rho of L(Q(w) + d) - L(Q(w)). The directions
                  are normal draws scaled to the norm as one vector, with no per-filter normalisation. Each
                  is used as d and -d: the linear term in d has mean 0 and would dominate the noise.
    eigenvalue    the largest (most positive) eigenvalue of the Hessian of L with respect to Q(w)

Activations pass through their quantizers. For the second derivative a rounding counts as x -> x + c with
constant c inside its range, and as a constant outside; the Hessian is that of the loss of *that* network,
which has an equal value and gradient at Q(w). With float activations it is the Hessian of the loss itself.

The eigenvalue comes from power iteration on v -> Hv (double backward), which converges to the eigenvalue a of
largest magnitude; if that is negative, a second search on H - aI gives the largest one. A search ends when
||Hv - av|| <= tolerance * |a|. This residual bounds the distance of a to an eigenvalue, and it is returned
with the number of iterations, which distinguishes a converged search from one that reached its limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qcompress.errors import ModelError
from qcompress.models.checkpoint_files import read_config
from qcompress.models.prepare import Prepared, replace_module
from qcompress.models.rebuild import rebuild
from qcompress.quant.layers import QuantizedEmbedding, QuantizedLinear, QuantizedWeight, Tap, tapped
from qcompress.schema.method_options import Sharpness
from qcompress.schema.recipe import Recipe
from qcompress.system.artifacts import FloatModel, TrainedModel
from qcompress.system.reporter import Reporter
from qcompress.tasks import TASKS, loss_of
from qcompress.tasks.examples import inputs_of

Vector = list[Tensor]
"""One tensor for each tapped weight, in its shape; together one vector."""


@dataclass(frozen=True)
class Part:
    """Mean loss of some samples, and their fraction of all samples."""

    loss: Callable[[], Tensor]
    share: float = 1.0


def measure_sharpness(
    parts: Sequence[Part], layers: Sequence[QuantizedWeight], options: Sharpness, seed: int
) -> dict[str, float]:
    """Compute loss, loss_rise, eigenvalue, iterations and residual (relative) at the layers' rounded weights.

    The model must be in evaluation mode: a loss with dropout has no Hessian.
    """
    landscape = _Landscape(parts, layers, torch.Generator().manual_seed(seed))
    # only the math attention kernel has a second derivative
    with sdpa_kernel(SDPBackend.MATH):
        loss = landscape.loss()
        rises = [landscape.loss_around(options.rho) - loss for _ in range(options.directions)]
        top = _power_iteration(landscape, 0.0, options)
        iterations = top.iterations
        if top.value < 0:
            shifted = _power_iteration(landscape, top.value, options)
            top, iterations = shifted, iterations + shifted.iterations
    return {
        "loss": loss,
        "loss_rise": sum(rises) / options.directions,
        "eigenvalue": top.value,
        "iterations": float(iterations),
        "residual": top.residual,
    }


class _Landscape:
    """The loss as a function of an offset to the rounded weights."""

    def __init__(
        self, parts: Sequence[Part], layers: Sequence[QuantizedWeight], random: torch.Generator
    ) -> None:
        self.parts, self.layers, self.random = parts, layers, random

    def direction(self, norm: float) -> Vector:
        """Random vector of this norm, independent of the device."""
        draws = [torch.randn(layer.weight.shape, generator=self.random) for layer in self.layers]
        factor = norm / torch.nn.utils.get_total_norm(draws)
        return [
            (draw * factor).to(layer.weight.device) for draw, layer in zip(draws, self.layers, strict=True)
        ]

    def loss_around(self, norm: float) -> float:
        """Mean of the losses at a random offset and at its negative."""
        offsets = self.direction(norm)
        return (self.loss(offsets) + self.loss([-offset for offset in offsets])) / 2

    @torch.no_grad()
    def loss(self, offsets: Vector | None = None) -> float:
        """Mean loss over all samples, with the offsets added."""
        taps = [Tap("rounded", offset) for offset in offsets or [None] * len(self.layers)]
        with tapped(self.layers, taps):
            return sum(part.share * part.loss().double().item() for part in self.parts)

    @torch.enable_grad()
    def hessian_times(self, vector: Vector) -> Vector:
        """H v, by differentiating the gradient's product with v."""
        total = [torch.zeros_like(tensor) for tensor in vector]
        for part in self.parts:
            offsets = [torch.zeros_like(tensor, requires_grad=True) for tensor in vector]
            with tapped(self.layers, [Tap("rounded", offset) for offset in offsets]):
                loss = part.loss()
            gradients = torch.autograd.grad(loss, offsets, create_graph=True, allow_unused=True)
            used = [(g, v) for g, v in zip(gradients, vector, strict=True) if g is not None]
            product = sum((g * v).sum() for g, v in used)
            if not product.requires_grad:
                continue  # the loss is linear in the weights
            seconds = torch.autograd.grad(product, offsets, allow_unused=True)
            for sum_, second in zip(total, seconds, strict=True):
                if second is not None:
                    sum_.add_(second, alpha=part.share)
        return total


@dataclass(frozen=True)
class _Eigenvalue:
    value: float
    residual: float
    """||Hv - value v|| / |value|, with v of norm 1."""
    iterations: int


def _dot(a: Vector, b: Vector) -> float:
    return sum((x.double() * y.double()).sum().item() for x, y in zip(a, b, strict=True))


def _power_iteration(landscape: _Landscape, shift: float, options: Sharpness) -> _Eigenvalue:
    """Eigenvalue of H with the largest distance from `shift`."""
    vector = landscape.direction(1.0)
    value, residual, iteration = 0.0, 0.0, 0
    while iteration < options.iterations:
        iteration += 1
        image = landscape.hessian_times(vector)
        value = _dot(vector, image)
        rest = [h - value * v for h, v in zip(image, vector, strict=True)]
        residual = _dot(rest, rest) ** 0.5
        moved = [h - shift * v for h, v in zip(image, vector, strict=True)]
        length = _dot(moved, moved) ** 0.5
        if residual <= options.tolerance * abs(value) or length == 0:
            break
        vector = [tensor / length for tensor in moved]
    return _Eigenvalue(value, residual / abs(value) if value else 0.0, iteration)


def trained_sharpness(
    recipe: Recipe, base: Path, float_model: FloatModel, trained: TrainedModel, device: torch.device,
    reporter: Reporter,
) -> dict[str, float]:  # fmt: skip
    """Compute `sharpness.*` of a trained model, with its task's loss on samples spread over the first
    evaluation set.

    A model without a quantized linear layer is measured at the float weights of all linear layers.
    """
    options, task = recipe.verify.sharpness, TASKS[recipe.task.name]
    prepared = rebuild(float_model, trained)
    layers = _linear_layers(prepared)
    model = prepared.model.to(device)
    section = next(iter(recipe.data.evaluate.values()))
    settled = task.settled(recipe.task, read_config(float_model.path))
    examples = task.examples(section, base, task.reader(float_model.path), settled)
    loss = loss_of(settled, base)
    count = min(options.samples, len(examples))
    rows = [index * len(examples) // count for index in range(count)]
    size = recipe.verify.batch_size

    def part(indices: list[int]) -> Part:
        batch = {name: tensor.to(device) for name, tensor in examples.batch(indices).items()}
        return Part(lambda: loss(model(**inputs_of(batch)).logits, batch), len(indices) / count)

    parts = [part(rows[start : start + size]) for start in range(0, count, size)]
    sharpness = measure_sharpness(parts, layers, options, recipe.seed)
    reporter.say(
        f"verify: loss rises by {sharpness['loss_rise']:.3g} at distance {options.rho:g}, "
        f"largest eigenvalue {sharpness['eigenvalue']:.4g} "
        f"(residual {sharpness['residual']:.1e} after {sharpness['iterations']:.0f} iterations)"
    )
    return {f"sharpness.{name}": value for name, value in sharpness.items() if name != "loss"}


def _linear_layers(prepared: Prepared) -> list[QuantizedWeight]:
    """Linear layers with a quantized weight or, without any, all linear layers, wrapped so that they can be
    perturbed. Raises ModelError for a model without linear layers.
    """
    layers = [prepared.layers[name] for name, _ in prepared.weight_quantizers()]
    layers = [layer for layer in layers if not isinstance(layer, QuantizedEmbedding)]
    if layers:
        return layers
    for item in prepared.plan:
        if item.layer.kind == "linear":
            module = prepared.model.get_submodule(item.name)
            bias = getattr(module, "bias", None)
            layer = QuantizedLinear(module.weight, bias, item.layer.axis, None, None)
            replace_module(prepared.model, item.name, layer)
            layers.append(layer)
    if not layers:
        raise ModelError(
            f"{prepared.family}: the model has no linear layer whose sharpness could be measured"
        )
    return layers
