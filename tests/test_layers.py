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

LEVELS: tuple[tuple[str, set[str]], ...] = (
    ("plain values", {
        "errors", "formats", "axes", "options", "quantizer_options", "adapter_options", "glue",
        "task_options", "data_options",
        "export_options", "schema",
        "custom_code", "custom_loaded", "custom_values", "own", "artifacts", "plan",
        "models.architecture", "models.config_values", "models.files",
        "codekey", "digests", "placed", "system", "host", "processes", "progress", "history",
        "yamlfile", "outside", "memory", "stopping", "printable", "screen", "places",
        "distance", "tensorfile", "goals", "rates", "strict_json", "report.junit",
    }),
    ("numerics", {
        "quant", "quant.batchnorm", "quant.conv", "quant.folded_conv",
        "quant.affine", "quant.codebook", "quant.coding", "quant.dynamic", "quant.folded",
        "quant.folded_codebook", "quant.int32_bias", "quant.kmeans", "quant.layers", "quant.learned_scale",
        "quant.noise", "quant.product",
        "quant.quantizers", "quant.ranges", "quant.ternary", "quant.types",
    }),
    ("families, tasks, targets", {
        "models", "models.attention", "models.bert", "models.cache", "models.distilbert", "models.encoder",
        "models.depth", "models.finite", "models.gpt2", "models.loading", "models.residual",
        "models.roberta", "models.stock",
        "tasks", "tasks.causal_lm", "tasks.examples", "tasks.image_slices",
        "tasks.labels", "tasks.padded", "tasks.scores",
        "tasks.sequence_classification",
        "tasks.slices", "tasks.table", "tasks.text", "tasks.token_classification",
        "targets", "targets.builder", "targets.checks", "targets.child", "targets.codebooks",
        "targets.contents",
        "models.cifar_net", "models.cifar_resnet", "models.convnet", "models.efficientnet",
        "models.image_residual", "models.resnet", "models.stock_images", "targets.convolutions",
        "models.heads", "models.readers", "models.tokenizer_files", "models.vit",
        "tasks.image_classification", "tasks.images",
        "targets.device", "targets.graph", "targets.model_file", "targets.tensors",
        "targets.inline", "targets.lint", "targets.plan_content",
        "targets.process",
        "targets.profiles", "targets.quantizers", "targets.rules", "targets.sizes", "targets.soundness",
        "targets.table", "targets.trial", "targets.weight_checks",
    }),
    ("recipes", {
        "wording", "structure", "data_rules", "data_check",
        "slice_rules", "rules", "adapter_rules", "recipe", "codebook_rules", "point_rules", "check",
        "scale_reach",
    }),
    ("models in three forms", {
        "engine", "evaluation", "flips", "layerdrop", "gpu_rows", "held", "layerwise",
        "parameter_roles", "prepare", "observe", "checkpoint", "certificate", "certificate_codebooks",
        "certificate_graph",
        "certificate_points", "codebook_nodes", "graph_optimizer", "precision", "sizes",
        "adopted",
        "probe", "rows",
        "runners", "samples", "sharpness",
    }),
    ("methods", {
        "methods", "methods.awq", "methods.ball", "methods.distillation", "methods.ipq", "methods.modelopt",
        "methods.plain", "methods.protocols", "methods.smoothquant",
        "methods.quadapter", "methods.saq", "methods.signals", "methods.squat",
        "methods.teacher_intervention",
    }),
    ("loops", {"distributions", "logpoints", "movement", "loop", "blockwise", "calibration", "trainedfile"}),
    ("stages", {"stages", *STAGES}),
    ("workspace", {"workspace"}),
    ("pipeline", {"key_scope", "keys", "pipeline", "smoke", "tracking", "tracker"}),
    ("what a user calls", {
        "api", "graph_files", "generate", "predict", "listing", "report", "report.checked", "report.compare",
        "report.compared", "report.inspected", "report.ladder", "report.layers", "report.measured",
        "report.paired",
        "report.replicates", "report.sarif", "report.seeds", "report.shown",
        "sensitivity", "sensitivity.calibrated", "sensitivity.candidates", "sensitivity.controls",
        "sensitivity.measure", "sensitivity.mixture", "sensitivity.sampling", "sensitivity.study",
        "report.sensitive",
        "finished", "run_files",
        "regression", "regression.baseline_file", "regression.decide", "regression.goals_file",
        "regression.judged",
        "regression.standing", "regression.statistics", "regression.written",
        "report.gated", "report.hosts",
        "bundle", "bundle.config", "bundle.examine", "bundle.materials", "bundle.opens", "bundle.triton",
        "bundle.warmup", "doctor", "report.deployed",
        "recipe_schema", "first", "first.asked", "first.choose", "first.data", "first.lengths", "first.model",
        "first.splits", "first.start", "first.write",
        "report.html", "report.html.beside", "report.html.charts", "report.html.distributed",
        "report.html.evidence",
        "report.html.figures", "report.html.judged", "report.html.logged", "report.html.made",
        "report.html.page", "report.html.parts", "report.html.rungs", "report.html.several",
        "report.html.weighed",
    }),
    ("command line", {
        "arguments", "cli", "cli_deploy", "cli_gate", "cli_report", "cli_sensitivity", "cli_start",
        "completion", "terminal", "__main__",
    }),
)  # fmt: skip
"""Bottom first. A module imports from its own level and from those before it."""

APART = {"", "probe_kit.engine_runners", "probe_kit.engine_speed", "probe_kit.measure_engine"}
"""The package itself, which hands out the API lazily, and a script that runs on a device by itself."""

DOORS: dict[str, set[str]] = {
    "torch": {
        "quant.batchnorm", "quant.conv", "quant.folded_conv", "flips",
        "models.cifar_net", "models.image_residual", "models.stock_images",
        "quant.affine", "quant.codebook", "quant.coding", "quant.dynamic", "quant.folded",
        "quant.folded_codebook", "quant.int32_bias",
        "quant.kmeans", "quant.layers", "quant.learned_scale",
        "quant.noise", "quant.product", "quant.quantizers",
        "quant.ranges", "quant.ternary", "quant.types", "methods.plain",
        "methods.protocols", "methods.quadapter", "methods.ball", "methods.saq", "methods.squat",
        "methods.distillation", "methods.signals", "methods.teacher_intervention",
        "models.attention", "models.cache", "models.gpt2", "models.residual", "models.stock", "models.vit",
        "methods.modelopt",
        "tasks.causal_lm", "tasks.examples", "tasks.padded", "tasks.sequence_classification",
        "tasks.token_classification", "parameter_roles", "prepare", "observe", "processes", "checkpoint",
        "distributions", "logpoints", "loop", "movement", "blockwise", "calibration", "trainedfile",
        "runners", "tensorfile", "train", "fold", "export", "verify",
        "tasks.image_classification", "tasks.images",
        "layerwise", "sharpness", "engine", "held", "layerdrop", "models.depth", "models.finite",
        "sensitivity.measure", "sensitivity.calibrated",
    },
    "transformers": {"models", "models.attention", "models.cache", "models.gpt2", "models.loading",
                     "models.residual", "models.stock", "models.vit", "models.image_residual",
                     "models.stock_images"},
    "accelerate": {"tracker", "processes", "train", "loop",
                   "methods.ball", "methods.plain", "methods.protocols",
                   "methods.saq", "methods.squat"},
    "onnxruntime": {"bundle.opens", "targets.trial", "generate", "runners", "probe_kit.engine_runners"},
    "onnx": {"targets.model_file", "targets.tensors",
             "adopted", "export", "certificate", "certificate_codebooks", "certificate_graph",
             "certificate_points", "sizes", "targets.checks",
             "targets.codebooks", "targets.contents", "targets.convolutions", "targets.plan_content",
             "targets.graph", "targets.inline", "targets.quantizers", "targets.sizes", "targets.soundness",
             "targets.weight_checks"},
    "onnx_ir": {"codebook_nodes", "export", "graph_optimizer", "precision"},
    "faiss": {"quant.kmeans"},
    "datasets": {"tasks.text"},
    "modelopt": {"methods.modelopt"},
    "pyarrow": {"tasks.table"},
    "PIL": {"tasks.images"},
    "sklearn": {"tasks.scores"},
    "huggingface_hub": {"load"},
    "typer": {"arguments", "cli", "cli_deploy", "cli_gate", "cli_report", "cli_sensitivity", "cli_start",
              "terminal"},
    "matplotlib": {"report.html.charts"},
    "jinja2": {"report.html.page"},
    "yaml": {"yamlfile"},
    "tokenizers": {"first.lengths", "models.tokenizer_files"},
}  # fmt: skip
"""Which modules may import a heavy package; each of them does."""

CALLED_BY_NAME = {"importlib.import_module": {"targets.builder"}, "__import__": {"probe_kit.engine_runners"}}
"""TensorRT is imported by name, because there are two of it; nothing else is."""

LAZY = {"processes", "models", "models.gpt2", "models.loading", "models.stock",
        "models.stock_images", "models.vit", "tasks.causal_lm",
        "tasks.examples", "tasks.image_classification", "tasks.images",
        "tasks.sequence_classification", "tasks.token_classification", "tasks.scores",
        "tasks.table"}  # fmt: skip
"""Modules that torch-free commands import, and that need torch or transformers only inside functions."""

DISTRIBUTIONS = {"mlflow": "mlflow-skinny", "yaml": "PyYAML", "faiss": "faiss-cpu",
                 "onnx_ir": "onnxscript", "google": "onnx", "pydantic_core": "pydantic",
                 "huggingface_hub": "transformers", "ml_dtypes": "ml-dtypes",
                 "sklearn": "scikit-learn", "pyarrow": "datasets", "PIL": "Pillow",
                 "modelopt": "nvidia-modelopt", "tokenizers": "transformers"}  # fmt: skip
"""What brings a package that has another name than its distribution, or comes with one."""

BANNED = {"eval", "exec", "pickle", "cPickle", "marshal", "shelve", "torch.load", "joblib", "dill"}


@dataclass(frozen=True)
class Import:
    """One imported module: `qcompress.` and `stages.` are cut off our own."""

    name: str
    own: bool
    lazy: bool
    typing: bool
    line: int


def short(module: str) -> str:
    """`qcompress.pipeline.stages.gate` and `qcompress.gate` are one name."""
    return module.removeprefix("qcompress").removeprefix(".").removeprefix("stages.")


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return short(".".join(("qcompress", *(part for part in parts if part != "__init__"))))


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


def level(name: str) -> int:
    (found,) = [place for place, (_, modules) in enumerate(LEVELS) if name in modules]
    return found


# The rules ----------------------------------------------------------------------------------------


def test_every_module_was_found() -> None:
    assert len(SOURCES) >= 70
    assert sum(len(found) for found in IMPORTS.values()) > 400


def test_every_module_has_exactly_one_level() -> None:
    """A new module: put it into LEVELS, as low as its imports allow."""
    placed = [name for _, modules in LEVELS for name in modules]
    assert len(placed) == len(set(placed))
    assert set(SOURCES) - set(placed) - APART == set()
    assert set(placed) - set(SOURCES) <= {"stages"}


@pytest.mark.parametrize("name", sorted(set(SOURCES) - APART))
def test_imports_go_downhill(name: str) -> None:
    uphill = [
        f"line {found.line}: {found.name}"
        for found in IMPORTS[name]
        if found.own and not found.typing and found.name not in APART and level(found.name) > level(name)
    ]
    assert uphill == []


def test_no_stage_imports_another_stage() -> None:
    seen = 0
    for stage in STAGES:
        for found in IMPORTS[stage]:
            seen += found.own
            assert not found.own or found.name not in STAGES, f"{stage} imports {found.name}"
    assert seen > 40


def test_fold_is_not_given_the_method() -> None:
    reached, queue = set(), ["fold"]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            queue += [found.name for found in IMPORTS[name] if found.own and not found.typing]
    assert not any(name.startswith(("methods", "loop", "train")) for name in reached)
    assert {"prepare", "quant.layers"} <= reached


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
    found = {
        name
        for name, modules in IMPORTS.items()
        if any(not item.own and item.name.partition(".")[0] == package for item in modules)
    }
    assert found == DOORS[package]


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
    queue = ["cli", "api", "pipeline", "build", "gate", "certificate", "check"]
    while queue:
        name = queue.pop()
        if name in reached:
            continue
        reached.add(name)
        parents = [name.rpartition(".")[0]] if "." in name else []
        for found in IMPORTS[name]:
            if found.lazy or found.typing:
                continue
            if found.own:
                queue.append(found.name)
            else:
                heavy = (
                    "torch",
                    "transformers",
                    "onnxruntime",
                    "accelerate",
                    "datasets",
                    "onnx_ir",
                    "sklearn",
                    "pyarrow",
                )
                assert found.name.partition(".")[0] not in heavy, f"{name}:{found.line} imports {found.name}"
        queue += [parent for parent in parents if parent in SOURCES]
    assert LAZY | {"gate", "load", "build", "workspace", "tasks"} <= reached
    assert not reached & ({"train", "fold", "export", "verify", "runners", "prepare", "loop"})


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
