"""Experiment tracking (`tracking` of a recipe): sends the records of log.jsonl to accelerate's trackers. No
torch.

Each tracker runs in its own process (`tracker.py`), which receives the resolved recipe and then every record,
and returns nothing. So it cannot change a result, and a failure, such as a crash or a server that does not
answer, is one line in the run's output. A run that resumes, or reuses its training, is a new run of the
tracker with all records.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qcompress.errors import MachineError
from qcompress.schema.recipe import Recipe
from qcompress.system.child_process import command, environment
from qcompress.system.reporter import Record, Reporter
from qcompress.system.stopping import GRACE_S

LAST_WORDS_S = 60.0
"""Seconds that a finished run waits for a tracker to process its records."""

LAUNCHED = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC_",
    "ACCELERATE_",
    "FSDP_",
)
"""Environment variables, or their prefixes, by which a launcher starts several processes of one training."""


def demand_trackers(names: Sequence[str]) -> None:
    """Raise MachineError, before any expensive step, if a tracker's package is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise MachineError(
            f"tracking: {', '.join(missing)} {are} not installed",
            fix=f"pip install {' '.join(missing)}, or drop `tracking`",
        )


@contextmanager
def tracking(recipe: Recipe, folder: Path, reporter: Reporter) -> Iterator[None]:
    """Context manager in which the recipe's trackers receive the reporter's records. `folder`: the run's."""
    started = datetime.now().strftime("%Y%m%dT%H%M%S")
    values = {
        "project": recipe.name,
        "run": f"{folder.name}-{started}",
        "recipe": recipe.model_dump(mode="json", by_alias=True),
    }
    names = dict.fromkeys(recipe.tracking)
    trackers = [_Tracker(name, folder / "tracking" / name, values, reporter) for name in names]
    for tracker in trackers:
        reporter.listen(tracker.send)
    status, patience_s = "failed", LAST_WORDS_S
    try:
        yield
        status = "finished"
    except KeyboardInterrupt:
        status, patience_s = "interrupted", GRACE_S
        raise
    finally:
        for tracker in trackers:  # messages about a tracker's end are not sent to the other trackers
            reporter.unlisten(tracker.send)
        for tracker in trackers:
            tracker.send({"event": "ended", "status": status})
        for tracker in trackers:
            tracker.close(patience_s)


class _Tracker:
    """A tracker's process, and the thread that writes to it, so that the run never waits."""

    def __init__(self, name: str, folder: Path, values: dict[str, Any], reporter: Reporter) -> None:
        self._name, self._reporter = name, reporter
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._log = folder.resolve() / "tracker.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._lines.put(json.dumps(values))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._log.open("w", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    command("qcompress.pipeline.tracker", name, str(folder.resolve())),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    cwd=folder,
                    env=_environment(name, folder.resolve()),
                    bufsize=0,  # without a buffer, closing a broken pipe raises no second error
                    start_new_session=True,  # Ctrl-C ends the run, and the end of the run ends the tracker
                )
        except OSError as error:
            self._give_up(str(error))
            return
        self._stdin = self._process.stdin
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def send(self, record: Record) -> None:
        """Queue a record without waiting."""
        if self._process is None:
            return
        if self._process.poll() is not None:
            self._give_up(self._last_line())
            return
        self._lines.put(json.dumps(record))

    def close(self, patience_s: float) -> None:
        """Wait for the tracker to end, and report a failure."""
        self._lines.put(None)
        process, thread = self._process, self._thread
        if process is None or thread is None:
            return
        try:
            code = process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            self._give_up(f"it took more than {patience_s:.0f} s to end")
        else:
            if code:
                self._give_up(self._last_line())
        thread.join()

    def _write(self) -> None:
        with suppress(OSError), self._stdin:  # the process has ended; `send` and `close` report it
            for line in iter(self._lines.get, None):
                left = memoryview(f"{line}\n".encode())
                while left:
                    left = left[self._stdin.write(left) :]

    def _give_up(self, reason: str) -> None:
        self._process = None
        self._reporter.say(f"tracking: {self._name} has stopped, and the run goes on: {reason} ({self._log})")

    def _last_line(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _environment(name: str, folder: Path) -> dict[str, str]:
    """Environment of a tracker: the run's, without its launcher's variables and its GPUs. Tracker data is
    stored in the run, and wandb is offline, unless the user's variables specify otherwise.
    """
    kept = {key: value for key, value in environment().items() if not key.startswith(LAUNCHED)}
    places = {
        "tensorboard": {},
        "mlflow": {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"},
        "wandb": {"WANDB_MODE": "offline", "WANDB_DIR": str(folder)},
    }
    return {**places[name], **kept, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
