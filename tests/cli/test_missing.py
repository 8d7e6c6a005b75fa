"""Missing packages (exit code 6), files and folders (exit code 2)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from lines import Project, cli, finished

from qcompress.errors import MachineError, package_missing


@pytest.fixture
def project(tiny_model: Path, text_file: Path) -> Project:
    return finished(tiny_model, text_file)


def without(monkeypatch: pytest.MonkeyPatch, package: str, *again: str) -> None:
    """Every import of `package` fails; the modules `again`, which have imported it, are imported anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for name in again:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("package", ["onnxruntime", "transformers"])
def test_predict_without_a_package_says_what_to_install(
    project: Project, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    if package == "onnxruntime":
        without(
            monkeypatch,
            package,
            "qcompress.cli.predict",
            "qcompress.parity.runners",
            "qcompress.parity.generate",
        )
    else:
        without(monkeypatch, package)
    done = cli("predict", project.latest, "a text")
    assert done.code == 6
    assert f"this command needs the package {package}, which is not installed" in done.stderr
    assert "pip install 'qcompress[train]'" in done.stderr and "Traceback" not in done.stderr


def test_a_stage_and_another_command_say_the_same(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = project.copy(tmp_path / "copy")
    without(
        monkeypatch,
        "onnxruntime",
        "qcompress.pipeline.stages.verify",
        "qcompress.parity.runners",
        "qcompress.parity.measure",
    )
    done = cli("verify", project.latest)
    assert done.code == 6 and "this command needs the package onnxruntime" in done.stderr
    with pytest.raises(MachineError, match="the stage verify needs the package onnxruntime"):
        made.run("verify.samples=4")


def test_a_package_that_cannot_be_loaded_and_a_defect_of_ours_are_told_apart() -> None:
    broken = package_missing(
        ImportError("libcudart.so.13: cannot open", name="onnxruntime.capi"), "this command"
    )
    assert isinstance(broken, MachineError) and "libcudart.so.13" in broken.message
    absent = package_missing(ModuleNotFoundError("no", name="tensorrt_rtx"), "the stage build")
    assert absent.fix == "pip install 'qcompress[rtx]'"
    for name in ("qcompress.models.nowhere", None):
        with pytest.raises(ImportError):
            package_missing(ImportError("no", name=name), "this command")


COMMANDS = {
    "lint": ("{}", "--target", "rtx-ada"),
    "inspect": ("{}",),
    "build": ("{}", "--target", "rtx-ada", "--out", "{out}"),
    "verify": ("{}",),
    "show": ("{}",),
    "report": ("{}",),
    "compare": ("{}",),
    "bundle": ("{}", "--out", "{out}"),
    "predict": ("{}", "a text"),
    "gate": ("--candidate", "{}"),
    "baseline": ("promote", "{}"),
    "doctor": ("--bundle", "{}"),
    "run": ("{}", "--out", "{out}"),
    "check": ("{}",),
    "sensitivity": ("{}",),
}
FILES = {"lint", "inspect", "build", "run", "check", "sensitivity"}
"""Commands that read a file; the others read a folder."""


@pytest.mark.parametrize("kind", ["nothing", "the other kind"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_is_not_there_is_wrong_usage(command: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "there"
    if kind != "nothing":
        path.mkdir() if command in FILES else path.write_text("text")
    out = tmp_path / "out"
    done = cli(command, *(part.format(path, out=out) for part in COMMANDS[command]))
    assert done.code == 2 and str(path) in done.stderr and "fix" in done.stderr
    assert "Traceback" not in done.stderr and not out.exists()
    if kind == "nothing":
        assert "does not exist" in done.stderr
