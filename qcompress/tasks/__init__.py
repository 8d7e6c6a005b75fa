"""One file per task: its data, its loss, its metrics. `TASKS` is the table of them."""

from __future__ import annotations

from qcompress.tasks import causal_lm
from qcompress.tasks.causal_lm import TaskLoss

TASKS = {"causal-lm": causal_lm}

__all__ = ["TASKS", "TaskLoss"]
