"""Values that no file shows, in the key of custom code: each kind of value, both directions."""

from __future__ import annotations

import abc
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import itertools
import logging
import operator
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import pydantic
import pytest
import rich.console
import torch
from torch import nn

from qcompress.errors import UsageError
from qcompress.schema.custom_code import CustomCode, code_of
from qcompress.schema.formats import Options


class Base:
    def step(self) -> object:
        return LIMIT


LIMIT = 1.0


@dataclasses.dataclass(slots=True)
class Slotted:
    factor: float


@dataclasses.dataclass(frozen=True)
class Plain:
    factor: float


class Kept:
    """Leaves its only value out of a copy."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __getstate__(self) -> dict[str, object]:
        return {}


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


Pair = collections.namedtuple("Pair", "first second")


def linear(value: float) -> nn.Module:
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, value)
    nn.init.zeros_(layer.bias)
    return layer


def buffered(value: float) -> nn.Module:
    module = nn.Sequential()
    module.register_buffer("table", torch.tensor([value], dtype=torch.bfloat16))
    return module


def typed(value: object) -> type:
    return type("Typed", (Base,), {"held": value})


def key(value: object) -> CustomCode:
    return code_of({"stepper mine": typed(value)})


VALUES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "slots": (lambda: Slotted(1.0), lambda: Slotted(8.0)),
    "dataclass": (lambda: Plain(1.0), lambda: Plain(8.0)),
    "own getstate": (lambda: Kept(1.0), lambda: Kept(8.0)),
    "range": (lambda: range(4), lambda: range(8)),
    "slice": (lambda: slice(4), lambda: slice(8)),
    "dtype": (lambda: torch.float32, lambda: torch.bfloat16),
    "numpy dtype": (lambda: np.dtype("f4"), lambda: np.dtype("f8")),
    "device": (lambda: torch.device("cpu"), lambda: torch.device("cuda", 1)),
    "size": (lambda: torch.Size([1, 2]), lambda: torch.Size([2, 1])),
    "path": (lambda: Path("a"), lambda: Path("b")),
    "decimal": (lambda: decimal.Decimal("1"), lambda: decimal.Decimal("8")),
    "date": (lambda: datetime.date(2026, 1, 1), lambda: datetime.date(2026, 1, 2)),
    "deque": (lambda: collections.deque([1]), lambda: collections.deque([8])),
    "defaultdict": (lambda: collections.defaultdict(int), lambda: collections.defaultdict(float)),
    "counter": (lambda: collections.Counter("a"), lambda: collections.Counter("aa")),
    "proxy": (lambda: MappingProxyType({"a": 1}), lambda: MappingProxyType({"a": 8})),
    "key of a dict": (lambda: {torch.relu: 1}, lambda: {torch.sigmoid: 1}),
    "named tuple": (lambda: Pair(1, 2), lambda: Pair(2, 1)),
    "list or tuple": (lambda: [1, 2], lambda: (1, 2)),
    "bytearray": (lambda: bytearray(b"a"), lambda: bytearray(b"b")),
    "pattern": (lambda: re.compile("a"), lambda: re.compile("b")),
    "flags of a pattern": (lambda: re.compile("a"), lambda: re.compile("a", re.IGNORECASE)),
    "enum": (lambda: Colour.RED, lambda: Colour.BLUE),
    "set of classes": (lambda: {nn.ReLU, nn.GELU}, lambda: {nn.ReLU, nn.SiLU}),
    "type of a tensor": (lambda: torch.ones(2), lambda: torch.ones(2, dtype=torch.float64)),
    "shape of an array": (lambda: np.ones((1, 2)), lambda: np.ones((2, 1))),
    "array of objects": (lambda: np.array([None, 1]), lambda: np.array([None, 8])),
    "module": (lambda: linear(1.0), lambda: linear(8.0)),
    "buffer": (lambda: buffered(1.0), lambda: buffered(8.0)),
    "modules in order": (
        lambda: nn.Sequential(nn.ReLU(), nn.GELU()),
        lambda: nn.Sequential(nn.GELU(), nn.ReLU()),
    ),
    "option of a module": (lambda: nn.LeakyReLU(0.1), lambda: nn.LeakyReLU(0.2)),
    "builtin function": (lambda: torch.relu, lambda: torch.sigmoid),
    "Python function": (lambda: nn.functional.gelu, lambda: nn.functional.silu),
    "made function": (lambda: nn.functional.max_pool1d, lambda: nn.functional.max_pool2d),
    "class": (lambda: nn.ReLU, lambda: nn.GELU),
    "ufunc": (lambda: np.sin, lambda: np.cos),
    "method": (lambda: torch.ones(1).add, lambda: torch.ones(1).sub),
    "static": (lambda: staticmethod(torch.relu), lambda: staticmethod(torch.sigmoid)),
    "partial": (
        lambda: functools.partial(torch.clamp, min=1),
        lambda: functools.partial(torch.clamp, min=8),
    ),
    "getter": (lambda: operator.attrgetter("a"), lambda: operator.attrgetter("b")),
    "imported module": (lambda: nn.functional, lambda: nn.init),
    "iterator": (lambda: itertools.count(1), lambda: itertools.count(8)),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.filterwarnings("ignore:.*itertools.*:DeprecationWarning")
def test_a_value_of_any_kind_counts_by_its_content(name: str) -> None:
    one, other = VALUES[name]
    assert key(one()) != key(other())
    assert key(one()) == key(one())


@pytest.mark.parametrize("name", ["slots", "range", "dtype", "builtin function", "class", "ufunc", "module"])
def test_values_of_closures_count_too(name: str) -> None:
    def closed(value: object) -> CustomCode:
        class Closed:
            def step(self) -> object:
                return value

        return code_of({"mine": Closed})

    one, other = VALUES[name]
    assert closed(one()) != closed(other())
    assert closed(one()) == closed(one())


@pytest.mark.parametrize(
    "value", [(n for n in ()), [(n for n in ())], {"a": {"b": memoryview(b"")}}], ids=["bare", "list", "deep"]
)
def test_a_value_without_a_readable_content_is_an_error_that_names_the_attribute(value: object) -> None:
    with pytest.raises(UsageError, match=r"Typed\.held.*cannot be part of the cache key\n  fix: make it"):
        key(value)


@pytest.mark.parametrize("make", [threading.Lock, threading.RLock, threading.local, lambda: open(os.devnull)])  # noqa: SIM115
def test_locks_and_open_files_count_by_their_class(make: Callable[[], Any]) -> None:
    one, other = make(), make()
    assert key(one) == key(other) != key(1)
    for held in (one, other):
        getattr(held, "close", lambda: None)()


def made_of(factor: float) -> type:
    class Made:
        rate = factor

        def step(self) -> float:
            return factor

    return Made


def test_two_classes_of_one_factory_are_told_apart() -> None:
    def of(a: float, b: float) -> CustomCode:
        return code_of({"quantizer a": made_of(a), "quantizer b": made_of(b)})

    assert of(1.0, 1.0) == of(1.0, 1.0)
    assert len({of(*pair).files["custom values"] for pair in ((1, 1), (8, 1), (1, 8), (8, 8))}) == 4


def test_two_functions_and_two_bases_of_one_name_are_told_apart() -> None:
    def scaled(factor: float) -> Callable[[], float]:
        return lambda: factor

    def of(a: float, b: float) -> CustomCode:
        return key([scaled(a), scaled(b)])

    def derived(a: float, b: float) -> CustomCode:
        inner = type("Made", (made_of(a),), {})
        return code_of({"mine": type("Made", (inner, made_of(b)), {})})

    for make in (of, derived):
        assert len({make(*pair).files["custom values"] for pair in ((1, 1), (8, 1), (1, 8), (8, 8))}) == 4


def test_one_class_under_two_names_is_not_two_classes() -> None:
    same, first, second = made_of(1.0), made_of(1.0), made_of(8.0)
    assert code_of({"a": same, "b": same}) != code_of({"a": first, "b": second})
    assert code_of({"a": first, "b": second}) != code_of({"a": second, "b": first})


CELL = """
import torch
from torch import nn
A, B = (type(name, (), {{"name": name}}) for name in "AB")
f = {function}
LEVELS = {levels}
class Mine({bases}):
    def step(self, x):
        return f(x) * len(LEVELS)
"""


@pytest.mark.parametrize(
    "change",
    [{"bases": "nn.GELU"}, {"bases": "A, B"}, {"function": "torch.sigmoid"}, {"levels": "range(8)"}],
    ids=str,
)
def test_bases_and_globals_of_a_notebook_count(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    def of(**parts: str) -> CustomCode:
        module = ModuleType("__main__")
        parts = {"function": "torch.relu", "levels": "range(4)", "bases": "nn.ReLU", **parts}
        exec(compile(CELL.format(**parts), "<cell>", "exec"), module.__dict__)
        monkeypatch.setitem(sys.modules, "__main__", module)
        return code_of({"stepper mine": module.Mine})

    assert of(**change) != of() == of()
    assert of(bases="A, B") != of(bases="B, A")


LOG, CONSOLE, GENERATOR = logging.getLogger("custom"), rich.console.Console(), torch.Generator()


class Section(Options):
    factor: float = 1.0

    @pydantic.field_validator("factor")
    @classmethod
    def _positive(cls, value: float) -> float:
        return abs(value)


class Decorated(abc.ABC):  # noqa: B024
    Options = Section
    lock = threading.Lock()

    @functools.cached_property
    def first(self) -> int:
        return 1

    @functools.lru_cache  # noqa: B019
    def second(self) -> int:
        return 2

    @functools.singledispatchmethod
    def third(self, value: object) -> object:
        return value

    @torch.inference_mode()
    def step(self) -> object:
        LOG.info("step")
        CONSOLE.print(threading.current_thread())
        return plain_call(GENERATOR)


@torch.no_grad()
def plain_call(value: object) -> object:
    return value


def test_tools_that_classes_commonly_hold_have_a_content() -> None:
    assert code_of({"mine": Decorated}) == code_of({"mine": Decorated})


SCRIPT = """
import json, torch, numpy, pathlib, re
from qcompress.schema.custom_code import code_of
held = [{torch.relu, numpy.sin, torch.nn.ReLU, 'a', 'b', 3, ('x', 1)},
        torch.nn.Linear(1, 1, bias=False).half(),
        frozenset({'c', 'd', range(3), pathlib.PurePosixPath('y')}), re.compile('a'), object(), {'k': {1.5}}]
torch.nn.init.ones_(held[1].weight)
print(json.dumps(code_of({'mine': type('Mine', (), {'held': held})}).files, sort_keys=True))
"""


def test_another_process_finds_the_same_key() -> None:
    texts = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True,
            text=True, check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(texts) == 1 and "custom values" in texts.pop()
