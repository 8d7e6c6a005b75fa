"""A user's Python file that a recipe names: import, digests, and what is known of it without running it."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from qcompress.errors import UsageError
from qcompress.system.digests import digest_of
from qcompress.system.fingerprint import import_statements


def is_beside(file: Path, folder: Path) -> bool:
    """True for a file in or below a folder, unless it is one of an installed package."""
    below = file.relative_to(folder).parts if file.is_relative_to(folder) else ()
    return bool(below) and not {"site-packages", "dist-packages"} & {*below}


@contextmanager
def imports_beside(folder: Path) -> Iterator[Callable[[], list[Path]]]:
    """Import modules beside a file; yields a function that lists their files, and forgets them afterwards."""

    def beside() -> dict[str, Path]:
        files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
        return {
            name: Path(file).resolve()
            for name, file in files.items()
            if file and name not in before and is_beside(Path(file).resolve(), folder)
        }

    before, writes = set(sys.modules), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    try:
        yield lambda: sorted(set(beside().values()))
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = writes
        for name in beside():
            del sys.modules[name]


def executed(path: Path) -> ModuleType:
    """Run a file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"qcompress_user_{path.stem}", path)
    namespace = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(namespace)
    return namespace


def function_of(named: str, base: Path) -> Callable[..., Any]:
    """The function FILE:FUNCTION, with the file relative to `base`. Raises UsageError if it is none."""
    file, _, name = named.rpartition(":")
    path = (base / file).resolve()
    with imports_beside(path.parent):
        found = getattr(executed(path), name, None)
    if not callable(found):
        raise UsageError(f"{path} has no function {name}", fix=f"define `{name}`")
    return found


def problem_of(named: str, base: Path) -> str | None:
    """Reason why FILE:FUNCTION cannot be used, found without running the file; None without one."""
    file, _, name = named.rpartition(":")
    path = base / file
    if not path.is_file():
        return f"{file} does not exist (looked for {path.resolve()})"
    try:
        tree = ast.parse(path.read_bytes(), filename=file)
    except (SyntaxError, ValueError) as error:
        return f"{file} is not Python ({error})"
    return None if name in _defined(tree) else f"{file} defines no {name}"


def _defined(tree: ast.Module) -> set[str]:
    """Names that the top level of a file binds."""
    names = {
        alias.asname or alias.name.partition(".")[0]
        for node, lazy in import_statements(tree.body, lazy=False)
        if not lazy
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def files_of(named: str, base: Path) -> dict[str, str]:
    """Digests of FILE of FILE:FUNCTION and of the modules beside it that it imports, by relative path. The
    files are read, and not run.
    """
    first = (base / named.rpartition(":")[0]).resolve()
    folder, waiting, digests = first.parent, [first], {}
    while waiting:
        path = waiting.pop()
        name = path.relative_to(folder).as_posix()
        if name not in digests:
            digests[name] = digest_of(path)
            tree = ast.parse(path.read_bytes(), filename=name)
            waiting += [file for dotted in _imported(tree, path, folder) for file in _located(dotted, folder)]
    return dict(sorted(digests.items()))


def _imported(tree: ast.Module, path: Path, folder: Path) -> Iterator[str]:
    """Dotted names that a file imports, relative ones from its folder on."""
    above = path.relative_to(folder).parts[:-1]
    for node, _ in import_statements(tree.body, lazy=False):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            continue
        package = above[: len(above) - node.level + 1] if node.level else ()
        base = ".".join([*package, *([node.module] if node.module else [])])
        yield base
        yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names)


def _located(dotted: str, folder: Path) -> Iterator[Path]:
    """Files beside the user's that an import of a dotted name runs."""
    place = folder
    for part in filter(None, dotted.split(".")):
        place = place / part
        for file in (place.with_name(f"{part}.py"), place / "__init__.py"):
            if file.is_file() and is_beside(file, folder):
                yield file
