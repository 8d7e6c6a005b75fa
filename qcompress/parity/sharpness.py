"""How steeply the loss rises around a model's quantized weights.

Two numbers, both with respect to Q(w), the weights as they enter the matmuls, of all linear layers together
(embedding tables are left out, as they are from the steppers' ball by default):

    loss_rise     mean over random directions d with ||d||_2 = rho of L(Q(w) + d) - L(Q(w)). The directions
                  are normal draws scaled to the norm as one vector, with no per-filter normalisation. Each
                  is gone both ways, d and -d: what is linear in d has mean 0 and would be most of the noise.
    eigenvalue    the largest (most positive) eigenvalue of the Hessian of L with respect to Q(w)

Activations pass through their quantizers. Differentiated twice, straight through, a rounding is x -> x + c
with c held constant inside its range, and a constant outside; of the loss of *that* network, which has the
same value and gradient at Q(w), the Hessian is taken. With float activations it is the Hessian of the loss
itself.

The eigenvalue is found by power iteration on v -> Hv (double backward). It converges to the eigenvalue a of
largest magnitude; where that is negative, a second search on H - aI gives the largest one. A search ends when
||Hv - av|| <= tolerance * |a|: this residual bounds the distance of a to an eigenvalue, and it is returned
with the iterations, so that a search that ran out of them can be told from one that converged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qcompress.errors import ModelError
from qcompress.models import FAMILIES
from qcompress.models.prepare import Prepared, rebuild, replace_module
from qcompress.quant.layers import QuantizedEmbedding, QuantizedLinear, QuantizedWeight, Tap, tapped
from qcompress.schema.method_options import Sharpness
from qcompress.schema.recipe import Recipe
from qcompress.system.artifacts import FloatModel, TrainedModel
from qcompress.system.reporter import Reporter
from qcompress.tasks import TASKS
from qcompress.tasks.examples import inputs_of

Vector = list[Tensor]
"""One tensor for each tapped weight, in its shape; together one vector."""


@dataclass(frozen=True)
class Part:
    """The mean loss of some samples, and their share of all samples."""

    loss: Callable[[], Tensor]
    share: float = 1.0


def measure_sharpness(
    parts: Sequence[Part], layers: Sequence[QuantizedWeight], options: Sharpness, seed: int
) -> dict[str, float]:
    """loss, loss_rise, eigenvalue, iterations and residual (relative) at the layers' rounded weights.

    The model must be in evaluation mode: a loss with dropout in it has no Hessian.
    """
    landscape = _Landscape(parts, layers, torch.Generator().manual_seed(seed))
    # of the attention kernels only the plain one can be differentiated twice
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
        """A random vector of this norm; the same on every device."""
        draws = [torch.randn(layer.weight.shape, generator=self.random) for layer in self.layers]
        factor = norm / torch.nn.utils.get_total_norm(draws)
        return [
            (draw * factor).to(layer.weight.device) for draw, layer in zip(draws, self.layers, strict=True)
        ]

    def loss_around(self, norm: float) -> float:
        """Mean of the losses at a random offset and at its opposite."""
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
    """The eigenvalue of H whose distance to `shift` is largest."""
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
    """`sharpness.*` of a trained model, with its task's loss on samples spread over the first evaluation set.

    In a model without a quantized linear layer, it is the sharpness at the float weights of all of them.
    """
    options, task = recipe.verify.sharpness, TASKS[recipe.task.name]
    prepared = rebuild(float_model, trained)
    layers = _linear_layers(prepared)
    model = prepared.model.to(device)
    section = next(iter(recipe.data.evaluate.values()))
    examples = task.examples(section, base, task.reader(float_model.path), recipe.task)
    count = min(options.samples, len(examples))
    rows = [place * len(examples) // count for place in range(count)]
    size = recipe.verify.batch_size

    def part(chosen: list[int]) -> Part:
        batch = {name: tensor.to(device) for name, tensor in examples.batch(chosen).items()}
        return Part(lambda: task.loss(model(**inputs_of(batch)).logits, batch), len(chosen) / count)

    parts = [part(rows[start : start + size]) for start in range(0, count, size)]
    found = measure_sharpness(parts, layers, options, recipe.seed)
    reporter.say(
        f"verify: loss rises by {found['loss_rise']:.3g} at distance {options.rho:g}, "
        f"largest eigenvalue {found['eigenvalue']:.4g} "
        f"(residual {found['residual']:.1e} after {found['iterations']:.0f} iterations)"
    )
    return {f"sharpness.{name}": value for name, value in found.items() if name != "loss"}


def _linear_layers(prepared: Prepared) -> list[QuantizedWeight]:
    """Linear layers with a quantized weight; where there is none, all of them, as layers that do not
    round.
    """
    found = [prepared.layers[name] for name, _ in prepared.weight_quantizers()]
    found = [layer for layer in found if not isinstance(layer, QuantizedEmbedding)]
    if found:
        return found
    axis = FAMILIES[prepared.family].LINEAR_AXIS
    for item in prepared.plan:
        if item.layer.kind == "linear":
            module = prepared.model.get_submodule(item.name)
            layer = QuantizedLinear(module.weight, getattr(module, "bias", None), axis, None, None)
            replace_module(prepared.model, item.name, layer)
            found.append(layer)
    if not found:
        raise ModelError(
            f"{prepared.family}: the model has no linear layer whose sharpness could be measured"
        )
    return found
