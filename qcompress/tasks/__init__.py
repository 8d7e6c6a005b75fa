"""One file per task: its data, its loss, its metrics. `TASKS` is the table of them."""

from __future__ import annotations

from qcompress.tasks import causal_lm

TASKS = {"causal-lm": causal_lm}
