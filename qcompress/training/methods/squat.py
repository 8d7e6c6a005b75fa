"""SQuAT: Sharpness- and Quantization-Aware Training for BERT (Wang et al., arXiv:2210.07171).

Only the abstract of the paper was available to us: the method "alternates training between sharpness
objective and step-size objective", with learned scales. Everything below is a reading of that sentence.

    sharpness objective   s frozen   min over w   max over ||eps|| <= rho   L( Q(w; s) + eps )
    step-size objective   w frozen   min over s   L( Q(w; s) )

"w" is every trained parameter that is not a scale. The two share one optimizer; in each of them a frozen
parameter has no gradient at all, so that neither momentum nor weight decay moves it. Options where the
sentence has more than one reading:

    alternate: batch       both on each batch, one after the other: three passes. The default, because this
                               reading changes neither objective.
    alternate: iteration   weights at even updates of a phase (two passes), scales at odd ones (one pass)
    alternate: fused       the scales take the gradient of the first, unperturbed pass: two passes. Both
                               objectives then see equal weights, and the weights see scales not yet updated.
    perturb: quantized     Q(w) + eps along dL/dQ (SAQ's case 3), the default
    perturb: latent        Q(w + eps) along dL/dw (SAQ's case 2), which rounding mostly undoes

Scales cannot be in the ball, because they are frozen while it is searched. Without trained scales every
update is the sharpness objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Optimizer

from qcompress.quant.layers import Place, QuantizedWeight
from qcompress.schema.method_options import Squat
from qcompress.training.methods.perturbation import Ball, fixed_statistics, without_gradients
from qcompress.training.methods.plain import apply_gradients
from qcompress.training.methods.protocols import Group, Moment, Report

if TYPE_CHECKING:
    from accelerate import Accelerator

PLACES: dict[str, Place] = {"quantized": "rounded", "latent": "latent"}


class AlternatingUpdate:
    """Stepper that updates weights at the worst point nearby, and scales at the unperturbed point."""

    def __init__(self, options: Squat) -> None:
        self.options = options
        self.model: nn.Module | None = None

    def attach(self, model: nn.Module) -> None:
        """Store the model, for its batch norms and its process group."""
        self.model = model

    def step(
        self,
        closure: Callable[[], Tensor],
        optimizer: Optimizer,
        groups: Sequence[Group],
        taps: Sequence[QuantizedWeight],
        accelerator: Accelerator,
        moment: Moment,
    ) -> Report:
        """Make one update from one to three passes."""
        options = self.options
        weights = [group for group in groups if group.role != "scale"]
        scales = [group for group in groups if group.role == "scale"]
        turns = bool(scales) and options.alternate == "iteration"
        loss, passes = None, 0
        if not turns or moment.step % 2 == 0:
            fused = options.alternate == "fused"
            loss = self._sharpness(closure, optimizer, groups, taps, accelerator, scales, fused)
            kept = groups if fused else weights
            apply_gradients(optimizer, kept, options.clip_norm, accelerator)
            passes = 2
        if scales and options.alternate != "fused" and (not turns or moment.step % 2 == 1):
            # a batch counts once in the running statistics, whatever the number of its passes
            frozen = without_gradients([*_parameters(weights)])
            with fixed_statistics(self.model if passes else None), frozen:
                scale_loss = closure()
                accelerator.backward(scale_loss)
            apply_gradients(optimizer, scales, options.clip_norm, accelerator)
            loss, passes = scale_loss if loss is None else loss, passes + 1
        return Report(loss=loss.item(), passes=passes)

    def _sharpness(
        self, closure: Callable[[], Tensor], optimizer: Optimizer, groups: Sequence[Group],
        taps: Sequence[QuantizedWeight], accelerator: Accelerator, scales: Sequence[Group], fused: bool,
    ) -> Tensor:  # fmt: skip
        """Compute gradients of the sharpness objective. The scales get none or, if `fused`, the
        unperturbed pass's.
        """
        options, place = self.options, PLACES[self.options.perturb]
        ball = Ball.of(options.ball, groups, taps, options.rho, place, place)
        others = _parameters(scales) if fused else ()
        _, eps = ball.climb(closure, self.model, accelerator, others)
        unperturbed = [parameter.grad for parameter in _parameters(scales)] if fused else []
        optimizer.zero_grad(set_to_none=True)
        frozen = without_gradients([*_parameters(scales)])
        with ball.perturbed(eps), fixed_statistics(self.model), frozen:
            loss = closure()
            accelerator.backward(loss)
        if fused:
            for parameter, gradient in zip(_parameters(scales), unperturbed, strict=True):
                parameter.grad = gradient
        return loss

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: the turn of weights or scales follows from the step."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """No-op."""


def _parameters(groups: Sequence[Group]) -> Iterable[nn.Parameter]:
    return (parameter for group in groups for parameter in group.parameters)
