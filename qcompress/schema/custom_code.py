"""Digests of the code that a custom class can run, for the key of the stage that runs it. No torch.

Covered, from the class on:
  * the module of every class in its MRO, and of every class and function that they refer to;
  * modules that those files import, also inside functions and by relative imports. A file counts by its
    syntax tree (`fingerprint.py`), so a comment or a docstring re-runs nothing;
  * values outside of files: attributes of classes, closures, defaults, and module globals that a function
    reads. Numbers, strings, containers, arrays and tensors count by content, library classes and functions by
    name, other objects by the content of a copy (`custom_values.py`). An object without readable content is
    an error;
  * the order of a class's bases;
  * functions without a file (a notebook's cell) by their byte code;
  * modules of this package, which the caller walks as it walks a stage's own;
  * installed packages (site-packages) by their version. The standard library does not count.

Imports by a computed name are invisible, unless the module holds an object from the imported one. A file
edited after its import is refused if a function differs from the loaded one; a differing constant counts with
the loaded value (`custom_loaded.py`).
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
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType

from qcompress.errors import UsageError
from qcompress.schema.custom_loaded import Codes, changed, changed_constants, compiled, functions_of
from qcompress.schema.custom_values import (
    DESCRIPTORS,
    PLAIN,
    STATELESS,
    array_text,
    attributes,
    byte_code,
    codes_of,
    content,
    is_array,
    is_file,
    module_of,
    qualified,
    reduced,
    wrapped,
)
from qcompress.system.fingerprint import PACKAGE, import_statements, is_module, tree_digest

MAPPINGS = (dict, OrderedDict, MappingProxyType)

WRAPPERS = (staticmethod, classmethod, property, functools.partial, MethodType)
"""Objects without content besides the functions and values that they wrap."""

TRANSPARENT = {"builtins", "collections", "functools", "types"}
"""Modules whose classes contain the user's values, each of which must be in the key."""

PARTS = ("made by", "from", "state", "items", "pairs")
"""Names of the parts returned by `__reduce_ex__`."""

INSTALLED = {"site-packages", "dist-packages"}
"""Folders whose content counts by version."""

TOOLS = {"torch", "transformers", "numpy", "accelerate", "tokenizers", "pydantic", "scipy", "onnx"}
"""Packages that are never walked, wherever they are installed; their versions are in the stages' keys."""


@dataclass
class CustomCode:
    """Code that a set of classes can run."""

    files: dict[str, str] = field(default_factory=dict)
    """Digest of each of the user's modules, by `custom <module>`, and of values outside of files."""
    modules: set[str] = field(default_factory=set)
    """Modules of this package."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of installed packages; `absent` for an import that would fail."""


def code_of(classes: Mapping[str, type]) -> CustomCode:
    """Collect the code of these classes; the names are labels only."""
    importlib.invalidate_caches()
    walk = _Walk()
    for name, kind in sorted(classes.items()):
        walk.value(kind, name)
    code = CustomCode(walk.files, walk.package, walk.versions)
    if walk.state:
        state = _text(walk.state).encode("utf-8", "surrogatepass")
        code.files["custom values"] = hashlib.sha256(state).hexdigest()
    return code


def _text(state: Mapping[str, str]) -> str:
    return "\n".join(f"{name} = {text}" for name, text in sorted(state.items()))


class _Walk:
    """Walk over values, visiting each once."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.package: set[str] = set()
        self.versions: dict[str, str] = {}
        self.state: dict[str, str] = {}
        self._modules: dict[str, bool] = {}
        self._seen: dict[int, tuple[object, str]] = {}  # keeps references, so that no id is reused
        self._names: dict[str, int] = {}
        self._compiled: dict[Path, Codes] = {}
        self._globals: set[tuple[int, str]] = set()
        self._deep = False  # inside an object of a library class, whose parts may count by class

    # Values ---------------------------------------------------------------------------------------

    def value(self, value: object, name: str) -> None:
        """Visit a value that a class or a function holds or refers to."""
        if type(value) in PLAIN:
            self._note(name, repr(value))
            return
        if type(value) is tuple and all(type(item) in PLAIN for item in value):
            self._note(name, repr(value))  # by value: the compiler may merge equal constants into one object
            return
        if id(value) in self._seen:
            self._note(name, f"same as {self._seen[id(value)][1]}")
            return
        if isinstance(value, type):
            self._note(name, self._class(value)[0])
            return
        label = self._free(name)
        self._seen[id(value)] = (value, label)
        if isinstance(value, ModuleType):
            self.state[label] = f"module {value.__name__}"
            self.module(value.__name__)
        elif isinstance(value, FunctionType):
            self._function(value, label)
        elif type(value) in MAPPINGS:
            self._mapping(value, label)
        elif type(value) in (tuple, list):
            self.state[label] = f"{type(value).__name__} of {len(value)}"
            for index, item in enumerate(value):
                self.value(item, f"{label}[{index}]")
        elif type(value) in (set, frozenset):
            self.state[label] = f"{type(value).__name__} {self._unordered(value)}"
        elif is_array(value):
            self.state[label] = array_text(value)
        else:
            self._instance(value, label)

    def _free(self, name: str) -> str:
        """Make a label unique by a number."""
        self._names[name] = number = self._names.get(name, 0) + 1
        return name if number == 1 else f"{name} #{number}"

    def _note(self, name: str, text: str) -> None:
        self.state[self._free(name)] = text

    def _mapping(self, value: Mapping[object, object], label: str) -> None:
        self.state[label] = f"{type(value).__name__} of {len(value)}"
        for index, (key, item) in enumerate(value.items()):
            if type(key) in PLAIN:
                self.value(item, f"{label}[{key!r}]")
            else:
                self.value(key, f"{label} key {index}")
                self.value(item, f"{label} value {index}")

    def _unordered(self, items: Iterable[object]) -> list[str]:
        """Texts of a set's items, each walked separately, sorted."""
        texts, before = [], (self.state, self._seen, self._names, self._globals)
        for item in items:
            self.state, self._seen, self._names, self._globals = {}, dict(before[1]), {}, set(before[3])
            self.value(item, "item")
            texts.append(_text(self.state))
        self.state, self._seen, self._names, self._globals = before
        return sorted(texts)

    def _instance(self, value: object, label: str) -> None:
        kind, is_own = self._class(type(value))
        self.state[label] = kind
        inner = [*wrapped(value)]
        for item in inner:
            self.value(item, f"{label}()")
        if isinstance(value, WRAPPERS):
            return
        if isinstance(value, DESCRIPTORS):
            self.state[label] = f"{kind} {value.__name__}"
            return
        if isinstance(value, STATELESS):
            return
        parts, held = reduced(value), attributes(value)
        if isinstance(parts, str):
            self.state[label] = f"{kind} {module_of(value)}.{parts}"
        elif parts is not None:
            deep = self._deep
            self._deep = deep or not (is_own or module_of(type(value)) in TRANSPARENT)
            for index, part in enumerate(parts):
                if part is not None:
                    self.value(part, f"{label}.{PARTS[index]}")
            self._deep = deep
        elif not (held or inner or self._deep or is_own):
            raise UsageError(
                f"custom code: {label} is an object of {qualified(type(value))}, "
                "whose content cannot be part of the cache key",
                fix="make it a plain value: a number, a string, an array, or a list of these",
            )
        if is_own or (parts is None and not self._deep):
            for key, item in held.items():
                self.value(item, f"{label}.{key}")

    def _class(self, kind: type) -> tuple[str, bool]:
        """Walk a class and its bases; returns its text, and True if it is the user's class."""
        is_user_class = {base: self.module(module_of(base)) for base in kind.__mro__}
        unseen = [base for base in kind.__mro__ if is_user_class[base] and id(base) not in self._seen]
        for base in unseen:
            self._seen[id(base)] = (base, self._free(f"class {qualified(base)}"))
        names = [self._seen[id(base)][1] if is_user_class[base] else qualified(base) for base in kind.__mro__]
        for base in unseen:
            label = self._seen[id(base)][1]
            self.state[label] = " < ".join(map(qualified, base.__mro__))
            for key, item in vars(base).items():
                is_dunder = key.startswith("__") and key.endswith("__")
                if key != "_abc_impl" and (not is_dunder or isinstance(item, FunctionType)):
                    self.value(item, f"{label}.{key}")
        if kind in unseen and type(kind) is not type:
            self.value(type(kind), f"{names[0]}.__class__")
        return " < ".join(names), is_user_class[kind]

    def _function(self, function: FunctionType, label: str) -> None:
        self.state[label] = f"function {qualified(function)}"
        is_own, deep = self.module(module_of(function)), self._deep
        self._deep = deep or not is_own
        for index, cell in enumerate(function.__closure__ or ()):
            self.value(content(cell), f"{label}<{index}>")
        self._deep = deep
        if not is_own:
            return
        self._demand_same(iter([function]), Path(function.__code__.co_filename))
        codes = list(codes_of(function.__code__))
        if not is_file(function.__code__.co_filename):
            self.state[label] += " " + "; ".join(byte_code(code) for code in codes)
            for code in codes:
                self._imports_of(code)
        for defaults in (function.__defaults__, function.__kwdefaults__):
            if defaults:
                self.value(defaults, f"{label}()")
        for wanted in sorted({name for code in codes for name in code.co_names}):
            if wanted in function.__globals__:
                self._global(function, wanted)

    def _global(self, function: FunctionType, wanted: str) -> None:
        """Visit a module's global once; other functions of the module read that global too."""
        name = f"{module_of(function)}.{wanted}"
        if (id(function.__globals__), wanted) not in self._globals:
            self._globals.add((id(function.__globals__), wanted))
            self.value(function.__globals__[wanted], name)

    def _imports_of(self, code: CodeType) -> None:
        """Visit the imports of a function without a file."""
        for instruction in dis.get_instructions(code):
            if instruction.opname == "IMPORT_NAME":
                self.module(instruction.argval)

    # Modules --------------------------------------------------------------------------------------

    def module(self, name: str) -> bool:
        """Walk a module and its parent packages; returns True if it is the user's module."""
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
            self.versions |= {distribution: metadata.version(distribution) for distribution in distributions}
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
        except (SyntaxError, ValueError):  # written for another version of Python
            tree = None
        if tree is None:
            self.files[label] = hashlib.sha256(content).hexdigest()
            return
        self.files[label] = tree_digest(tree)
        self._compare(name, file, content, tree)
        for node, _ in import_statements(tree.body, lazy=False):
            for imported in _imported(node, package):
                self.module(imported)

    def _compare(self, name: str, file: Path, content: bytes, tree: ast.Module) -> None:
        """Refuse a module whose functions differ from its file's; record differing constants."""
        loaded = sys.modules.get(name)
        codes = compiled(loaded, content, file)
        if codes is None:
            return
        self._compiled[file] = codes
        self._demand_same(functions_of(loaded), file)
        deep, self._deep = self._deep, True
        for key, value in sorted(changed_constants(loaded, tree).items()):
            self.value(value, f"{name}.{key} loaded")
        self._deep = deep

    def _demand_same(self, functions: Iterator[FunctionType], file: Path) -> None:
        name = changed(functions, self._compiled[file], file) if file in self._compiled else None
        if name is not None:
            raise UsageError(
                f"{file} was changed after it was imported: {name} is not what the file says",
                fix="restart Python, or reload the module and take the class from it again",
            )


def _imported(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[str]:
    """Modules named by one import statement in `package`."""
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
    """Find a module without importing anything, not even its parent packages. None: not found, or loaded
    without a specification (a script, a notebook).
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
    """True for files of the standard library."""
    paths = sysconfig.get_paths()
    libraries = {Path(paths[key]).resolve() for key in ("stdlib", "platstdlib")}
    standard = any(file.resolve().is_relative_to(library) for library in libraries)
    return standard and not INSTALLED & set(file.parts)


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()
