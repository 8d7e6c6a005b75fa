"""Distillation from the float model: the losses of TernaryBERT (Zhang et al., EMNLP 2020, arXiv:2009.12812),
which Teacher Intervention (arXiv:2302.11812) uses as well.

    L = L_pred + L_AS + L_rep
    L_pred  mean over the batch of -sum_c softmax(z_T)_c log softmax(z_S)_c; for several labels at once the
            same of each label's sigmoid; for a regression the mean squared error
    L_AS    sum over layers of the mean squared error of the attention scores; masked entries count as 0
    L_rep   sum over embeddings and layers of the mean squared error of the hidden states

The soft cross-entropy is summed over classes, then averaged, as in Teacher Intervention's published code;
TernaryBERT's averages over classes as well, which makes it smaller by their number. Padding is not left out
of L_AS and L_rep, as in both. Labels are used only where the weight `task` is above 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.schema.method_options import Distillation, TeacherIntervention
from qcompress.tasks.examples import Batch, inputs_of
from qcompress.training.methods.activation_taps import Signals, Watch
from qcompress.training.methods.protocols import Scene

MASKED = -100.0
"""Scores at or below this were masked."""


class DistillationLoss:
    """The float model teaches logits, attention scores and hidden states."""

    def __init__(
        self, options: Distillation | TeacherIntervention, task_loss: Callable[[Tensor, Batch], Tensor]
    ) -> None:
        self.options, self.task_loss = options, task_loss
        self.terms: dict[str, Tensor] = {}
        """Terms of the last loss, as they are summed."""
        self.student: Watch | None = None
        self.teacher: Watch | None = None
        self._run: nn.Module | None = None
        self._known: tuple[Batch, Signals] | None = None

    def attach(self, student: nn.Module, scene: Scene) -> None:
        """Hook the student and load the teacher."""
        look = self.looks_into_attention
        self._run = student
        self.student = Watch(scene.model, scene.architecture, look)
        self.teacher = Watch(scene.teacher(), scene.architecture, look)

    @property
    def looks_into_attention(self) -> bool:
        """Whether a loss needs what happens inside the attentions."""
        return self.options.attention > 0

    def begin(self, phase: str) -> None:
        """Every phase has the same losses."""

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """Weighted sum of the losses, []."""
        taught = self._taught(batch)
        return self._weighted(self.student.collect(lambda: self._logits(batch)), taught, batch)

    def detach(self) -> None:
        """Remove every hook and let go of the teacher."""
        for watch in (self.student, self.teacher):
            if watch is not None:
                watch.remove()
        self.student = self.teacher = self._run = self._known = None

    def _logits(self, batch: Batch) -> Tensor:
        return self._run(**inputs_of(batch)).logits

    @torch.no_grad()
    def _taught(self, batch: Batch) -> Signals:
        """The teacher's signals; computed once where an update runs the same batch several times."""
        if self._known is None or self._known[0] is not batch:
            self._known = (batch, self.teacher(**inputs_of(batch)))
        return self._known[1]

    def _weighted(self, said: Signals, taught: Signals, batch: Batch) -> Tensor:
        options = self.options
        problem = self.teacher.model.config.problem_type
        terms: dict[str, Tensor] = {}
        if options.logits:
            loss = prediction_loss(said.logits, taught.logits, batch, options.temperature, problem)
            terms["logits"] = options.logits * loss
        if options.attention:
            terms["attention"] = options.attention * scores_loss(said.scores, taught.scores)
        if options.hidden:
            terms["hidden"] = options.hidden * states_loss(said.hidden, taught.hidden)
        if options.task:
            terms["task"] = options.task * self.task_loss(said.logits, batch)
        self.terms = {name: term.detach() for name, term in terms.items()}
        return torch.stack([*terms.values()]).sum()


def prediction_loss(
    said: Tensor, taught: Tensor, batch: Batch, temperature: float, problem: str | None
) -> Tensor:
    """Soft cross-entropy of [batch, classes] or, token by token, of [batch, tokens, classes] without padding;
    times temperature squared, so that its gradient keeps its size (Hinton et al., arXiv:1503.02531).
    `problem` is transformers' `problem_type`.
    """
    said, taught = said.float(), taught.float()
    if problem == "regression":
        return F.mse_loss(said, taught)
    mask = batch.get("attention_mask")
    if said.dim() == 3 and mask is not None:
        said, taught = said[mask.bool()], taught[mask.bool()]
    said, taught = said / temperature, taught / temperature
    if problem == "multi_label_classification":
        each = F.binary_cross_entropy_with_logits(said, taught.sigmoid(), reduction="none").sum(-1)
    else:
        each = -(taught.softmax(-1) * said.log_softmax(-1)).sum(-1)
    return each.mean() * temperature**2


def scores_loss(said: list[Tensor], taught: list[Tensor]) -> Tensor:
    """Sum over layers of the mean squared error of the scores."""
    losses = []
    for student, teacher in zip(said, taught, strict=True):
        pair = (F.threshold(scores.float(), MASKED, 0.0) for scores in (student, teacher))
        losses.append(F.mse_loss(*pair))
    return torch.stack(losses).sum()


def states_loss(said: list[Tensor], taught: list[Tensor]) -> Tensor:
    """Sum over states of their mean squared error."""
    pairs = zip(said, taught, strict=True)
    return torch.stack([F.mse_loss(student.float(), teacher.float()) for student, teacher in pairs]).sum()
