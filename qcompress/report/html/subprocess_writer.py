"""Writes report.html at the end of a run, in a child process. A failure of the page is logged in one line and
does not affect the run.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import qcompress
from qcompress.system.digests import Seen, differs
from qcompress.system.placed import read_placed, write_placed

PACKAGES = ("jinja2", "matplotlib")

PAGE = "report.html"

NOT_SHOWN = (PAGE, "manifest.json", "log.jsonl")
"""Files that change in every run and do not affect the page."""

TIMEOUT_S = 300.0
"""Time limit. A page takes seconds; ten thousand bootstrap draws of a large evaluation set take longer."""


def write_beside(folder: Path, say: Callable[[str], None]) -> None:
    """Write report.html into a finished run, or log why not. An up-to-date page is kept."""
    rule, page = _page_rule(folder), folder / PAGE
    record = read_placed(folder).get(PAGE, {})
    same = bool(rule) and record.get("rule") == rule and page.is_file()
    if same and differs(page, record["sha256"], Seen.from_json(record)) is None:
        return
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        say(f"no report.html: it needs {' and '.join(missing)}")
        return
    command = [sys.executable, "-m", "qcompress", "report", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        say(f"no report.html: it took more than {TIMEOUT_S:.0f} s; qcompress report {folder}")
        return
    except OSError as error:
        say(f"no report.html: {error}")
        return
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        error = [line for line in lines if line.startswith("error: ")] or lines[-1:]
        say(f"no report.html: {error[0] if error else f'exit code {done.returncode}'}")
        return
    if rule:
        record = {**Seen.now(page).to_json(), "stage": "run", "rule": rule}
        write_placed(folder, read_placed(folder) | {PAGE: record})


def _page_rule(folder: Path) -> str:
    """Digest of the files shown on the page and of qcompress's version; empty if the run has no recorded
    digests.
    """
    placed = read_placed(folder)
    digests = {name: record["sha256"] for name, record in placed.items() if name not in NOT_SHOWN}
    content = json.dumps([qcompress.__version__, digests], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest() if digests else ""
