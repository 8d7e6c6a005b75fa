"""CPU time of commands that read a file at most, against the bare import of typer, rich, pydantic and yaml.

One interleaved run of processes, with compiled bytecode as an installation has it; the median of all rounds
counts. `check` has an empty cache; `show` prints a tiny model's run.

    pytest -m benchmark -s -n 0 tests/benchmarks/test_start_cost.py
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
from lines import environment, finished

from qcompress.cli.listing import LISTS

ROUNDS = 11
RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
BARE = ("-c", "import typer, rich, pydantic, yaml")
COMMAND = ("-m", "qcompress")
COMPLETE = ("-c", "import sys; from qcompress.__main__ import main; sys.argv = ['qcompress']; main()")
"""The name of the program names the variables of its completion."""
TABLES = ("list", "lint model.onnx --target", "init --method", "init --format", "init --labels-are",
          "build model.onnx --hardware-compatibility", "run recipe.yaml --until")  # fmt: skip
BRIEF, CHECK = 2.0, 4.0
"""Largest ratios to the bare import."""


def completion(line: str) -> dict[str, str]:
    """Variables with which bash asks for the words after `qcompress LINE`."""
    words = {"COMP_WORDS": f"qcompress {line} ", "COMP_CWORD": str(len(line.split()) + 1)}
    return {"_QCOMPRESS_COMPLETE": "complete_bash", **words}


def seconds(arguments: tuple[str, ...], variables: dict[str, str]) -> float:
    """CPU time of a process of Python, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and (arguments is BARE or done.stdout), (arguments, done.stderr)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.benchmark
def test_a_command_starts_within_twice_the_bare_import_and_check_within_four_times(
    tmp_path: Path, tiny_model: Path, text_file: Path
) -> None:
    run = finished(tiny_model, text_file).latest
    variables = environment(PYTHONPYCACHEPREFIX=str(tmp_path / "bytecode"), TERM="dumb")
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    variables["PYTHONPATH"] = os.pathsep.join([str(RECIPE.parents[1]), variables.get("PYTHONPATH", "")])
    cases = {"bare import": (BARE, {}, 1.0), "--help": ((*COMMAND, "--help"), {}, BRIEF)}
    cases |= {f"list {what}": ((*COMMAND, "list", what), {}, BRIEF) for what in LISTS}
    cases["show RUN"] = ((*COMMAND, "show", str(run)), {}, BRIEF)
    cases |= {f"{line} <TAB>": (COMPLETE, completion(line), BRIEF) for line in ("", *TABLES)}
    check = (*COMMAND, "check", str(RECIPE), "--out", str(tmp_path / "runs"))
    cases["check recipes/quickstart.yaml"] = (check, {}, CHECK)
    costs: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(ROUNDS + 1):
        for name, (arguments, more, _) in cases.items():
            cost = seconds(arguments, {**variables, **more})
            if round_ > 0:  # the first one compiles
                costs[name].append(cost)
    base = median(costs["bare import"])
    ratios = {name: median(values) / base for name, values in costs.items()}
    print(f"\n{'command':48} {'ms':>5} {'ratio':>6} {'limit':>6}")
    for name, (_, _, limit) in cases.items():
        print(f"{name:48} {1000 * median(costs[name]):5.0f} {ratios[name]:6.2f} {limit:6.1f}")
    assert {name: ratio for name, ratio in ratios.items() if ratio > cases[name][2]} == {}
