"""Checkpoints of a training run: everything that moves, in one safetensors file, written in one step.

Randomness is a function of (seed, phase, step), so no random state is stored; learning rates are a function
of the step. What is stored is the model's moving tensors, the optimizer's moments, what the stepper keeps
from one update to the next, and where the run was.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qcompress.tensorfile import save_tensors

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
        partial = self.file.with_name(NAME + ".tmp")
        save_tensors(
            partial,
            {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()},
            metadata,
        )
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, self.file)
        self._last = time.monotonic()

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
