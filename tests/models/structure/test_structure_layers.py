"""Layers that are refused, nonnegative inputs and batch norms, on modules of a few lines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from step_nets import Net, example, pictures
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.models.structure import Structure, discover


class Scaled(nn.Embedding):
    """A table whose rows are multiplied."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 1) * 5.5


class Bounded(nn.Embedding):
    """A table whose rows pass a function."""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(super().forward(ids))


class Same(nn.Linear):
    """A linear layer in other words."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Other(nn.Linear):
    """A linear layer with an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Collection(nn.Module):
    """Layer-like modules that can and that cannot be replaced."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scaled, self.bounded, self.limited = (
            Scaled(9, 8),
            Bounded(9, 8),
            nn.Embedding(9, 8, max_norm=1.0),
        )
        self.same, self.other, self.unused, self.read = (
            Same(8, 8),
            Other(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
        )
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.reflected = nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")
        self.uneven, self.row = nn.Conv2d(2, 2, 2, padding="same"), nn.Conv1d(8, 8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.scaled(ids) + self.bounded(ids) + self.limited(ids)
        x = self.computed(self.other(self.same(x)))
        x = self.read(x) @ self.read.weight
        x = self.row(x.transpose(1, 2)).transpose(1, 2)
        return self.uneven(self.reflected(x[:, None])).mean()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_layers_that_cannot_be_replaced_stay_float_and_say_why() -> None:
    structure = discover(Collection(), {"ids": torch.arange(6).view(2, 3)})
    assert [layer.name for layer in structure.layers] == ["scaled", "same"]
    assert structure.floats == {
        "bounded": "Bounded computes something of its own",
        "limited": "renormalizes its rows",
        "other": "Other computes something of its own",
        "unused": "never called as a module",
        "read": "its weight is read outside its module",
        "computed": "its weight is computed",
        "reflected": "pads with reflect",
        "uneven": "pads its sides unequally",
        "row": "Conv1d has no quantized counterpart",
    }


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="ReLU has no linear, embedding or convolution layer"):
        discover(nn.ReLU(), {"input": torch.ones(2)})


@pytest.mark.parametrize(("step", "nonnegative"), [
    (lambda net, x: net.relu(x), True),
    (lambda net, x: F.relu(x).flatten(1).view(x.shape) * 2, True),
    (lambda net, x: F.dropout(F.hardtanh(x, 0, 6), 0.5, False), True),
    (lambda net, x: torch.cat([F.relu(x[..., :4]), torch.sigmoid(x[..., 4:])], -1), True),
    (lambda net, x: F.relu(x) + x.abs(), True),
    (lambda net, x: x.exp() * 0.1 + 5, False),  # never negative, but not by an operation that says so
    (lambda net, x: F.relu(x) - 0.1, False),
    (lambda net, x: F.relu(x).sub_(0.1), False),
    (lambda net, x: F.relu(x) + x, False),
    (lambda net, x: torch.add(F.relu(x), F.relu(-x), alpha=-1), False),
    (lambda net, x: F.relu(x) * -1.0, False),
    (lambda net, x: F.hardtanh(x, -1, 1), False),
    (lambda net, x: torch.cat([F.relu(x[..., :4]), x[..., 4:]], -1), False),
])  # fmt: skip
def test_nonnegative_inputs_are_told_by_the_operations_before(
    step: Callable[[Net, Tensor], Tensor], nonnegative: bool
) -> None:
    structure = discover(Net(step), example(), sites=False)
    assert structure.layer("second").nonnegative is nonnegative
    assert not structure.layer("first").nonnegative


def test_a_view_of_a_tensor_that_was_changed_in_place_is_not_nonnegative() -> None:
    def between(net: Net, x: Tensor) -> Tensor:
        positive = F.relu(x)
        view = positive.view(x.shape)
        positive.sub_(1)
        return view

    assert not discover(Net(between), example(), sites=False).layer("second").nonnegative


# Batch norms --------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A convolution, a step, a batch norm, and a convolution."""

    def __init__(self, forward: Callable[[Normed, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.last = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.step = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


@pytest.mark.parametrize(("step", "norm"), [
    (lambda net, x: net.last(net.norm(net.conv(x))), "norm"),
    (lambda net, x: net.last(net.norm(F.relu(net.conv(x), inplace=True))), None),
    (lambda net, x: net.last(net.norm(net.conv(x).add_(1))), None),
    (lambda net, x: (y := net.conv(x)).mean() + net.last(net.norm(y)), None),
])  # fmt: skip
def test_a_batch_norm_folds_if_it_alone_reads_the_convolution(
    step: Callable[[Normed, Tensor], Tensor], norm: str | None
) -> None:
    structure: Structure = discover(Normed(step), pictures())
    assert structure.layer("conv").norm == norm
    writers = {site.writer: site.kind for site in structure.sites}
    assert writers == ({"conv": "value"} if norm else {"norm": "norm"})


@pytest.mark.parametrize(("activation", "writers"), [(nn.ReLU(), {"conv"}), (nn.SiLU(), set())])
def test_a_batch_norm_with_an_activation_inside(activation: nn.Module, writers: set[str]) -> None:
    """Its weight takes a factor of the output only if the activation passes it."""

    class NormAct(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(8)
            self.activation = activation

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(super().forward(x))

    model = Normed(lambda net, x: net.last(net.norm(net.conv(x))))
    model.norm = NormAct()
    structure = discover(model, pictures())
    assert structure.layer("conv").norm == "norm"
    assert {site.writer for site in structure.sites} == writers
