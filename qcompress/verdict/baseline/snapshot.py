"""What a gate knows of a run: a run directory, or the baseline.json that `baseline promote` wrote. No torch.

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
"""Files that turn data into inputs. Where tokenizer.json is there, the others are what it was made from."""

AS_WRITTEN = ("recipe", "row", "compute", "float_trains", "task", "samples", "slices", "readers", "resources",
              "latency", "device", "versions")  # fmt: skip
"""Keys of baseline.json that are a standing's own as they are."""


@dataclass(frozen=True)
class Standing:
    """A row of a run as it is judged against another: where it stands, and by what."""

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
    """Columns by evaluation set: what is known of the samples, the row's results, `reference`."""
    known: dict[str, tuple[str, ...]]
    """Names of the columns that no model changes, by evaluation set."""
    slices: dict[str, dict[str, list[str | None]]]
    """Values of a user's columns, by the evaluation sets that have some."""
    readers: dict[str, str]
    resources: dict[str, float]
    latency: dict[str, float] | None
    """`median`, `p99`, `least` and `runs` of the engine's latency, where it was measured."""
    device: str | None
    """GPU that the engine was measured on."""
    versions: dict[str, str]
    broken: tuple[str, ...] = ()
    """Files of a run that are not what was measured; a baseline.json has none."""
    served: bool = False
    """ONNX Runtime's default session serves the run's target; unknown of a baseline.json."""

    @property
    def metrics(self) -> dict[str, float]:
        """The row's."""
        return next(row["metrics"] for row in self.parity["rows"] if row["stage"] == self.row)

    def columns(self, name: str) -> Columns:
        """Columns of a set, with those that are made of others: entities of each sequence."""
        return with_entities(self.samples[name], self.task.get("labels"))

    def to_json(self) -> dict[str, Any]:
        """The content of baseline.json: one row, without distances between files that are not committed."""
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


def read_standing(path: Path, row: str | None = None) -> Standing:
    """A run directory, or a baseline.json; `row` of a run, by default the last that was measured.

    Raises UsageError for what is neither, IncomparableError for a run without such a row.
    """
    if path.is_dir():
        return _of_run(path, row)
    if path.is_file():
        return _of_file(path)
    raise UsageError(
        f"{path} does not exist", fix="name a run directory, or a file of `qcompress baseline promote`"
    )


# A run --------------------------------------------------------------------------------------------


def _of_run(folder: Path, row: str | None) -> Standing:
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
    return Standing(
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
    """The row was measured, and its per-sample results are there."""
    found = _row(parity, row)
    if found is None or found["status"] != "measured":
        why = found["reason"] if found else "there is no such row"
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
    """Digests of what they say: JSON is written in another order by another version of a library."""
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
    """What of `goals.RESOURCES` is known of a run."""
    found: dict[str, float] = {}
    if (folder / "sizes.json").is_file():
        found["onnx_bytes"] = read_object(folder / "sizes.json")["file_bytes"]
    build = folder / "engine" / "build.json"
    if build.is_file() and (plan := read_object(build).get("plan")):
        found["plan_bytes"] = plan["bytes"]
    if latency := _latency(parity):
        found["latency_ms"] = latency["median"]
    device = _measured_on(parity).get("device") or {}
    if "memory_bytes" in device:
        found["device_memory_bytes"] = device["memory_bytes"]
    return found


def _latency(parity: Mapping[str, Any]) -> dict[str, float] | None:
    """Of the first profile; what could not be measured has a reason instead of a list."""
    speed = _measured_on(parity).get("speed")
    return speed[0]["latency_ms"] if speed and isinstance(speed, list) else None


def _measured_on(parity: Mapping[str, Any]) -> Mapping[str, Any]:
    return (_row(parity, "engine") or {}).get("measured_on") or {}


# A file -------------------------------------------------------------------------------------------


def _of_file(file: Path) -> Standing:
    written = read_written(file)
    return Standing(
        where=str(file),
        goals=written.gate,
        require=tuple(written.require),
        known={name: tuple(names) for name, names in written.known.items()},
        parity=written.parity.model_dump(),
        **{name: getattr(written, name) for name in AS_WRITTEN},
    )
