"""The axis values that every baseline is made of: task loss, plain update, calibrate only, train
everything.
"""

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
    """No adapter."""

    def __init__(self, options: NoAdapter) -> None:
        pass

    def attach(self, prepared: Prepared, sites: Sequence[Site], statistics: dict[str, Statistics]) -> None:
        """Nothing to install."""

    def fold(self) -> dict[str, Tensor]:
        """Nothing to fold."""
        return {}


class TaskLossObjective:
    """The task's own loss."""

    def __init__(self, options: TaskObjective, task_loss: Callable[[Tensor, Batch], Tensor]) -> None:
        self.task_loss = task_loss
        self.student: nn.Module | None = None

    def attach(self, student: nn.Module, scene: Scene) -> None:
        """Remember the model."""
        self.student = student

    def begin(self, phase: str) -> None:
        """Every phase has the same loss."""

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """Mean loss over the batch, []."""
        return self.task_loss(self.student(**inputs_of(batch)).logits, batch)

    def detach(self) -> None:
        """No hook was installed."""
        self.student = None


def apply_gradients(
    optimizer: Optimizer, groups: Sequence[Group], clip_norm: float | None, accelerator: Accelerator
) -> None:
    """The end of every update: average over the processes, clip each role by itself, move what has a
    gradient, drop the gradients.

    Per role, because the gradient of a scale sums over a whole tensor and would drown the weights' in a
    common norm. A parameter whose gradient is None is left alone entirely: no momentum, no weight decay.
    """
    _average([parameter for group in groups for parameter in group.parameters], accelerator)
    if clip_norm is not None:
        # once for all roles: accelerate's own clipping would remove the loss scale of fp16 at every call
        accelerator.unscale_gradients(optimizer)
        for group in groups:
            nn.utils.clip_grad_norm_(group.parameters, clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _average(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace each gradient by its mean over the processes, in one message; who has none stays without."""
    held = [parameter for parameter in parameters if parameter.grad is not None]
    if accelerator.num_processes == 1 or not held:
        return
    together = accelerator.reduce(torch.cat([one.grad.flatten() for one in held]), reduction="mean")
    parts = together.split([parameter.numel() for parameter in held])
    for parameter, part in zip(held, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.grad.dtype)


class OneUpdate:
    """One forward, one backward, one update."""

    def __init__(self, options: PlainStepper) -> None:
        self.options = options

    def attach(self, model: nn.Module) -> None:
        """Nothing to remember."""

    def step(
        self,
        closure: Callable[[], Tensor],
        optimizer: Optimizer,
        groups: Sequence[Group],
        taps: Sequence[QuantizedWeight],
        accelerator: Accelerator,
        moment: Moment,
    ) -> Report:
        """One update, one pass."""
        loss = closure()
        accelerator.backward(loss)
        apply_gradients(optimizer, groups, self.options.clip_norm, accelerator)
        return Report(loss=loss.item(), passes=1)

    def state_dict(self) -> dict[str, Tensor]:
        """No update depends on another."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to take up."""


class CalibrateOnly:
    """Ranges from the calibration data; no phase trains."""

    def __init__(self, options: Calibrate, train: Train) -> None:
        pass

    def phases(self, architecture: Architecture, plan: tuple[LayerPlan, ...]) -> tuple[Phase, ...]:
        """None."""
        return ()


class TrainEverything:
    """One phase: weights, scales and everything else, with the task's loss."""

    def __init__(self, options: PlainSchedule, train: Train) -> None:
        self.train = train

    def phases(self, architecture: Architecture, plan: tuple[LayerPlan, ...]) -> tuple[Phase, ...]:
        """`finetune`."""
        defaults = PHASES["plain"]["finetune"]
        chosen = self.train.phases.get("finetune")
        return (Phase("finetune", chosen.steps if chosen else defaults.steps, defaults.roles),)
