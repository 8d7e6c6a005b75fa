"""lint, inspect and build on files that are broken: a documented exit code and a message, every time."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from lines import Result, cli
from mutations import STRUCTURE, mutated

COUNT = 300
BUILT = 8
"""Of these as many are built by default: a builder takes seconds to start."""

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")

opened: list[str] = []
"""Files that were opened while `watching`."""
watching = False


def _heard(event: str, arguments: tuple[object, ...]) -> None:
    if watching and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_heard)


@pytest.fixture
def watch():
    """Everything that Python opens goes into `opened`."""
    global watching
    opened.clear()
    watching = True
    yield
    watching = False


def check(done: Result, file: Path, what: str) -> None:
    assert done.code in (0, 5), (done, what)
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    if done.code == 5:
        assert re.search(r"^error[: ]", said, re.MULTILINE), what
    assert str(file.name) in said or "weight" in said


def test_every_kind_of_change_is_made(tmp_path: Path) -> None:
    made = Counter(word for number in range(COUNT) for word in mutated(number, tmp_path)[1].split())
    assert set(made) == {change.__name__ for change in STRUCTURE} | {"bytes"}
    assert min(made.values()) >= 10 and made["bytes"] == COUNT / 5


@pytest.mark.parametrize(
    "start",
    [
        *range(0, COUNT // 2, 50),
        *(pytest.param(one, marks=pytest.mark.slow) for one in range(COUNT // 2, COUNT, 50)),
    ],
)
def test_lint_and_inspect_end_with_a_code_and_a_message(start: int, tmp_path: Path, watch: None) -> None:
    codes: Counter[int] = Counter()
    for number in range(start, start + 50):
        file, what = mutated(number, tmp_path)
        for command in (["lint", file, "--target", "rtx-ada"], ["inspect", file]):
            done = cli(*command)
            check(done, file, what)
            codes[done.code] += 1
    assert codes[5] > codes[0] > 0
    outside = [name for name in opened if os.path.basename(name) in ("passwd", "x") or ".." in name]
    assert outside == [] and len(opened) >= 50


def build(number: int, folder: Path) -> bool:
    """Whether both agree: what TensorRT-RTX builds has no error for the linter, and the other way round."""
    file, what = mutated(number, folder)
    done = cli("build", file, "--target", "rtx-ada", "--out", folder / f"engine-{number}")
    assert done.code in (0, 2, 5), (done, what)  # 2: an axis without a name or a profile
    said = done.stdout + done.stderr
    assert "Traceback" not in said and (not done.code or "error: " in done.stderr), what
    assert (folder / f"engine-{number}" / "model.plan").is_file() is (done.code == 0)
    return (done.code == 0) is (cli("lint", file, "--target", "rtx-ada").code == 0)


@needs_rtx
def test_build_ends_with_a_code_and_a_message(tmp_path: Path) -> None:
    assert len([build(number, tmp_path) for number in range(BUILT)]) == BUILT


@needs_rtx
@pytest.mark.slow
def test_build_ends_with_a_code_and_a_message_on_every_file(tmp_path: Path) -> None:
    agreed = Counter(build(number, tmp_path) for number in range(COUNT))
    assert sum(agreed.values()) == COUNT and agreed[True] > 0.8 * COUNT
    print(f"the linter and TensorRT-RTX agree about {agreed[True]} of {COUNT} broken files")
