"""Distillation from the float model, with the losses of TernaryBERT (Zhang et al., EMNLP 2020,
arXiv:2009.12812), which Teacher Intervention (arXiv:2302.11812) uses as well.

    L = L_pred + L_AS + L_rep
    L_pred  mean over the batch of -sum_c softmax(z_T)_c log softmax(z_S)_c; for multi-label problems the
            binary cross-entropy with each label's sigmoid; for a regression the mean squared error
    L_AS    sum over layers of the mean squared error of the attention scores; masked entries count as 0
    L_rep   sum over embeddings and layers of the mean squared error of the hidden states

The soft cross-entropy is summed over classes, then averaged, as in Teacher Intervention's published code;
TernaryBERT's code averages over classes as well, which divides it by their number. L_AS and L_rep include
padding, as in both. Labels are used only if the weight `task` is above 0.
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
"""Scores at or below this value are masked."""


class DistillationLoss:
    """Objective that matches the float model's logits, attention scores and hidden states."""

    def __init__(
        self, options: Distillation | TeacherIntervention, task_loss: Callable[[Tensor, Batch], Tensor]
    ) -> None:
        self.options, self.task_loss = options, task_loss
        self.terms: dict[str, Tensor] = {}
        """Terms of the last loss, with their weights applied."""
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
        """True if a loss needs values from inside the attentions."""
        return self.options.attention > 0

    def begin(self, phase: str) -> None:
        """No-op: every phase has the same losses."""

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """Weighted sum of the losses, []."""
        teacher = self._taught(batch)
        return self._weighted(self.student.collect(lambda: self._logits(batch)), teacher, batch)

    def detach(self) -> None:
        """Remove every hook and release the teacher."""
        for watch in (self.student, self.teacher):
            if watch is not None:
                watch.remove()
        self.student = self.teacher = self._run = self._known = None

    def _logits(self, batch: Batch) -> Tensor:
        return self._run(**inputs_of(batch)).logits

    @torch.no_grad()
    def _taught(self, batch: Batch) -> Signals:
        """The teacher's activations; cached, because an update may run one batch several times."""
        if self._known is None or self._known[0] is not batch:
            self._known = (batch, self.teacher(**inputs_of(batch)))
        return self._known[1]

    def _weighted(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        options = self.options
        problem = self.teacher.model.config.problem_type
        terms: dict[str, Tensor] = {}
        if options.logits:
            loss = prediction_loss(student.logits, teacher.logits, batch, options.temperature, problem)
            terms["logits"] = options.logits * loss
        if options.attention:
            terms["attention"] = options.attention * scores_loss(student.scores, teacher.scores)
        if options.hidden:
            terms["hidden"] = options.hidden * states_loss(student.hidden, teacher.hidden)
        if options.task:
            terms["task"] = options.task * self.task_loss(student.logits, batch)
        self.terms = {name: term.detach() for name, term in terms.items()}
        return torch.stack([*terms.values()]).sum()


def prediction_loss(
    student: Tensor, teacher: Tensor, batch: Batch, temperature: float, problem: str | None
) -> Tensor:
    """Soft cross-entropy of logits [batch, classes], or [batch, tokens, classes] without padding, times
    temperature squared so that its gradient keeps its size (Hinton et al., arXiv:1503.02531). `problem` is
    transformers' `problem_type`.
    """
    student, teacher = student.float(), teacher.float()
    if problem == "regression":
        return F.mse_loss(student, teacher)
    mask = batch.get("attention_mask")
    if student.dim() == 3 and mask is not None:
        student, teacher = student[mask.bool()], teacher[mask.bool()]
    student, teacher = student / temperature, teacher / temperature
    if problem == "multi_label_classification":
        each = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none").sum(-1)
    else:
        each = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
    return each.mean() * temperature**2


def scores_loss(student_scores: list[Tensor], teacher_scores: list[Tensor]) -> Tensor:
    """Sum over layers of the mean squared error of the attention scores."""
    losses = []
    for student, teacher in zip(student_scores, teacher_scores, strict=True):
        pair = (F.threshold(scores.float(), MASKED, 0.0) for scores in (student, teacher))
        losses.append(F.mse_loss(*pair))
    return torch.stack(losses).sum()


def states_loss(student_states: list[Tensor], teacher_states: list[Tensor]) -> Tensor:
    """Sum over hidden states of their mean squared error."""
    pairs = zip(student_states, teacher_states, strict=True)
    return torch.stack([F.mse_loss(student.float(), teacher.float()) for student, teacher in pairs]).sum()
