"""Roles of parameters come from declarations of classes, never from the ending of a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from tiny import Line
from torch import Tensor, nn

from qcompress.errors import UsageError
from qcompress.quant.affine import fake_quantize
from qcompress.quant.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, LsqActivation, LsqWeight
from qcompress.quant.weight_quantizer import CodedWeight
from qcompress.system.reporter import Reporter
from qcompress.training import loop
from qcompress.training.methods import ADAPTERS
from qcompress.training.methods.quadapter import Quadapter

RATES = {"weight": 1e-5, "scale": 3e-3, "adapter": 7e-2, "centroid": 5e-4, "other": 2e-6}
RECIPE: dict[str, Any] = {"method": "lsq", "train": {"lr": RATES}, "steps": 1}


class Learned(CodedWeight):
    """A learned scale under a name that no list in the package knows."""

    NAME = "alpha"

    def __init__(self, options: Any, grid: Any, bounds: tuple[int, int], shape: torch.Size) -> None:
        super().__init__()
        self.grid, self.bounds = grid, bounds
        self.register_parameter(self.NAME, nn.Parameter(torch.ones(grid.scale_shape(shape))))

    def init(self, weight: Tensor) -> None:
        getattr(self, self.NAME).data.copy_(self.grid.largest(weight) / self.bounds[1])

    def scale_of(self, weight: Tensor) -> Tensor:
        return getattr(self, self.NAME)

    def forward(self, weight: Tensor) -> Tensor:
        scale = self.grid.align(self.scale_of(weight))
        return self.grid.join(fake_quantize(self.grid.divide(weight), scale, self.bounds, 1.0))

    def advance(self) -> None:
        pass


class Declared(Learned):
    parameter_roles: ClassVar[dict[str, str]] = {"alpha": "scale"}


class Theta(Learned):
    """Its name is that of Quadapter's parameter."""

    NAME = "theta"
    parameter_roles: ClassVar[dict[str, str]] = {"theta": "scale"}


class Ratio(Learned):
    """Its name is that of LSQ's learned scale, and its role another one."""

    NAME = "ratio"
    parameter_roles: ClassVar[dict[str, str]] = {"ratio": "centroid"}


def groups(line: Callable[..., Line], **recipe: Any) -> dict[str, loop.Group]:
    """The groups of the first phase, as the loop makes them."""
    made: list[loop.Group] = []
    original = loop.groups_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop, "groups_of", lambda *given, **named: made.extend(original(*given, **named)) or made
        )
        line(**{**RECIPE, **recipe}).train()
    return {group.role: group for group in made}


@pytest.mark.parametrize(("kind", "role"), [(Declared, "scale"), (Theta, "scale"), (Ratio, "centroid")])
def test_a_quantizers_parameter_has_the_rate_of_the_role_that_its_class_declares(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch, kind: type, role: str
) -> None:
    monkeypatch.setitem(WEIGHT_QUANTIZERS, "lsq", kind)
    made = groups(line, quantizer={"weights": "lsq", "activations": "minmax"})
    assert len(made[role].parameters) == 8  # the linear layers of two blocks
    assert made[role].lr == RATES[role]
    wanted = "weight-scale" if role == "scale" else "centroid"
    assert set(made[role].kinds) == {wanted}
    assert made[role].weight_decay == 0.0


def test_an_activations_scale_is_of_the_kind_that_a_ball_asks_for(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shifted(LsqActivation):
        parameter_roles: ClassVar[dict[str, str]] = {**LsqActivation.parameter_roles, "beta": "other"}

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.beta = nn.Parameter(torch.zeros(()))

    monkeypatch.setitem(ACTIVATION_QUANTIZERS, "lsq", Shifted)
    made = groups(line)
    kinds = list(made["scale"].kinds)
    assert (kinds.count("weight-scale"), kinds.count("activation-scale")) == (8, 9)
    assert list(made["other"].kinds).count("other") >= 9


class Undeclared(Learned):
    pass


class Misspelt(Learned):
    parameter_roles: ClassVar[dict[str, str]] = {"alpha": "scales"}


class Inherits(LsqWeight):
    """One parameter more than its base declares."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.inner = nn.Linear(1, 1, bias=False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Undeclared, r"'alpha' is not declared.*\n.*parameter_roles = \{\"alpha\": \"scale\"\}"),
        (Misspelt, "has the role 'scales', which does not exist"),
        (Inherits, r"'inner.weight' is not declared.*\n.*\"inner.weight\": \"scale\"\}"),
    ],
)
def test_a_parameter_without_a_role_ends_the_run_before_the_first_update(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch, kind: type, message: str
) -> None:
    monkeypatch.setitem(WEIGHT_QUANTIZERS, "lsq", kind)
    monkeypatch.setattr(loop, "advance", lambda prepared: pytest.fail("an update was made"))
    with pytest.raises(UsageError, match=message):
        line(**RECIPE).train()


class Gains(nn.Module):
    """The rescaling of an adapter; its parameter is not called theta."""

    parameter_roles: ClassVar[dict[str, str]] = {"gains": "adapter"}

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.ones(channels))

    def forward(self) -> Tensor:
        return self.gains

    def advance(self) -> None:
        pass


class Plain(Quadapter):
    def attach(self, prepared: Any, sites: Any, statistics: Any) -> None:
        for site in sites:
            self.scales[site.writer] = Gains(site.channels)
            prepared.rescale(site, self.scales[site.writer])


class Loose(Quadapter):
    def attach(self, prepared: Any, sites: Any, statistics: Any) -> None:
        prepared.model.loose = nn.Parameter(torch.ones(()))


def test_an_adapters_parameter_is_declared_by_its_rescaling(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ADAPTERS, "quadapter", Plain)
    made = groups(line, method="quadapter")
    assert made["adapter"].lr == RATES["adapter"] and len(made["adapter"].parameters) == 4


def test_a_parameter_that_an_adapter_leaves_elsewhere_is_refused(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ADAPTERS, "quadapter", Loose)
    with pytest.raises(UsageError, match="parameter loose belongs neither"):
        line(method="quadapter", steps=1).train()


def test_a_role_that_no_phase_trains_is_told(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Declared, "parameter_roles", {"alpha": "adapter"})
    monkeypatch.setitem(WEIGHT_QUANTIZERS, "lsq", Declared)
    line(**RECIPE).train(Reporter())
    assert "8 parameters with the role adapter" in capsys.readouterr().err
