"""The import rules: downhill only, no stage knows another, heavy packages have one door.

What runs without torch is tried out in test_torch_free.py; here the sources alone are read, so that a breach
is named before anything is imported.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import qcompress

PACKAGE = Path(qcompress.__file__).parent
PROJECT = PACKAGE.parent

STAGES = ("load", "train", "fold", "export", "build", "verify", "gate")

ROOMS: dict[str, str] = {
    "errors": "",
    "system": "errors",
    "schema": "errors system",
    "quant": "errors schema",
    "encodings": "errors quant schema",
    "models": "encodings errors quant schema system",
    "tasks": "errors models schema system",
    "graph": "encodings errors models schema system",
    "engine": "errors graph schema system",
    "recipe": "errors models schema system tasks",
    "training": "errors models quant schema system tasks",
    "parity": "engine errors graph models quant recipe schema system tasks",
    "verdict": "errors parity recipe schema system tasks",
    "report": "errors graph models recipe schema system verdict",
    "pipeline": "encodings engine errors graph models parity quant recipe schema system tasks training "
    "verdict",
    "api": "errors graph models parity pipeline recipe report schema system verdict",
    "cli": "api engine errors graph models parity pipeline recipe report schema system tasks verdict",
}
"""What each room may import, bottom first; README's layout section says what lies in it."""

APART = {"", "engine.probe_kit.engine_runners", "engine.probe_kit.engine_speed",
         "engine.probe_kit.measure_engine"}  # fmt: skip
"""The package itself, which hands out the API lazily, and a script that runs on a device by itself."""

DOORS: dict[str, str] = {
    "torch": "encodings engine models parity pipeline quant system tasks training",
    "transformers": "models",
    "accelerate": "models pipeline system training",
    "onnxruntime": "cli engine graph parity",
    "onnx": "encodings engine graph pipeline",
    "onnx_ir": "encodings graph pipeline",
    "faiss": "quant",
    "datasets": "tasks",
    "modelopt": "training",
    "pyarrow": "tasks",
    "PIL": "tasks",
    "sklearn": "tasks",
    "huggingface_hub": "pipeline",
    "typer": "cli",
    "matplotlib": "report",
    "jinja2": "report",
    "yaml": "recipe",
    "tokenizers": "cli models",
}
"""Rooms that may import a heavy package; each of them does."""

CALLED_BY_NAME = {
    "importlib.import_module": {"engine.build_engine"},
    "__import__": {"engine.probe_kit.engine_runners"},
}
"""TensorRT is imported by name, because there are two of it; nothing else is."""

TORCH_FREE = ("cli.main", "api", "pipeline.run", "pipeline.stages.build", "pipeline.stages.gate",
              "graph.certificate.layers", "recipe.check")  # fmt: skip
"""Where commands begin that run on a machine without torch."""

HEAVY = ("torch", "transformers", "onnxruntime", "accelerate", "datasets", "onnx_ir", "sklearn", "pyarrow")

DISTRIBUTIONS = {"mlflow": "mlflow-skinny", "yaml": "PyYAML", "faiss": "faiss-cpu",
                 "onnx_ir": "onnxscript", "google": "onnx", "pydantic_core": "pydantic",
                 "huggingface_hub": "transformers", "ml_dtypes": "ml-dtypes",
                 "sklearn": "scikit-learn", "pyarrow": "datasets", "PIL": "Pillow",
                 "modelopt": "nvidia-modelopt", "tokenizers": "transformers"}  # fmt: skip
"""What brings a package that has another name than its distribution, or comes with one."""

BANNED = {"eval", "exec", "pickle", "cPickle", "marshal", "shelve", "torch.load", "joblib", "dill"}


@dataclass(frozen=True)
class Import:
    """One imported module: `qcompress.` is cut off our own."""

    name: str
    own: bool
    lazy: bool
    typing: bool
    line: int


def short(module: str) -> str:
    """Without `qcompress.`; the package itself is empty."""
    return module.removeprefix("qcompress").removeprefix(".")


def room(name: str) -> str:
    """The folder of a module; the two files of the command line and of the API are rooms of their own."""
    return {"__main__": "cli", "": "api"}.get(name, name.partition(".")[0])


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py")) if file.suffix == ".py"}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in SOURCES.items()}


def is_module(name: str) -> bool:
    return short(name) in SOURCES


def imports(name: str) -> list[Import]:
    """Every import of a module, wherever it stands."""
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool, typing: bool) -> None:
        if isinstance(node, ast.ImportFrom | ast.Import):
            assert not getattr(node, "level", 0), f"{name}:{node.lineno}: imports are absolute here"
            for target in targets(node):
                own = target.partition(".")[0] == "qcompress"
                found.append(Import(short(target) if own else target, own, lazy, typing, node.lineno))
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                visit(child, inside, True)
            for child in node.orelse:
                visit(child, inside, typing)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, inside, typing)

    visit(TREES[name], False, False)
    return found


def targets(node: ast.Import | ast.ImportFrom) -> list[str]:
    """`from a import b` is a.b where that is a module of ours, and a otherwise."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [
        f"{node.module}.{alias.name}"
        if node.module.startswith("qcompress") and is_module(f"{node.module}.{alias.name}")
        else node.module
        for alias in node.names
    ]


IMPORTS = {name: imports(name) for name in SOURCES}


# The rules ----------------------------------------------------------------------------------------


def test_every_module_was_found() -> None:
    assert len(SOURCES) >= 70
    assert sum(len(found) for found in IMPORTS.values()) > 400


def test_the_package_has_fifteen_rooms_at_most_and_four_files() -> None:
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    files = {name for name in entries if name.endswith(".py")}
    assert files == {"__init__.py", "__main__.py", "api.py", "errors.py"}
    assert entries - files <= ROOMS.keys() and len(entries - files) <= 15


def test_rooms_lie_above_those_that_they_import() -> None:
    below: set[str] = set()
    for name, may in ROOMS.items():
        assert set(may.split()) <= below, name
        below.add(name)


@pytest.mark.parametrize("name", sorted(set(SOURCES) - APART))
def test_a_module_imports_from_the_rooms_that_its_room_may(name: str) -> None:
    allowed = {room(name), *ROOMS[room(name)].split()}
    uphill = [
        f"line {found.line}: {found.name}"
        for found in IMPORTS[name]
        if found.own and not found.typing and found.name not in APART and room(found.name) not in allowed
    ]
    assert uphill == []


def test_every_arrow_between_rooms_is_used() -> None:
    """A direction that nobody takes is none."""
    taken = {(room(name), room(item.name)) for name in SOURCES for item in IMPORTS[name] if item.own}
    stated = {(name, below) for name, may in ROOMS.items() for below in may.split()}
    assert stated - taken == set()


def test_no_stage_imports_another_stage() -> None:
    seen = 0
    for stage in STAGES:
        for found in IMPORTS[f"pipeline.stages.{stage}"]:
            seen += found.own
            assert not found.name.startswith("pipeline.stages"), f"{stage} imports {found.name}"
    assert seen > 40


def test_fold_is_not_given_the_method() -> None:
    reached, queue = set(), ["pipeline.stages.fold"]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            queue += [found.name for found in IMPORTS[name] if found.own and not found.typing]
    assert not any(room(name) == "training" for name in reached)
    assert {"models.prepare", "quant.layers"} <= reached


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """What is imported when a module is; a package's own `__init__` runs before its modules."""
    edges = {
        name: {found.name for found in IMPORTS[name] if found.own and not (found.lazy or found.typing)}
        - {name}
        for name in SOURCES
    }
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for imported in sorted(edges[name] - {""}):
                walk(imported, (*path, name))
            done.add(name)

    for name in sorted(edges):
        walk(name, ())
    assert done == set(SOURCES)


@pytest.mark.parametrize("package", DOORS)
def test_a_heavy_package_has_its_doors_and_no_other(package: str) -> None:
    rooms = {
        room(name)
        for name, modules in IMPORTS.items()
        if any(not item.own and item.name.partition(".")[0] == package for item in modules)
    }
    assert rooms == set(DOORS[package].split())


def test_tensorrt_is_imported_by_name_in_the_builder_alone() -> None:
    calls: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (*CALLED_BY_NAME, "import_module"):
                calls.setdefault(ast.unparse(node.func), set()).add(name)
        assert not any("tensorrt" in item.name for item in IMPORTS[name] if not item.own)
    assert calls == CALLED_BY_NAME


def test_what_torch_free_commands_import_needs_torch_only_inside_functions() -> None:
    """From the command line down, along every import that happens when a module is imported."""
    reached: set[str] = set()
    queue = list(TORCH_FREE)
    while queue:
        name = queue.pop()
        if name in reached:
            continue
        reached.add(name)
        for found in IMPORTS[name]:
            if found.lazy or found.typing:
                continue
            if found.own:
                queue.append(found.name)
            else:
                assert found.name.partition(".")[0] not in HEAVY, f"{name}:{found.line} imports {found.name}"
        parts = name.split(".")
        queue += [".".join(parts[:end]) for end in range(1, len(parts))]
    assert {"models.gpt2", "tasks.causal_lm", "system.distributed", "system.workspace"} <= reached
    stages = {f"pipeline.stages.{stage}" for stage in ("train", "fold", "export", "verify")}
    assert not reached & {*stages, "parity.runners", "models.prepare", "training.loop"}


def test_what_is_imported_is_declared() -> None:
    """Nothing from tests/ or deploy/, and nothing that a user would have to install by hand."""
    declared = {
        re.split(r"[\[<>=;! ]", line)[0].lower()
        for line in re.findall(r'^    "([^"]+)",', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)
    }
    roots = {
        found.name.partition(".")[0] for modules in IMPORTS.values() for found in modules if not found.own
    } - set(sys.stdlib_module_names)
    assert len(roots) > 12 and len(declared) > 12
    missing = {root for root in roots if DISTRIBUTIONS.get(root, root).lower() not in declared}
    assert missing == {
        "engine_runners",
        "engine_speed",
        "strict_json",
    }  # of the kit, beside the script that imports them


def test_nothing_runs_code_that_it_reads_and_no_error_is_swallowed_whole() -> None:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in BANNED, f"{name}:{node.lineno}"
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in ("everything", "Exception", "BaseException"), f"{name}:{node.lineno}"
        assert not {item.name.partition(".")[0] for item in IMPORTS[name]} & BANNED, name


def test_every_module_says_what_it_is_and_none_is_called_utils() -> None:
    for name, tree in TREES.items():
        assert ast.get_docstring(tree) or not tree.body, name
        assert name.rpartition(".")[2] not in ("utils", "util", "helpers", "common", "misc"), name
