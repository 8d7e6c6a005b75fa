"""What a run and its stages depend on: the parts of their keys, in one place. No torch.

A stage's key covers the recipe's values that it reads, the digests of its inputs and its data, the code it
uses, and the versions of its tools.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import qcompress
from qcompress.adopted import files_of
from qcompress.check import Report, check_model, head_of
from qcompress.codekey import code_digest, stage_key
from qcompress.data_options import FILES
from qcompress.formats import CodebookFormat
from qcompress.host import describe_host, device_kind, threads
from qcompress.own import active
from qcompress.processes import announced
from qcompress.recipe import Resolved
from qcompress.schema import STAGES, Recipe
from qcompress.stages.load import fingerprint, locate
from qcompress.tasks import TASKS
from qcompress.tasks.text import fingerprint as text_fingerprint
from qcompress.tracking import demand_trackers
from qcompress.workspace import Step

TOOLS: dict[str, tuple[str, ...]] = {
    "load": (),
    "train": ("torch", "transformers", "tokenizers", "accelerate", "numpy", "pillow"),
    "fold": ("torch", "transformers"),
    "export": ("torch", "transformers", "onnx", "onnxscript", "onnx-ir"),
    "build": ("tensorrt", "tensorrt_rtx"),
    "verify": (
        "torch",
        "transformers",
        "tokenizers",
        "onnxruntime",
        "onnxruntime-gpu",
        "numpy",
        "pillow",
        "scikit-learn",
        "scipy",
        "tensorrt",
        "tensorrt_rtx",
    ),  # fmt: skip
    "gate": (),
}
"""Packages whose version can change a stage's result."""


BY_MODELOPT = ("smoothquant", "awq")
"""Adapters whose scales nvidia-modelopt computes."""

HIDDEN_CODE = {
    "build": ("qcompress.targets.builder",),
    "verify": (
        "qcompress.probe_kit.measure_engine",
        "qcompress.probe_kit.engine_runners",
        "qcompress.probe_kit.engine_speed",
    ),
}
"""Code that a stage starts as a process or copies, and does not import."""


@dataclass(frozen=True)
class Plan:
    """What a recipe depends on, before anything runs."""

    resolved: Resolved
    directory: Path
    digests: dict[str, str]
    report: Report
    graph: dict[str, str] = field(default_factory=dict)
    """Digests of the files of `export.graph`."""

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe


def prepare(resolved: Resolved) -> Plan:
    """Find the checkpoint and check the recipe against it. Seconds, no torch."""
    demand_trackers(resolved.recipe.tracking)
    directory = locate(resolved.recipe.model, resolved.base)
    digests = fingerprint(directory)
    report = check_model(resolved, directory)
    graph = files_of(resolved.base / resolved.recipe.export.graph) if resolved.recipe.export.graph else {}
    return Plan(resolved, directory, digests, report, graph)


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages that a recipe runs: a graph made elsewhere was trained and folded elsewhere."""
    without = ("train", "fold") if recipe.export.graph else ()
    return tuple(stage for stage in STAGES if stage not in without)


def run_key(plan: Plan, one_of_seeds: bool = False) -> str:
    """Name of the run's folder: a digest of the recipe and of the content it names."""
    values = plan.recipe.model_dump(mode="json", exclude={"tracking"})
    if one_of_seeds:
        del values["seed"]
    inputs = {"values": values, "inputs": plan.digests} | ({"graph": plan.graph} if plan.graph else {})
    key = stage_key("run", inputs)[:12]
    return f"{key}/seed-{plan.recipe.seed}" if one_of_seeds else key


def parts(plan: Plan, stage: str, steps: Mapping[str, Step]) -> dict[str, object]:
    """Everything that the result of a stage depends on."""
    recipe, base = plan.recipe, plan.resolved.base
    values, data, inputs = _values(recipe)[stage], {}, {}
    if stage == "load":
        inputs = plan.digests
        new = plan.report.architecture.new_head
        values["new_head"] = {"seed": recipe.seed, "tensors": list(new)} if new else None
    code = [f"qcompress.stages.{stage}", *HIDDEN_CODE.get(stage, ())]
    if stage == "export" and plan.graph:
        data = plan.graph
        code = ["qcompress.adopted", "qcompress.targets.trial"]
    if stage == "train":
        sections = {"train": recipe.data.train, "calibration": recipe.data.calibration}
        data = {name: text_fingerprint(section, base) for name, section in sections.items() if section}
    if stage == "verify":
        data = {name: text_fingerprint(section, base) for name, section in recipe.data.evaluate.items()}
    inputs = inputs or {name: steps[name].digest for name in inputs_of(recipe, stage) if name in steps}
    found = {
        "recipe": recipe.name,
        "values": values,
        "code": code_digest(code, leave_out=_unselected(recipe, stage)),
        "versions": versions_of(stage, recipe),
        "inputs": inputs,
        "data": data,
    }
    if stage in ("train", "fold", "export", "verify"):
        found["device"] = {"kind": device_kind(recipe.train.device), "threads": threads()}
    if stage == "train" and announced() > 1:  # sums in another order give other bits
        found["device"]["processes"] = announced()
    if stage == "train":
        custom = active().code(recipe)
        # a method's module imports the table of all methods first; only who names the table uses the others
        table = {"qcompress.methods"} - custom.modules
        found["code"] |= custom.files | code_digest(sorted(custom.modules), {"qcompress", *table})
        found["versions"] |= custom.versions
    if stage == "verify":  # where there is a GPU, the engine runs on it
        found["device"]["gpu"] = describe_host()["gpu"]
    if stage == "build":
        found["device"] = {"machine": platform.machine()} | describe_host()["gpu"]
    return found


INPUTS: dict[str, tuple[str, ...]] = {
    "load": (),
    "train": ("load",),
    "fold": ("load", "train"),
    "export": ("fold",),
    "build": ("export",),
    "verify": ("load", "train", "fold", "export", "build"),
    "gate": ("verify",),
}
"""Stages whose artifacts a stage reads."""


def inputs_of(recipe: Recipe, stage: str) -> tuple[str, ...]:
    """The same of the stages that this recipe has."""
    if stage == "export" and recipe.export.graph:
        return ("load",)
    return tuple(name for name in INPUTS[stage] if name in stages_of(recipe))


def _values(recipe: Recipe) -> dict[str, dict[str, object]]:
    """The part of the recipe that each stage reads."""
    whole = recipe.model_dump(mode="json", by_alias=True)
    axes = ("quantizer", "adapter", "objective", "stepper", "schedule")
    learned = {key: whole[key] for key in ("seed", "task", "format", "train", *axes)}
    learned["data"] = {key: _unplaced(whole["data"][key]) for key in ("train", "calibration")}
    return {
        "load": {
            "family": recipe.model.family,
            "blocks": recipe.model.blocks,
            "head": asdict(head_of(recipe)),
            "processor": TASKS[recipe.task.name].processor(recipe.task),
        },
        "train": learned,
        "fold": {},
        "export": {
            "export": whole["export"],
            "target": recipe.build.target,
            "provenance": provenance(recipe),
        },
        "build": {"build": whole["build"]},
        "verify": {
            "task": whole["task"],
            "evaluate": {name: _unplaced(data) for name, data in whole["data"]["evaluate"].items()},
            "verify": {key: value for key, value in whole["verify"].items() if key != "require"},
            "compute": recipe.format.compute,
            "activations": whole["quantizer"]["activations"],
        },
        "gate": {
            "gate": whole["gate"],
            "require": recipe.verify.require,
            "compute": recipe.format.compute,
            "is_float": recipe.trains_float,
            "target": recipe.build.target,
        },
    }


def _unplaced(data: dict[str, object] | None) -> dict[str, object] | None:
    """A section of `data` with the names of its files and not their folders: what counts is their content,
    and that is a part of the key by itself.
    """
    if data is None:
        return None
    placed = {
        key: [Path(name).name for name in value] for key, value in data.items() if key in FILES and value
    }
    if data.get("folder"):
        placed["folder"] = Path(data["folder"]).name
    return data | placed


def provenance(recipe: Recipe) -> dict[str, str]:
    """Metadata of the ONNX file. The hash covers what shapes the file: not the gate, not the evaluation, not
    who is told of it.
    """
    whole = recipe.model_dump(mode="json", by_alias=True)
    for section in ("gate", "verify", "build", "tracking"):
        del whole[section]
    del whole["data"]["evaluate"]
    whole["data"] = {key: _unplaced(section) for key, section in whole["data"].items()}
    return {
        "recipe": recipe.name,
        "recipe_sha256": stage_key("recipe", {"values": whole}),
        "version": qcompress.__version__,
        "method": recipe.method,
    }


def _unselected(recipe: Recipe, stage: str) -> set[str]:
    """What must not re-run a stage: methods that the recipe does not use, and the version's number."""
    unselected = {"qcompress"}
    if stage == "train" and "quadapter" not in (recipe.adapter.name, recipe.method):
        unselected.add("qcompress.methods.quadapter")
    if stage == "train":
        fixed = {"smoothquant", "awq"} - {recipe.adapter.name}
        fixed |= {"modelopt"} if recipe.adapter.name not in BY_MODELOPT else set()
        fixed |= {"ipq"} if recipe.schedule.name != "staged" else set()
        unselected |= {f"qcompress.methods.{name}" for name in fixed}
        unselected |= {
            f"qcompress.methods.{name}" for name in ("saq", "squat") if name != recipe.stepper.name
        }
        unselected |= {"qcompress.methods.ball"} if recipe.stepper.name == "plain" else set()
    return unselected


def versions_of(stage: str, recipe: Recipe) -> dict[str, str]:
    by_modelopt = stage == "train" and recipe.adapter.name in BY_MODELOPT
    found = {}
    form = recipe.format
    weights = [form.weights, form.embeddings, *(exception.weights for exception in form.layers.values())]
    by_kmeans = stage == "train" and any(isinstance(one, CodebookFormat) for one in weights)
    more = (["nvidia-modelopt"] if by_modelopt else []) + (["faiss-cpu"] if by_kmeans else [])
    for package in (*TOOLS[stage], *more):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
