"""Fingerprints of stages: digests of the code that a stage can run, and of its other inputs. No torch.

`code_digest` lists the files of this package that a stage can run, with their digests, without importing
them. `stage_key` combines them with values, versions and inputs into the name of a cache entry, and
`differences` words the differences between two sets of inputs.

The code of a module counts as
  * its syntax tree, so that layout, comments and line numbers do not matter, and neither do bare strings:
    docstrings and the help texts of fields are for readers, not for a stage;
  * the modules it imports, also inside functions, because heavy packages are imported where they are used;
  * the `__init__` of each package above it, which Python runs first. Only the imports that happen then are
    followed: a lazy import inside one of their functions counts once a name of that package is imported.
    Otherwise the public API in `qcompress/__init__.py` would tie every stage to every file.
  * but not code under `if TYPE_CHECKING:`, which never runs.

Imports by a computed name (`importlib`) are invisible; this package has none.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompress.errors import ContractError

PACKAGE = Path(__file__).parents[1]

SECTIONS = ("code", "values", "versions", "inputs", "data")
"""Order in which `differences` lists changes: the likeliest cause first."""

_ABSENT = object()


# Code ---------------------------------------------------------------------------------------------


def code_digest(
    roots: Sequence[str],
    leave_out: Collection[str] = (),
    unused: Collection[tuple[str, str]] = (),
    *,
    package: Path = PACKAGE,
) -> dict[str, str]:
    """Digest of every file that `roots` can run, by path inside the package (`quant/lsq.py`).

    `leave_out` names modules; modules inside a package named here are still followed. `unused` names imports,
    as (importer, imported), that are not followed, such as those of the methods that a recipe does not
    select; imports of those modules by others still count. `package` is the folder to walk.
    """
    modules = _modules_of(package)
    for module in [*roots, *leave_out, *(module for edge in unused for module in edge)]:
        if module not in modules:
            raise ContractError(
                f"code_digest was asked about {module}, and {package} holds no such module",
                fix="correct the module's name where the stage lists its code",
            )
    digests: dict[str, str] = {}
    walked: dict[str, bool] = {}  # module -> are the imports inside its functions followed as well?
    queue = [(root, True, "the stage") for root in roots]
    while queue:
        module, whole, importer = queue.pop()
        if module in leave_out or walked.get(module) in (True, whole):
            continue
        walked[module] = whole
        queue.extend((parent, False, module) for parent in _parents(module))
        path = modules.get(module)
        if path is None:
            raise ContractError(
                f"{importer} imports {module}, and {package} holds no such module",
                fix=f"add {module} or drop the import",
            )
        if path.is_dir():  # a package without __init__ has no code of its own
            continue
        code = _read(path.read_bytes(), module, path.name == "__init__.py")
        digests[path.relative_to(package).as_posix()] = code.digest
        for imported in code.imports:
            if whole or not imported.lazy:
                names = _imported(modules, imported)
                queue.extend((name, full, module) for name, full in names if (module, name) not in unused)
    return dict(sorted(digests.items()))


@dataclass(frozen=True)
class _Import:
    """`from base import name`, or `import base` if name is None."""

    base: str
    name: str | None
    lazy: bool
    """Inside a function: executed when the function is called, not when the module is imported."""
    binds_root: bool = False
    """`import a.b.c` without `as` gives access to `a` and `a.b` as well."""


@dataclass(frozen=True)
class _Code:
    digest: str
    imports: tuple[_Import, ...]


@functools.lru_cache(maxsize=1024)
def _read(source: bytes, module: str, is_package: bool) -> _Code:
    """Parse one file. Cached by content: the stages of a run share most of their files."""
    tree = ast.parse(source, filename=module)
    digest = tree_digest(tree)
    here = module if is_package else module.rpartition(".")[0]
    imports = [
        imported
        for node, lazy in import_statements(tree.body, lazy=False)
        for imported in _imports(node, here, lazy)
    ]
    return _Code(digest, tuple(dict.fromkeys(imports)))


def tree_digest(tree: ast.AST) -> str:
    """Digest of a syntax tree without positions and bare strings."""
    return hashlib.sha256(_tree_text(tree).encode("utf-8", "surrogatepass")).hexdigest()


def is_module(name: str) -> bool:
    """True if this package has a module of this name."""
    root, _, rest = name.partition(".")
    place = PACKAGE.joinpath(*rest.split(".")) if rest else PACKAGE
    return root == PACKAGE.name and (place.is_dir() or place.with_name(f"{place.name}.py").is_file())


def _tree_text(node: object) -> str:
    """Text of a syntax tree without positions and bare strings.

    Not `ast.dump`: it writes empty fields on some versions of Python and omits them on others.
    """
    if isinstance(node, ast.AST):
        fields = []
        for name in node._fields:
            child = getattr(node, name, None)
            if child is not None and child != [] and name not in ("ctx", "kind", "type_comment"):
                fields.append(f"{name}={_tree_text(child)}")
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join([_tree_text(item) for item in node if not _is_bare_string(item)])}]"
    return repr(node)


def _is_bare_string(node: object) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def import_statements(
    body: list[ast.stmt], *, lazy: bool
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements below `body`, each with True if it is inside a function."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, lazy
            continue
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not (isinstance(node, ast.If) and _is_type_checking(node.test)):
            yield from import_statements(getattr(node, "body", []), lazy=inside)
        for field in ("orelse", "finalbody"):
            yield from import_statements(getattr(node, field, []), lazy=inside)
        for block in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
            yield from import_statements(block.body, lazy=inside)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def _imports(node: ast.Import | ast.ImportFrom, here: str, lazy: bool) -> Iterator[_Import]:
    """Imports of this package by one statement in package `here`."""
    root = here.partition(".")[0]
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.partition(".")[0] == root:
                yield _Import(alias.name, None, lazy, binds_root=alias.asname is None)
        return
    base = node.module or ""
    if node.level:
        above = here.split(".")[: len(here.split(".")) - (node.level - 1)]
        base = ".".join([*above, base] if base else above)
    if base.partition(".")[0] == root:
        for alias in node.names:
            yield _Import(base, alias.name, lazy)


def _imported(modules: Mapping[str, Path], imported: _Import) -> Iterator[tuple[str, bool]]:
    """Modules that an import needs, each with True if imports inside its functions count."""
    if imported.name is not None and f"{imported.base}.{imported.name}" in modules:
        yield f"{imported.base}.{imported.name}", True
    else:
        yield imported.base, True
        if imported.binds_root:
            yield from ((parent, True) for parent in _parents(imported.base))


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _modules_of(package: Path) -> dict[str, Path]:
    """File of each module of a package by its full name; for a folder without `__init__`, the folder."""
    modules: dict[str, Path] = {}
    for folder, _, files in os.walk(package, followlinks=True):
        place = Path(folder)
        parts = (package.name, *place.relative_to(package).parts)
        name = ".".join(parts)
        sources = [file for file in files if file.endswith(".py")]
        modules |= {f"{name}.{file[:-3]}": place / file for file in sources}
        if "__init__.py" in sources:
            modules[name] = place / "__init__.py"
        else:
            modules.setdefault(name, place)
    return modules


# Keys ---------------------------------------------------------------------------------------------


def stage_key(stage: str, parts: Mapping[str, object]) -> str:
    """Name of a stage's cache entry: sha256 of all `parts` except "recipe".

    `recipe` only selects the entry for comparison when explaining. The caller must keep absolute paths, host
    names and times out of `parts`: with one of these no entry is ever found again.
    """
    counted = {name: part for name, part in plain(parts).items() if name != "recipe"}
    return hashlib.sha256(_canonical({"stage": stage, "parts": counted}).encode()).hexdigest()


def plain(parts: Mapping[str, object]) -> dict[str, Any]:
    """Copy of `parts` that consists of dicts, lists, strings, finite numbers, booleans and None only."""
    copy = _plain(parts, "parts")
    assert isinstance(copy, dict)
    return copy


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """List the changes between the parts of two stages, such as `format.weights changed (8 -> 4)`."""
    sections = [*SECTIONS, *sorted((old.keys() | new.keys()) - {*SECTIONS, "recipe"})]
    changes: list[str] = []
    for section in sections:
        before, after = old.get(section, _ABSENT), new.get(section, _ABSENT)
        if isinstance(before, dict) and isinstance(after, dict):
            prefix = "" if section == "values" else f"{section}: "
            changes.extend(
                prefix + change for change in _changes(before, after, "", deep=section == "values")
            )
        else:
            changes.extend(_changes({section: before}, {section: after}, "", deep=False))
    return changes


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], above: str, *, deep: bool) -> Iterator[str]:
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if deep and isinstance(before, dict) and isinstance(after, dict):
            yield from _changes(before, after, f"{above}{key}.", deep=True)
        elif before is _ABSENT or after is _ABSENT:
            if before is not after:
                yield f"{above}{key} {'added' if before is _ABSENT else 'removed'}"
        elif _canonical(before) != _canonical(after):
            texts = [side if isinstance(side, str) else _canonical(side) for side in (before, after)]
            # Digests and long lists do not help a reader.
            detail = f" ({texts[0]} -> {texts[1]})" if max(map(len, texts)) <= 40 else ""
            yield f"{above}{key} changed{detail}"


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: object, where: str) -> object:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ContractError(
                    f"{where}: key {key!r} is of type {type(key).__name__}, and JSON knows only strings",
                    fix="spell the key as a string before it goes into a stage's key",
                )
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    shown = f"{value!r}" if isinstance(value, float) else f"a value of type {type(value).__name__}"
    raise ContractError(
        f"{where}: {shown} has no exact JSON form, so no stable key can be made of it",
        fix="turn it into a string, a finite number, a list or a mapping of these",
    )
