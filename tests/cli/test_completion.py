"""Completion in a shell after `qcompress`; starting up imports no heavy package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from lines import cli, python
from typer.testing import CliRunner

from qcompress.cli.listing import LISTS
from qcompress.cli.main import app
from qcompress.schema.axes import METHODS
from qcompress.schema.formats import FORMAT_PRESETS
from qcompress.schema.recipe import ROWS, STAGES
from qcompress.schema.targets import TARGETS

LEVELS = ("none", "ampere-plus", "same-compute-capability")

VALUES = {
    "lint model.onnx --target": TARGETS,
    "build model.onnx --target": TARGETS,
    "build model.onnx --hardware-compatibility": LEVELS,
    "init --target": TARGETS,
    "init --method": METHODS,
    "init --format": FORMAT_PRESETS,
    "run recipe.yaml --until": STAGES,
    "run recipe.yaml --keep": STAGES,
    "compare a b --row": ROWS,
    "baseline promote run --row": ROWS,
    "list": LISTS,
}


def completed(line: str, typed: str = "") -> list[str]:
    """Completions that bash offers for the last word of a line."""
    words = f"qcompress {line} {typed}"
    variables = {
        "_QCOMPRESS_COMPLETE": "complete_bash",
        "COMP_WORDS": words.rstrip(),
        "COMP_CWORD": str(len(line.split()) + 1),
    }
    return CliRunner().invoke(app, [], env=variables).stdout.split()


@pytest.mark.parametrize("line", VALUES)
def test_values_come_from_the_tables(line: str) -> None:
    known = list(VALUES[line])
    assert len(known) >= 3 and completed(line) == known
    first = known[0][:2]
    assert completed(line, first) == [word for word in known if word.startswith(first)]
    assert completed(line, "zz") == []


def test_commands_are_completed() -> None:
    assert completed("", "in") == ["init", "inspect"]
    assert len(typer.main.get_command(app).commands) >= 14


@pytest.mark.parametrize(
    ("shell", "how"), [("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --command qcompress")]
)
def test_the_script_for_a_shell_is_shown(shell: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is typer's own, for tests: a shell is named, and not looked for."""
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = cli("--show-completion", shell)
    assert done.code == 0 and how in done.stdout and f"_QCOMPRESS_COMPLETE=complete_{shell}" in done.stdout


HEAVY = {"torch", "transformers", "onnxruntime", "onnx", "datasets", "tensorrt_rtx", "pyarrow", "scipy",
         "sklearn", "matplotlib", "jinja2"}  # fmt: skip
"""Packages that none of these commands imports."""

OF_RECIPES = {"numpy", "yaml", "qcompress.schema.recipe", "qcompress.pipeline.run"}
"""Modules with which a recipe is read."""

STARTED = """
import json, sys
from qcompress.cli.main import app
from qcompress.schema.stages import STAGES

def sections(kind):
    return [kind, *(section for below in kind.__subclasses__() for section in sections(below))]

for line in json.loads(sys.argv[1]):
    try:
        app(line.split())
    except SystemExit:
        pass
    formats = sys.modules.get("qcompress.schema.formats")
    known = sections(formats.Options) if formats else []
    built = sorted(section.__name__ for section in known if section.__pydantic_complete__)
    print("MODULES", json.dumps([sorted(sys.modules), built]))
"""

LINES = ("--help", "list methods", "list targets", "show nowhere", "list axes", "list tasks", "list models",
         "check recipes/quickstart.yaml")  # fmt: skip


def test_a_command_imports_no_more_than_it_needs() -> None:
    """One process runs the commands in turn, so that each list of modules contains the ones before."""
    done = python(STARTED, json.dumps(LINES), folder=Path(__file__).parents[2])
    reports = [json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("MODULES ")]
    assert len(reports) == len(LINES), done.stderr
    for line, (modules, built) in zip(LINES, reports, strict=True):
        banned = HEAVY if line.startswith("check") else HEAVY | OF_RECIPES
        assert banned & set(modules) == set(), line
        if LINES.index(line) < LINES.index("list axes"):
            assert {"qcompress.schema.formats", "qcompress.models"} & set(modules) == set(), line
        assert line.startswith("check") or built == [], line
    assert "Recipe" in reports[-1][1] and "quickstart: gpt2" in done.stdout
