"""The defects of tests/defects agree with the sources, and `planted_defects.py` judges them rightly."""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from planted_defects import ROOT, main, read_defects, with_defect
from test_layers import ROOMS

DEFECTS = read_defects()
FEWEST = 4
COVERED = ("quant", "models", "encodings", "training", "parity", "pipeline", "graph", "verdict", "recipe",
           "engine", "tasks", "system")  # fmt: skip


def test_there_are_enough_defects_and_some_for_each_room() -> None:
    counts = Counter(defect.room for defect in DEFECTS)
    assert len(DEFECTS) >= 72
    assert counts.keys() <= ROOMS.keys()
    assert {room: counts[room] for room in COVERED if counts[room] < FEWEST} == {}


def test_names_are_unique_and_defects_lie_in_their_room() -> None:
    assert [name for name, count in Counter(defect.name for defect in DEFECTS).items() if count > 1] == []
    assert [one.label for one in DEFECTS if Path(one.file).parts[:2] != ("qcompress", one.room)] == []


def test_each_defect_changes_one_line_of_code() -> None:
    wrong: dict[str, str] = {}
    for defect in DEFECTS:
        source = (ROOT / defect.file).read_text(encoding="utf-8")
        try:
            broken = with_defect(defect, source)
            ast.parse(broken)
        except (ValueError, SyntaxError) as error:
            wrong[defect.label] = str(error)
            continue
        before, after = source.splitlines(), broken.splitlines()
        changed = [one.strip() for one, other in zip(before, after, strict=False) if one != other]
        if len(before) != len(after) or len(changed) != 1 or changed[0].startswith(("#", '"""')):
            wrong[defect.label] = f"these lines change: {changed}"
    assert wrong == {}


def test_laws_are_sentences_and_tests_are_files_of_the_suite() -> None:
    assert [one.label for one in DEFECTS if not (one.law[0].isupper() and one.law.endswith("."))] == []
    named = {test for defect in DEFECTS for test in defect.tests}
    assert all(defect.tests for defect in DEFECTS)
    assert [
        test for test in sorted(named) if not (test.startswith("tests/") and (ROOT / test).exists())
    ] == []


# The script ---------------------------------------------------------------------------------------

DOUBLE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TEST = "from qcompress.room.sums import double\n\n\ndef test_double():\n    assert double(3) == {}\n"


def defect(**changes: Any) -> dict[str, Any]:
    return {
        "name": "triple",
        "file": "qcompress/room/sums.py",
        "law": "A double is twice the number.",
        "old": "return 2 * x",
        "new": "return 3 * x",
        "tests": ["tests/room/test_sums.py"],
        **changes,
    }


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout with one module, whose function `double` alone is tested."""
    files = {
        "qcompress/__init__.py": "",
        "qcompress/room/__init__.py": "",
        "qcompress/room/sums.py": DOUBLE,
        "tests/room/test_sums.py": TEST.format(6),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "tests" / "defects").mkdir()
    return tmp_path


def outcomes(project: Path, *defects: dict[str, Any], options: tuple[str, ...] = ()) -> tuple[int, list[Any]]:
    """Exit code, and outcome and reason of each defect."""
    (project / "tests" / "defects" / "room.yaml").write_text(yaml.safe_dump(list(defects)))
    code = main(["--json", str(project / "out.json"), *options], project, ())
    assert (project / "qcompress/room/sums.py").read_text() == DOUBLE
    return code, [(one["outcome"], one["said"]) for one in json.loads((project / "out.json").read_text())]


def test_a_defect_is_killed_survives_or_cannot_be_planted(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of them have the size of the source, so that a compiled file of the one would serve the other."""
    law = "A half is half the number."
    code, results = outcomes(
        project,
        defect(),
        defect(name="fourfold", new="return 4 * x"),
        defect(name="third", law=law, old="return x / 2", new="return x / 3"),
        defect(name="absent", old="return 5 * x"),
        defect(name="twice", old="return"),
        defect(name="syntax", new="return 3 *"),
    )
    assert code == 1
    killed = ("killed", "tests/room/test_sums.py::test_double")
    assert results[:2] == [killed, killed]
    assert [outcome for outcome, _ in results[2:]] == ["survived", "error", "error", "error"]
    assert results[3][1] == "the old text occurs 0 times in qcompress/room/sums.py"
    assert results[4][1] == "the old text occurs 2 times in qcompress/room/sums.py"
    assert "1 error in" in results[5][1]
    shown = capsys.readouterr().out
    assert f"survived: room/third (qcompress/room/sums.py): {law}" in shown
    assert "2 killed, 1 survived, 3 error" in shown


@pytest.mark.parametrize("options", [("--only", "triple"), ("--jobs", "2", "--all", "--only", "doub.e is")])
def test_the_code_is_0_if_all_chosen_defects_are_killed(project: Path, options: tuple[str, ...]) -> None:
    unseen = defect(name="third", law="A half is half the number.", old="return x / 2", new="return x / 3")
    code, results = outcomes(project, defect(), unseen, options=options)
    assert (code, len(results)) == (0, 1)


def test_tests_that_fail_without_a_defect_are_an_error(project: Path) -> None:
    (project / "tests/room/test_sums.py").write_text(TEST.format(9))
    code, [(outcome, reason)] = outcomes(project, defect())
    assert (code, outcome) == (1, "error")
    file = "tests/room/test_sums.py"
    assert reason == f"{file} fails without a defect: {file}::test_double"


def test_a_pattern_without_a_defect_is_an_error(project: Path) -> None:
    (project / "tests" / "defects" / "room.yaml").write_text(yaml.safe_dump([defect()]))
    assert main(["--only", "nothing"], project, ()) == 1
