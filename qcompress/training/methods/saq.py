"""SAQ: Sharpness-aware Quantization for Deep Neural Networks (Liu, Cai, Zhuang; arXiv:2111.12273).

Each update descends at the worst point near the quantized weights:

    min over w, s   max over ||eps|| <= rho   L( Q(w; s) + eps )

The paper compares three formulations, `case` here:

    1   L( Q(w) + eps(w) )      eps along dL/dw. Mismatch: where a weight is clipped, dL/dw is 0, dL/dQ not.
    2   L( Q(w + eps(w)) )      eps along dL/dw, before the quantizer. Diminishment: it is rounded away.
    3   L( Q(w) + eps(Q(w)) )   eps along dL/dQ. The paper's choice, and the default.

In case 2 a quantizer whose scale follows the weight (minmax) takes the scale of w + eps.

Two passes an update: the first computes eps (`perturbation.py`), the second computes the gradient, straight
through the quantizer, of weights and scales alike. Running statistics of batch norms see the first pass only;
the published code lets them see both.

Cheaper variants: the paper's "efficient training strategy" is in no text or code that was available to us, so
these are readings from the literature that its README credits.

    every: k    eps is computed at the updates 0, k, 2k... of a phase and reused in between, 1 + 1/k passes
                an update (LookSAM, arXiv:2203.02714, which reuses a part of the gradient instead)
    subset: p   eps of a random share p of the elements, divided by p (ESAM's stochastic weight perturbation,
                arXiv:2110.03141); it changes the result, and costs as much as the whole

`every` counts a phase's steps and not the passes since the start, and eps goes into the checkpoint: a resumed
run makes equal updates. Between two searches the statistics of batch norms rest, since every pass is
perturbed.

The published code quantizes with LIQ, whose levels are odd multiples of half a step. It has no zero, and no
symmetric integer grid with zero point 0 represents it at its own width, so LSQ replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Optimizer

from qcompress.quant.layers import Place, QuantizedWeight
from qcompress.schema.method_options import Saq
from qcompress.training.methods.perturbation import Ball, Perturbation, fixed_statistics, random_share
from qcompress.training.methods.plain import apply_gradients
from qcompress.training.methods.protocols import Group, Moment, Report

if TYPE_CHECKING:
    from accelerate import Accelerator

CASES: dict[int, tuple[Place, Place]] = {
    1: ("latent", "rounded"),
    2: ("latent", "latent"),
    3: ("rounded", "rounded"),
}
"""For each case, the tap whose gradient eps follows, and the tap where eps is added."""


class SharpnessAwareUpdate:
    """Stepper that computes eps and descends at the perturbed point."""

    def __init__(self, options: Saq) -> None:
        self.options = options
        self.model: nn.Module | None = None
        self._eps = Perturbation()
        self._resumed: dict[str, Tensor] | None = None

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
        """Make one update from two passes, or from one where eps is reused."""
        options, passes = self.options, 1
        ball = Ball.of(options.ball, groups, taps, options.rho, *CASES[options.case])
        if self._resumed is not None:
            self._eps, self._resumed = ball.from_state(self._resumed), None
        if moment.step % options.every == 0:
            _, self._eps = ball.climb(closure, self.model, accelerator)
            optimizer.zero_grad(set_to_none=True)
            passes = 2
        subset = options.subset < 1
        eps = random_share(self._eps, options.subset, moment) if subset else self._eps
        with ball.perturbed(eps), fixed_statistics(self.model):
            loss = closure()
            accelerator.backward(loss)
        if options.every == 1:
            self._eps = Perturbation()
        apply_gradients(optimizer, groups, options.clip_norm, accelerator)
        return Report(loss=loss.item(), passes=passes)

    def state_dict(self) -> dict[str, Tensor]:
        """eps, if a later update reuses it."""
        return self._eps.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue with this eps."""
        self._resumed = state
