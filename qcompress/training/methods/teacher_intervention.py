"""Teacher Intervention (Kim et al., EACL 2023, arXiv:2302.11812), after its published code.

In the first of two steps, in every layer, the float model's activation replaces the student's:

    TI-O  output     the attention block's output, before dropout, residual and norm
    TI-C  context    the context of each head, before the output layer
    TI-M  attention  the attention map, before dropout and rounding

and the inputs of the replaced layers are detached (Q, K, V; for TI-M Q and K). The error of the layers below
therefore does not reach the rest of the layer, which learns on float inputs; Q and K learn from the loss of
the attention scores alone. In the second step the student runs without replacement. TI-G applies TI-O for the
first sixth of the step, TI-C for the second, TI-M for the rest (the thresholds of the code).

    loss of both steps: distillation.py's, plus L_out, the sum over layers of the mean squared error of the
    attention blocks' outputs

The code compares these outputs after the norm, where TI-O's output is already the teacher's: V and the output
layer learn nothing. The paper's figure 3 draws the arrow to the output before the residual. Both are options.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.models.architecture import Architecture
from qcompress.models.plan import LayerPlan
from qcompress.schema.axes import PHASES
from qcompress.schema.method_options import TwoStep
from qcompress.schema.recipe import Train
from qcompress.tasks.examples import Batch
from qcompress.training.methods.activation_taps import Mode, Signals
from qcompress.training.methods.distillation import DistillationLoss, states_loss
from qcompress.training.methods.protocols import Phase

INTERVENTION = "intervention"
"""The phase in which the teacher intervenes."""

MODES: tuple[Mode, ...] = ("output", "context", "attention")


class Intervention(DistillationLoss):
    """Distillation with the teacher's activations in place of the student's during the phase
    `intervention`.
    """

    intervenes = False

    @property
    def looks_into_attention(self) -> bool:
        """Always True: the replaced activations are inside the attentions."""
        return True

    def begin(self, phase: str) -> None:
        """Enable the replacement in the phase `intervention` only."""
        self.intervenes = phase == INTERVENTION

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """Weighted sum of the losses, []."""
        mode = mode_at(self.options.mode, progress) if self.intervenes else None
        teacher = self._taught(batch)
        self.student.replace(mode, teacher)
        try:
            student = self.student.collect(lambda: self._logits(batch))
        finally:
            self.student.replace(None, None)
        loss = self._weighted(student, teacher, batch)
        if not self.options.output:
            return loss
        output = self.options.output * self._output_loss(student, teacher)
        self.terms["output"] = output.detach()
        return loss + output

    def _output_loss(self, student: Signals, teacher: Signals) -> Tensor:
        if self.options.out_loss == "post_ln":
            return states_loss(student.normed, teacher.normed)
        return states_loss(student.outputs, teacher.outputs)


def mode_at(mode: str, progress: float) -> Mode:
    """Activation that is replaced at this share of the phase. `stochastic` draws from torch's generator,
    which the loop seeds for each update.

    >>> [mode_at("gradual", step / 60) for step in (0, 9, 10, 19, 20, 59)]
    ['output', 'output', 'context', 'context', 'attention', 'attention']
    >>> [mode_at("inverted", step / 60) for step in (0, 19, 20, 39, 40, 59)]
    ['attention', 'attention', 'context', 'context', 'output', 'output']
    """
    if mode == "gradual":
        return MODES[0] if progress < 1 / 6 else MODES[1] if progress < 1 / 3 else MODES[2]
    if mode == "inverted":
        return MODES[2] if progress < 1 / 3 else MODES[1] if progress < 2 / 3 else MODES[0]
    if mode == "stochastic":
        return MODES[int(torch.randint(len(MODES), ()))]
    return mode


class InterveneThenTrain:
    """Schedule of two steps: `intervention`, then `finetune`."""

    def __init__(self, options: TwoStep, train: Train) -> None:
        self.train = train

    def phases(self, architecture: Architecture, plan: tuple[LayerPlan, ...]) -> tuple[Phase, ...]:
        """Both phases, each with its own optimizer."""
        return tuple(
            Phase(
                name,
                self.train.phases[name].steps if name in self.train.phases else defaults.steps,
                defaults.roles,
            )
            for name, defaults in PHASES["two-step"].items()
        )
