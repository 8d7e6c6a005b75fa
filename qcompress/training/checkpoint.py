"""Training checkpoints: all state that changes during training, in one safetensors file that is replaced
atomically.

Randomness is a function of (seed, phase, step), so no random state is stored; learning rates are a function
of the step. A checkpoint stores the model's changing tensors, the optimizer's moments, the stepper's state
between updates, and the position in the run.

The metadata holds a digest of all of these and of the append-only files beside the checkpoint, so that
training never resumes from damaged files.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qcompress.system.digests import prefix_digest
from qcompress.system.filesystem import sync
from qcompress.system.tensor_file import save_tensors

NAME = "checkpoint.safetensors"


@dataclass(frozen=True)
class Position:
    """Position in a run: the next update is number `step` of block `block` of phase `phase`."""

    phase: int = 0
    block: int = 0
    step: int = 0
    passes: int = 0


@dataclass(frozen=True)
class Resumed:
    """Contents of a checkpoint apart from the model's tensors."""

    position: Position
    moments: dict[str, Tensor]
    stepper: dict[str, Tensor]
    facts: list[dict[str, object]]
    recent: list[float]


class Checkpoints:
    """Reader and writer of the one checkpoint in a stage's folder."""

    def __init__(self, folder: Path, every_s: float) -> None:
        self.file = folder / NAME
        self.every_s = every_s
        self._last = time.monotonic()

    def due(self) -> bool:
        """True if `every_s` seconds have passed since the last save."""
        return time.monotonic() - self._last >= self.every_s

    def save(
        self, position: Position, model: nn.Module, names: set[str], optimizer: torch.optim.Optimizer | None,
        facts: list[dict[str, object]], recent: list[float], stepper: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Write a checkpoint atomically: a concurrent reader sees the previous one or this one. `stepper` is
        the stepper's state.
        """
        tensors = {f"model:{name}": tensor for name, tensor in moving(model, names).items()}
        if optimizer is not None:
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {
                    f"optimizer:{index}:{key}": torch.as_tensor(value) for key, value in state.items()
                }
        tensors |= {f"stepper:{name}": tensor for name, tensor in stepper.items()}
        metadata = {"position": json.dumps(asdict(position)), "facts": json.dumps(facts)}
        metadata["recent"] = json.dumps(recent)
        metadata["beside"] = json.dumps(self._beside())
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        metadata["digest"] = _digest(metadata, sorted(copies.items()))
        partial = self.file.with_name(NAME + ".tmp")
        save_tensors(partial, copies, metadata)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, self.file)
        self._last = time.monotonic()

    def damage(self) -> str | None:
        """Describe the first difference between the saved checkpoint and the files on disk; None if they
        agree.
        """
        if not self.file.is_file():
            return None
        try:
            with safe_open(self.file, framework="pt") as stream:
                metadata = stream.metadata() or {}
                tensors = ((name, stream.get_tensor(name)) for name in sorted(stream.keys()))
                if metadata.pop("digest", None) != _digest(metadata, tensors):
                    return f"{NAME} has other content than was written"
        except SafetensorError as error:
            return f"{NAME} cannot be read ({error})"
        for name, (size, sha256) in json.loads(metadata["beside"]).items():
            file = self.file.with_name(name)
            if not file.is_file() or prefix_digest(file, size) != sha256:
                return f"{name} has other content than was written"
        return None

    def drop_damaged(self, report: Callable[[str], None]) -> None:
        """Delete the folder's files, and report it, if any of them is damaged; training then starts from
        the beginning.
        """
        if damage := self.damage():
            report(f"train: damaged: {damage}; training begins anew")
            for path in self.file.parent.iterdir():
                path.unlink()

    def _beside(self) -> dict[str, tuple[int, str]]:
        """Sync the folder's other files to disk; returns size in bytes and digest of each."""
        digests = {}
        for path in sorted(self.file.parent.iterdir()):
            if path.is_file() and not path.name.startswith("checkpoint") and path.suffix != ".tmp":
                sync(path)
                size = path.stat().st_size
                digests[path.name] = (size, prefix_digest(path, size))
        return digests

    def load(self, model: nn.Module) -> Resumed | None:
        """Fill the model from the checkpoint; returns the rest of its contents, or None without a
        checkpoint.
        """
        if not self.file.is_file():
            return None
        with safe_open(self.file, framework="pt") as stream:
            metadata = stream.metadata()
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dict)
        model_tensors = model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name.startswith("model:"):
                    model_tensors[name.removeprefix("model:")].copy_(tensor)
        return Resumed(
            position=Position(**json.loads(metadata["position"])),
            moments={name: tensor for name, tensor in tensors.items() if name.startswith("optimizer:")},
            stepper={
                name.removeprefix("stepper:"): tensor
                for name, tensor in tensors.items()
                if name.startswith("stepper:")
            },
            facts=json.loads(metadata["facts"]),
            recent=json.loads(metadata["recent"]),
        )


def _digest(metadata: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of metadata and name-sorted tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def moving(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """Select the named tensors of the model's state; a shared tensor appears once, under its first name."""
    selected: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in names and id(tensor) not in seen:
            seen.add(id(tensor))
            selected[name] = tensor
    return selected


def restore(optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    """Load the checkpoint's moments into a new optimizer."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in moments.items():
        _, index, key = name.split(":", 2)
        state.setdefault(int(index), {})[key] = tensor
    if state:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
