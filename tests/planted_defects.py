"""Plants one defect after another in a copy of the checkout, and reports which of them the tests kill.

    python tests/planted_defects.py [--only PATTERN] [--jobs 2] [--all] [--json FILE]

`tests/defects/ROOM.yaml` lists the defects of a room: each changes one line of a module, breaks one law, and
names the test files that should fail. A change to the suite loses no law if every defect is still killed.

    killed      a named test fails
    survived    all named tests pass: no test states the law
    error       the old text does not occur exactly once, the tests fail without a defect as well, they cannot
                be collected, or they take longer than `--timeout`

The exit code is 0 if every defect is killed, else 1. A process that has imported torch and other packages is
forked for each defect (Linux, macOS): importing them takes longer than most tests.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
LEFT_OUT = (".git", ".venv", "runs", "build", "dist", "__pycache__", ".pytest_cache", ".ruff_cache")
MARKS = "not slow and not gpu and not benchmark"
PYTEST = ("-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "-m", MARKS)
PRELOADED = (
    "accelerate", "onnx", "onnx_ir", "onnxruntime", "scipy.stats", "torch",
    "transformers.models.bert.modeling_bert", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.vit.modeling_vit",
)  # fmt: skip
"""Modules that are imported before the fork; none of this package."""
SERVE = "--serve"


@dataclass(frozen=True)
class Defect:
    """One change of one line, and the law that it breaks."""

    room: str
    name: str
    file: str
    """Path of the module, relative to the checkout."""
    law: str
    old: str
    """Text that occurs once in the module; its other lines only locate the line that changes."""
    new: str
    tests: tuple[str, ...]
    """Files or folders whose tests state the law."""

    @property
    def label(self) -> str:
        return f"{self.room}/{self.name}"


@dataclass(frozen=True)
class Result:
    """Outcome of one defect. `said`: the first test that failed, or the reason of an error."""

    name: str
    file: str
    law: str
    tests: tuple[str, ...]
    outcome: str
    said: str
    seconds: float


@dataclass(frozen=True)
class Session:
    """End of one run of pytest. `failed`: the tests that failed, by id."""

    code: int | None
    """None: stopped after the time limit."""
    failed: tuple[str, ...]
    last: str
    seconds: float


def read_defects(root: Path = ROOT) -> list[Defect]:
    """Read the defects of all rooms, in the order of the files."""
    return [
        Defect(room=file.stem, **{**entry, "tests": tuple(entry["tests"])})
        for file in sorted((root / "tests" / "defects").glob("*.yaml"))
        for entry in yaml.safe_load(file.read_text(encoding="utf-8"))
    ]


def with_defect(defect: Defect, source: str) -> str:
    """Source of the module with the defect. Raises ValueError unless the old text occurs exactly once."""
    count = source.count(defect.old)
    if count != 1:
        raise ValueError(f"the old text occurs {count} times in {defect.file}")
    return source.replace(defect.old, defect.new)


class Copy:
    """Copy of a checkout in which defects are planted."""

    def __init__(self, root: Path, folder: Path, timeout_s: float, preloaded: Sequence[str]) -> None:
        self.folder, self.timeout_s = folder / "checkout", timeout_s
        self._scratch, self._output = folder / "pytest", folder / "output.txt"
        self._stamp = int(time.time())
        shutil.copytree(root, self.folder, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
        path = os.pathsep.join([str(self.folder), str(self.folder / "tests")])
        # no test needs a plugin, and loading those that are installed takes as long as a short test
        own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        self._environment = {**os.environ, **own}
        self._server = subprocess.Popen(
            [sys.executable, __file__, SERVE, *preloaded], cwd=self.folder, env=self._environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def close(self) -> None:
        """End the process that is forked, and a test that still runs."""
        self._server.terminate()
        self._server.communicate()

    def check_import(self) -> None:
        """Raise RuntimeError if Python imports the package from elsewhere."""
        code = "import qcompress; print(qcompress.__file__)"
        command = [sys.executable, "-c", code]
        found_at = subprocess.run(
            command, cwd=self.folder.parent, env=self._environment, capture_output=True, text=True, check=True
        ).stdout.strip()
        if not Path(found_at).resolve().is_relative_to(self.folder.resolve()):
            raise RuntimeError(f"qcompress is imported from {found_at}, not from the copy")

    def write(self, file: str, text: str) -> None:
        """Write a module. Its time differs from that of every earlier content, which Python may have cached
        by size and time in whole seconds.
        """
        self._stamp += 2
        path = self.folder / file
        path.write_text(text, encoding="utf-8")
        os.utime(path, (self._stamp, self._stamp))

    def run(self, tests: Iterable[str], *options: str) -> Session:
        """Run pytest on these files in the copy."""
        begin = time.monotonic()
        arguments = [*PYTEST, f"--basetemp={self._scratch}", *options, *tests]
        request = {"arguments": arguments, "output": str(self._output), "timeout_s": self.timeout_s}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        code = json.loads(self._server.stdout.readline())
        output = self._output.read_text(encoding="utf-8", errors="replace")
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        lines = output.strip().splitlines() or [""]
        return Session(code, tuple(failed), lines[-1], time.monotonic() - begin)


def serve(preloaded: Sequence[str]) -> None:
    """Fork a child for each request of stdin; write pytest's exit code, or null after the time limit."""
    sys.path[0] = ""  # not the folder of this script, whose modules are those of another checkout
    import pytest

    for name in preloaded:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(_forked(pytest.main, json.loads(line))), flush=True)


def _forked(pytest_main: Callable[[list[str]], int], request: dict[str, Any]) -> int | None:
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
                os.dup2(descriptor, stream)
            sys.argv = ["pytest"]
            code = int(pytest_main(request["arguments"]))
            sys.stdout.flush()
        finally:
            os._exit(code)
    end = time.monotonic() + request["timeout_s"]
    try:
        while time.monotonic() < end:
            process, status = os.waitpid(child, os.WNOHANG)
            if process:
                child = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        return None
    finally:  # the time is up, or someone stops the script
        if child:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)


def failing_files(copy: Copy, files: Sequence[str]) -> dict[str, str]:
    """Run these test files without a defect; returns those that fail, each with a reason."""
    session = copy.run(files)
    if session.code == 0:
        return {}
    if session.code != 1 or not session.failed:
        why = "takes too long" if session.code is None else session.last
        return dict.fromkeys(files, why)
    wrong: dict[str, str] = {}
    for test in session.failed:
        file = next((name for name in files if test.partition("::")[0].startswith(name)), files[0])
        wrong.setdefault(file, test)
    return wrong


def try_defect(copy: Copy, defect: Defect, tests: Sequence[str]) -> tuple[str, str]:
    """Plant a defect, run its tests up to the first failure and take it back; returns outcome and reason."""
    source = (copy.folder / defect.file).read_text(encoding="utf-8")
    try:
        broken = with_defect(defect, source)
    except ValueError as error:
        return "error", str(error)
    copy.write(defect.file, broken)
    try:
        session = copy.run(tests, "-x")
    finally:
        copy.write(defect.file, source)
    if session.code == 0:
        return "survived", session.last
    if session.code == 1 and session.failed:
        return "killed", session.failed[0]
    return "error", "takes too long" if session.code is None else session.last


def tests_of(defect: Defect, whole_room: bool) -> tuple[str, ...]:
    """Test files of a defect, or the folder of its room."""
    return (f"tests/{defect.room}",) if whole_room else defect.tests


def run_all(copies: Sequence[Copy], defects: Sequence[Defect], whole_room: bool) -> list[Result]:
    """Try all defects, in all copies at once, after a run of their tests without any."""
    copies[0].check_import()
    files = list(dict.fromkeys(file for defect in defects for file in tests_of(defect, whole_room)))
    print(f"{len(defects)} defects, {len(files)} test files; first the tests without a defect", flush=True)
    wrong: dict[str, str] = {}
    shares = [files[number :: len(copies)] for number in range(len(copies))]
    _in_threads([lambda copy=copy, share=share: wrong.update(failing_files(copy, share) if share else {})
                 for copy, share in zip(copies, shares, strict=True)])  # fmt: skip
    for file, why in wrong.items():
        print(f"fails without a defect: {file}: {why}", flush=True)

    waiting: queue.SimpleQueue[Defect] = queue.SimpleQueue()
    results: dict[str, Result] = {}
    for defect in defects:
        waiting.put(defect)

    def work(copy: Copy) -> None:
        while not waiting.empty():
            try:
                defect = waiting.get_nowait()
            except queue.Empty:
                return
            tests, begin = tests_of(defect, whole_room), time.monotonic()
            broken = next((file for file in tests if file in wrong), None)
            if broken is None:
                outcome, said = try_defect(copy, defect, tests)
            else:
                outcome, said = "error", f"{broken} fails without a defect: {wrong[broken]}"
            seconds = time.monotonic() - begin
            results[defect.label] = Result(
                defect.label, defect.file, defect.law, tests, outcome, said, round(seconds, 1)
            )
            print(f"{outcome:8}  {defect.label}  {seconds:.0f} s  {said}", flush=True)

    _in_threads([lambda copy=copy: work(copy) for copy in copies])
    return [results[defect.label] for defect in defects]


def _in_threads(calls: Sequence) -> None:
    """Run all calls at once, and raise the first error after all of them ended."""
    errors: list[BaseException] = []

    def guarded(call) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def main(
    arguments: Sequence[str] | None = None, root: Path = ROOT, preloaded: Sequence[str] = PRELOADED
) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Plant defects, and report which of them the tests kill.")
    parser.add_argument("--only", metavar="PATTERN", help="only defects whose name, file or law match")
    parser.add_argument("--jobs", type=int, default=1, help="number of copies that are tested at once")
    parser.add_argument("--all", action="store_true", help="run the whole folder of a defect's room")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds of one run of pytest")
    options = parser.parse_args(arguments)
    wanted = re.compile(options.only or "")
    chosen = [
        defect
        for defect in read_defects(root)
        if any(map(wanted.search, (defect.label, defect.file, defect.law)))
    ]
    if not chosen:
        print(f"no defect matches {options.only!r}")
        return 1
    with tempfile.TemporaryDirectory(prefix="qcompress-defects-") as folder:
        jobs = range(max(1, options.jobs))
        copies = [Copy(root, Path(folder, str(job)), options.timeout, preloaded) for job in jobs]
        try:
            results = run_all(copies, chosen, options.all)
        finally:
            for copy in copies:
                copy.close()
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in results], indent=2) + "\n", "utf-8")
    counts = {word: sum(one.outcome == word for one in results) for word in ("killed", "survived", "error")}
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    for one in results:
        if one.outcome != "killed":
            print(f"{one.outcome}: {one.name} ({one.file}): {one.law}\n    {one.said}")
    return 0 if counts["killed"] == len(results) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what is running is ended as well
    if sys.argv[1:2] == [SERVE]:
        serve(sys.argv[2:])
    else:
        sys.exit(main())
