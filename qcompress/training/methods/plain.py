"""Baseline values of every axis: task loss, plain update, calibration only, training of all parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qcompress.models.architecture import Architecture, Site
from qcompress.models.plan import LayerPlan
from qcompress.models.prepare import Prepared
from qcompress.quant.layers import QuantizedWeight
from qcompress.quant.ranges import Statistics
from qcompress.schema.adapters import NoAdapter
from qcompress.schema.axes import PHASES
from qcompress.schema.method_options import Calibrate, PlainSchedule, PlainStepper, TaskObjective
from qcompress.schema.recipe import Train
from qcompress.tasks.examples import Batch, inputs_of
from qcompress.training.methods.protocols import Group, Moment, Phase, Report, Scene

if TYPE_CHECKING:
    from accelerate import Accelerator


class NoRescaling:
    """Adapter that rescales nothing."""

    def __init__(self, options: NoAdapter) -> None:
        pass

    def attach(self, prepared: Prepared, sites: Sequence[Site], statistics: dict[str, Statistics]) -> None:
        """No-op."""

    def fold(self) -> dict[str, Tensor]:
        """No scales."""
        return {}


class TaskLossObjective:
    """Objective that minimises the task's own loss."""

    def __init__(self, options: TaskObjective, task_loss: Callable[[Tensor, Batch], Tensor]) -> None:
        self.task_loss = task_loss
        self.student: nn.Module | None = None

    def attach(self, student: nn.Module, scene: Scene) -> None:
        """Store the model."""
        self.student = student

    def begin(self, phase: str) -> None:
        """No-op: every phase has one loss."""

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """Mean loss over the batch, []."""
        return self.task_loss(self.student(**inputs_of(batch)).logits, batch)

    def detach(self) -> None:
        """Release the model."""
        self.student = None


def apply_gradients(
    optimizer: Optimizer, groups: Sequence[Group], clip_norm: float | None, accelerator: Accelerator
) -> None:
    """Finish an update: average gradients over the processes, clip each role by itself, step the optimizer,
    clear the gradients.

    Clipping is per role, because the gradient of a scale sums over a whole tensor and would dominate a common
    norm. A parameter whose gradient is None is left unchanged: no momentum, no weight decay.
    """
    _average([parameter for group in groups for parameter in group.parameters], accelerator)
    if clip_norm is not None:
        # once for all roles: accelerate's own clipping would remove fp16's loss scale at every call
        accelerator.unscale_gradients(optimizer)
        for group in groups:
            nn.utils.clip_grad_norm_(group.parameters, clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _average(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace each gradient by its mean over the processes, in one message; a gradient of None stays None."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    if accelerator.num_processes == 1 or not with_gradient:
        return
    averaged = accelerator.reduce(
        torch.cat([parameter.grad.flatten() for parameter in with_gradient]), reduction="mean"
    )
    parts = averaged.split([parameter.numel() for parameter in with_gradient])
    for parameter, part in zip(with_gradient, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.grad.dtype)


class OneUpdate:
    """Stepper with one forward pass, one backward pass and one update."""

    def __init__(self, options: PlainStepper) -> None:
        self.options = options

    def attach(self, model: nn.Module) -> None:
        """No-op."""

    def step(
        self,
        closure: Callable[[], Tensor],
        optimizer: Optimizer,
        groups: Sequence[Group],
        taps: Sequence[QuantizedWeight],
        accelerator: Accelerator,
        moment: Moment,
    ) -> Report:
        """Make one update from one pass."""
        loss = closure()
        accelerator.backward(loss)
        apply_gradients(optimizer, groups, self.options.clip_norm, accelerator)
        return Report(loss=loss.item(), passes=1)

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: no state carries over between updates."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """No-op."""


class CalibrateOnly:
    """Schedule without training: ranges come from the calibration data."""

    def __init__(self, options: Calibrate, train: Train) -> None:
        pass

    def phases(self, architecture: Architecture, plan: tuple[LayerPlan, ...]) -> tuple[Phase, ...]:
        """No phases."""
        return ()


class TrainEverything:
    """Schedule of one phase that trains weights, scales and all other parameters."""

    def __init__(self, options: PlainSchedule, train: Train) -> None:
        self.train = train

    def phases(self, architecture: Architecture, plan: tuple[LayerPlan, ...]) -> tuple[Phase, ...]:
        """The phase `finetune`."""
        defaults = PHASES["plain"]["finetune"]
        chosen = self.train.phases.get("finetune")
        return (Phase("finetune", chosen.steps if chosen else defaults.steps, defaults.roles),)
