"""Seconds of each stage of a run, and their shares: the quickstart, and GPT-2's 124 M shape (random weights).

Seconds are those of manifest.json. `rest` is what the stages do not take: start of the program, cache keys,
and report.html, which a process of its own writes. The processor time of all processes is printed as well,
since a busy machine takes longer.

    pytest -m benchmark -s -n 0 tests/benchmarks/test_line_cost.py
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpt2_shapes import make_checkpoint, run_line

from qcompress.schema.recipe import STAGES

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
LIMIT_S = 30
"""Aim of a quickstart on two idle cores."""


def cpu_seconds() -> float:
    """Processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def print_stages(name: str, run: Path, seconds: float, cpu: float) -> None:
    """Print one line for each stage, and one for the rest."""
    stages = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["stages"]
    parts = {stage: stages[stage]["seconds"] for stage in STAGES}
    parts["rest"] = seconds - sum(parts.values())
    print(f"\n{name}: {seconds:.1f} s, {cpu:.1f} s of processor time, {os.cpu_count()} cores")
    for stage, part in parts.items():
        print(f"  {stage:<7} {part:6.2f} s  {100 * part / seconds:5.1f} %")


@pytest.mark.benchmark
def test_stages_of_the_quickstart(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qcompress", "run", str(QUICKSTART), "--out", str(tmp_path)]
    used, began = cpu_seconds(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    seconds = time.perf_counter() - began
    print_stages("quickstart", tmp_path / "quickstart" / "latest", seconds, cpu_seconds() - used)
    print(f"  aim: {LIMIT_S} s")


@pytest.mark.benchmark
def test_stages_of_a_124m_run_with_observed_ranges(tmp_path: Path, text_file: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", text_file, "124M")
    used = cpu_seconds()
    cost = run_line(tmp_path / "run", checkpoint, text_file, "gate", format="w8a8")
    print_stages("124 M", cost.folder, cost.seconds, cpu_seconds() - used)
