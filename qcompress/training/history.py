"""What training records at its log points: history.jsonl in the stage's folder, and the same records in
log.jsonl. No torch.

    {"event": "update", "phase": "finetune", "number": 0, "step": 24, "steps": 60, "update": 204, "passes": 1,
     "loss": 3.1, "terms": {"logits": 3.0, "hidden": 0.1}, "lr": {"scale": 0.001, "weight": 2e-05}}
    {"event": "scales", "phase": "finetune", "number": 0, "step": 24, "steps": 60, "update": 204,
     "scales": {"h.0.attn.c_attn.input": 0.021, "h.0.attn.c_attn.weight": [0.001, 0.002, 0.004]}}

`number` counts phases from 0, `step` the phase's updates (over all of its blocks), `update` those of all
phases; passes, loss and terms are those of this one update, in the first process. A scale is its value or, of
many, least, median and largest. Log points depend on nothing but the recipe, so that a run which was stopped
and goes on leaves the records of one that was not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcompress.system import strict_json
from qcompress.system.filesystem import writes_to
from qcompress.system.reporter import Reporter

NAME = "history.jsonl"

UPDATES, FEWEST_UPDATES = 400, 20
"""Records of updates that a run has at most, shared out among its phases, and what a phase has at least."""

SUMMARIES, MOST_SCALES = 4000, 20
"""Summaries of scales that a run has about, and records of scales that a phase has at most; one it has
always."""

Record = dict[str, Any]
Scale = float | list[float]


class History:
    """The records of one training. `folder` None: another process keeps them, and nothing is ever due."""

    def __init__(
        self, folder: Path | None, phases: Sequence[tuple[str, int]], scales: int, reporter: Reporter
    ) -> None:
        """`phases` are names and updates, `scales` is how many a record of scales has."""
        self._file = None if folder is None else folder / NAME
        self._phases, self._reporter = phases, reporter
        trained = max(1, sum(steps > 0 for _, steps in phases))
        self._updates = max(FEWEST_UPDATES, UPDATES // trained)
        self._scales = min(MOST_SCALES, max(1, SUMMARIES // (max(1, scales) * trained))) if scales else 0

    def go_on(self, number: int, step: int) -> None:
        """Training is about to go on behind update `step` of phase `number`: what was recorded later is
        forgotten, here and in log.jsonl.
        """
        if self._file is None:
            return
        here = (number, step)
        kept = [
            record
            for record in read(self._file.parent)
            if (record["number"], record["step"]) < here
            or ((record["number"], record["step"]) == here and step > 0)
        ]
        partial = self._file.with_name(f"{NAME}.tmp")
        partial.write_text("".join(_line(record) for record in kept), encoding="utf-8")
        os.replace(partial, self._file)
        self._reporter.settle(kept)

    def update_due(self, number: int, step: int) -> bool:
        """Whether update `step` (from 1) is to be recorded."""
        if self._file is None:
            return False
        steps = self._phases[number][1]
        return step in (1, steps) or step % -(-steps // self._updates) == 0

    def scales_due(self, number: int, step: int) -> bool:
        """Whether scales are to be recorded behind update `step`. 0 is before the first one: where training
        begins, and no later phase, which begins where another one has ended.
        """
        if self._file is None or not self._scales:
            return False
        steps = self._phases[number][1]
        if step == 0:
            return not any(steps for _, steps in self._phases[:number])
        return step == steps or step % -(-steps // self._scales) == 0

    def update(
        self, number: int, step: int, passes: int, loss: float, terms: Mapping[str, float],
        rates: Mapping[str, float],
    ) -> None:  # fmt: skip
        """Record an update."""
        told = {"terms": dict(terms)} if terms else {}
        self._add("update", number, step, {"passes": passes, "loss": loss, **told, "lr": dict(rates)})

    def scales(self, number: int, step: int, found: Mapping[str, Scale]) -> None:
        """Record learned scales."""
        if found:
            self._add("scales", number, step, {"scales": dict(found)})

    def _add(self, event: str, number: int, step: int, facts: Record) -> None:
        name, steps = self._phases[number]
        before = sum(steps for _, steps in self._phases[:number])
        where = {"phase": name, "number": number, "step": step, "steps": steps, "update": before + step}
        record = {"event": event, **where, **facts}
        with writes_to(self._file), self._file.open("a", encoding="utf-8") as stream:
            stream.write(_line(record))
        self._reporter.record(**record)


def read(folder: Path) -> list[Record]:
    """The records of a stage's folder; a line that a killed run did not finish is none."""
    file = folder / NAME
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0] if file.is_file() else ""
    return [strict_json.loads(line) for line in whole.splitlines()]


def _line(record: Record) -> str:
    return strict_json.dumps(record, sort_keys=True) + "\n"
