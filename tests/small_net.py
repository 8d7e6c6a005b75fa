"""A network small enough to watch a stepper's every move, and what it takes to make an update of it.

Nothing in it is trivial: a norm with weights off 1, biases off 0, a batch norm, dropout if wanted, learned
scales of weights and of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from qcompress.quant.affine import Grid
from qcompress.quant.layers import QuantizedEmbedding, QuantizedLinear, QuantizedTied, QuantizedWeight
from qcompress.quant.learned_scale import unit_of
from qcompress.quant.quantizers import LsqActivation, LsqWeight
from qcompress.schema.method_options import PlainStepper, Saq, Squat
from qcompress.schema.quantizers import Lsq
from qcompress.training.methods.plain import OneUpdate
from qcompress.training.methods.protocols import Group, Moment, Report, Stepper
from qcompress.training.methods.saq import SharpnessAwareUpdate
from qcompress.training.methods.squat import AlternatingUpdate
from qcompress.training.parameter_roles import kind_of_float

WIDTH, CLASSES, TOKENS = 12, 5, 9


def bounds_of(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1


def linear(inputs: int, outputs: int, bits: int, activations: bool) -> QuantizedLinear:
    weight, bias = nn.Parameter(torch.randn(outputs, inputs) / 2), nn.Parameter(torch.randn(outputs) / 3)
    quantizer = LsqWeight(Lsq(init="lsq"), Grid(0), bounds_of(bits), weight.shape)
    quantizer.init(weight.detach())
    own = None
    if activations:
        own = LsqActivation(Lsq(), (-128, 127), inputs)
        own.start_at(torch.tensor(0.02))
    return QuantizedLinear(weight, bias, 0, quantizer, own)


class Net(nn.Module):
    """table -> first -> LayerNorm -> tanh -> second -> BatchNorm -> tanh -> third -> logits."""

    def __init__(self, bits: int, activations: bool, dropout: float, batch_norm: bool) -> None:
        super().__init__()
        table = nn.Parameter(torch.randn(TOKENS, WIDTH))
        quantizer = LsqWeight(Lsq(), Grid(0), (-127, 127), table.shape)
        quantizer.init(table.detach())
        self.table = QuantizedEmbedding(table, quantizer)
        self.first = linear(WIDTH, WIDTH, bits, activations)
        self.norm = nn.LayerNorm(WIDTH)
        self.second = linear(WIDTH, WIDTH, bits, activations)
        self.batch_norm = nn.BatchNorm1d(WIDTH) if batch_norm else nn.Identity()
        self.third = linear(WIDTH, CLASSES, bits, activations)
        self.dropout = nn.Dropout(dropout)
        self.norm.weight.data.add_(torch.randn(WIDTH) / 5)
        self.norm.bias.data.add_(torch.randn(WIDTH) / 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.first(self.table(ids)))
        x = self.batch_norm(self.second(self.dropout(torch.tanh(x))))
        return self.third(self.dropout(torch.tanh(x)))


@dataclass
class Small:
    """The network with its optimizer; `calls` holds what `watch` returned at each call of the closure."""

    net: nn.Module
    groups: list[Group]
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    watch: Callable[[Small], object] | None = None
    calls: list[object] = field(default_factory=list)
    factor: float = 1.0
    """Of the loss."""

    @property
    def taps(self) -> list[QuantizedWeight]:
        return [module for module in self.net.modules() if isinstance(module, QuantizedWeight)]

    @property
    def linears(self) -> list[QuantizedLinear]:
        return [module for module in self.net.modules() if isinstance(module, QuantizedLinear)]

    def loss(self, step: int = 0) -> Tensor:
        torch.manual_seed(1000 + step)
        random = torch.Generator().manual_seed(step)
        ids = torch.randint(0, TOKENS, (16,), generator=random)
        return self.factor * F.cross_entropy(self.net(ids), ids % CLASSES)

    def update(self, stepper: Stepper, step: int = 0) -> Report:
        def closure() -> Tensor:
            self.calls.append(self.watch(self) if self.watch else None)
            return self.loss(step)

        moment = Moment(seed=3, phase=0, block=0, step=step)
        report = stepper.step(closure, self.optimizer, self.groups, self.taps, self.accelerator, moment)
        for module in self.net.modules():
            if isinstance(module, LsqWeight | LsqActivation):
                module.advance()
        return report

    def run(self, stepper: Stepper, steps: int) -> list[Report]:
        stepper.attach(self.net)
        return [self.update(stepper, step) for step in range(steps)]

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.net.state_dict().items()}


def role_of(name: str) -> str:
    if name.endswith(".ratio"):
        return "scale"
    return (
        "weight" if name in {f"{part}.weight" for part in ("table", "first", "second", "third")} else "other"
    )


def kind_of(net: nn.Module, name: str) -> str:
    module = net.get_submodule(name.rpartition(".")[0])
    if isinstance(module, LsqWeight | LsqActivation):
        return "weight-scale" if isinstance(module, LsqWeight) else "activation-scale"
    return kind_of_float(net, name)


def small(
    bits: int = 4, activations: bool = False, dropout: float = 0.0, batch_norm: bool = False, seed: int = 0,
    roles: Sequence[str] = ("weight", "scale", "other"), decay: float = 0.0, sgd: bool = False,
    loss_scale: float | None = None,
) -> Small:  # fmt: skip
    torch.manual_seed(seed)
    net = Net(bits, activations, dropout, batch_norm)
    return wrap(net, roles, decay, sgd, loss_scale)


def wrap(
    net: nn.Module,
    roles: Sequence[str],
    decay: float = 0.0,
    sgd: bool = False,
    loss_scale: float | None = None,
) -> Small:
    """`loss_scale`: that of fp16, which needs no GPU; the arithmetic stays fp32. `mixed_precision` of the
    Accelerator must say fp16.
    """
    accelerator = Accelerator(cpu=True)
    if loss_scale is not None:
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
    groups = []
    for role in roles:
        chosen = {name: tensor for name, tensor in net.named_parameters() if role_of(name) == role}
        kinds = tuple(kind_of(net, name) for name in chosen)
        units = tuple(unit_of(net, name) for name in chosen)
        groups.append(Group(role, tuple(chosen.values()), 0.01, kinds=kinds, units=units))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(role_of(name) in roles)
    settings = [{"params": list(group.parameters), "weight_decay": decay} for group in groups]
    kind = torch.optim.SGD if sgd else torch.optim.AdamW
    return Small(net.train(), groups, accelerator.prepare(kind(settings, lr=0.01)), accelerator)


class Tied(nn.Module):
    """Logits over the tokens from the table itself."""

    def __init__(self) -> None:
        super().__init__()
        table = nn.Parameter(torch.randn(TOKENS, WIDTH))
        quantizer = LsqWeight(Lsq(), Grid(0), (-127, 127), table.shape)
        quantizer.init(table.detach())
        self.table = QuantizedEmbedding(table, quantizer)
        self.first = linear(WIDTH, WIDTH, 4, False)
        self.head = QuantizedTied(self.table, None)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(self.table(ids))))[:, :CLASSES]


def plain(**options: object) -> OneUpdate:
    return OneUpdate(PlainStepper(**options))


def saq(**options: object) -> SharpnessAwareUpdate:
    """With the clipping of the other two, so that their updates can be compared."""
    return SharpnessAwareUpdate(Saq(**{"clip_norm": 1.0, **options}))


def squat(**options: object) -> AlternatingUpdate:
    return AlternatingUpdate(Squat(**options))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys() and len(a) > 5
    return all(torch.equal(a[name], b[name]) for name in a)


def rounded_by_hand(layer: QuantizedLinear) -> Tensor:
    """Q(w) of a per-channel LSQ layer [out, in], in numpy."""
    weight, quantizer = layer.weight.detach().numpy(), layer.weight_quantizer
    scale = quantizer.scale_of(layer.weight).detach().numpy()[:, None]
    codes = (weight / scale).round().clip(*quantizer.bounds)
    return torch.from_numpy(codes * scale)


def gradients_by_hand(made: Small, step: int = 0) -> dict[str, Tensor]:
    """Gradients with respect to rounded weights, biases and norms, from stock layers on their own leaves."""
    net = made.net
    leaves = {}
    for part in ("first", "second", "third"):
        leaves[part] = rounded_by_hand(getattr(net, part)).requires_grad_()
        leaves[f"{part}.bias"] = getattr(net, part).bias.detach().clone().requires_grad_()
    for part in ("weight", "bias"):
        leaves[f"norm.{part}"] = getattr(net.norm, part).detach().clone().requires_grad_()
    ids = torch.randint(0, TOKENS, (16,), generator=torch.Generator().manual_seed(step))
    x = F.embedding(ids, rounded_by_hand(net.table))
    x = F.layer_norm(F.linear(x, leaves["first"], leaves["first.bias"]), (WIDTH,), leaves["norm.weight"],
                     leaves["norm.bias"])  # fmt: skip
    x = F.linear(torch.tanh(x), leaves["second"], leaves["second.bias"])
    logits = F.linear(torch.tanh(x), leaves["third"], leaves["third.bias"])
    F.cross_entropy(logits, ids % CLASSES).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}
