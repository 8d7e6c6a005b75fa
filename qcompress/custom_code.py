"""The code that a user's class can run, for the key of the stage that runs it. No torch.

Covered, from the class on:
  * the module of every class in its MRO, and of every class and function that they refer to;
  * what those files import, inside functions too, relative imports as well. A file counts by its syntax tree
    (`codekey.py`), so a comment or a docstring re-runs nothing;
  * values that no file shows: attributes of classes, closures, defaults, and module globals that a function
    reads, as far as they are numbers, strings, or containers of these;
  * functions without a file (a notebook's cell) by their byte code;
  * arrays and tensors among these values; an object of another type by its class alone;
  * modules of this package, which the caller walks as it walks a stage's own;
  * installed packages (site-packages) by their version. The standard library does not count.

Imports by a computed name are invisible, unless the module holds something of what they return. A file that
was edited after Python had imported it counts as it is on the disk now.
"""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import importlib
import importlib.machinery
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from qcompress.codekey import PACKAGE, import_statements, is_module, tree_digest

PLAIN = (type(None), bool, int, float, complex, str, bytes)

INSTALLED = {"site-packages", "dist-packages"}
"""Names of folders whose content counts by version."""

TOOLS = {"torch", "transformers", "numpy", "accelerate", "tokenizers", "pydantic", "scipy", "onnx"}
"""Never walked, wherever they are installed; their versions are in the stages' keys."""


@dataclass
class CustomCode:
    """What a set of classes can run."""

    files: dict[str, str] = field(default_factory=dict)
    """Digest of each of the user's modules, by `custom <module>`, and of what is in no file."""
    modules: set[str] = field(default_factory=set)
    """Modules of this package."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of installed packages; `absent` for an import that would fail."""


def code_of(classes: Mapping[str, type]) -> CustomCode:
    """The code of these classes; the names are only labels."""
    importlib.invalidate_caches()
    walk = _Walk()
    for name, kind in sorted(classes.items()):
        walk.value(kind, name)
    code = CustomCode(walk.files, walk.package, walk.versions)
    if walk.state:
        state = "\n".join(f"{name} = {text}" for name, text in sorted(walk.state.items()))
        code.files["custom values"] = hashlib.sha256(state.encode("utf-8", "surrogatepass")).hexdigest()
    return code


class _Walk:
    """From one value to the next, each once."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.package: set[str] = set()
        self.versions: dict[str, str] = {}
        self.state: dict[str, str] = {}
        self._modules: dict[str, bool] = {}
        self._seen: dict[int, object] = {}  # holds them, so that no id is used twice

    # Values ---------------------------------------------------------------------------------------

    def value(self, value: object, name: str) -> None:
        """Anything that a class or a function holds or refers to."""
        if isinstance(value, PLAIN):
            self.state[name] = repr(value)
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, ModuleType):
            self.module(value.__name__)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, FunctionType):
            self._function(value, name)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self.value(item, f"{name}[{key!r}]" if isinstance(key, PLAIN) else f"{name}[]")
        elif isinstance(value, tuple | list):
            for index, item in enumerate(value):
                self.value(item, f"{name}[{index}]")
        elif isinstance(value, set | frozenset):
            self.state[name] = repr(sorted(map(repr, value)))
        elif type(value).__module__.partition(".")[0] in ("torch", "numpy") and hasattr(value, "tolist"):
            self.state[name] = repr(value.tolist())
        else:
            self._instance(value, name)

    def _instance(self, value: object, name: str) -> None:
        for inner in _wrapped(value):
            self.value(inner, name)
        if self._class(type(value)):
            for key, item in sorted(getattr(value, "__dict__", {}).items()):
                self.value(item, f"{name}.{key}")

    def _class(self, kind: type) -> bool:
        """Walk a class and its bases; whether it is the user's own."""
        own = {base: self.module(base.__module__) for base in kind.__mro__}
        for base, is_own in own.items():
            if not is_own or (base is not kind and id(base) in self._seen):
                continue
            self._seen[id(base)] = base
            for key, item in vars(base).items():
                is_dunder = key.startswith("__") and key.endswith("__")
                if not is_dunder or isinstance(item, FunctionType):
                    self.value(item, f"{base.__qualname__}.{key}")
        return own[kind]

    def _function(self, function: FunctionType, name: str) -> None:
        if not self.module(function.__module__ or ""):
            return
        codes = list(_codes(function.__code__))
        if not _is_file(function.__code__.co_filename):
            self.state[name] = "; ".join(_byte_code(code) for code in codes)
            for code in codes:
                self._imports_of(code)
        for index, cell in enumerate(function.__closure__ or ()):
            self.value(_content(cell), f"{name}<{index}>")
        for part in (function.__defaults__, function.__kwdefaults__):
            self.value(part, f"{name}()")
        for wanted in sorted({name for code in codes for name in code.co_names}):
            if wanted in function.__globals__:
                self.value(function.__globals__[wanted], f"{function.__module__}.{wanted}")

    def _imports_of(self, code: CodeType) -> None:
        """Imports inside a function that is in no file."""
        for instruction in dis.get_instructions(code):
            if instruction.opname == "IMPORT_NAME":
                self.module(instruction.argval)

    # Modules --------------------------------------------------------------------------------------

    def module(self, name: str) -> bool:
        """Walk a module with the packages above it; whether it is the user's own."""
        if name in self._modules:
            return self._modules[name]
        self._modules[name] = False
        if name.partition(".")[0] == PACKAGE.name:
            if name != PACKAGE.name:
                self.package.add(name)
            return False
        if not name or name.partition(".")[0] in TOOLS:
            return False
        loaded, spec = sys.modules.get(name), _spec(name)
        if loaded is None and spec is None:
            self.versions[name] = "absent"
            return False
        real = spec.name if spec is not None else name  # of `python -m package.module`
        if "." in real:
            self.module(real.rpartition(".")[0])
        if spec is not None:
            file = Path(spec.origin) if spec.has_location and spec.origin else None
            package = real if spec.submodule_search_locations is not None else real.rpartition(".")[0]
        else:
            file = Path(loaded.__file__) if getattr(loaded, "__file__", None) else None
            package = getattr(loaded, "__package__", None) or ""
        if file is None:
            # a notebook or an interactive session; else built in, frozen, or a folder without __init__
            self._modules[name] = spec is None and name not in sys.builtin_module_names
            return self._modules[name]
        if _is_standard(file):
            return False
        if INSTALLED & set(file.parts):
            distributions = _distributions().get(name.partition(".")[0], [])
            self.versions |= {one: metadata.version(one) for one in distributions}
            if distributions:
                return False
        self._modules[name] = True
        if file.is_file():  # else read from stdin, out of an archive, or deleted since: its functions count
            self._file(name, package, file)
        return True

    def _file(self, name: str, package: str, file: Path) -> None:
        label = f"custom {file.stem if name == '__main__' else name}"
        content = file.read_bytes()
        try:
            tree = ast.parse(content, filename=str(file)) if file.suffix == ".py" else None
        except (SyntaxError, ValueError):  # of another Python, imported only where it fits
            tree = None
        if tree is None:
            self.files[label] = hashlib.sha256(content).hexdigest()
            return
        self.files[label] = tree_digest(tree)
        for node, _ in import_statements(tree.body, lazy=False):
            for imported in _imported(node, package):
                self.module(imported)


def _imported(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[str]:
    """The modules that one import statement in `package` names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        above = package.split(".")[: len(package.split(".")) - (node.level - 1)]
        base = ".".join([*above, base] if base else above)
    yield base
    for alias in node.names:
        name = f"{base}.{alias.name}"
        ours = base.partition(".")[0] == PACKAGE.name
        if is_module(name) if ours else _spec(name) is not None:
            yield name


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Where a module is; nothing is imported, not even the packages above it. None: nowhere, or a module
    that was loaded without a specification (a script, a notebook).
    """
    if name in sys.modules:
        return getattr(sys.modules[name], "__spec__", None)
    parent, path = name.rpartition(".")[0], None
    if parent:
        above = _spec(parent)
        if above is None or above.submodule_search_locations is None:
            return None
        path = list(above.submodule_search_locations)
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path) if hasattr(finder, "find_spec") else None
        if spec is not None:
            return spec
    return None


def _is_standard(file: Path) -> bool:
    """Whether a file is of the standard library."""
    paths = sysconfig.get_paths()
    libraries = {Path(paths[key]).resolve() for key in ("stdlib", "platstdlib")}
    standard = any(file.resolve().is_relative_to(library) for library in libraries)
    return standard and not INSTALLED & set(file.parts)


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


# Functions ----------------------------------------------------------------------------------------


def _wrapped(value: Any) -> Iterator[object]:
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


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _byte_code(code: CodeType) -> str:
    constants = [
        sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant
        for constant in code.co_consts
        if not isinstance(constant, CodeType)
    ]
    parts = (code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars)
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _is_file(name: str) -> bool:
    return not name.startswith("<") and Path(name).is_file()
