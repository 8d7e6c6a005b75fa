"""Progress output and log of a run: bars on a terminal, plain lines otherwise. No torch.

Progress goes to stderr; stdout is for results.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from qcompress.system import strict_json
from qcompress.system.filesystem import writes_to
from qcompress.system.screen import Screen

PLAIN_EVERY_S = 10.0
"""Seconds between two plain lines of one task."""

TRAINING = ("update", "scales")
"""Events of training (`history.py`); a run logs each once, even if it was stopped and resumed."""

Record = dict[str, Any]


class Bar:
    """Progress of one task; `advance` moves it and replaces its note."""

    def __init__(self, total: int, show) -> None:
        self.total, self.done, self._show = total, 0, show

    def advance(self, note: str = "", steps: int = 1) -> None:
        """Advance by a number of steps."""
        self.at(note, self.done + steps)

    def at(self, note: str, done: float) -> None:
        """Set the number of finished steps."""
        self.done = done
        self._show(done, note)


class Reporter:
    """Prints stages and their progress, and writes log.jsonl. `silent` prints nothing (default of the Python
    API).
    """

    def __init__(self, stream: TextIO | None = None, silent: bool = False) -> None:
        self.stream = stream or sys.stderr
        self.silent = silent
        self.console = Screen(file=self.stream)
        self._log: Path | None = None
        self._listeners: list[Callable[[Record], None]] = []

    def log_to(self, file: Path) -> None:
        """Append all further records to a file of JSON lines, also when silent."""
        self._log = file
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if text and not text.endswith("\n"):  # a killed run
            _replace(file, text.rpartition("\n")[0])

    def listen(self, listener: Callable[[Record], None]) -> None:
        """Send all further records to a listener too."""
        self._listeners.append(listener)

    def unlisten(self, listener: Callable[[Record], None]) -> None:
        """Remove a listener."""
        self._listeners.remove(listener)

    def record(self, **facts: Any) -> None:
        """Write a record to log.jsonl and send it to the listeners."""
        self._write(facts)
        self._notify(facts)

    def settle(self, records: Sequence[Record]) -> None:
        """Replace the training records in log.jsonl by these: removes others, adds missing ones. Listeners
        get all of them.
        """
        if self._log is not None:
            wanted = {_record_text(record): record for record in records}
            text = self._log.read_text(encoding="utf-8") if self._log.is_file() else ""
            kept, lines = [], text.splitlines()
            for line in lines:
                logged = _record(line)
                if logged.get("event") not in TRAINING or wanted.pop(_record_text(logged), None) is not None:
                    kept.append(line)
            if len(kept) < len(lines):
                _replace(self._log, "\n".join(kept))
            for record in wanted.values():
                self._write(record)
        for record in records:
            self._notify(record)

    def _write(self, facts: Record) -> None:
        if self._log is not None:
            line = strict_json.dumps({"time": round(time.time(), 3), **facts}, sort_keys=True)
            with writes_to(self._log), self._log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _notify(self, facts: Record) -> None:
        for listener in self._listeners:
            listener(facts)

    def stage(self, name: str) -> None:
        """Record the start of a stage."""
        self.record(event="stage", stage=name)

    def say(self, text: str) -> None:
        """Print and record a line."""
        self.record(event="say", text=text)
        if not self.silent:
            self.console.print(text, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Bar]:
        """Progress bar of `total` steps, of which `done` were made by an earlier, interrupted run."""
        if self.silent:
            bar = Bar(total, lambda steps, note: None)
            bar.done = done
            yield bar
        elif self.console.is_terminal:
            yield from self._rich(title, total, done)
        else:
            yield from self._plain(title, total, done)

    def _rich(self, title: str, total: int, done: int) -> Iterator[Bar]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=total, completed=done, note="")
            bar = Bar(total, lambda steps, note: progress.update(task, completed=steps, note=note))
            bar.done = done
            yield bar

    def _plain(self, title: str, total: int, done: int) -> Iterator[Bar]:
        started = last = time.monotonic()

        def show(steps: int, note: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= PLAIN_EVERY_S or steps == total:
                last = now
                left = (now - started) / max(steps - done, 1) * (total - steps)
                self.say(f"{title}: {steps}/{total}  {note}  {left:.0f} s left")

        bar = Bar(total, show)
        bar.done = done
        yield bar


def _record(line: str) -> Record:
    """Parse a line of the log; an empty record if it is not a JSON object."""
    try:
        record = strict_json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _record_text(record: Record) -> str:
    """Text of a record without its time."""
    return json.dumps({key: value for key, value in record.items() if key != "time"}, sort_keys=True)


def _replace(file: Path, text: str) -> None:
    """Replace the content of the log atomically."""
    partial = file.with_name(f"{file.name}.tmp")
    partial.write_text(f"{text}\n" if text else "", encoding="utf-8")
    os.replace(partial, file)
