"""Loaded modules against their files: functions and constants that were edited after the import. No torch.

A function is of the file if the file's compiled code has one of its name with the same instructions, so that
decorators, reloads, comments and the docstrings of functions pass. Functions that other code made
(dataclasses, notebooks) have another file name and are not compared.
A module that an import hook rewrites (pytest's assertions, type checkers at run time) is not compared either.
"""

from __future__ import annotations

import ast
import dis
from collections.abc import Iterator, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

from qcompress.schema.custom_values import PLAIN, codes_of, wrapped

Codes = set[tuple[str, str]]
"""Name and instructions of each function."""

CONTAINERS = (tuple, list, dict, set)


def compiled(module: ModuleType | None, content: bytes, file: Path) -> Codes | None:
    """Every code object of a file; None where the module was loaded in another way than from this text."""
    if module is None or type(getattr(module, "__loader__", None)) is not SourceFileLoader:
        return None
    try:
        code = compile(content, str(file), "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    return {(part.co_name, instructions(part)) for part in codes_of(code)}


def instructions(code: CodeType) -> str:
    """A function's instructions with the values that they load: no docstring, no lines, no positions."""
    spelled = [repr((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_varnames))]
    for step in dis.get_instructions(code):
        if step.opname == "EXTENDED_ARG":
            continue
        value = step.argval
        if isinstance(value, CodeType):
            value = instructions(value)
        elif isinstance(value, frozenset):
            value = sorted(map(repr, value))
        elif step.arg is not None and step.opcode in dis.hasconst:
            value = (type(value).__name__, repr(value))
        spelled.append(f"{step.opname} {value!r}")
    return "\n".join(spelled)


def functions_of(module: ModuleType) -> Iterator[FunctionType]:
    """The functions of a module and of its classes, without those that it imports."""
    queue, seen = [*vars(module).values()], set()
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, type):
            queue += vars(value).values() if value.__module__ == module.__name__ else ()
        elif isinstance(value, FunctionType):
            yield value
            queue += wrapped(value)
        elif isinstance(value, staticmethod | classmethod | property):
            queue += wrapped(value)


def changed(functions: Iterator[FunctionType], codes: Codes, file: Path) -> str | None:
    """Name of the first function that was read from the file and is not in it now."""
    for function in functions:
        code = function.__code__
        if Path(code.co_filename) == file and (code.co_name, instructions(code)) not in codes:
            return function.__qualname__
    return None


def changed_constants(module: ModuleType, tree: ast.Module) -> Mapping[str, object]:
    """Values of a module's names that the file sets to another literal, or sets since the import."""
    written: dict[str, object] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        try:
            literal = ast.literal_eval(node.value) if isinstance(node, ast.Assign | ast.AnnAssign) else None
        except (ValueError, TypeError):
            literal = None
        for name in names:
            written.pop(name, None)
            if literal is not None and isinstance(node, ast.Assign | ast.AnnAssign):
                written[name] = literal
    held = {name: vars(module)[name] for name in written if name in vars(module)}
    return {
        name: value if type(value) in (*PLAIN, *CONTAINERS) else type(value)
        for name, value in held.items()
        if type(value) is not type(written[name]) or value != written[name]
    }
