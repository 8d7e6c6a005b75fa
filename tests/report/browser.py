"""A headless Chromium driven through its DevTools protocol, over a pipe: no network, no driver to install.

What a page says on the console, what it loads and what it computes; nothing else of the protocol is here.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

TIMEOUT_S = 60.0

READS, WRITES = 3, 4
"""Where Chromium reads what it is told, and writes what it answers."""


def executable() -> str | None:
    """Chromium or a relative of it, where there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. `said` has what it told by itself: (method, parameters)."""

    def __init__(self, tell: int, hear: int) -> None:
        self._tell, self._hear = tell, hear
        self._rest, self._count, self._session = b"", 0, ""
        self.said: list[tuple[str, dict[str, Any]]] = []

    def attach(self) -> None:
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to one call."""
        self._count += 1
        call = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            call["sessionId"] = self._session
        os.write(self._tell, json.dumps(call).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]

    def open(self, file: Path, *, scheme: str, width: int) -> None:
        """A file, in `light` or `dark`, on a screen of that many pixels."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.ask("Emulation.setEmulatedMedia", features=[feature])
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        self.said.clear()
        self.ask("Page.navigate", url=file.resolve().as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.said):
            self._next()

    def value(self, expression: str) -> Any:
        """Value of a JavaScript expression."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """One key, down and up."""
        codes = {"Tab": 9, "Enter": 13}
        text = {"Enter": "\r"}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text,
                     windowsVirtualKeyCode=codes[key])  # fmt: skip

    def _next(self) -> dict[str, Any]:
        ends = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._hear], [], [], max(0.0, ends - time.monotonic()))
            assert ready, f"Chromium said nothing for {TIMEOUT_S:.0f} s"
            got = os.read(self._hear, 1 << 16)
            assert got, "Chromium has ended"
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self.said.append((message["method"], message.get("params", {})))
        return message


@contextmanager
def chromium(program: str, profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, ended at the end."""
    theirs, tell = os.pipe()
    hear, answers = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs, answers)]  # out of the way of 3 and 4

    def place() -> None:
        for end, number in zip(high, (READS, WRITES), strict=True):
            os.dup2(end, number)

    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run",
               "--disable-background-networking"]  # fmt: skip
    process = subprocess.Popen(
        command,
        preexec_fn=place,
        pass_fds=(READS, WRITES),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (theirs, answers, *high):
        os.close(end)
    try:
        browser = Browser(tell, hear)
        browser.attach()
        yield browser
    finally:
        process.terminate()
        process.wait(timeout=TIMEOUT_S)
        os.close(tell)
        os.close(hear)
