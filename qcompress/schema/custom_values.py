"""Content of Python values for the key of custom code: functions, byte code, arrays, and objects. No torch.

An object of a library class counts by the parts that `__reduce_ex__` returns, from which a copy would be
made. Nothing is serialized or deserialized.
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
"""Members of a class that follow from its bases and its `__slots__`."""

STATELESS = (
    type(threading.Lock()),
    type(threading.RLock()),
    threading.local,
    weakref.ref,
    io.IOBase,
    ContextVar,
)
"""Objects of the running process; they count by class."""

FAILURES = (TypeError, ValueError, AttributeError, RuntimeError, LookupError, OSError)


def module_of(value: Any) -> str:
    """Module name of a class or a function; empty without one, or if `__module__` is a descriptor."""
    name = getattr(value, "__module__", None)
    return name if isinstance(name, str) else ""


def qualified(value: Any) -> str:
    """`module.qualname` of a class or a function, with the name if it differs."""
    module = module_of(value)
    name = getattr(value, "__name__", "")
    long = getattr(value, "__qualname__", name)
    return f"{module}.{long}" if long.endswith(name) else f"{module}.{long} ({name})"


def reduced(value: object) -> str | list[object] | None:
    """Parts from which a copy of an object would be made; a name for a global object; None if it has no
    parts.
    """
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
    """Attributes of an object in `__dict__` and `__slots__`, by name."""
    held = dict(getattr(value, "__dict__", {}))
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            mangled = f"_{base.__name__.lstrip('_')}{slot}" if slot.startswith("__") else slot
            if slot not in ("__dict__", "__weakref__") and hasattr(value, mangled):
                held[mangled] = getattr(value, mangled)
    return dict(sorted(held.items()))


def is_array(value: object) -> bool:
    """True for a tensor, or an array or number of NumPy."""
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
    """Functions inside static methods, properties, partials and decorators."""
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
    """Content of a closure cell; None if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def codes_of(code: CodeType) -> Iterator[CodeType]:
    """Code of a function and of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_of(constant)


def byte_code(code: CodeType) -> str:
    """Digest of a code object: instructions, constants and names."""
    constants = [
        sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant
        for constant in code.co_consts
        if not isinstance(constant, CodeType)
    ]
    parts = (code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars)
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def is_file(name: str) -> bool:
    return not name.startswith("<") and Path(name).is_file()
