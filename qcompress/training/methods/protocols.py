"""The five protocols a method is made of. They carry no code; `methods/__init__.py` lists who fulfils them.

Life of a training run: adapters are attached and initialised from statistics of the float model, quantizers
are initialised on what the adapters left, then the schedule's phases run one after another, each with an
optimizer of its own. Randomness is a function of (seed, phase, step), so that a closure called twice in one
step sees the same dropout, and a resumed run the same as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from qcompress.models.architecture import Architecture, Site
from qcompress.models.plan import LayerPlan
from qcompress.models.prepare import Prepared
from qcompress.quant.layers import QuantizedWeight
from qcompress.quant.ranges import Statistics
from qcompress.schema.method_options import Role
from qcompress.tasks.examples import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator


class Quantizer(Protocol):
    """How one tensor becomes integers while training. Built from its options, its grid and its bounds."""

    bounds: tuple[int, int]
    parameter_roles: Mapping[str, Role]
    """Role of each of its parameters, by the name in `named_parameters()`; not needed without parameters."""

    def init(self, seen: Tensor | Statistics) -> None:
        """Choose a starting scale from the weight itself, or from what calibration saw of an activation."""

    def __call__(self, x: Tensor) -> Tensor:
        """x rounded to the grid, differentiable."""

    def advance(self) -> None:
        """Called after each update: restore whatever the update may have broken."""

    def scale_of(self, *weight: Tensor) -> Tensor:
        """The scale that is deployed; called when training has ended. A weight's quantizer is a `CodedWeight`
        (`quant/weight_quantizer.py`), which says how its codes are made as well.
        """


class Adapter(Protocol):
    """A function-preserving rescaling in front of activation quantizers, folded when training has ended. The
    modules that it gives to `Prepared.rescale` declare the roles of their parameters (`parameter_roles`).
    """

    def attach(self, prepared: Prepared, sites: Sequence[Site], statistics: dict[str, Statistics]) -> None:
        """Install the rescalings and give them their starting values."""

    def fold(self) -> dict[str, Tensor]:
        """The final scales, [channels] each, by the name of the site's writer."""


@runtime_checkable
class FittedAdapter(Adapter, Protocol):
    """An adapter that looks at the float model at work on the calibration data, before it is attached."""

    def fit(
        self, model: nn.Module, plan: tuple[LayerPlan, ...], sites: Sequence[Site],
        batches: Callable[[], Iterable[Batch]],
    ) -> None:  # fmt: skip
        """Choose the scales. `model` is a float model of its own, on the training's device, to do with as it
        likes; `batches()` gives the calibration data anew at each call, without padding. Not called where
        training goes on after an interruption: what `attach` installs is in the checkpoint then.
        """


@dataclass(frozen=True)
class Scene:
    """What an objective may look at beside the batches."""

    model: nn.Module
    architecture: Architecture
    teacher: Callable[[], nn.Module]
    """Loads the float model, in evaluation mode, on the training's device."""


class Objective(Protocol):
    """What is minimised."""

    def attach(self, student: nn.Module, scene: Scene) -> None:
        """Called once, with the model as the trainer runs it; `scene.model` is the same model unwrapped."""

    def begin(self, phase: str) -> None:
        """Called when a phase begins, also when it goes on after an interruption."""

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """Loss of a batch; `progress` in [0, 1) is the share of the phase that is done. Who sums
        several may keep them in `terms`, for the log (`logpoints.OfTerms`).
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
    """Unit in which each parameter stores a learned scale (`learned_scale.py`); empty: none of them does."""


@dataclass(frozen=True)
class Moment:
    """Which update this is. Everything random in it is a function of these four numbers."""

    seed: int
    phase: int
    block: int
    step: int


@dataclass(frozen=True)
class Report:
    """One update: the loss whose gradient moved the weights, and how many forward/backward passes it took."""

    loss: float
    passes: int


class Stepper(Protocol):
    """How one update is made. Gradient clipping, the loss scale of fp16 and what processes exchange live here
    and nowhere else.
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
        """One update. `closure()` is the loss on this process's share of the batch, with the same randomness
        at each call of this step; `taps` are the quantized weights, for steppers that perturb them. The
        gradients of the update itself are averaged over the processes before they are clipped.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What the next update of the phase needs from the ones before; it goes into the checkpoint."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave."""


@dataclass(frozen=True)
class Phase:
    """A part of training with an optimizer of its own.

    scope "model": every step sees one batch of the training data and the objective. scope "blocks": the
    blocks of the architecture learn one after another to reproduce their float outputs on the calibration
    data, and `steps` counts the updates of one block.
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
    """Whether Quant-Noise, where there is any, is on."""


class Schedule(Protocol):
    """What is trained when."""

    def phases(self, architecture: Architecture, plan: tuple[LayerPlan, ...]) -> tuple[Phase, ...]:
        """The phases, in order."""
