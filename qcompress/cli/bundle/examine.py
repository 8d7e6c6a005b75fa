"""Checks whether a bundle would load: faults of the bundle, and packages or devices missing here. No torch.

A broken bundle is broken on every machine: a file that is missing or changed, a configuration that does not
parse or disagrees with the graph. The machine is checked only for bundles that are not broken.

A child process opens the graph in this Python's ONNX Runtime. Triton brings another build of it: the answer
holds for Triton if both have one version.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from qcompress.cli.bundle import triton_config as triton
from qcompress.cli.bundle.triton import BACKENDS, FORMAT, RECORD
from qcompress.cli.bundle.warmup import FOLDER as WARMUP
from qcompress.errors import ExportError, MachineError
from qcompress.graph.view import read
from qcompress.schema.targets import AMPERE
from qcompress.system.artifacts import sha256_file
from qcompress.system.child_process import command, environment
from qcompress.system.gpu import compute_capability

OPENING_S = 300
TOO_OLD = re.compile(r"IR version|opset|not implemented|Could not find an implementation", re.IGNORECASE)
"""Messages of ONNX Runtime about a graph that is newer than itself."""

RUNTIMES = ("onnxruntime-gpu", "onnxruntime")
AGAIN = "bundle the run again, and copy the whole folder"


@dataclass(frozen=True)
class Fault:
    """One reason why the bundle does not load: `broken` in the bundle itself, or else missing on this
    machine.
    """

    broken: bool
    what: str
    fix: str


class BrokenError(ExportError):
    """The bundle is broken, so that no further check is possible."""


def examine(folder: Path) -> dict[str, Any]:
    """Check a bundle: {"bundle", "loads", "exit_code", "faults": [{"broken", "what", "fix"}], "notes"}."""
    faults, notes = [], []
    try:
        record = _record(folder)
        faults += _files(folder, record)
        if not faults:
            config, wrong = _config(folder, record)
            faults += wrong
        if not faults:
            lacking, notes = _machine(folder, record, config)
            faults += lacking
    except ExportError as error:
        faults.append(Fault(True, error.message, error.fix or AGAIN))
    code = 0
    if faults:
        code = ExportError.exit_code if any(fault.broken for fault in faults) else MachineError.exit_code
    return {
        "bundle": str(folder),
        "loads": not faults,
        "exit_code": code,
        "faults": [asdict(fault) for fault in faults],
        "notes": notes,
    }


def _record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise BrokenError(f"{file} is of format {record['format']!r}, and this version reads {FORMAT}")
        if record["backend"] not in BACKENDS:
            raise BrokenError(f"{file} names the backend {record['backend']!r}")
        for name in record["files"]:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise BrokenError(
                    f"{file} names {name!r}, outside the bundle", fix="do not trust this bundle"
                )
        if PurePosixPath(record["name"]).name != record["name"]:
            raise BrokenError(f"{file} names the model {record['name']!r}", fix="do not trust this bundle")
        for key in ("inputs", "outputs", "max_batch_size", "engine", "target"):
            record[key]
    except FileNotFoundError:
        raise BrokenError(
            f"{folder} is not a bundle: {RECORD} is missing",
            fix="name the folder that `qcompress bundle` wrote",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenError(f"{file} cannot be read ({error!r})") from None
    return record


def _files(folder: Path, record: dict[str, Any]) -> list[Fault]:
    faults = []
    for name, digest in record["files"].items():
        file = folder / name
        if not file.is_file():
            faults.append(Fault(True, f"{name} is missing", AGAIN))
        elif (actual := sha256_file(file)) != digest:
            faults.append(
                Fault(
                    True, f"{name} has another content (sha256 {actual[:12]}, bundled {digest[:12]})", AGAIN
                )
            )
    for needed in ("config.pbtxt", f"1/{BACKENDS[record['backend']][1]}"):
        if f"{record['name']}/{needed}" not in record["files"]:
            faults.append(Fault(True, f"{RECORD} does not list {record['name']}/{needed}", AGAIN))
    return faults


def _config(folder: Path, record: dict[str, Any]) -> tuple[Any, list[Fault]]:
    """Parse the configuration and list its disagreements with the bundle."""
    model = folder / record["name"]
    platform, file = BACKENDS[record["backend"]]
    try:
        text = (model / "config.pbtxt").read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BrokenError(f"{model / 'config.pbtxt'} is not UTF-8 text ({error})") from None
    config = triton.from_text(text, f"{record['name']}/config.pbtxt")
    wrong = []
    if config.name not in ("", record["name"]):
        wrong.append(f"config.pbtxt is of model {config.name!r}, and its folder is {record['name']!r}")
    if (config.platform or platform) != platform or (config.backend or record["backend"]) != record[
        "backend"
    ]:
        wrong.append(
            f"config.pbtxt is for {config.platform or config.backend}, and 1/{file} for {record['backend']}"
        )
    wrong += _tensors(folder, record, config)
    wrong += _batches(record, config)
    for sample in config.model_warmup:
        for name, given in sample.inputs.items():
            data = given.input_data_file
            if data and not (model / WARMUP / data).is_file():
                wrong.append(f"warm-up {sample.name}: {WARMUP}/{data}, for {name}, is missing")
    return config, [Fault(True, what, AGAIN) for what in wrong]


def _tensors(folder: Path, record: dict[str, Any], config: Any) -> list[str]:
    """Compare names, types and dims with the graph's; for a plan with those noted when it was bundled."""
    if record["backend"] == "onnxruntime":
        inputs, outputs = triton.tensors(read(folder / record["name"] / "1" / "model.onnx"))
    else:
        inputs, outputs = (
            [triton.Tensor(item["name"], item["type"], tuple(item["axes"])) for item in record[side]]
            for side in ("inputs", "outputs")
        )
    wrong = []
    if config.max_batch_size and not triton.batched(inputs, outputs):
        return [f"config.pbtxt has max_batch_size {config.max_batch_size}, and the graph no dynamic batch"]
    kinds = config.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number
    for side, graph_tensors, entries in (("input", inputs, config.input), ("output", outputs, config.output)):
        expected = {item["name"]: item for item in triton.describe(graph_tensors, config.max_batch_size > 0)}
        stated = {item.name: item for item in entries}
        wrong += [
            f"config.pbtxt has no {side} {name!r}, and the graph has it" for name in expected.keys() - stated
        ]
        wrong += [
            f"config.pbtxt has an {side} {name!r}, and the graph has not" for name in stated.keys() - expected
        ]
        for name in sorted(expected.keys() & stated):
            kind, dims = kinds[stated[name].data_type].name, list(stated[name].dims)
            if (kind, dims) != (expected[name]["data_type"], expected[name]["dims"]):
                wrong.append(
                    f"{side} {name!r}: config.pbtxt says {kind} {dims}, and the graph "
                    f"{expected[name]['data_type']} {expected[name]['dims']}"
                )
    return wrong


def _batches(record: dict[str, Any], config: Any) -> list[str]:
    most, wrong = config.max_batch_size, []
    sizes = [
        *config.dynamic_batching.preferred_batch_size,
        *(item.batch_size for item in config.model_warmup),
    ]
    if any(size > max(most, 1) for size in sizes):
        wrong.append(f"config.pbtxt asks for batches of {max(sizes)}, and max_batch_size is {most}")
    if record["backend"] == "tensorrt":
        if most > record["max_batch_size"]:
            wrong.append(f"max_batch_size is {most}, and the plan takes {record['max_batch_size']}")
        count = record["engine"]["profiles"]
        asked = {
            int(number) for group in config.instance_group for number in group.profile if number.isdigit()
        }
        if asked and max(asked) >= count:
            wrong.append(f"config.pbtxt asks for profile {max(asked)}, and the plan has {count}")
    return wrong


def _machine(folder: Path, record: dict[str, Any], config: Any) -> tuple[list[Fault], list[str]]:
    """Faults of this machine for the bundle, and notes."""
    faults, notes = [], []
    sm = compute_capability()
    if sm is None and any(group.kind == group.KIND_GPU for group in config.instance_group):
        what = "config.pbtxt asks for a GPU (KIND_GPU), and this machine has no CUDA device"
        faults.append(Fault(False, what, "load it on a machine with one, or bundle a run for target cpu"))
    if record["backend"] == "tensorrt":
        return faults + _plan(record["engine"], sm), notes
    version, why = _opened(folder / record["name"] / "1" / "model.onnx", config.optimization.graph.level)
    if version is None:
        faults.append(Fault(False, "ONNX Runtime is not installed", "pip install 'qcompress[train]'"))
    elif why:
        newer = bool(TOO_OLD.search(why))
        fix = "pip install -U onnxruntime, or export with a lower `export.opset`" if newer else AGAIN
        faults.append(Fault(not newer, f"ONNX Runtime {version} does not take model.onnx: {why}", fix))
    else:
        notes.append(f"ONNX Runtime {version} opens the graph; Triton's own must not be older")
    return faults, notes


def _opened(file: Path, level: int) -> tuple[str | None, str]:
    """Version of ONNX Runtime (None without one), and the reason why it does not open the file."""
    if not any(version_of(name) for name in RUNTIMES):
        return None, ""
    with tempfile.TemporaryDirectory(prefix="qcompress-opens-") as folder:
        words = command("qcompress.cli.bundle.opens", str(file.resolve()), str(level))
        try:
            done = subprocess.run(
                words, cwd=folder, env=environment(), stdin=subprocess.DEVNULL, capture_output=True,
                text=True, errors="replace", timeout=OPENING_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "", f"not open after {OPENING_S} s"
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
        return answer["version"], answer["why"]
    except (IndexError, ValueError):
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        if "ModuleNotFoundError" in last or "ImportError" in last:
            return None, ""
        return "", f"the process that opened it ended ({last})"


def version_of(distribution: str) -> str | None:
    """Installed version of a package; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _plan(engine: dict[str, Any], sm: int | None) -> list[Fault]:
    """Check TensorRT's version and the GPU: a plan is for one version and one compute capability, unless it
    was built to be compatible with more.
    """
    faults = []
    built, here = (engine.get("versions") or {}).get("tensorrt", ""), version_of("tensorrt")
    if here is None:
        faults.append(Fault(False, "TensorRT is not installed", f"pip install tensorrt=={built}"))
    elif not _same_version(built, here, bool(engine.get("version_compatible"))):
        fix = f"use TensorRT {built}, or build the plan again with {here}"
        faults.append(Fault(False, f"the plan was built with TensorRT {built}, and here is {here}", fix))
    if sm is not None and not _same_gpu(engine, sm):
        what = f"the plan was built for a GPU of SM{engine['sm']}, and this one is SM{sm}"
        fix = "run the recipe with the target of this GPU; `qcompress list targets`"
        faults.append(Fault(False, what, fix))
    return faults


def _same_version(built: str, here: str, compatible: bool) -> bool:
    """True if a plan loads: in the version it was built with, or, if `compatible`, in that or a later one.

    >>> _same_version("10.13.0.35", "10.13.0.40", False), _same_version("10.13.0.35", "10.14.1", False)
    (True, False)
    >>> _same_version("10.13.0.35", "10.14.1", True), _same_version("10.13.0.35", "10.3.0", True)
    (True, False)
    """
    before, now = ([int(number) for number in re.findall(r"\d+", text)[:3]] for text in (built, here))
    return before <= now if compatible else before == now


def _same_gpu(engine: dict[str, Any], sm: int) -> bool:
    level = engine.get("hardware_compatibility")
    return sm == engine["sm"] or (level == "ampere-plus" and sm >= AMPERE)
