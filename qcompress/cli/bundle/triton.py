"""Writer of Triton model repositories from finished runs. Reads the run's directory; no torch.

    DIR/bundle.json             digests of all other files; run, verdict, target, versions
    DIR/sbom.cdx.json           software bill of materials (CycloneDX 1.6)
    DIR/NAME/config.pbtxt
    DIR/NAME/1/model.onnx       and its external data; or model.plan
    DIR/NAME/warmup/            masks of the warm-up samples
    DIR/NAME/config.json, tokenizer or preprocessor files

The bundle is made in a folder beside DIR and renamed, so that DIR is whole or absent.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qcompress
from qcompress.cli.bundle import triton_config as triton
from qcompress.cli.bundle.materials import NAME as MATERIALS
from qcompress.cli.bundle.materials import bill_of_materials
from qcompress.cli.bundle.warmup import FOLDER as WARMUP
from qcompress.cli.bundle.warmup import samples
from qcompress.engine.profiles import model_context
from qcompress.errors import IncomparableError, UsageError, VerdictError
from qcompress.graph.view import View, read
from qcompress.models import FAMILIES
from qcompress.schema.targets import find_target
from qcompress.system.artifacts import read_object, sha256_file, write_json
from qcompress.system.filesystem import machine_errors
from qcompress.system.places import demand_place
from qcompress.verdict.judge import exit_code, judged, verdict_of
from qcompress.verdict.run_directory import LoadedRun, broken

RECORD = "bundle.json"
FORMAT = 1
BACKENDS = {"onnxruntime": ("onnxruntime_onnx", "model.onnx"), "tensorrt": ("tensorrt_plan", "model.plan")}
"""Triton's platform and the file name that it expects, by backend."""

BESIDE = (
    "config.json", "preprocessor_config.json", "tokenizer*", "vocab*", "merges.txt",
    "special_tokens_map.json",
)  # fmt: skip
"""Files that turn texts and images into inputs, and outputs into labels."""

NO_OPTIMIZER = 2
"""`optimization.graph.level` at which Triton's ONNX Runtime backend disables all optimizers; single ones
cannot be disabled.
"""


def bundle(run: LoadedRun, out: Path, *, backend: str = "onnxruntime", name: str | None = None,
           max_batch: int | None = None, instances: int = 1,
           force: bool = False) -> dict[str, Any]:  # fmt: skip
    """Write the model repository and return bundle.json. A run that was not accepted is refused, unless
    `force`.

    `max_batch`: largest batch that Triton makes; the largest of the profiles unless given.
    """
    name = name or run.recipe.name
    _check(run, name, backend, force)
    demand_place(out, folder=True)
    view = read(run.path / "model.onnx")
    settings = _settings(run, view, backend, max_batch)
    before = _earlier(out, _identity(run, name, backend))
    with machine_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            temporary.chmod(0o755)  # mkdtemp denies other users access, and a server runs as another user
            record = _write(run, view, temporary, name, backend, settings, instances)
            _put(temporary, out, before)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return record


def _check(run: LoadedRun, name: str, backend: str, force: bool) -> None:
    """Refuse invalid options, a run that was not accepted, and changed files, before anything is written."""
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}", fix=f"choose one of {', '.join(BACKENDS)}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f"{name!r} is not a valid model name", fix="use letters, digits, '.', '_' and '-'")
    judgement = judged(run)
    verdict = judgement["verdict"]
    if verdict != "accept" and not force:
        raise VerdictError(
            f"{run.path} ended with {verdict}: {'; '.join(judgement['reasons']) or 'see its goals'}",
            fix="fix the run, or pass --force to serve it anyway",
            exit_code=exit_code(verdict),
        )
    if backend == "onnxruntime" and not force:
        _check_deployed(run, judgement["deployed"])
    if not (run.path / "model.onnx").is_file():
        raise UsageError(f"{run.path} has no model.onnx", fix="run the recipe again")
    if not run.parity.get("onnx"):
        raise IncomparableError(
            f"{run.path}: parity.json does not say which graph was measured", fix="run the recipe again"
        )
    if wrong := list(broken(run.path, run.parity)):
        raise IncomparableError(f"{run.path}: {'; '.join(wrong)}", fix="run the recipe again")
    if backend == "tensorrt":
        _check_plan(run)


def _check_deployed(run: LoadedRun, deployed: dict[str, Any] | None) -> None:
    """Refuse a graph whose default ONNX Runtime session misses the goals: Triton serves that session. The
    verdict of a run for TensorRT does not include it.
    """
    if deployed is not None and not deployed["passed"]:
        raise VerdictError(
            f"{run.path}: ONNX Runtime's default session (the row deployed), which Triton serves, misses the "
            f"goals: {'; '.join(deployed['reasons'])}",
            fix="fix the run, or pass --force to serve it anyway",
            exit_code=exit_code("regression"),
        )


def _check_plan(run: LoadedRun) -> None:
    target = find_target(run.recipe.build.target)
    if target.backend != "tensorrt":
        what = "plans of TensorRT-RTX" if target.backend else "an ONNX file"
        raise UsageError(
            f"target {target.name} takes {what}, and Triton's TensorRT backend loads plans of TensorRT alone",
            fix="pass --backend onnxruntime, or build for a server's target (`qcompress list targets`)",
        )
    if not (run.path / "engine" / "model.plan").is_file():
        facts = _build(run)
        raise UsageError(
            f"{run.path} has no plan for {target.name}: {facts.get('reason') or 'it was not built'}",
            fix=f"run the recipe on the device; it builds: {facts.get('command') or 'qcompress run'}",
        )


def _build(run: LoadedRun) -> dict[str, Any]:
    """build.json of a run; empty for a run without the build stage."""
    file = run.path / "engine" / "build.json"
    return read_object(file) if file.is_file() else {}


def _settings(run: LoadedRun, view: View, backend: str, max_batch: int | None) -> dict[str, Any]:
    """Batch sizes; 0 if the graph has no dynamic batch axis."""
    largest = max(profile.batch[2] for profile in run.recipe.build.profiles)
    if not triton.batched(*triton.tensors(view)):
        if max_batch:
            raise UsageError(
                f"{view.file} has no dynamic batch, so Triton cannot put requests together",
                fix="drop --max-batch, or export with `dynamic: [batch, ...]`",
            )
        return {"max_batch": 0, "preferred": []}
    if backend == "tensorrt" and max_batch is not None and max_batch > largest:
        raise UsageError(
            f"--max-batch {max_batch}: the plan's profiles go to {largest}",
            fix=f"pass at most {largest}, or build with larger profiles",
        )
    most = max_batch if max_batch is not None else largest
    if most < 1:
        raise UsageError(f"--max-batch {most} is less than 1", fix="pass at least 1")
    opts = {size for profile in run.recipe.build.profiles for size in profile.batch[1:]}
    return {"max_batch": most, "preferred": sorted(size for size in opts if 1 < size <= most)}


def _identity(run: LoadedRun, name: str, backend: str) -> dict[str, str]:
    return {"run": run.path.resolve().name, "recipe": run.recipe.name, "name": name, "backend": backend}


def _earlier(out: Path, identity: dict[str, str]) -> bool:
    """True if `out` already holds this bundle or is an empty folder. Raises UsageError for other content,
    which is never overwritten.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return out.exists()
    try:
        record = json.loads((out / RECORD).read_bytes())
    except (OSError, ValueError):
        record = None
    if isinstance(record, dict) and all(record.get(key) == value for key, value in identity.items()):
        return True
    raise UsageError(f"{out} is not empty and is not this bundle", fix="name a new folder, or remove it")


def _put(temporary: Path, out: Path, before: bool) -> None:
    if before:
        old = temporary.with_name(temporary.name + ".old")
        os.replace(out, old)
        try:
            os.replace(temporary, out)
        except OSError:
            os.replace(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(temporary, out)


def _write(run: LoadedRun, view: View, out: Path, name: str, backend: str, settings: dict[str, Any],
           instances: int) -> dict[str, Any]:  # fmt: skip
    model = out / name
    (model / "1").mkdir(parents=True)
    for file in _model_files(run, view, backend):
        shutil.copyfile(file, model / "1" / file.name)
    for file in sorted(
        {
            file_of_pattern
            for pattern in BESIDE
            for file_of_pattern in run.path.glob(pattern)
            if file_of_pattern.is_file()
        }
    ):
        shutil.copyfile(file, model / file.name)
    message = _config(run, view, name, backend, settings, instances, model / WARMUP)
    (model / "config.pbtxt").write_text(triton.to_text(message), encoding="utf-8")
    write_json(out / MATERIALS, bill_of_materials(run, name, out))
    inputs, outputs = triton.tensors(view)
    record = {
        "format": FORMAT,
        **_identity(run, name, backend),
        "verdict": run.verdict["verdict"],
        "deployed": verdict_of(run.parity, run.recipe, run.smoke)["deployed"],
        "target": run.recipe.build.target,
        "onnx_sha256": run.parity["onnx"]["sha256"],
        "engine": _engine(run) if backend == "tensorrt" else None,
        "inputs": [_plain(tensor) for tensor in inputs],
        "outputs": [_plain(tensor) for tensor in outputs],
        "max_batch_size": settings["max_batch"],
        "warmup": len(message.model_warmup),
        "versions": {**run.manifest.get("versions", {}), "bundled_by": qcompress.__version__},
        "files": {
            file.relative_to(out).as_posix(): sha256_file(file)
            for file in sorted(out.rglob("*"))
            if file.is_file()
        },
    }
    write_json(out / RECORD, record)
    return record


def _model_files(run: LoadedRun, view: View, backend: str) -> list[Path]:
    if backend == "tensorrt":
        return [run.path / "engine" / "model.plan"]
    return [view.file, *view.data_files]


def _plain(tensor: triton.Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "type": tensor.kind, "axes": list(tensor.axes)}


def _engine(run: LoadedRun) -> dict[str, Any]:
    """Keys of build.json that tell on which machines the plan runs."""
    facts = _build(run)
    keys = ("backend", "versions", "version_compatible", "hardware_compatibility")
    kept = {key: facts.get(key) for key in keys}
    return {**kept, "sm": find_target(run.recipe.build.target).sm, "profiles": len(facts.get("profiles", []))}


def _config(run: LoadedRun, view: View, name: str, backend: str, settings: dict[str, Any], instances: int,
            warmup: Path) -> Any:  # fmt: skip
    """Triton's ModelConfig of the run."""
    batch = settings["max_batch"]
    inputs, outputs = triton.tensors(view)
    group: dict[str, Any] = {"count": instances, "kind": "KIND_GPU"}
    if find_target(run.recipe.build.target).backend is None:
        group["kind"] = "KIND_CPU"
    profiles = run.recipe.build.profiles
    if backend == "tensorrt" and any(not isinstance(axis, int) for item in inputs for axis in item.axes):
        group["profile"] = [str(number) for number in range(len(profiles))]
    values: dict[str, Any] = {
        "name": name,
        "platform": BACKENDS[backend][0],
        "backend": backend,
        "max_batch_size": batch,
        "input": triton.describe(inputs, batch > 0),
        "output": triton.describe(outputs, batch > 0),
        "instance_group": [group],
        "model_warmup": samples(inputs, profiles, batch, _positions(run, view), warmup),
        "parameters": {key: {"string_value": value} for key, value in _run_parameters(run).items()},
    }
    if batch:
        values["dynamic_batching"] = {"preferred_batch_size": settings["preferred"]}
    if backend == "onnxruntime" and _without_optimizers(run):
        values["optimization"] = {"graph": {"level": NO_OPTIMIZER}}
    make: Callable[..., Any] = triton.message_class()
    return make(**values)


def _run_parameters(run: LoadedRun) -> dict[str, str]:
    """Parameters that the server reports with the model's configuration."""
    facts = {
        "run": run.path.resolve().name,
        "recipe": run.recipe.name,
        "verdict": run.verdict["verdict"],
        "target": run.recipe.build.target,
        "onnx_sha256": run.parity["onnx"]["sha256"],
        "version": qcompress.__version__,
    }
    return {f"qcompress.{key}": value for key, value in facts.items()}


def _without_optimizers(run: LoadedRun) -> bool:
    """True if ONNX Runtime must run an external graph without some optimizers."""
    file = run.path / "certificate.json"
    return bool(read_object(file).get("disabled_optimizers")) if file.is_file() else False


def _positions(run: LoadedRun, view: View) -> int | None:
    """Largest number of tokens that the model takes; None if unknown."""
    family, file = FAMILIES[run.recipe.model.family], run.path / "config.json"
    known = [model_context(view), getattr(run.recipe.task, "context", None)]
    if hasattr(family, "positions") and file.is_file():
        known.append(family.positions(read_object(file)))
    return min((count for count in known if count is not None), default=None)
