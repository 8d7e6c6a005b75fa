"""results/<arm>-<task>-<seed>.json: what a study keeps of a run, and how it is read back.

arm task seed recipe_sha256 verdict   which run, and the digest of what its result depends on
rows        the metrics of every measured row of the ladder; `onnx (deployed)` as ONNX Runtime runs it, and,
            where ranges were dynamic, `trained (dynamic)` before they were made static
onnx_bytes  of model.onnx and its data; results from before it was kept have none
cost        updates, updates of a block alone, forward/backward passes, seconds of training
machine     what the run was made on (not its name); versions of every tool
samples     per-sample results of the compared row, six digits each, with the digest of the inputs
settings    the recipe's task, format, training and axes, without what is as by default (see `essence`)
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs import essence

from qcompress import api
from qcompress.errors import QcompressError
from qcompress.report.ladder import BESIDE
from qcompress.system.artifacts import read_json
from qcompress.verdict.measured import Cost, Measured, measured

BYTES_LIMIT = 200_000
"""Most bytes of one result."""


def result_of(loaded: api.LoadedRun, arm: str, task: str, digest: str, row: str) -> dict[str, Any]:
    """The document of a finished run."""
    found = measured(loaded, row, arm)
    values = loaded.recipe.model_dump(mode="json", by_alias=True)
    chosen = {key: essence(getattr(loaded.recipe, key), values[key]) for key in found.settings}
    return {
        "arm": arm,
        "task": task,
        "seed": found.seed,
        "recipe_sha256": digest,
        "verdict": loaded.verdict["verdict"],
        "rows": rows_of(loaded.parity),
        "onnx_bytes": read_json(loaded.path / "sizes.json")["file_bytes"],
        "cost": asdict(found.cost),
        "machine": machine(loaded.manifest["host"]),
        "versions": loaded.manifest["versions"],
        "start": found.start,
        "main": found.main,
        "sets": list(found.sets),
        "settings": chosen,
        "samples": {name: _compact(entry) for name, entry in found.samples.items()},
    }


def rows_of(parity: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Metrics of each measured row, and of what was measured beside it."""
    rows = {}
    for item in parity["rows"]:
        if item["status"] == "measured":
            rows[item["stage"]] = item["metrics"]
        rows |= {f"{item['stage']} ({name})": item[name]["metrics"] for name in BESIDE if item.get(name)}
    return rows


def machine(host: dict[str, Any]) -> dict[str, Any]:
    """The manifest's host without its name, with its processor's."""
    found = {key: host[key] for key in ("platform", "processor", "threads", "python", "gpu")}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found | {"cpu": models[0] if models else platform.processor()}


def spell_machine(host: dict[str, Any]) -> str:
    """A machine in one line."""
    gpu = ", ".join(f"GPU sm{sm}" for sm in host["gpu"]["sm"]) or "no GPU"
    return f"{host['cpu'] or host['processor']}, {host['threads']} threads, {gpu}"


def _compact(value: Any) -> Any:
    """The same with six digits of every float."""
    if isinstance(value, dict):
        return {key: _compact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_compact(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def measured_of(result: dict[str, Any], row: str) -> Measured:
    """A result as `compare` takes it."""
    return Measured(
        arm=result["arm"],
        task=result["task"],
        seed=result["seed"],
        where="{arm}-{task}-{seed}".format(**result),
        metrics=result["rows"][row],
        sets=tuple(result["sets"]),
        main=result["main"],
        samples=result["samples"],
        cost=Cost(**result["cost"]),
        settings=result["settings"],
        start=result["start"],
        machine=spell_machine(result["machine"]),
    )


def write_document(file: Path, document: dict[str, Any]) -> None:
    """JSON with one line for each key, in one step: a reader never sees half of it."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in document.items()]
    partial = file.with_name(file.name + ".tmp")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(partial, file)


def check_size(file: Path) -> None:
    """Refuse a result that does not belong into a repository."""
    size = file.stat().st_size
    if size > BYTES_LIMIT:
        raise QcompressError(
            f"{file} has {size} bytes, more than {BYTES_LIMIT}", fix="lower verify.samples in study.yaml"
        )


def read_result(file: Path) -> dict[str, Any]:
    """One result."""
    return json.loads(file.read_text(encoding="utf-8"))


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of a study, in the order of their names."""
    files = sorted((folder / "results").glob("*.json"))
    return [read_result(file) for file in files if file.name != "trials.json"]
