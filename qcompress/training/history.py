"""Training log: records at log points, in history.jsonl of the stage's folder and copied to log.jsonl. No
torch.

    {"event": "update", "phase": "finetune", "number": 0, "step": 24, "steps": 60, "update": 204, "passes": 1,
     "loss": 3.1, "terms": {"logits": 3.0, "hidden": 0.1}, "lr": {"scale": 0.001, "weight": 2e-05}}
    {"event": "scales", "phase": "finetune", "number": 0, "step": 24, "steps": 60, "update": 204,
     "scales": {"h.0.attn.c_attn.input": 0.021, "h.0.attn.c_attn.weight": [0.001, 0.002, 0.004]}}

`number` counts phases from 0, `step` the phase's updates (over all of its blocks), `update` the updates of
all phases; passes, loss and terms belong to this one update, in the first process. A scalar scale is its
value; a tensor of scales is [minimum, median, maximum]. Log points depend only on the recipe, so that a
resumed run leaves the records of an uninterrupted one.
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
"""Upper limit of update records in a run, divided among its phases, and the least number for a phase."""

SUMMARIES, MOST_SCALES = 4000, 20
"""Approximate limit of scale summaries in a run, and upper limit of scale records in a phase, which has at
least one.
"""

Record = dict[str, Any]
Scale = float | list[float]


class History:
    """Writer of one training's records. `folder` None: another process writes them, and no record is ever
    due.
    """

    def __init__(
        self, folder: Path | None, phases: Sequence[tuple[str, int]], scales: int, reporter: Reporter
    ) -> None:
        """`phases`: names and numbers of updates; `scales`: number of scales in one scale record."""
        self._file = None if folder is None else folder / NAME
        self._phases, self._reporter = phases, reporter
        trained = max(1, sum(steps > 0 for _, steps in phases))
        self._updates = max(FEWEST_UPDATES, UPDATES // trained)
        self._scales = min(MOST_SCALES, max(1, SUMMARIES // (max(1, scales) * trained))) if scales else 0

    def go_on(self, number: int, step: int) -> None:
        """Prepare to resume after update `step` of phase `number`: drop later records here and in
        log.jsonl.
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
        """True if update `step` (from 1) is a log point."""
        if self._file is None:
            return False
        steps = self._phases[number][1]
        return step in (1, steps) or step % -(-steps // self._updates) == 0

    def scales_due(self, number: int, step: int) -> bool:
        """True if scales are recorded after update `step`. Step 0, before the first update, is recorded once,
        at the start of training; a later phase starts where the previous one ended.
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
        loss_terms = {"terms": dict(terms)} if terms else {}
        self._add("update", number, step, {"passes": passes, "loss": loss, **loss_terms, "lr": dict(rates)})

    def scales(self, number: int, step: int, values: Mapping[str, Scale]) -> None:
        """Record learned scales."""
        if values:
            self._add("scales", number, step, {"scales": dict(values)})

    def _add(self, event: str, number: int, step: int, facts: Record) -> None:
        name, steps = self._phases[number]
        before = sum(steps for _, steps in self._phases[:number])
        where = {"phase": name, "number": number, "step": step, "steps": steps, "update": before + step}
        record = {"event": event, **where, **facts}
        with writes_to(self._file), self._file.open("a", encoding="utf-8") as stream:
            stream.write(_line(record))
        self._reporter.record(**record)


def read(folder: Path) -> list[Record]:
    """Read the records of a stage's folder; an unfinished last line of a killed run is ignored."""
    file = folder / NAME
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0] if file.is_file() else ""
    return [strict_json.loads(line) for line in whole.splitlines()]


def _line(record: Record) -> str:
    return strict_json.dumps(record, sort_keys=True) + "\n"
