"""Snapshot of a run for the regression gate, from a run directory or from a baseline.json. No torch.

baseline.json is made to be committed: one line for each field of the per-sample results, so that a diff shows
what changed. It holds one row of the ladder with its results and the float model's predictions, the goals,
digests of what turned data into inputs, and sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompress.errors import IncomparableError, UsageError
from qcompress.parity.sample_results import APART, REFERENCE, Columns, with_entities
from qcompress.schema.goals import Gate
from qcompress.system.artifacts import read_object, sha256_file
from qcompress.verdict.baseline.read import FORMAT, read_written
from qcompress.verdict.judge import served_by_onnxruntime
from qcompress.verdict.run_directory import broken, load
from qcompress.verdict.run_files import read_run_samples

READERS = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
)
"""Files that turn data into inputs. tokenizer.json replaces the other tokenizer files, from which it was
made.
"""

AS_WRITTEN = ("recipe", "row", "compute", "float_trains", "task", "samples", "slices", "readers", "resources",
              "latency", "device", "versions")  # fmt: skip
"""Keys of baseline.json that a snapshot takes unchanged."""


@dataclass(frozen=True)
class Snapshot:
    """One row of a run, with everything that the gate compares: results, goals, resources, digests."""

    where: str
    recipe: str
    row: str
    goals: Gate
    require: tuple[str, ...]
    compute: str
    float_trains: bool
    task: dict[str, Any]
    parity: dict[str, Any]
    samples: dict[str, dict[str, list[Any]]]
    """Columns by evaluation set: sample data, the row's results, and `reference`."""
    known: dict[str, tuple[str, ...]]
    """Names of the columns that do not depend on the model, by evaluation set."""
    slices: dict[str, dict[str, list[str | None]]]
    """Values of the user's slice columns, by evaluation set."""
    readers: dict[str, str]
    resources: dict[str, float]
    latency: dict[str, float] | None
    """`median`, `p99`, `least` and `runs` of the engine's latency, if measured."""
    device: str | None
    """GPU on which the engine was measured."""
    versions: dict[str, str]
    broken: tuple[str, ...] = ()
    """Messages on files of a run that differ from the measured ones; empty for a baseline.json."""
    served: bool = False
    """ONNX Runtime's default session serves the run's target; False for a baseline.json."""

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the row."""
        return next(row["metrics"] for row in self.parity["rows"] if row["stage"] == self.row)

    def columns(self, name: str) -> Columns:
        """Columns of a set, including derived ones (entities of each sequence)."""
        return with_entities(self.samples[name], self.task.get("labels"))

    def to_json(self) -> dict[str, Any]:
        """Content of baseline.json: one row, without distances to files that are not committed."""
        return {
            "format": FORMAT,
            "recipe": self.recipe,
            "row": self.row,
            "gate": self.goals.model_dump(mode="json", by_alias=True, exclude_none=True),
            "require": list(self.require),
            "compute": self.compute,
            "float_trains": self.float_trains,
            "task": self.task,
            "parity": self.parity,
            "known": {name: list(names) for name, names in self.known.items()},
            "readers": self.readers,
            "resources": self.resources,
            "latency": self.latency,
            "device": self.device,
            "versions": self.versions,
            "slices": self.slices,
            "samples": self.samples,
        }


def read_snapshot(path: Path, row: str | None = None) -> Snapshot:
    """Read a run directory or a baseline.json; `row` of a run, by default the last measured one.

    Raises UsageError if the path is neither, IncomparableError if the run has no such row.
    """
    if path.is_dir():
        return _snapshot_of_run(path, row)
    if path.is_file():
        return _snapshot_of_file(path)
    raise UsageError(
        f"{path} does not exist", fix="name a run directory, or a file of `qcompress baseline promote`"
    )


# From a run directory -----------------------------------------------------------------------------


def _snapshot_of_run(folder: Path, row: str | None) -> Snapshot:
    loaded = load(folder)
    loaded.demand_whole()
    if not (folder / "samples.json.gz").is_file():
        raise UsageError(f"{folder} has no samples.json.gz, so it cannot be compared sample by sample",
                         fix=f"measure it again: qcompress verify {folder}")  # fmt: skip
    recipe, parity = loaded.recipe, loaded.parity
    row = row or _last_measured(folder, parity)
    sets = read_run_samples(folder / "samples.json.gz")
    _match(folder, parity, row, sets)
    known = {name: tuple(key for key in entry if key not in APART) for name, entry in sets.items()}
    samples = {name: _columns(entry, row) for name, entry in sets.items()}
    task = recipe.task.model_dump(mode="json", by_alias=True)
    return Snapshot(
        where=str(folder),
        recipe=recipe.name,
        row=row,
        goals=recipe.gate,
        require=tuple(recipe.verify.require),
        compute=recipe.format.compute,
        float_trains=recipe.trains_float,
        served=served_by_onnxruntime(recipe),
        task=task | ({"labels": list(loaded.labels)} if loaded.labels else {}),
        parity=parity,
        samples=samples,
        known=known,
        slices={name: entry["slices"] for name, entry in sets.items() if "slices" in entry},
        readers=_readers(folder),
        resources=_resources(folder, parity),
        latency=_latency(parity),
        device=(_measured_on(parity).get("device") or {}).get("gpu"),
        versions=loaded.manifest.get("versions", {}),
        broken=tuple(broken(folder, parity)),
    )


def _row(parity: Mapping[str, Any], stage: str) -> dict[str, Any] | None:
    return next((row for row in parity["rows"] if row["stage"] == stage), None)


def _last_measured(folder: Path, parity: Mapping[str, Any]) -> str:
    measured = [row["stage"] for row in parity.get("rows", []) if row["status"] == "measured"]
    if not measured:
        raise IncomparableError(f"{folder}: no row was measured", fix="let the run measure itself")
    return measured[-1]


def _match(folder: Path, parity: Mapping[str, Any], row: str, sets: Mapping[str, Any]) -> None:
    """Check that the row was measured and that samples.json.gz has its results."""
    measured_row = _row(parity, row)
    if measured_row is None or measured_row["status"] != "measured":
        why = measured_row["reason"] if measured_row else "the report has no such row"
        raise IncomparableError(f"{folder}: the row {row} was not measured: {why}")
    for name, entry in sets.items():
        if row not in entry["rows"]:
            raise IncomparableError(f"{folder}: samples.json.gz has no results of the row {row} on {name}",
                                    fix=f"measure it again: qcompress verify {folder}")  # fmt: skip


def _columns(entry: Mapping[str, Any], row: str) -> dict[str, list[Any]]:
    columns = {name: values for name, values in entry.items() if name not in APART}
    columns |= entry["rows"][row]
    if "prediction" in entry["rows"].get("float", {}):
        columns[REFERENCE] = entry["rows"]["float"]["prediction"]
    return columns


def _readers(folder: Path) -> dict[str, str]:
    """Digests of the files that turn data into inputs. JSON is parsed first: versions of a library order keys
    differently.
    """
    names = [name for name in READERS if (folder / name).is_file()]
    if READERS[0] in names:
        names = [name for name in names if name in (READERS[0], READERS[-1])]
    return {name: _digest(folder / name) for name in names}


def _digest(file: Path) -> str:
    import hashlib

    if file.suffix != ".json":
        return sha256_file(file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IncomparableError(f"{file} cannot be read ({error})") from None
    if isinstance(value, dict) and file.name == READERS[-1]:
        value = {key: item for key, item in value.items() if not key.endswith("_version")}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _resources(folder: Path, parity: Mapping[str, Any]) -> dict[str, float]:
    """Measured resources of a run, a subset of `goals.RESOURCES`."""
    resources: dict[str, float] = {}
    if (folder / "sizes.json").is_file():
        resources["onnx_bytes"] = read_object(folder / "sizes.json")["file_bytes"]
    build = folder / "engine" / "build.json"
    if build.is_file() and (plan := read_object(build).get("plan")):
        resources["plan_bytes"] = plan["bytes"]
    if latency := _latency(parity):
        resources["latency_ms"] = latency["median"]
    device = _measured_on(parity).get("device") or {}
    if "memory_bytes" in device:
        resources["device_memory_bytes"] = device["memory_bytes"]
    return resources


def _latency(parity: Mapping[str, Any]) -> dict[str, float] | None:
    """Latency of the first profile; None if it was not measured (`speed` is then a reason, not a list)."""
    speed = _measured_on(parity).get("speed")
    return speed[0]["latency_ms"] if speed and isinstance(speed, list) else None


def _measured_on(parity: Mapping[str, Any]) -> Mapping[str, Any]:
    return (_row(parity, "engine") or {}).get("measured_on") or {}


# From baseline.json -------------------------------------------------------------------------------


def _snapshot_of_file(file: Path) -> Snapshot:
    written = read_written(file)
    return Snapshot(
        where=str(file),
        goals=written.gate,
        require=tuple(written.require),
        known={name: tuple(names) for name, names in written.known.items()},
        parity=written.parity.model_dump(),
        **{name: getattr(written, name) for name in AS_WRITTEN},
    )
