"""Tasks, one file each: data, loss and metrics. `TASKS` is the table of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.tasks import (
    any_task,
    causal_lm,
    feature_extraction,
    fill_mask,
    image_classification,
    question_answering,
    sequence_classification,
    token_classification,
)

if TYPE_CHECKING:
    from torch import Tensor

    from qcompress.tasks.examples import Batch

TASKS = {
    "causal-lm": causal_lm,
    "sequence-classification": sequence_classification,
    "token-classification": token_classification,
    "image-classification": image_classification,
    "feature-extraction": feature_extraction,
    "fill-mask": fill_mask,
    "question-answering": question_answering,
    "any": any_task,
}


def loss_of(task: Any, base: Path) -> Callable[[Tensor, Batch], Tensor]:
    """Function from logits and a batch to the loss [] of a settled task; `base`: the recipe's folder."""
    return any_task.own_loss(task, base) if task.name == any_task.NAME else TASKS[task.name].loss
