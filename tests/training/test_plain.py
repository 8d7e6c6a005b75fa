"""The plain stepper: one update, each role clipped by itself, also under the loss scale of fp16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qcompress.schema.method_options import PlainStepper
from qcompress.training.methods.plain import OneUpdate
from qcompress.training.methods.protocols import Group, Moment

MOMENT = Moment(seed=0, phase=0, block=0, step=0)
START = {"weight": [3.0, 4.0], "scale": [300.0, 400.0], "other": [0.003, 0.004]}
"""The gradient of each role is its own value: norms 5, 500 and 0.005."""


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def setting(accelerator: Accelerator) -> tuple[list[Group], torch.optim.Optimizer, Callable[[], Tensor]]:
    parameters = {role: nn.Parameter(torch.tensor(value)) for role, value in START.items()}
    groups = [Group(role, (parameter,), lr=1.0) for role, parameter in parameters.items()]
    optimizer = accelerator.prepare(
        torch.optim.SGD([{"params": list(group.parameters)} for group in groups], lr=1.0)
    )
    return groups, optimizer, lambda: sum(p.square().sum() / 2 for p in parameters.values())


def moves(groups: list[Group]) -> dict[str, float]:
    return {
        group.role: float((torch.tensor(START[group.role]) - group.parameters[0].detach()).norm())
        for group in groups
    }


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        (1.0, {"weight": 1.0, "scale": 1.0, "other": 0.005}),
        (10.0, {"weight": 5.0, "scale": 10.0, "other": 0.005}),
        (None, {"weight": 5.0, "scale": 500.0, "other": 0.005}),
    ],
)
def test_each_role_is_clipped_to_the_norm_by_itself(
    accelerator: Accelerator, clip: float | None, expected: dict[str, float]
) -> None:
    groups, optimizer, closure = setting(accelerator)
    report = OneUpdate(PlainStepper(clip_norm=clip)).step(closure, optimizer, groups, (), accelerator, MOMENT)
    assert moves(groups) == pytest.approx(expected, rel=1e-4)
    assert report.passes == 1 and report.loss == pytest.approx((5**2 + 500**2 + 0.005**2) / 2)
    assert all(parameter.grad is None for group in groups for parameter in group.parameters)


def test_under_a_loss_scale_the_unscaled_gradient_is_clipped(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed precision fp16 needs a GPU, its loss scale does not. Two optimizers, as in a second phase."""
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    setting(accelerator)  # the optimizer of an earlier phase
    groups, optimizer, closure = setting(accelerator)
    stepper = OneUpdate(PlainStepper(clip_norm=1.0))
    stepper.step(closure, optimizer, groups, (), accelerator, MOMENT)
    assert moves(groups) == pytest.approx({"weight": 1.0, "scale": 1.0, "other": 0.005}, rel=1e-4)
    stepper.step(closure, optimizer, groups, (), accelerator, MOMENT)
    assert moves(groups) == pytest.approx({"weight": 2.0, "scale": 2.0, "other": 0.005}, rel=1e-2)
