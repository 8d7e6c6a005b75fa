"""Checkpoints of a training run: everything that moves, in one safetensors file, written in one step.

Randomness is a function of (seed, phase, step), so no random state is stored; learning rates are a function
of the step. What is stored is the model's moving tensors, the optimizer's moments, what the stepper keeps
from one update to the next, and where the run was.

The metadata has a digest of all of that and of the files beside the checkpoint, which only grow: training
never resumes from bits that nobody wrote.
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
    """Where a run is: about to make update `step` of block `block` of phase `phase`."""

    phase: int = 0
    block: int = 0
    step: int = 0
    passes: int = 0


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint knows beside the model's tensors."""

    position: Position
    moments: dict[str, Tensor]
    stepper: dict[str, Tensor]
    facts: list[dict[str, object]]
    recent: list[float]


class Checkpoints:
    """Reads and writes the one checkpoint of a stage's folder."""

    def __init__(self, folder: Path, every_s: float) -> None:
        self.file = folder / NAME
        self.every_s = every_s
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether enough time has passed since the last one."""
        return time.monotonic() - self._last >= self.every_s

    def save(
        self, position: Position, model: nn.Module, names: set[str], optimizer: torch.optim.Optimizer | None,
        facts: list[dict[str, object]], recent: list[float], stepper: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Write a checkpoint; a reader sees the old one or this one. `stepper` is the stepper's state."""
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
        """The first difference between what was saved and what is there, or None."""
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

    def drop_damaged(self, say: Callable[[str], None]) -> None:
        """Empty the folder, and say so, if anything in it is damaged: training begins anew."""
        if wrong := self.damage():
            say(f"train: damaged: {wrong}; training begins anew")
            for path in self.file.parent.iterdir():
                path.unlink()

    def _beside(self) -> dict[str, tuple[int, str]]:
        """Bytes and digest of each other file of the folder, which is brought to the disk."""
        promised = {}
        for path in sorted(self.file.parent.iterdir()):
            if path.is_file() and not path.name.startswith("checkpoint") and path.suffix != ".tmp":
                sync(path)
                size = path.stat().st_size
                promised[path.name] = (size, prefix_digest(path, size))
        return promised

    def load(self, model: nn.Module) -> Resumed | None:
        """Fill the model from the checkpoint, if there is one."""
        if not self.file.is_file():
            return None
        with safe_open(self.file, framework="pt") as stream:
            metadata = stream.metadata()
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dict)
        own = model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name.startswith("model:"):
                    own[name.removeprefix("model:")].copy_(tensor)
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
    """Of metadata and of tensors in the order of their names: names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def moving(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """The named tensors of the model's state, each shared one once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in names and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def restore(optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    """Give a new optimizer the moments of the checkpoint."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in moments.items():
        _, index, key = name.split(":", 2)
        state.setdefault(int(index), {})[key] = tensor
    if state:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
