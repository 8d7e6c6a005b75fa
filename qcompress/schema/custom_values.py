"""Parts of Python values for the key of custom code: functions, byte code, arrays, and objects. No torch.

An object of a stock class counts by what `__reduce_ex__` says of it, which is what a copy would be made of.
Nothing is written or read back.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import io
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import CellType, CodeType, MethodType
from typing import Any

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))

DESCRIPTORS = (
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
)
"""Parts of a class that are made of its bases and its `__slots__`."""

STATELESS = (
    type(threading.Lock()),
    type(threading.RLock()),
    threading.local,
    weakref.ref,
    io.IOBase,
    ContextVar,
)
"""Objects of the running process; they count by their class."""

FAILURES = (TypeError, ValueError, AttributeError, RuntimeError, LookupError, OSError)


def module_of(value: Any) -> str:
    """Name of the module of a class or a function; empty where it has none, or makes a descriptor of it."""
    name = getattr(value, "__module__", None)
    return name if isinstance(name, str) else ""


def qualified(value: Any) -> str:
    """`module.qualname` of a class or a function; the name as well where it differs."""
    module = module_of(value)
    name = getattr(value, "__name__", "")
    long = getattr(value, "__qualname__", name)
    return f"{module}.{long}" if long.endswith(name) else f"{module}.{long} ({name})"


def reduced(value: object) -> str | list[object] | None:
    """The parts that a copy of an object is made of; a name for a global one; None where it has none."""
    reducer = copyreg.dispatch_table.get(type(value))
    try:
        parts = reducer(value) if reducer is not None else value.__reduce_ex__(4)
        if isinstance(parts, str):
            return parts
        items = [None if part is None else list(part) for part in parts[3:5]]
    except FAILURES:
        return None
    return [*parts[:3], *items]


def attributes(value: object) -> dict[str, object]:
    """What an object holds in `__dict__` and `__slots__`, by name."""
    held = dict(getattr(value, "__dict__", {}))
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            mangled = f"_{base.__name__.lstrip('_')}{slot}" if slot.startswith("__") else slot
            if slot not in ("__dict__", "__weakref__") and hasattr(value, mangled):
                held[mangled] = getattr(value, mangled)
    return dict(sorted(held.items()))


def is_array(value: object) -> bool:
    """Whether a value is a tensor or an array (or a number) of NumPy."""
    return type(value).__module__.partition(".")[0] in ("torch", "numpy") and hasattr(value, "tolist")


def array_text(value: Any) -> str:
    """Type, shape and digest of the elements of a tensor or an array."""
    label = f"{type(value).__qualname__} {value.dtype} {list(value.shape)}"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        label += f" {value.requires_grad}"
        if value.device.type == "meta":
            return label
        if value.layout is torch.strided and not value.is_quantized:
            flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            return f"{label} {_digest(flat.view(torch.uint8).numpy().tobytes())}"
        value = value.to_dense() if not value.is_quantized else value.dequantize()
    elif not value.dtype.hasobject:
        return f"{label} {_digest(value.tobytes())}"
    return f"{label} {value.tolist()!r}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wrapped(value: Any) -> Iterator[object]:
    """The functions inside static methods, properties, partials and decorators."""
    if isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    if isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    if isinstance(value, property):
        yield from (value.fget, value.fset)
    for attribute in ("__func__", "__wrapped__", "func"):
        inner = vars(value).get(attribute) if hasattr(value, "__dict__") else None
        inner = getattr(value, attribute, None) if isinstance(value, staticmethod | classmethod) else inner
        if inner is not None:
            yield inner


def content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def codes_of(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_of(constant)


def byte_code(code: CodeType) -> str:
    constants = [
        sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant
        for constant in code.co_consts
        if not isinstance(constant, CodeType)
    ]
    parts = (code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars)
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def is_file(name: str) -> bool:
    return not name.startswith("<") and Path(name).is_file()
