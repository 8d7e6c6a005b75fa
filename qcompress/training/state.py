"""State of a training run, shared by the loops, the checkpoints and the training log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from qcompress.models.architecture import Architecture
from qcompress.models.prepare import Prepared
from qcompress.schema.recipe import Recipe
from qcompress.system.distributed import Processes
from qcompress.system.reporter import Reporter
from qcompress.tasks.examples import Examples
from qcompress.training.checkpoint import Checkpoints, Position
from qcompress.training.history import History
from qcompress.training.methods.protocols import Objective, Stepper
from qcompress.training.parameter_roles import ParameterRole


@dataclass
class Training:
    """State of a training run: everything that a loop needs, and the facts it reports (`facts`)."""

    recipe: Recipe
    architecture: Architecture
    prepared: Prepared
    objective: Objective
    stepper: Stepper
    accelerator: Accelerator
    processes: Processes
    checkpoints: Checkpoints
    reporter: Reporter
    history: History
    train_data: Examples | None
    calibration_data: Examples | None
    reference: Callable[[], nn.Module]
    moving: set[str]
    roles: dict[str, ParameterRole]
    """Role of each parameter of the prepared model, by name."""
    facts: list[dict[str, object]]
    recent: list[float]

    def save(self, position: Position, optimizer: torch.optim.Optimizer | None) -> None:
        """Write a checkpoint, in the first process only. `optimizer` None: the next phase or block has not
        started.
        """
        if self.processes.first:
            model, kept = self.prepared.model, self.stepper.state_dict() if optimizer is not None else {}
            self.checkpoints.save(position, model, self.moving, optimizer, self.facts, self.recent, kept)
