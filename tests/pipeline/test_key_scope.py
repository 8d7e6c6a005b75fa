"""Both directions of every stage's key: what must re-run it, and what must not."""

from __future__ import annotations

import ast
import copy
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tiny import make_recipe

from qcompress.models import FAMILIES
from qcompress.pipeline import keys
from qcompress.pipeline.key_scope import (
    METHOD_MODULES,
    NO_RESULT,
    NOT_BUILT,
    NOT_CAUGHT,
    ONLY_CHECKED,
    ONLY_MEASURED,
    no_result,
    unselected,
)
from qcompress.recipe.load import load_recipe
from qcompress.schema.recipe import STAGES, Recipe
from qcompress.system.fingerprint import PACKAGE, code_digest
from qcompress.tasks import TASKS
from qcompress.training import methods

Change = tuple[str, Any]


def code_of(recipe: Recipe, stage: str) -> set[str]:
    return set(
        code_digest([f"qcompress.pipeline.stages.{stage}"], no_result(stage), unselected(recipe, stage))
    )


@pytest.fixture
def own_text(text_file: Path, tmp_path: Path) -> Path:
    """A copy of the text: recipes are written beside it."""
    return Path(shutil.copy(text_file, tmp_path))


@pytest.fixture
def plan(tiny_model: Path, own_text: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., keys.Plan]:
    monkeypatch.setattr(keys, "demand_trackers", lambda names: None)

    def make(*changes: Change, **sections: Any) -> keys.Plan:
        recipe = make_recipe(own_text, **sections).model_dump(mode="json", by_alias=True)
        recipe["build"]["profiles"] = [{"sequence": [1, 16, 32]}]
        for dotted, value in changes:
            *above, last = dotted.split(".")
            section = recipe
            for key in above:
                section = section[key]
            section[last] = value
        recipe["model"] = {"family": "gpt2", "source": str(tiny_model)}
        file = own_text.parent / "scope.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return keys.prepare(load_recipe(file))

    return make


def test_what_must_re_run_each_stage_does(plan: Callable[..., keys.Plan], own_text: Path) -> None:
    (own_text.parent / "other.txt").write_text("another text " * 400)
    changes: dict[str, list[Change]] = {
        "train": [
            ("train.lr", {"weight": 0.5}),
            ("train.phases", {"finetune": {"steps": 4}}),
            ("train.batch_size", 2),
            ("train.optimizer", "sgd"),
            ("seed", 1),
            ("format.weights", {"bits": 4, "block": 32}),
            ("format.compute", "fp16"),
            ("quantizer.weights", {"name": "lsq", "init": "absmax"}),
            ("stepper", {"name": "saq", "rho": 0.1}),
            ("objective", {"name": "distillation", "attention": 0}),
            ("task.context", 16),
            ("data.train.limit", 32),
            ("data.calibration.limit", 6),
            ("data.train.text", ["other.txt"]),
            ("data.calibration.text", ["other.txt"]),
        ],
        "export": [("export.opset", 22), ("build.target", "t4"), ("train.lr", {"weight": 0.5})],
        "build": [("build.here", "never"), ("build.target", "t4")],
        "verify": [
            ("verify.samples", 4),
            ("data.evaluate.test.limit", 4),
            ("data.evaluate.test.text", ["other.txt"]),
            ("format.compute", "fp16"),
            ("task.context", 16),
            ("quantizer.activations", "minmax"),
        ],
        "gate": [
            ("gate.float_floor", {"test.perplexity": 3}),
            ("verify.require", ["float"]),
            ("format.compute", "fp16"),
            ("build.target", "t4"),
        ],
    }
    for stage, several in changes.items():
        before = keys.parts(plan(method="lsq"), stage, {})
        for change in several:
            assert keys.parts(plan(change, method="lsq"), stage, {}) != before, (stage, change)
    options: dict[str, list[Change]] = {
        "quadapter": [
            ("adapter", {"name": "quadapter", "bound": 50}),
            ("schedule", {"name": "blockwise-then-end-to-end", "evaluate_every": 7}),
        ],
        "saq": [("stepper", {"name": "saq", "rho": 0.125})],
    }
    for method, several in options.items():  # the same code, so that the option itself must be in the key
        before = keys.parts(plan(method=method), "train", {})
        for change in several:
            assert keys.parts(plan(change, method=method), "train", {}) != before, change
    softer = [{"name": "distillation", "attention": 0, "temperature": one} for one in (1, 2)]
    first, second = (keys.parts(plan(method="lsq", objective=one), "train", {}) for one in softer)
    assert first != second


def test_what_must_not_re_run_a_stage_does_not(plan: Callable[..., keys.Plan], own_text: Path) -> None:
    (own_text.parent / "deep").mkdir(exist_ok=True)
    (own_text.parent / "deep" / "renamed.txt").write_bytes(own_text.read_bytes())
    judged: list[Change] = [
        ("gate.recovery", {"test.perplexity": {"threshold": 5}}),
        ("gate.regression", {"test.perplexity": {"threshold": 5}}),
        ("gate.parity", {"onnx": {"max_abs": 1}}),
        ("verify.require", ["float"]),
        ("tracking", ["tensorboard"]),
        ("name", "another"),
    ]
    measured: list[Change] = [("verify.samples", 4), ("verify.batch_size", 4), ("verify.held", "always")]
    profile = {"batch": [1, 1, 2], "sequence": [1, 16, 32]}
    built: list[Change] = [("build.here", "never"), ("build.profiles", [profile])]
    trained: list[Change] = [
        ("train.checkpoint_every_s", 7),
        ("train.device", "auto"),
        ("format.preset", None),
    ]
    unchanged = {
        "load": [*judged, *measured, *built, *trained, ("train.lr", {"weight": 0.5}), ("seed", 5)],
        "train": [
            *judged,
            *measured,
            *built,
            *trained,
            ("export.opset", 22),
            ("build.target", "t4"),
            ("data.train.text", ["deep/renamed.txt"]),
            ("data.evaluate.test.limit", 3),
        ],
        "fold": [*judged, *measured, *built, *trained],
        "export": [*judged[:-1], *measured, *built, *trained],
        "build": [*judged, *measured, *trained],
        "verify": [*judged, *built, *trained],
    }
    for stage, several in unchanged.items():
        before = copy.deepcopy(keys.parts(plan(method="lsq"), stage, {}))
        for change in several:
            after = keys.parts(plan(change, method="lsq"), stage, {})
            assert {**after, "recipe": ""} == {**before, "recipe": ""}, (stage, change)


@pytest.fixture
def made(plan: Callable[..., keys.Plan], monkeypatch: pytest.MonkeyPatch) -> keys.Plan:
    """A plan for tests about everything in a key but the code."""
    monkeypatch.setattr(keys, "code_digest", lambda *arguments: {})
    return plan(method="lsq")


MACHINE: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "device_kind": (lambda wanted: "cuda", {"train", "fold", "export", "verify"}),
    "threads": (lambda: 97, {"train", "fold", "export", "verify"}),
    "announced": (lambda: 3, {"train"}),
    "describe_host": (lambda: {"gpu": {"name": "another"}}, {"build", "verify"}),
}
"""Facts of the machine, by the function of `keys` that finds them, with the stages that each re-runs."""


@pytest.mark.parametrize("fact", MACHINE)
def test_a_fact_of_the_machine_re_runs_the_stages_whose_bits_it_changes(
    made: keys.Plan, monkeypatch: pytest.MonkeyPatch, fact: str
) -> None:
    before = {stage: keys.parts(made, stage, {}) for stage in STAGES}
    monkeypatch.setattr(keys, fact, MACHINE[fact][0])
    assert {stage for stage in STAGES if keys.parts(made, stage, {}) != before[stage]} == MACHINE[fact][1]


READS = {
    "load": set(),
    "train": {"load"},
    "fold": {"load", "train"},
    "export": {"fold"},
    "build": {"export"},
    "verify": {"load", "train", "fold", "export", "build"},
    "gate": {"verify"},
}


def test_another_artifact_re_runs_the_stages_that_read_it(made: keys.Plan) -> None:
    steps = {stage: SimpleNamespace(digest="a") for stage in STAGES}
    for stage in STAGES:
        before = keys.parts(made, stage, steps)
        others = {name: {**steps, name: SimpleNamespace(digest="b")} for name in steps}
        read = {name for name in steps if keys.parts(made, stage, others[name]) != before}
        assert read == READS[stage], stage


def test_another_checkpoint_re_runs_load_and_another_graph_export(made: keys.Plan) -> None:
    graphs = [replace(made, graph={"graph.onnx": digest}) for digest in "ab"]
    others = [replace(made, digests={"model.safetensors": digest}) for digest in "ab"]
    for stage in STAGES:
        same = keys.parts(graphs[0], stage, {}) == keys.parts(graphs[1], stage, {})
        assert same == (stage != "export"), stage
        same = keys.parts(others[0], stage, {}) == keys.parts(others[1], stage, {})
        assert same == (stage != "load"), stage


def test_a_smoke_run_is_gated_apart(made: keys.Plan) -> None:
    small = replace(made, resolved=replace(made.resolved, smoke=True))
    before = {stage: keys.parts(made, stage, {}) for stage in STAGES}
    assert [stage for stage in STAGES if keys.parts(small, stage, {}) != before[stage]] == ["gate"]


def test_another_version_of_a_tool_re_runs_the_stages_that_use_it(
    made: keys.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = metadata.version
    before = {stage: keys.parts(made, stage, {}) for stage in STAGES}
    for tool, stages in {
        "torch": {"train", "fold", "export", "verify"},
        "onnxscript": {"export"},
        "tokenizers": {"train", "verify"},
        "onnxruntime": {"verify"},
    }.items():
        found = {tool: "0"}
        monkeypatch.setattr(metadata, "version", lambda name, found=found: found.get(name) or installed(name))
        assert {stage for stage in STAGES if keys.parts(made, stage, {}) != before[stage]} == stages, tool


SGD: Change = ("train.optimizer", "sgd")
STEPS: Change = ("train.phases", {"finetune": {"steps": 4}})
NO_STEPS: Change = ("train.phases", {"finetune": {"steps": 0}})
IDLE: Change = ("train.phases", {})

Case = tuple[dict[str, Any], list[Change], Change]
"""Sections, the changes before, and one more change."""


def same_key(plan: Callable[..., keys.Plan], case: Case) -> bool:
    sections, before, change = case
    train = [keys.parts(plan(*several, **sections), "train", {}) for several in (before, [*before, change])]
    return train[0] == train[1]


LSQ, PTQ, QUADAPTER = {"method": "lsq"}, {"method": "ptq"}, {"method": "quadapter"}
WRITTEN = {"weight": 2e-5, "other": 2e-5, "scale": 1e-3, "centroid": 1e-3}


@pytest.mark.parametrize(
    "case",
    [
        (LSQ, [], ("task.stride", 4)),
        (LSQ, [], ("train.momentum", 0.5)),
        (LSQ, [STEPS], ("train.lr", WRITTEN)),
        (LSQ, [STEPS], ("train.phases", {"finetune": {"steps": 4, "lr": {"scale": 1e-3}}})),
        (LSQ, [("train.phases", {})], ("train.phases", {"finetune": {"steps": 300}})),
        (LSQ, [STEPS, ("train.lr", {"scale": 2e-3})],
         ("train.phases", {"finetune": {"steps": 4, "lr": {"scale": 2e-3}}})),
        (LSQ, [NO_STEPS], ("train.lr", {"scale": 0.5})),
        (LSQ, [NO_STEPS], ("train.decay", "cosine")),
        (LSQ, [NO_STEPS], ("train.warmup", 0.5)),
        (PTQ, [IDLE], SGD),
        (PTQ, [IDLE], ("train.momentum", 0.5)),
        (PTQ, [IDLE, SGD], ("train.momentum", 0.5)),
        (PTQ, [IDLE], ("train.weight_decay", 0.5)),
        (QUADAPTER, [IDLE], ("train.weight_decay", 0.5)),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_training_does_not_read_does_not_re_run_it(
    plan: Callable[..., keys.Plan], case: Case
) -> None:
    assert same_key(plan, case)


@pytest.mark.parametrize(
    "case",
    [
        (LSQ, [SGD], ("train.momentum", 0.5)),
        (LSQ, [STEPS], ("train.lr", {"scale": 2e-3})),
        (LSQ, [STEPS], ("train.phases", {"finetune": {"steps": 4, "lr": {"scale": 2e-3}}})),
        (LSQ, [STEPS], NO_STEPS),
        (LSQ, [STEPS], SGD),
        (LSQ, [], ("train.decay", "cosine")),
        (LSQ, [], ("train.warmup", 0.5)),
        (LSQ, [], ("train.weight_decay", 0.5)),
        (LSQ, [], ("train.layer_drop", 0.2)),
        (PTQ, [IDLE], ("train.batch_size", 2)),
        (QUADAPTER, [IDLE], ("train.lr", {"adapter": 0.5})),
        (QUADAPTER, [IDLE], ("train.phases", {"calibrate": {"steps": 3}})),
    ],
    ids=str,
)
def test_a_value_that_training_reads_re_runs_it(plan: Callable[..., keys.Plan], case: Case) -> None:
    assert not same_key(plan, case)


def test_slices_part_evaluation_sets_only(text_file: Path) -> None:
    recipe = make_recipe(text_file)
    for name in ("train", "calibration"):
        section = (getattr(recipe.data, name) or recipe.data.train).model_copy(update={"slices": ["source"]})
        sliced = recipe.model_copy(update={"data": recipe.data.model_copy(update={name: section})})
        whole = section.model_copy(update={"slices": None})
        plain = recipe.model_copy(update={"data": sliced.data.model_copy(update={name: whole})})
        assert keys._values(sliced, "train") == keys._values(plain, "train")
    test = recipe.data.evaluate["test"].model_copy(update={"slices": ["source"]})
    sliced = recipe.model_copy(update={"data": recipe.data.model_copy(update={"evaluate": {"test": test}})})
    assert keys._values(sliced, "verify") != keys._values(recipe, "verify")


def test_the_stride_of_windows_re_runs_verify(plan: Callable[..., keys.Plan]) -> None:
    before = keys.parts(plan(method="lsq"), "verify", {})
    assert keys.parts(plan(("task.stride", 4), method="lsq"), "verify", {}) != before


def test_what_measures_is_in_the_key_of_verify_alone(text_file: Path) -> None:
    """Why: in the tasks' modules only the functions of the evaluation use it."""
    for importer, imported in ONLY_MEASURED:
        file = PACKAGE / f"{importer.removeprefix('qcompress.').replace('.', '/')}.py"
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {
            alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module == imported
            for alias in node.names
        }
        users = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef)
            and names & {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        }
        assert names and users and users <= {"metrics", "slices", "_result"}, (importer, users)
    task = {"task": {"name": "sequence-classification"}, "model": {"family": "bert", "source": "unused"}}
    recipe = make_recipe(text_file, **task)
    for stage in ("load", "train", "fold", "export"):
        assert "tasks/scores.py" not in code_of(recipe, stage)
    assert "tasks/scores.py" in code_of(recipe, "verify")


SHAPES_TRAIN = {
    "pipeline/stages/train.py",
    "training/loop.py",
    "training/blockwise.py",
    "training/calibration.py",
    "training/checkpoint.py",
    "training/observer.py",
    "models/prepare.py",
    "training/parameter_roles.py",
    "system/distributed.py",
    "training/artifact.py",
    "quant/quantizers.py",
    "quant/affine.py",
    "quant/ranges.py",
    "quant/layers.py",
    "training/methods/plain.py",
    "training/methods/protocols.py",
    "tasks/examples.py",
    "tasks/text.py",
    "schema/axes.py",
    "schema/recipe.py",
    "schema/method_options.py",
    "schema/formats.py",
    "models/plan.py",
}

NEVER = re.compile(
    r"(cli|encodings|engine|graph|parity|recipe|report|verdict)/.*|api|errors|pipeline/(?!__init__|stages/).*"
    r"|models/folded|quant/(folded.*|int32_bias)"
    r"|training/(history|movement)|system/(filesystem|fingerprint|reporter|workspace)"
    r"|schema/(custom_.*|export|goals)|tasks/(image_slices|scores)"
)


@pytest.mark.parametrize(
    ("sections", "wanted", "unwanted"),
    [
        (
            {"method": "lsq"},
            {"models/gpt2.py", "tasks/causal_lm.py"},
            {"training/methods/perturbation.py", "models/bert.py"},
        ),
        (
            {"method": "saq"},
            {"training/methods/saq.py", "training/methods/perturbation.py"},
            {"training/methods/squat.py"},
        ),
        (
            {"method": "squat"},
            {"training/methods/squat.py", "training/methods/perturbation.py"},
            {"training/methods/saq.py"},
        ),
        (
            {"method": "quadapter"},
            {"training/methods/quadapter.py"},
            {"training/methods/modelopt.py", "training/methods/ipq.py"},
        ),
        (
            {"method": "smoothquant"},
            {"training/methods/smoothquant.py", "training/methods/modelopt.py"},
            {"training/methods/awq.py"},
        ),
        (
            {"method": "awq"},
            {"training/methods/awq.py", "training/methods/modelopt.py"},
            {"training/methods/smoothquant.py"},
        ),
        (
            {"method": "ipq", "format": "ipq", "train": {"phases": {}}},
            {"training/methods/ipq.py", "quant/kmeans.py", "quant/noise.py"},
            {"training/methods/quadapter.py"},
        ),
        (
            {
                "method": "teacher-intervention",
                "format": "ternary-a8",
                "train": {"phases": {}},
                "model": {"family": "bert", "source": "unused"},
                "task": {"name": "sequence-classification"},
            },
            {
                "training/methods/teacher_intervention.py",
                "training/methods/distillation.py",
                "training/methods/activation_taps.py",
                "models/bert.py",
                "models/hf_loader.py",
                "tasks/sequence_classification.py",
                "quant/ternary.py",
            },
            {"models/gpt2.py", "tasks/causal_lm.py", "tasks/images.py", "models/convnet.py"},
        ),
        (
            {
                "method": "distillation",
                "model": {"family": "resnet", "source": "unused"},
                "task": {"name": "image-classification"},
            },
            {"training/methods/distillation.py", "models/resnet.py", "models/convnet.py", "tasks/images.py"},
            {"models/encoder.py", "tasks/token_classification.py"},
        ),
    ],
    ids=lambda value: value.get("method", "") if isinstance(value, dict) else "",
)
def test_the_code_of_train_is_what_the_recipe_selects(
    text_file: Path, sections: dict[str, Any], wanted: set[str], unwanted: set[str]
) -> None:
    code = code_of(make_recipe(text_file, **sections), "train")
    assert SHAPES_TRAIN | wanted <= code
    assert not code & unwanted
    assert not [file for file in code if NEVER.fullmatch(file.removesuffix(".py"))]


def test_every_stage_has_its_own_code_and_no_report(text_file: Path) -> None:
    recipe = make_recipe(text_file)
    wanted = {
        "load": {"models/checkpoint_files.py", "models/gpt2.py"},
        "fold": {"quant/folded.py", "models/rebuild.py", "models/gpt2.py"},
        "export": {
            "graph/certificate/layers.py",
            "graph/lint/rules.py",
            "graph/sizes.py",
            "models/folded.py",
        },
        "build": {"engine/build_process.py", "errors.py"},
        "verify": {
            "parity/measure.py",
            "schema/goals.py",
            "parity/forced_codes.py",
            "tasks/scores.py",
            "errors.py",
        },
        "gate": {"schema/goals.py", "errors.py"},
    }
    outside = re.compile(
        r"(cli|report)/(?!__init__).*|verdict/baseline/.*|system/reporter|training/history|pipeline/tracking"
    )
    for stage, files in wanted.items():
        code = code_of(recipe, stage)
        assert files | {f"pipeline/stages/{stage}.py"} <= code, stage
        assert not [file for file in code if outside.fullmatch(file.removesuffix(".py"))], stage
    assert not {"schema/goals.py", "errors.py"} & (code_of(recipe, "fold") | code_of(recipe, "load"))


def test_only_methods_that_build_does_not_call_import_what_its_key_leaves_out() -> None:
    """Inside functions that fold, decode or export a weight, and in no other place of the encodings."""
    for importer, imported in NOT_BUILT:
        file = PACKAGE / f"{importer.removeprefix('qcompress.').replace('.', '/')}.py"
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inside = {
            function.name
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            for node in ast.walk(function)
            if isinstance(node, ast.ImportFrom) and node.module == imported
        }
        assert inside and inside <= {"fold", "decoder", "lower", "is_turned"}, (importer, imported, inside)
    recipe = make_recipe(Path("text.txt"))
    assert "encodings/int_qdq.py" in code_of(recipe, "build")
    assert not [
        file for file in code_of(recipe, "build") if file.startswith("quant/") and "__init__" not in file
    ]


def test_the_table_of_the_documents_is_what_the_keys_cover(text_file: Path) -> None:
    """docs/architecture.md, "What an edit re-runs": rooms by stages, for the recipe of the quickstart."""
    root = Path(__file__).parents[2]
    recipe = load_recipe(root / "recipes" / "quickstart.yaml").recipe
    covered = {stage: {file.partition("/")[0] for file in code_of(recipe, stage)} for stage in STAGES}
    text = (
        (root / "docs" / "architecture.md")
        .read_text(encoding="utf-8")
        .partition("## What an edit re-runs")[2]
    )
    lines = [
        line.strip().split("|")[1:-1]
        for line in text.partition("## ")[0].splitlines()
        if line.startswith("|")
    ]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    assert head[1:] == list(STAGES)
    rooms = [path.name for path in (root / "qcompress").iterdir() if (path / "__init__.py").exists()]
    told = {room.strip("`"): cells for names, *cells in rows for room in names.split(", ")}
    assert sorted(told) == sorted(rooms)
    for room, cells in told.items():
        assert cells == ["yes" if room in covered[stage] else "" for stage in STAGES], room
    assert not any("yes" in told[room] for room in ("cli", "report"))


def test_code_that_a_stage_starts_or_copies_is_in_its_key(plan: Callable[..., keys.Plan]) -> None:
    """No import leads there: the builder is a process, and the scripts of the probe kit are copied."""
    code = {stage: keys.parts(plan(), stage, {})["code"].keys() for stage in ("build", "verify")}
    kit = {path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / "engine/probe_kit").glob("*.py")}
    assert len(kit) == 3 and kit <= code["verify"]
    assert "engine/build_engine.py" in code["build"]


def test_the_table_of_methods_names_the_module_of_each_class() -> None:
    tables = {
        "adapter": methods.ADAPTERS,
        "objective": methods.OBJECTIVES,
        "stepper": methods.STEPPERS,
        "schedule": methods.SCHEDULES,
    }
    for axis, table in tables.items():
        for name, kind in table.items():
            wanted = METHOD_MODULES[axis].get(name, "plain")
            assert kind.__module__ == f"qcompress.training.methods.{wanted}", (axis, name)


def test_an_import_from_outside_the_tables_counts_whatever_the_recipe_selects(tmp_path: Path) -> None:
    folder = tmp_path / "qcompress"
    (folder / "training" / "methods").mkdir(parents=True)
    for name, text in {
        "__init__": "",
        "training/__init__": "",
        "training/loop": "from qcompress.training.methods import TABLE\n",
        "training/methods/__init__": "from qcompress.training.methods import saq, squat\nTABLE = [saq]\n",
        "training/methods/saq": "",
        "training/methods/squat": "",
    }.items():
        (folder / f"{name}.py").write_text(text)
    unused = {("qcompress.training.methods", "qcompress.training.methods.squat")}
    found = code_digest(["qcompress.training.loop"], (), unused, package=folder)
    assert "training/methods/saq.py" in found and "training/methods/squat.py" not in found
    (folder / "training" / "loop.py").write_text("from qcompress.training.methods import TABLE, squat\n")
    assert "training/methods/squat.py" in code_digest(["qcompress.training.loop"], (), unused, package=folder)


def test_stages_before_export_read_no_option_of_export_build_gate_or_verify(text_file: Path) -> None:
    """Why the classes of these sections may be left out of their keys."""
    for stage in ("load", "train", "fold"):
        for file in code_of(make_recipe(text_file), stage) - {"schema/recipe.py"}:
            text = (PACKAGE / file).read_text(encoding="utf-8")
            assert not re.search(r"\brecipe\.(export|build|gate|verify|tracking)\b", text), file
            imported = set(
                re.findall(r"from qcompress\.schema\.(?:recipe|export|goals) import ([^\n]*)", text)
            )
            assert not re.search(r"\b(Build|Export|Profile|Gate|Goal|ParityGoal)\b", " ".join(imported)), file
    assert set(ONLY_CHECKED) == set(STAGES) - {"gate"}


def test_stages_whose_key_has_no_errors_catch_none_of_this_package(text_file: Path) -> None:
    errors = {
        node.name
        for node in ast.parse((PACKAGE / "errors.py").read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    for stage in NOT_CAUGHT:
        for file in code_of(make_recipe(text_file), stage):
            tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
            caught = [
                node.type for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type
            ]
            names = {name.id for each in caught for name in ast.walk(each) if isinstance(name, ast.Name)}
            assert not names & errors, file


def test_left_out_modules_exist_and_say_why() -> None:
    assert all(reason for reason in NO_RESULT.values())
    for table, package in ((FAMILIES, "models"), (TASKS, "tasks")):
        assert {module.__name__.rpartition(".")[0] for module in table.values()} == {f"qcompress.{package}"}
