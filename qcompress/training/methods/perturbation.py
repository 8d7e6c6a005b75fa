"""Worst-case perturbation of a sharpness-aware stepper, within a ball of radius rho.

Source: SAM (Foret et al., arXiv:2010.01412), section 2, first order. With g the gradient of the loss with
respect to all members of the ball, taken together as one vector:

    eps = rho * g / (||g||_2 + 1e-12)

Members by kind: the quantized weights of layers (`weight`) and of embedding tables (`embedding`; a tied head
reads its table), biases (`bias`), weights and biases of norms (`norm`), and learned scales (`weight-scale`,
`activation-scale`). Only trained parameters are members, and a weight that stays float is not. A learned
scale s is perturbed as s, whatever its parametrization: for a parameter p with s = unit * p, the gradient is
divided by the unit before the norm is taken, and eps is divided by the unit before p moves.

A quantized weight is moved by an offset at its tap, and no parameter is written. The other members are moved
in place and restored bit for bit. Gradients of quantized weights are those of this process alone, and the
pass that computes them exchanges nothing, so that under data parallelism each process perturbs by itself
("m-sharpness", as in the published code of SAQ).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.quant.batchnorm import BATCH_NORMS
from qcompress.quant.layers import Place, QuantizedEmbedding, QuantizedWeight, Tap, tapped
from qcompress.quant.rescaling import RescaledNorm
from qcompress.training.methods.protocols import Group, Moment

if TYPE_CHECKING:
    from accelerate import Accelerator

SCALES = ("weight-scale", "activation-scale")


@dataclass(frozen=True)
class Perturbation:
    """eps of every tap and of every parameter in the ball; None for a member without a gradient. Both tuples
    are empty for no perturbation.
    """

    offsets: tuple[Tensor | None, ...] = ()
    shifts: tuple[Tensor | None, ...] = ()

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint, named by index."""
        parts = {"offset": self.offsets, "shift": self.shifts}
        return {
            f"{part}:{index}": tensor
            for part, tensors in parts.items()
            for index, tensor in enumerate(tensors)
            if tensor is not None
        }


@dataclass(frozen=True)
class Ball:
    """Members of one phase that are perturbed, and the radius."""

    layers: tuple[QuantizedWeight, ...]
    parameters: tuple[nn.Parameter, ...]
    kinds: tuple[str, ...]
    """Kind of each parameter."""
    rho: float
    listen: Place
    """Tap whose gradient eps follows."""
    move: Place
    """Tap where eps is added."""
    outside: tuple[nn.Parameter, ...] = ()
    """Trained parameters of the phase that are not members."""
    units: tuple[Tensor | None, ...] = ()
    """Unit of each parameter that stores a learned scale, None for the others."""

    @classmethod
    def of(
        cls, kinds: Sequence[str], groups: Sequence[Group], taps: Sequence[QuantizedWeight],
        rho: float, listen: Place, move: Place,
    ) -> Ball:  # fmt: skip
        """Build the ball from the taps and groups whose kinds are listed."""
        layers = tuple(
            layer
            for layer in taps
            if ("embedding" if isinstance(layer, QuantizedEmbedding) else "weight") in kinds
        )
        trained = [
            (parameter, kind, unit)
            for group in groups
            for parameter, kind, unit in zip(
                group.parameters, group.kinds, group.units or (None,) * len(group.parameters), strict=True
            )
        ]
        inside = [member for member in trained if member[1] in kinds]
        parameters, inside_kinds, units = zip(*inside, strict=True) if inside else ((), (), ())
        outside = tuple(parameter for parameter, kind, _ in trained if kind not in kinds)
        return cls(layers, parameters, inside_kinds, rho, listen, move, outside, units)

    def from_state(self, state: dict[str, Tensor]) -> Perturbation:
        """Inverse of `Perturbation.state_dict`; no tensors mean no perturbation."""
        if not state:
            return Perturbation()
        return Perturbation(
            tuple(state.get(f"offset:{index}") for index in range(len(self.layers))),
            tuple(state.get(f"shift:{index}") for index in range(len(self.parameters))),
        )

    def climb(
        self, closure: Callable[[], Tensor], model: nn.Module | None, accelerator: Accelerator,
        others: Iterable[nn.Parameter] = (),
    ) -> tuple[Tensor, Perturbation]:  # fmt: skip
        """Run one pass at the unperturbed point; returns its loss and eps. The ball's parameters and `others`
        keep their gradients of this pass; nothing else gets one, so that the backward pass ends at the
        rounded weights.

        Under fp16 the loss scale is removed before the norm. A gradient that is not finite (the loss scale
        was too large, and will be lowered) gives no perturbation. Raises ModelError if the phase trains no
        member of the ball.
        """
        taps = [Tap(self.listen, listens=True) for _ in self.layers]
        wanted = {id(parameter) for parameter in others}
        unwanted = [parameter for parameter in self.outside if id(parameter) not in wanted]
        alone = accelerator.no_sync(model) if model is not None else nullcontext()
        with tapped(self.layers, taps), without_gradients(unwanted), alone:
            loss = closure()
            if loss.requires_grad:  # False for an empty ball, which raises below
                accelerator.backward(loss)
        units = (*(None for _ in taps), *self.units)
        gradients = [tap.gradient for tap in taps] + [parameter.grad for parameter in self.parameters]
        known = [
            _over(gradient.detach(), unit)
            for gradient, unit in zip(gradients, units, strict=True)
            if gradient is not None
        ]
        if not known:
            raise ModelError(
                "the stepper perturbs nothing: no member of stepper.ball is trained in this phase",
                fix="add `weight` to stepper.ball (and quantize a layer), or use `stepper: plain`",
            )
        if accelerator.scaler is not None:
            loss_scale = accelerator.scaler.get_scale()
            known = [gradient / loss_scale for gradient in known]
        norm = nn.utils.get_total_norm(known)
        if not bool(norm.isfinite()):
            return loss, Perturbation()
        factor, eps = self.rho / (norm + 1e-12), iter(known)
        shifts = [
            None if gradient is None else _over(next(eps) * factor, unit)
            for gradient, unit in zip(gradients, units, strict=True)
        ]
        return loss, Perturbation(tuple(shifts[: len(taps)]), tuple(shifts[len(taps) :]))

    @contextmanager
    def perturbed(self, eps: Perturbation) -> Iterator[None]:
        """Context manager in which the loss is that of the perturbed point; the parameters are restored
        afterwards.

        A scale keeps at least half its value, because a negative scale would negate its weights.
        """
        if not eps.offsets and not eps.shifts:
            yield
            return
        moved = [
            (parameter, shift, kind)
            for parameter, shift, kind in zip(self.parameters, eps.shifts, self.kinds, strict=True)
            if shift is not None
        ]
        before = [parameter.detach().clone() for parameter, _, _ in moved]
        try:
            with torch.no_grad():
                for parameter, shift, kind in moved:
                    lowest = parameter / 2 if kind in SCALES else None
                    parameter.add_(shift)
                    if lowest is not None:
                        parameter.copy_(torch.maximum(parameter, lowest))
            with tapped(self.layers, [Tap(self.move, offset) for offset in eps.offsets]):
                yield
        finally:
            with torch.no_grad():
                for (parameter, _, _), value in zip(moved, before, strict=True):
                    parameter.copy_(value)


def _over(tensor: Tensor, unit: Tensor | None) -> Tensor:
    """Divide a tensor by its unit, if it has one."""
    return tensor if unit is None else tensor / unit


def random_share(eps: Perturbation, share: float, moment: Moment) -> Perturbation:
    """Keep eps for a random fraction `share` of the elements, divided by it, so that the mean over draws
    is eps.
    """
    where = (moment.seed, moment.phase, moment.block, moment.step)
    seed = int(np.random.SeedSequence(where, spawn_key=(1,)).generate_state(1, np.uint64)[0])
    generators: dict[torch.device, torch.Generator] = {}

    def draw(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if tensor.device not in generators:
            generators[tensor.device] = torch.Generator(tensor.device).manual_seed(seed)
        random = torch.rand(tensor.shape, generator=generators[tensor.device], device=tensor.device)
        return torch.where(random < share, tensor / share, 0.0)

    return Perturbation(tuple(map(draw, eps.offsets)), tuple(map(draw, eps.shifts)))


@contextmanager
def without_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Context manager in which these parameters require no gradient; afterwards all of them do."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def fixed_statistics(model: nn.Module | None) -> Iterator[None]:
    """Context manager in which batch norms in training mode use the batch's statistics and keep their running
    ones.

    Otherwise running statistics would count a batch once for each pass, and average over perturbed weights.
    """
    modules = [] if model is None else [*model.modules()]
    training = [module for module in modules if module.training]
    stock = [module.stock if isinstance(module, RescaledNorm) else module for module in training]
    norms = [module for module in stock if isinstance(module, BATCH_NORMS) and module.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
