"""Artifacts passed between stages: the folder of each stage and its files. No torch.

    load    -> FloatModel     float.json, config.json, tokenizer files
    train   -> TrainedModel   trained.json, trained.safetensors
    fold    -> FoldedModel    folded.json, folded.safetensors
    export  -> OnnxModel      model.onnx (+ model.onnx.data), lint.json, certificate.json, sizes.json, probe/
    build   -> Engine         build.json, model.plan unless deferred
    verify  -> ParityReport   parity.json, samples.json.gz
    gate    -> Verdict        verdict.json, junit.xml

A stage writes into an empty folder and returns that folder's artifact only; `workspace.py` decides
where the folder is and when it is finished.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompress.errors import ContractError, IncomparableError
from qcompress.system import strict_json
from qcompress.system.places import write_whole
from qcompress.system.untrusted_file import demand_file


def sha256_file(path: Path) -> str:
    """Digest of a file's content, as 64 hexadecimal digits. Raises UsageError for a pipe or a device."""
    if path.exists():
        demand_file(path)
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def graph_digests(file: Path) -> dict[str, str]:
    """Digests of model.onnx and of its external data in the same folder, by name."""
    files = [file, *file.parent.glob(file.name + ".data*")]
    return {path.name: sha256_file(path) for path in sorted(files)}


def write_json(path: Path, value: object) -> None:
    """Write sorted, indented, strict JSON atomically."""
    write_text(path, strict_json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text atomically: a reader never sees part of it."""
    write_whole(path, text)


def read_json(path: Path) -> Any:
    """Read a JSON file that a stage must have written; raises IncomparableError if it is damaged."""
    try:
        return strict_json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ContractError(f"{path} is missing from a finished stage") from None
    except (ValueError, RecursionError) as error:
        raise IncomparableError(f"{path} is torn ({error})", fix="run the recipe again") from None


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object of a run. Raises IncomparableError if it is missing, damaged or not an object."""
    if not file.is_file():
        raise IncomparableError(f"{file} is missing", fix="run the recipe again")
    try:
        content = read_json(file)
    except OSError as error:
        raise IncomparableError(f"{file} cannot be read ({error})", fix="run the recipe again") from None
    if not isinstance(content, dict):
        raise IncomparableError(f"{file} is not a JSON object", fix="run the recipe again")
    return content


@dataclass(frozen=True)
class Artifact:
    """Folder of a finished stage. `digest` is the digest of the contents of all its files."""

    path: Path
    digest: str = ""


@dataclass(frozen=True)
class FloatModel(Artifact):
    """The float checkpoint; its files are never changed.

    float.json: {"family", "files": {name: sha256}, "parameters": count}. `source` is the folder of the
    weights on this machine; it is not part of the artifact's content, so that moving a model changes no
    result.
    """

    source: Path = Path()

    @classmethod
    def of(cls, path: Path, digest: str, origin: Path) -> FloatModel:
        """Float model of a load stage; the stage has its own weights if it has copied blocks of the
        checkpoint at `origin`.
        """
        return cls(path, digest, source=path if (path / "model.safetensors").is_file() else origin)


@dataclass(frozen=True)
class TrainedModel(Artifact):
    """A trained model, whose tensors still pass through quantizers.

    trained.json: {"family", "compute", "plan": [layer plans], "rescalings": [{"norm", "readers"}, of a value
    projection {"value", "readers", "first", "point"}], "changed": [names of tensors that differ from the
    float model], "weights_unchanged": {"sha256"} | null, "static_ranges": {layer or point that was dynamic:
    {"range", "scale"}}, "phases": [one entry for a phase, or for each of its blocks]}.
    trained.safetensors: `<layer>.weight.scale`, `<layer>.input.scale`, `<norm or layer>.rescale`, and the
    tensors named in `changed`.
    """


@dataclass(frozen=True)
class FoldedModel(Artifact):
    """Folded model: integers, scales in the compute type, and the remaining float tensors, independent of the
    method.

    folded.json: {"family", "compute", "plan": [layer plans], "codes": count of integers}.
    folded.safetensors: `<layer>.weight.codes` int8, `<layer>.weight.scale`, `<layer>.input.scale`, and every
    float tensor under its own name.
    """


@dataclass(frozen=True)
class OnnxModel(Artifact):
    """An ONNX graph with explicit Q/DQ and native integer initializers, linted and certified."""

    @property
    def file(self) -> Path:
        """The graph; its external data, if any, is in the same folder."""
        return self.path / "model.onnx"


@dataclass(frozen=True)
class Engine(Artifact):
    """An engine plan, or the reason why it was deferred and the command that builds it on the device.

    build.json: {"status": "built" | "deferred" | "none", "reason", "command", "target", "backend",
    "versions", "plan": {"sha256", "bytes"}, "onnx": {"sha256", "bytes"}, "predicted_bytes", "limit_bytes",
    "profiles", "version_compatible", "hardware_compatibility", "timing_cache": {"read", "written"},
    "inputs", "outputs", "messages", "warnings"}.
    """

    @property
    def plan(self) -> Path | None:
        """The serialized engine; None if it was deferred."""
        plan = self.path / "model.plan"
        return plan if plan.is_file() else None


def disabled_optimizers(file: Path) -> list[str]:
    """Optimizers that ONNX Runtime must disable for an external graph, from the certificate.json in its
    folder.
    """
    certificate = file.with_name("certificate.json")
    return read_object(certificate).get("disabled_optimizers", []) if certificate.is_file() else []
