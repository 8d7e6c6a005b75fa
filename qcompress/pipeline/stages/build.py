"""Stage `build`: OnnxModel -> Engine for one target, or the reason why it is deferred and the command for the
device.

Reads model.onnx (+ model.onnx.data); writes build.json, and model.plan if this machine can build it. TensorRT
runs in a child process, whose crash, refusal or limit becomes an ExportError here. No torch.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from qcompress.engine.build_process import Progress, run_builder
from qcompress.engine.plan_bytes import check_plan, limit_bytes, predicted_bytes
from qcompress.engine.profiles import profile_shapes
from qcompress.errors import ExportError, MachineError, UsageError
from qcompress.graph.lint.soundness import demand_sound
from qcompress.graph.view import View, dimensions, read
from qcompress.schema.recipe import Build, Profile
from qcompress.schema.targets import Target, find_target, lacks, option_refusals
from qcompress.system.artifacts import Engine, OnnxModel, sha256_file, write_json

PLAN, RECORD = "model.plan", "build.json"


def build(onnx: OnnxModel, options: Build, out: Path, progress: Progress | None = None) -> Engine:
    """Build the engine of an exported model."""
    return build_file(onnx.file, options, out, progress)


def build_file(file: Path, options: Build, out: Path, progress: Progress | None = None) -> Engine:
    """Build the engine of any ONNX file with explicit Q/DQ; `out` is an empty folder. Raises MachineError if
    `build.here` is `required` and this machine cannot build it.
    """
    target = find_target(options.target)
    for refusal in option_refusals(target, options):
        raise UsageError(f"{refusal.key}: {refusal.message}", fix=refusal.fix)
    cache = Path(options.timing_cache) if options.timing_cache is not None else None
    if cache is not None and (cache.is_dir() or not cache.parent.is_dir()):
        raise UsageError(
            f"build.timing_cache: {cache} cannot be written", fix="name a file in an existing folder"
        )
    view = read(file)
    demand_sound(view)
    record = _record(view, target, options)
    if target.backend is None:
        return _write(out, record, status="none", reason=f"target {target.name} runs the ONNX file itself")
    shapes = profile_shapes(view, options.profiles)
    command = device_command(file, options)
    if options.here == "never":
        return _write(out, record, status="deferred", reason="build.here is `never`", command=command)
    reason = lacks(target)
    if not reason:
        reason = _build_here(view, target, options, out, shapes, record, progress)
    if not reason:
        return _write(out, record, status="built")
    if options.here == "required":
        raise MachineError(
            f"this machine cannot build for target {target.name}: {reason}",
            fix=f"run `{command}` on the device, or set `build.here: auto`",
        )
    return _write(out, record, status="deferred", reason=reason, command=command)


def device_command(file: Path, options: Build) -> str:
    """Command that builds the engine on the device, with the ONNX file and its data in the current folder."""
    words = ["qcompress", "build", file.name, "--target", options.target, "--out", "engine"]
    if options.profiles != [Profile()]:
        values = [profile.model_dump(exclude_defaults=True) for profile in options.profiles]
        words += ["--profiles", json.dumps(values)]
    if options.version_compatible:
        words.append("--version-compatible")
    if options.hardware_compatibility != "none":
        words += ["--hardware-compatibility", options.hardware_compatibility]
    if options.timing_cache is not None:
        words += ["--timing-cache", Path(options.timing_cache).name]
    return shlex.join(words)


def _record(view: View, target: Target, options: Build) -> dict[str, Any]:
    """Fields of build.json that are known before the build."""
    predicted = predicted_bytes(view)
    limit = limit_bytes(predicted, lean_runtime=options.version_compatible)
    files = [view.file, *view.data_files]
    axes = {size for value in view.inputs for size in dimensions(value) or () if isinstance(size, str)}
    return {
        "status": None,
        "reason": None,
        "command": None,
        "target": target.name,
        "backend": target.backend,
        "versions": {},
        "plan": None,
        "onnx": {
            "sha256": sha256_file(view.file),
            "bytes": sum(file.stat().st_size for file in files),
            "data": {file.name: sha256_file(file) for file in view.data_files},
        },
        "predicted_bytes": predicted,
        "limit_bytes": limit,
        "version_compatible": options.version_compatible,
        "hardware_compatibility": options.hardware_compatibility,
        "timing_cache": None,
        "profiles": [
            {name: sizes for name, sizes in profile.ranges.items() if name in axes}
            for profile in (options.profiles if target.backend else ())
        ],
        "inputs": {},
        "outputs": {},
        "messages": [],
        "warnings": [],
    }


def _write(out: Path, record: dict[str, Any], **values: str) -> Engine:
    write_json(out / RECORD, {**record, **values})
    return Engine(out)


def _build_here(view: View, target: Target, options: Build, out: Path, shapes: list[dict[str, Any]],
                record: dict[str, Any], progress: Progress | None) -> str:  # fmt: skip
    """Build, check and complete the record; returns an empty text, or what this machine lacks."""
    plan = out.resolve() / PLAN
    spec = {
        "onnx": str(view.file.resolve()),
        "plan": str(plan),
        "target": target.name,
        "backend": target.backend,
        "versions": target.versions,
        "sm": target.sm,
        "profiles": shapes,
        "memory_mib": options.memory_mib,
        "version_compatible": options.version_compatible,
        "hardware_compatibility": options.hardware_compatibility,
        "timing_cache": options.timing_cache and str(Path(options.timing_cache).resolve()),
    }
    outcome = run_builder(spec, options.timeout_s, progress)
    if outcome.final["event"] == "unavailable":
        return f"{outcome.final['reason']}; the target needs {target.requirement}"
    try:
        size, warning = check_plan(
            plan, record["predicted_bytes"], view, lean_runtime=options.version_compatible
        )
    except ExportError:
        plan.unlink()  # a refused plan must not be deployed
        raise
    record |= {
        "versions": {target.backend: outcome.version},
        "plan": {"sha256": sha256_file(plan), "bytes": size},
        "inputs": outcome.final["inputs"],
        "outputs": outcome.final["outputs"],
        "timing_cache": outcome.final["timing_cache"],
        "messages": outcome.messages,
        "warnings": [warning] if warning else [],
    }
    return ""
