"""Protocols of the five axes of a method; that of quantizers is `Quantizer` of `quant/quantizers.py`.
`methods/__init__.py` lists the classes that implement them.

Life of a training run: adapters are attached and initialised from statistics of the float model, quantizers
are initialised on the rescaled weights, then the schedule's phases run one after another, each with its own
optimizer. Randomness is a function of (seed, phase, step), so that a closure called twice in one step sees
one dropout mask, and a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from qcompress.models.architecture import Architecture, Site
from qcompress.models.plan import LayerPlan
from qcompress.models.prepare import Prepared
from qcompress.quant.layers import QuantizedWeight
from qcompress.quant.ranges import Statistics
from qcompress.tasks.examples import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator


class Adapter(Protocol):
    """A function-preserving rescaling in front of activation quantizers, folded when training has ended. The
    modules passed to `Prepared.rescale` declare the roles of their parameters (`parameter_roles`).
    """

    def attach(self, prepared: Prepared, sites: Sequence[Site], statistics: dict[str, Statistics]) -> None:
        """Install the rescalings with their initial values."""

    def fold(self) -> dict[str, Tensor]:
        """Final scales, [channels] each, by the name of the site's writer."""


@runtime_checkable
class FittedAdapter(Adapter, Protocol):
    """An adapter that runs the float model on the calibration data before it is attached."""

    def fit(
        self, model: nn.Module, plan: tuple[LayerPlan, ...], sites: Sequence[Site],
        batches: Callable[[], Iterable[Batch]],
    ) -> None:  # fmt: skip
        """Choose the scales. `model` is a float model on the training device, which the adapter may change;
        `batches()` gives the calibration data anew at each call, without padding. Not called in a resumed
        run, whose checkpoint holds the state that `attach` installs.
        """


@dataclass(frozen=True)
class Scene:
    """Models available to an objective besides the batches."""

    model: nn.Module
    architecture: Architecture
    teacher: Callable[[], nn.Module]
    """Loads the float model, in evaluation mode, on the training device."""


class Objective(Protocol):
    """The loss that training minimises."""

    def attach(self, student: nn.Module, scene: Scene) -> None:
        """Called once, with the model as the trainer runs it; `scene.model` is that model unwrapped."""

    def begin(self, phase: str) -> None:
        """Called when a phase begins, also when it resumes after an interruption."""

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """Loss of a batch; `progress` in [0, 1) is the completed share of the phase. Objectives that sum
        several losses may expose them as `terms` for logging (`recording.OfTerms`).
        """

    def detach(self) -> None:
        """Remove every hook."""


@dataclass(frozen=True)
class Group:
    """Parameters of one role, with the learning rate at the peak of its schedule."""

    role: str
    parameters: tuple[nn.Parameter, ...]
    lr: float
    weight_decay: float = 0.0
    kinds: tuple[str, ...] = ()
    """Kind of each parameter (`parameter_roles.py`), for steppers that perturb some kinds."""
    units: tuple[Tensor | None, ...] = ()
    """Unit in which each parameter stores a learned scale (`learned_scale.py`); empty: no parameter stores
    one.
    """


@dataclass(frozen=True)
class Moment:
    """Identity of one update. Everything random in it is a function of these four numbers."""

    seed: int
    phase: int
    block: int
    step: int


@dataclass(frozen=True)
class Report:
    """Result of one update: the loss whose gradient moved the weights, and the number of forward/backward
    passes.
    """

    loss: float
    passes: int


class Stepper(Protocol):
    """Update rule. Gradient clipping, fp16's loss scale and the exchange between processes live here and
    nowhere else.
    """

    def attach(self, model: nn.Module) -> None:
        """Called once, with the model as the trainer runs it."""

    def step(
        self,
        closure: Callable[[], Tensor],
        optimizer: Optimizer,
        groups: Sequence[Group],
        taps: Sequence[QuantizedWeight],
        accelerator: Accelerator,
        moment: Moment,
    ) -> Report:
        """Make one update. `closure()` is the loss on this process's share of the batch, with equal
        randomness at each call of this step; `taps` are the quantized weights, for steppers that perturb
        them. The gradients of the update itself are averaged over the processes before they are clipped.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """State that later updates of the phase need; it goes into the checkpoint."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the state of `state_dict`."""


@dataclass(frozen=True)
class Phase:
    """A part of training with its own optimizer.

    scope "model": every step runs the objective on one batch of the training data. scope "blocks": the blocks
    of the architecture learn one after another to reproduce their float outputs on the calibration data, and
    `steps` counts the updates of one block.
    """

    name: str
    steps: int
    roles: tuple[str, ...]
    scope: Literal["model", "blocks"] = "model"
    dropout: bool = True
    evaluate_every: int = 25
    quantizes: tuple[str, ...] = ()
    """Layers that become codebooks when the phase begins."""
    noise: bool = True
    """Enables Quant-Noise for quantizers that have it."""


class Schedule(Protocol):
    """Order of the training phases."""

    def phases(self, architecture: Architecture, plan: tuple[LayerPlan, ...]) -> tuple[Phase, ...]:
        """Phases in order."""
