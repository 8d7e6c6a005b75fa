"""Runs the TensorRT builder as a child process, and turns its end into a result or an error. No torch."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from qcompress.errors import ExportError
from qcompress.system.child_process import command, environment

Progress = Callable[[str, float], None]
"""Called with the name of TensorRT's phase and the completed fraction of the build, 0 to 1."""

FINAL = ("unavailable", "refused", "unwritten", "done")
"""Events that end a build; the last line of a builder that did not crash is one of them."""

MESSAGES = 200
"""Number of TensorRT messages that are kept; an external graph may cause millions."""

SHOWN = 10
"""Number of errors that are shown."""

OUT_OF_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|cannot allocate|failed to map", re.IGNORECASE)


@dataclass
class Outcome:
    """Output of a builder process."""

    version: str = ""
    """Version of TensorRT."""
    final: dict[str, Any] = field(default_factory=dict)
    """The last event; empty if the builder crashed before."""
    messages: list[dict[str, str]] = field(default_factory=list)
    """Warnings and errors of TensorRT: {"severity", "text"}."""
    code: int = 0
    """Exit code; negative for a signal."""
    timed_out: bool = False
    stderr: str = ""
    """The end of stderr."""


def run_builder(spec: dict[str, Any], timeout_s: int, progress: Progress | None = None) -> Outcome:
    """Run the builder; the outcome's final event is `done` or `unavailable`. Raises ExportError for a crash,
    a timeout or a graph that TensorRT refuses, and OSError if the engine cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="qcompress-build-") as folder:
        file = Path(folder) / "spec.json"
        file.write_text(json.dumps(spec), encoding="utf-8")
        with (Path(folder) / "stderr").open("w+b") as stderr:
            outcome = _run(file, stderr, timeout_s, progress)
            outcome.stderr = _tail(stderr)
    if outcome.timed_out and not outcome.final:
        raise ExportError(
            f"the builder was stopped after {timeout_s} s" + _last_words(outcome),
            fix="raise build.timeout_s, or build.memory_mib: a builder without memory may hang",
        )
    if not outcome.final:
        raise _crash(outcome, spec)
    if outcome.final["event"] == "refused":
        raise _refusal(outcome, spec)
    if outcome.final["event"] == "unwritten":
        number = outcome.final["errno"]
        raise OSError(number, os.strerror(number), outcome.final["file"])
    return outcome


def _run(file: Path, stderr: BinaryIO, timeout_s: int, progress: Progress | None) -> Outcome:
    outcome = Outcome()
    process = subprocess.Popen(
        command("qcompress.engine.build_engine", str(file)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        cwd=file.parent,
        env=environment(),
        encoding="utf-8",
        errors="replace",
    )

    def stop() -> None:
        outcome.timed_out = process.poll() is None
        process.kill()

    timer = threading.Timer(timeout_s, stop)
    timer.start()
    try:
        for line in process.stdout:
            if line.endswith("\n"):  # a killed process may leave an unfinished line
                _take(json.loads(line), outcome, progress)
        outcome.code = process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
    return outcome


def _take(event: dict[str, Any], outcome: Outcome, progress: Progress | None) -> None:
    kind = event["event"]
    if kind == "start":
        outcome.version = event["version"]
    elif kind == "progress" and progress is not None:
        progress(event["phase"], event["fraction"])
    elif kind == "message":
        message = {"severity": event["severity"], "text": event["text"]}
        if message not in outcome.messages[-SHOWN:]:
            outcome.messages = [*outcome.messages[-MESSAGES + 1 :], message]
    elif kind in FINAL:
        outcome.final = event


def _tail(stream: BinaryIO) -> str:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(size - 4000, 0))
    return stream.read().decode("utf-8", "replace").strip()


def _last_words(outcome: Outcome) -> str:
    errors = [message["text"] for message in outcome.messages if message["severity"] != "warning"]
    lines = [*errors[-SHOWN:], *outcome.stderr.splitlines()[-SHOWN:]]
    return "".join(f"\n  {line}" for line in lines)


def _memory_fix(text: str, spec: dict[str, Any], otherwise: str) -> str:
    if OUT_OF_MEMORY.search(text):
        return f"raise build.memory_mib, now {spec['memory_mib']}, or build on a machine with more memory"
    return otherwise


def _crash(outcome: Outcome, spec: dict[str, Any]) -> ExportError:
    how = f"ended with exit code {outcome.code}"
    if outcome.code < 0:
        names = {item.value: item.name for item in signal.Signals}
        how = f"was killed by {names.get(-outcome.code, f'signal {-outcome.code}')}"
    words = _last_words(outcome)
    fix = "run `qcompress lint` on the model, and report the graph to TensorRT if it finds nothing"
    if outcome.code == -9:  # Windows has no signal.SIGKILL
        fix = "give this machine or container more memory: the system kills processes that exceed it"
    return ExportError(f"the builder {how}{words}", fix=_memory_fix(words, spec, fix))


def _refusal(outcome: Outcome, spec: dict[str, Any]) -> ExportError:
    errors = outcome.final["errors"]
    lines = [_spell(error) for error in errors[:SHOWN]]
    if len(errors) > SHOWN:
        lines.append(f"  and {len(errors) - SHOWN} more")
    who = {"parse": "TensorRT's parser", "configure": "TensorRT", "build": "TensorRT's builder"}
    text = "\n".join(lines)
    fix = f"run `qcompress lint {Path(spec['onnx']).name} --target {spec['target']}` for what to change"
    return ExportError(
        f"{who[outcome.final['stage']]} refused {spec['onnx']}:\n{text}", fix=_memory_fix(text, spec, fix)
    )


def _spell(error: dict[str, str]) -> str:
    where = f"node {error['node'] or '(unnamed)'} ({error['op']}): " if error["op"] or error["node"] else ""
    return f"  {where}{error['text'].strip()}"
