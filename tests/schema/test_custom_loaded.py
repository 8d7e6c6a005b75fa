"""A file that was edited after its import: refused where its functions are stale, and nowhere else."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from qcompress.errors import UsageError
from qcompress.schema.custom_code import CustomCode, code_of

TEXT = """
    from __future__ import annotations
    import abc, contextlib, dataclasses, enum, functools, typing
    import torch
    import edited_helper
    from edited_helper import halved

    FACTOR = 1.0
    NAMES = {"a", "b", "c"}
    FLAGS: tuple = (1, 2)

    def logged(function):
        @functools.wraps(function)
        def inner(*args):
            return function(*args)
        return inner

    @dataclasses.dataclass
    class Setting:
        rate: float = 1.0

        def doubled(self):
            return 2 * self.rate

    class Colour(enum.Enum):
        RED = 1

    class Pair(typing.NamedTuple):
        first: int

    def made(power):
        def of(x):
            return [x ** power for _ in range(3) if x in {"a", "b", "c", 1}]
        return of

    class Mine(abc.ABC):
        "The class."
        power = staticmethod(made(3))

        @logged
        def step(self, x=1.0):
            "One update."
            return halved(x) * FACTOR + edited_helper.other(x) + Setting().doubled()

        @property
        def rate(self):
            return super().__init__

        @classmethod
        def build(cls, *args, key=lambda x: x + 1, **rest):
            async def later():
                yield 1
            return later

        @staticmethod
        @torch.no_grad()
        def still():
            assert FACTOR, "message"
            return 1

        @functools.lru_cache
        def kept(self):
            return 1

        @contextlib.contextmanager
        def within(self):
            yield 1
"""
HELPER = "FACTOR = 1\n\ndef halved(x):\n    return x / 2\n\ndef other(x):\n    return x * FACTOR\n"


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("edited", "edited_helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "edited.py").write_text(textwrap.dedent(TEXT))
    (tmp_path / "edited_helper.py").write_text(HELPER)
    importlib.invalidate_caches()
    importlib.import_module("edited")

    def change(name: str, old: str, new: str) -> None:
        file = tmp_path / f"{name}.py"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))

    yield change
    for name in ("edited", "edited_helper"):
        sys.modules.pop(name, None)


def code(kind: type | None = None) -> CustomCode:
    return code_of({"mine": kind or sys.modules["edited"].Mine})


def reloaded(*names: str) -> ModuleType:
    return [importlib.reload(sys.modules[name]) for name in names][-1]


EDITS = [
    ("edited", "2 * self.rate", "3 * self.rate"),
    ("edited", "return super().__init__", "return 1"),
    ("edited", "x + 1", "x + 2"),
    ("edited", "x ** power for", "x * power for"),
    ("edited", '"b", "c", 1}', '"b", "d", 1}'),
    ("edited", "yield 1", "yield 2"),
    ("edited", "return function(*args)", "return function(*args) or 1"),
    ("edited", "return halved(x) * FACTOR", "return FACTOR * halved(x)"),
    ("edited_helper", "x / 2", "x / 3"),
    ("edited_helper", "x * FACTOR", "x - FACTOR"),
]


@pytest.mark.parametrize(("name", "old", "new"), EDITS)
def test_a_function_that_the_file_has_no_longer_is_refused(
    edit: Callable, name: str, old: str, new: str
) -> None:
    before = code()
    edit(name, old, new)
    message = rf"{name}\.py was changed after it was imported: .*\n  fix: restart"
    with pytest.raises(UsageError, match=message):
        code()
    after = reloaded("edited_helper", "edited")
    assert code(after.Mine).files != before.files


def test_a_class_of_before_a_reload_is_refused(edit: Callable) -> None:
    old = sys.modules["edited"].Mine
    edit("edited", "return super().__init__", "return 1")
    new = reloaded("edited").Mine
    assert code(new)
    with pytest.raises(UsageError, match="rate is not what the file says"):
        code(old)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("edited", "import torch", "# a comment\n\nimport torch"),
        ("edited", '"One update."', '"One update of all."'),
        ("edited", '"The class."', ""),
        ("edited_helper", "    return x / 2", "    return (\n        x\n        / 2\n    )"),
    ],
)
def test_comments_layout_and_docstrings_are_no_change(edit: Callable, name: str, old: str, new: str) -> None:
    before = code()
    edit(name, old, new)
    assert code() == before


def test_a_new_function_is_not_refused(edit: Callable) -> None:
    before = code()
    edit("edited_helper", "def halved", "def added():\n    return 1\n\ndef halved")
    assert code().files != before.files


def test_functions_of_elsewhere_are_not_compared(edit: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["edited_helper"], "halved", lambda x: x)
    exec("def other(x): return x", sys.modules["edited_helper"].__dict__)
    assert code()


def test_a_module_that_a_hook_rewrote_is_not_compared(
    edit: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["edited"], "__loader__", object())
    edit("edited", "2 * self.rate", "3 * self.rate")
    assert code()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("edited_helper", "FACTOR = 1", "FACTOR = 100"),
        ("edited", "FLAGS: tuple = (1, 2)", "FLAGS: tuple = (1, 3)"),
        ("edited", 'NAMES = {"a", "b", "c"}', 'NAMES = {"a", "b", "d"}'),
    ],
)
def test_a_stale_constant_has_another_key_than_the_new_one(
    edit: Callable, name: str, old: str, new: str
) -> None:
    before = code()
    edit(name, old, new)
    stale = code()
    fresh = code(reloaded("edited_helper", "edited").Mine)
    assert len({before.files["custom values"], stale.files["custom values"]}) == 2
    assert stale.files != fresh.files


def test_a_constant_that_was_set_from_outside_counts(edit: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    before = code()
    monkeypatch.setattr(sys.modules["edited_helper"], "FACTOR", 100)
    assert code() != before
    monkeypatch.setattr(sys.modules["edited_helper"], "FACTOR", object())
    assert code() != before
