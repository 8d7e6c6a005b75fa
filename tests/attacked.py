"""Commands under attack: `qcompress` in a process of its own, with limits, and its behaviour in numbers."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from lines import environment


@dataclass(frozen=True)
class Ended:
    """One command. `peak_mib` is the largest resident set of its process, looked at every few milliseconds:
    `ru_maxrss` counts that of the process that forked it, too.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak_mib: float

    @property
    def text(self) -> str:
        return self.stdout + self.stderr


def attacked(
    *arguments: str | Path,
    folder: Path | None = None,
    timeout_s: float = 120,
    address_space_mib: int | None = None,
    **variables: str,
) -> Ended:
    """Run a command to its end. `address_space_mib` limits its virtual memory (RLIMIT_AS)."""

    def limit() -> None:
        if address_space_mib is not None:
            size = address_space_mib * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (size, size))

    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "qcompress", *map(str, arguments)],
        env=environment(COLUMNS="200", **variables),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        preexec_fn=limit,
    )
    texts: dict[str, str] = {}

    def drain(name: str) -> None:
        stream = getattr(process, name)
        texts[name] = stream.read()
        stream.close()

    readers = [threading.Thread(target=drain, args=(name,)) for name in ("stdout", "stderr")]
    for reader in readers:
        reader.start()
    killer = threading.Timer(timeout_s, process.kill)
    killer.start()
    peak = 0
    while (done := os.waitpid(process.pid, os.WNOHANG))[0] == 0:
        peak = max(peak, _peak_kib(process.pid))
        time.sleep(0.005)
    status = done[1]
    process.returncode = os.waitstatus_to_exitcode(status)
    killer.cancel()
    for reader in readers:
        reader.join()
    seconds = time.monotonic() - begin
    return Ended(process.returncode, texts["stdout"], texts["stderr"], seconds, peak / 1024)


def _peak_kib(pid: int) -> int:
    """VmHWM: of the program that runs now, and none of a process that has ended."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def refused(ended: Ended, code: int, *words: str) -> None:
    """Assert an error in words: the exit code, no traceback, an `error:` line that has `words`."""
    assert "Traceback" not in ended.text, ended.text[-3000:]
    assert ended.code == code, (ended.code, ended.text[-3000:])
    assert "error: " in ended.stderr, ended.text[-3000:]
    for word in words:
        assert word in ended.text, (word, ended.text[-3000:])


def no_traceback(ended: Ended, *codes: int) -> None:
    """Assert that a command ended with one of `codes` and without a traceback."""
    assert "Traceback" not in ended.text, ended.text[-3000:]
    assert ended.code in codes, (ended.code, ended.text[-3000:])
