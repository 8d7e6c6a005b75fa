"""Cache keys of a run and its stages: collects everything that they depend on. No torch.

`key_scope.py` has the table of the scope of each stage's key.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import qcompress
from qcompress.errors import ModelError
from qcompress.graph.external import files_of
from qcompress.pipeline.key_scope import (
    HIDDEN_CODE,
    INPUTS,
    VALUES,
    no_result,
    scope_of,
    unselected,
    versions_of,
)
from qcompress.pipeline.stages.load import fingerprint, locate
from qcompress.pipeline.tracking import demand_trackers
from qcompress.recipe.check import Report, check_model, head_of
from qcompress.recipe.load import Resolved
from qcompress.schema.custom import active
from qcompress.schema.data import FILES
from qcompress.schema.recipe import STAGES, Recipe
from qcompress.system.distributed import announced
from qcompress.system.fingerprint import code_digest, stage_key
from qcompress.system.gpu import device_kind
from qcompress.system.host import describe_host, threads
from qcompress.system.placed import read_placed
from qcompress.system.user_code import files_of as code_files_of
from qcompress.system.workspace import Step
from qcompress.tasks import TASKS
from qcompress.tasks.text import fingerprint as text_fingerprint


@dataclass(frozen=True)
class Plan:
    """Inputs of a recipe, resolved and checked before anything runs."""

    resolved: Resolved
    directory: Path
    digests: dict[str, str]
    report: Report
    graph: dict[str, str] = field(default_factory=dict)
    """Digests of the files of `export.graph`."""

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe


def prepare(resolved: Resolved, *, whole: bool = True, report: Report | None = None) -> Plan:
    """Locate the checkpoint, and check the recipe against it and its data. No torch.

    `whole`: check all rows of the data, as a run requires, and not only the first of each file. `report`: the
    result of a check of this recipe, which is not repeated.
    """
    demand_trackers(resolved.recipe.tracking)
    directory = locate(resolved.recipe.model, resolved.base)
    report = report or check_model(resolved, directory, whole=whole)  # before gigabytes are hashed
    digests = fingerprint(directory)
    if resolved.recipe.model.run is not None:
        _check_source(directory, digests)
    graph = files_of(resolved.base / resolved.recipe.export.graph) if resolved.recipe.export.graph else {}
    return Plan(resolved, directory, digests, report, graph)


def _check_source(run: Path, digests: Mapping[str, str]) -> None:
    """Raise ModelError for a finished run whose checkpoint was changed afterwards."""
    placed = read_placed(run)
    for name, digest in digests.items():
        if name in placed and placed[name]["sha256"] != digest:
            raise ModelError(
                f"model.run: {run / name} was changed after that run had made it",
                fix="run the recipe of that run again: it puts the file back",
            )


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """Stages that a recipe runs; an external graph is neither trained nor folded."""
    without = ("train", "fold") if recipe.export.graph else ()
    return tuple(stage for stage in STAGES if stage not in without)


def run_key(plan: Plan, one_of_seeds: bool = False) -> str:
    """Name of the run's folder: a digest of the recipe and of the files it names."""
    values = plan.recipe.model_dump(mode="json", exclude={"tracking"})
    if one_of_seeds:
        del values["seed"]
    inputs = {"values": values, "inputs": plan.digests} | ({"graph": plan.graph} if plan.graph else {})
    key = stage_key("run", inputs)[:12]
    return f"{key}/seed-{plan.recipe.seed}" if one_of_seeds else key


def parts(plan: Plan, stage: str, steps: Mapping[str, Step]) -> dict[str, object]:
    """Everything that a stage's result depends on (`key_scope.py`)."""
    recipe = plan.recipe
    values, inputs = _values(recipe, stage), {}
    if stage == "gate" and plan.resolved.smoke:
        values["smoke"] = True
    if stage == "load":
        inputs = plan.digests
        new = plan.report.architecture.new_head
        values["new_head"] = {"seed": recipe.seed, "tensors": list(new)} if new else None
    inputs = inputs or {name: steps[name].digest for name in inputs_of(recipe, stage) if name in steps}
    code, versions = _code(plan, stage)
    key_parts = {
        "recipe": recipe.name,
        "values": values,
        "code": code,
        "versions": versions,
        "inputs": inputs,
        "data": plan.graph if stage == "export" else _data(plan, stage),
    }
    device = _device(recipe, stage)
    return key_parts | ({"device": device} if device else {})


def _code(plan: Plan, stage: str) -> tuple[dict[str, str], dict[str, str]]:
    """Digests of the code that a stage can run, and versions of its tools."""
    recipe = plan.recipe
    roots, unused = (
        [f"qcompress.pipeline.stages.{stage}", *HIDDEN_CODE.get(stage, ())],
        unselected(recipe, stage),
    )
    versions, files = versions_of(stage, recipe), {}
    if stage == "export" and plan.graph:
        roots = ["qcompress.graph.external", "qcompress.graph.trial"]
    if stage == "train":
        custom = active().code(recipe)
        roots += sorted(custom.modules)
        # a custom class that imports one of the tables may use any of its entries
        unused = {(importer, imported) for importer, imported in unused if importer not in custom.modules}
        files, versions = custom.files, versions | custom.versions
    return code_digest(roots, no_result(stage), unused) | files, versions


def _data(plan: Plan, stage: str) -> dict[str, dict[str, str]]:
    """Fingerprints of the data that a stage reads. Training does not depend on the names of files."""
    base, data = plan.resolved.base, plan.recipe.data
    prints = {name: code_files_of(named, base) for name, named in _functions(plan.recipe, stage)}
    if stage == "verify":
        return prints | {name: text_fingerprint(section, base) for name, section in data.evaluate.items()}
    if stage != "train":
        return {}
    for name, section in (("train", data.train), ("calibration", data.calibration)):
        if section is not None:
            files = text_fingerprint(section, base)
            names = {_unnamed(file): digest for file, digest in files.items()}
            prints[name] = names if section.files else files
    return prints


def _functions(recipe: Recipe, stage: str) -> Iterator[tuple[str, str]]:
    """The user's functions that a stage calls, as (label, FILE:FUNCTION)."""
    used = {"train": ("loss",), "verify": ("score", "error")}
    if stage == "verify" and recipe.verify.sharpness is not None:
        used["verify"] += ("loss",)
    for name in used.get(stage, ()):
        if (named := getattr(recipe.task, name, None)) is not None:
            yield f"task.{name}", named


def _unnamed(file: str) -> str:
    """Drop the name from `0:train.tsv` but keep the suffix, which selects the reader."""
    index, _, name = file.partition(":")
    return f"{index}:{Path(name).suffix}"


def _device(recipe: Recipe, stage: str) -> dict[str, object]:
    """Properties of the machine that change the bits of a stage's result."""
    device: dict[str, object] = {}
    if stage in ("train", "fold", "export", "verify"):
        device = {"kind": device_kind(recipe.train.device), "threads": threads()}
    if stage == "train" and announced() > 1:  # another summation order gives other bits
        device["processes"] = announced()
    if stage == "verify":  # where there is a GPU, the engine runs on it
        device["gpu"] = describe_host()["gpu"]
    if stage == "build":
        device = {"machine": platform.machine()} | describe_host()["gpu"]
    return device


def inputs_of(recipe: Recipe, stage: str) -> tuple[str, ...]:
    """Input stages of `stage`, restricted to the stages this recipe runs."""
    if stage == "export" and recipe.export.graph:
        return ("load",)
    return tuple(name for name in INPUTS[stage] if name in stages_of(recipe))


def _values(recipe: Recipe, stage: str) -> dict[str, object]:
    """Values that affect a stage's result: `VALUES` within `scope_of`, and values derived from the recipe."""
    whole = _picked(recipe, stage)
    if stage == "load":
        processor = TASKS[recipe.task.name].processor(recipe.task)
        return {**whole, "head": asdict(head_of(recipe)), "processor": processor}
    if stage == "export":
        return {**whole, "provenance": provenance(recipe)}
    if stage == "gate":
        return {**whole, "is_float": recipe.trains_float}
    return whole


def _picked(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Keys of a recipe that `VALUES` lists for a stage."""
    whole = scope_of(recipe, stage)
    data = whole["data"]
    placed = {key: _unplaced(data[key], named=False) for key in ("train", "calibration")}
    placed["evaluate"] = {name: _unplaced(section, named=True) for name, section in data["evaluate"].items()}
    whole["data"] = placed
    values: dict[str, Any] = {}
    for dotted in VALUES[stage]:
        section, _, key = dotted.partition(".")
        if key:
            values.setdefault(section, {})[key] = whole[section][key]
        else:
            values[section] = whole[section]
    return values


def _unplaced(data: dict[str, Any] | None, named: bool) -> dict[str, Any] | None:
    """A section of `data` without the folders of its files, whose content is in the key already. `named`:
    keep the files' names, which appear in the results of samples; otherwise only their suffixes.
    """
    if data is None:
        return None
    placed: dict[str, Any] = {
        key: [Path(name).name if named else Path(name).suffix for name in value]
        for key, value in data.items()
        if key in FILES and value
    }
    if data.get("folder"):
        placed["folder"] = Path(data["folder"]).name if named else ""
    return data | placed


def provenance(recipe: Recipe) -> dict[str, str]:
    """Metadata of the ONNX file. Hashes only the recipe's values that affect the file: those of the stages
    load, train and export.
    """
    whole = {stage: _picked(recipe, stage) for stage in ("load", "train", "export")}
    return {
        "recipe": recipe.name,
        "recipe_sha256": stage_key("recipe", {"values": whole}),
        "version": qcompress.__version__,
        "method": recipe.method,
    }
