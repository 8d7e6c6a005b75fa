"""The code of a user's class in the key of train: every edit that changes what it does, and no other."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from qcompress.schema.custom_code import CustomCode, code_of

FILES = {
    "userlib/__init__.py": "",
    "userlib/stepper.py": """
        import torch
        from qcompress.training.methods.saq import SharpnessAwareUpdate
        from userlib.base import Base
        from .near import NEAR
        from userlib import defaults

        class Mixin:
            pass

        class Mine(SharpnessAwareUpdate, Base, Mixin):
            rate = 1.0

            def step(self):
                from userlib.lazy import late

                return late() * NEAR * defaults.FACTOR
    """,
    "userlib/base.py": "from userlib.deeper import make\n\nHELPER = make()\n\nclass Base:\n    factor = 1\n",
    "userlib/deeper.py": "class Helper:\n    power = 1\n\ndef make():\n    return Helper()\n",
    "userlib/near.py": "NEAR = 1\n",
    "userlib/defaults.py": "FACTOR = 1\n",
    "userlib/lazy.py": "def late():\n    return 1\n",
    "userlib/unused.py": "VALUE = 1\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    _unload()


def _unload() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("userlib", "single")]:
        del sys.modules[name]


def code(name: str = "userlib.stepper", kind: str = "Mine") -> CustomCode:
    """As a new process sees it."""
    _unload()
    importlib.invalidate_caches()
    return code_of({"stepper mine": getattr(importlib.import_module(name), kind)})


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("stepper.py", "rate = 1.0", "rate = 2.0"),
        ("base.py", "factor = 1", "factor = 100"),
        ("deeper.py", "power = 1", "power = 100"),
        ("near.py", "NEAR = 1", "NEAR = 100"),
        ("defaults.py", "FACTOR = 1", "FACTOR = 100"),
        ("lazy.py", "return 1", "return 100"),
        ("__init__.py", "", "import torch\ntorch.manual_seed(1)\n"),
    ],
)
def test_an_edit_of_any_file_that_the_class_can_run_changes_its_code(
    folder: Path, name: str, old: str, new: str
) -> None:
    before, file = code(), folder / "userlib" / name
    file.write_text(file.read_text().replace(old, new, 1))
    after = code()
    assert before.files != after.files
    module = f"userlib.{name[:-3]}" if name != "__init__.py" else "userlib"
    changed = {key for key in before.files if before.files[key] != after.files[key]}
    assert f"custom {module}" in changed <= {f"custom {module}", "custom values"}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("stepper.py", "import torch\n", "# a comment\nimport torch\n"),
        ("stepper.py", "    rate = 1.0", "    'What it is.'\n\n    rate = 1.0"),
        ("lazy.py", "return 1", "return (\n        1\n    )"),
        ("unused.py", "VALUE = 1", "VALUE = 100"),
    ],
)
def test_comments_layout_docstrings_and_files_that_it_cannot_run_do_not(
    folder: Path, name: str, old: str, new: str
) -> None:
    before, file = code(), folder / "userlib" / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    assert code() == before


def test_modules_of_this_package_that_the_class_uses_are_named(folder: Path) -> None:
    assert "qcompress.training.methods.saq" in code().modules
    (folder / "single.py").write_text(
        "class Mine:\n    def step(self):\n        from qcompress.training.methods import squat\n"
    )
    assert {"qcompress.training.methods", "qcompress.training.methods.squat"} <= code("single").modules


def test_installed_packages_count_by_version_and_the_standard_library_does_not(folder: Path) -> None:
    (folder / "single.py").write_text(
        "import json, os, yaml\ntry:\n    import no_such_package\nexcept ImportError:\n    pass\n"
        "class Mine(yaml.YAMLObject):\n    pass\n"
    )
    custom = code("single")
    assert set(custom.files) == {"custom single", "custom values"}
    assert set(custom.versions) == {"PyYAML", "no_such_package"}
    assert custom.versions["no_such_package"] == "absent"


def notebook(*cells: str) -> ModuleType:
    """A module that no file holds."""
    module = ModuleType("__main__")
    for number, cell in enumerate(cells):
        exec(compile(textwrap.dedent(cell), f"<cell {number}>", "exec"), module.__dict__)
    return module


CELLS = (
    "from userlib.near import NEAR\nFACTOR = 1\nimport numpy as np\nTABLE = np.array([1.0, 2.0])",
    "def helper(x):\n    return x * FACTOR\nclass Tool:\n    def use(self): return 1",
    """
    class Mine:
        def step(self):
            import userlib.lazy
            return helper(1) + Tool().use() + TABLE[0] + (3 in {3, 4, 'a', 'b'})
    """,
)


@pytest.mark.parametrize(
    ("cell", "old", "new"),
    [
        (0, "FACTOR = 1", "FACTOR = 100"),
        (0, "2.0", "3.0"),
        (1, "x * FACTOR", "x + FACTOR"),
        (1, "return 1", "return 100"),
        (2, "helper(1)", "helper(2)"),
    ],
)
def test_a_class_of_a_notebook_counts_with_what_it_refers_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cell: int, old: str, new: str
) -> None:
    def of(*cells: str) -> CustomCode:
        _unload()
        module = notebook(*cells)
        monkeypatch.setitem(sys.modules, "__main__", module)
        return code_of({"stepper mine": module.Mine})

    before = of(*CELLS)
    assert "custom userlib.lazy" in before.files
    assert of(*("\n# a comment\n" + textwrap.dedent(text) for text in CELLS)) == before
    changed = [*CELLS]
    assert old in changed[cell]
    changed[cell] = changed[cell].replace(old, new)
    assert of(*changed) != before


def test_a_file_that_does_not_parse_counts_by_its_bytes(folder: Path) -> None:
    (folder / "userlib" / "near.py").write_text("NEAR = 1\n")
    (folder / "single.py").write_text(
        "try:\n    from userlib import old\nexcept SyntaxError:\n    pass\nclass Mine:\n    pass\n"
    )
    (folder / "userlib" / "old.py").write_text("print 1\n")
    before = code("single")
    (folder / "userlib" / "old.py").write_text("print 2\n")
    assert "custom userlib.old" in before.files and code("single") != before


def test_a_class_whose_file_is_gone_counts_by_its_functions(folder: Path) -> None:
    file = folder / "single.py"
    digests = []
    for number in (1, 1, 100):
        file.write_text(f"class Mine:\n    def step(self):\n        return {number}\n")
        _unload()
        importlib.invalidate_caches()
        kind = importlib.import_module("single").Mine
        file.unlink()
        digests.append(code_of({"mine": kind}))
    assert digests[0] == digests[1] != digests[2]


def made_of(factor: float) -> type:
    class Made:
        def step(self) -> float:
            return factor

    return Made


class Configured:
    def step(self) -> float:
        return LIMIT


LIMIT = 1.0


@pytest.mark.parametrize(
    "make",
    [
        made_of,
        lambda value: type("Typed", (Configured,), {"factor": value}),
        lambda value: type("Typed", (Configured,), {"factor": [{"deep": value}]}),
        lambda value: type("Typed", (Configured,), {"step": lambda self, factor=value: factor}),
        lambda value: type("Typed", (Configured,), {"part": made_of(value)()}),
    ],
    ids=["closure", "attribute", "container", "default", "instance"],
)
def test_values_that_no_file_shows_count(make: Callable[[float], type]) -> None:
    assert code_of({"mine": make(1.0)}) != code_of({"mine": make(100.0)})
    assert code_of({"mine": make(1.0)}) == code_of({"mine": make(1.0)})


def test_a_global_that_was_set_from_outside_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_of({"mine": Configured})
    monkeypatch.setitem(globals(), "LIMIT", 100.0)
    assert code_of({"mine": Configured}) != before
