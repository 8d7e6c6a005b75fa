"""SQuAT: two objectives that do not disturb each other, in three orders."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small_net import Small, gradients_by_hand, plain, same, saq, small, squat
from tiny import Line, token_ids
from torch import Tensor

from qcompress.schema.method_options import Squat


def split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What trains and is no scale, and the scales."""
    scales = {name: tensor for name, tensor in state.items() if name.endswith(".ratio")}
    fixed = ("start", "unit", "running_mean", "running_var", "num_batches_tracked")
    weights = {
        name: tensor for name, tensor in state.items() if name not in scales and not name.endswith(fixed)
    }
    assert len(scales) >= 4 and len(weights) >= 9
    return weights, scales


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[bool]:
    return [torch.equal(a[name], b[name]) for name in a]


def test_rho_0_without_scales_to_train_is_plain_training_with_frozen_scales() -> None:
    ours = small(roles=("weight", "other"), dropout=0.3)
    theirs = small(roles=("weight", "other"), dropout=0.3)
    reports = ours.run(squat(rho=0), 5)
    theirs.run(plain(), 5)
    assert [report.passes for report in reports] == [2] * 5
    assert same(ours.state(), theirs.state())
    assert not same(ours.state(), small().state())


def test_on_each_batch_the_weights_move_first_and_the_scales_then() -> None:
    """Bit for bit, with momentum and weight decay at work in the optimizer."""
    made = small(activations=True, decay=0.1)
    made.watch = lambda made: made.state()
    stepper = squat()
    made.run(stepper, 2)
    for step in (2, 3):
        before = made.state()
        assert made.update(stepper, step).passes == 3
        between, after = made.calls[-1], made.state()
        (w0, s0), (w1, s1), (w2, s2) = split(before), split(between), split(after)
        assert all(equal(s0, s1)) and not any(equal(w0, w1))
        assert all(equal(w1, w2)) and not any(equal(s1, s2))


def test_in_turns_even_updates_move_weights_and_odd_ones_scales() -> None:
    made = small(activations=True, decay=0.1)
    stepper = squat(alternate="iteration")
    stepper.attach(made.net)
    for step in range(6):
        (w0, s0) = split(made.state())
        report = made.update(stepper, step)
        (w1, s1) = split(made.state())
        still, moved = ((s0, s1), (w0, w1)) if step % 2 == 0 else ((w0, w1), (s0, s1))
        assert all(equal(*still)) and not any(equal(*moved))
        assert report.passes == (1 if step % 2 else 2)


def test_the_second_objective_is_the_plain_loss_at_the_updated_weights() -> None:
    made, oracle = small(sgd=True), small(sgd=True, roles=("scale",))
    made.watch = lambda made: made.state()
    made.run(squat(clip_norm=None), 1)
    oracle.net.load_state_dict(made.calls[-1])
    oracle.run(plain(clip_norm=None), 1)
    assert same(made.state(), oracle.state())


def test_fused_takes_the_scales_gradient_unperturbed_and_the_weights_gradient_perturbed() -> None:
    fused, unperturbed, perturbed = (small(sgd=True) for _ in range(3))
    reports = fused.run(squat(alternate="fused", rho=0.3), 1)
    assert [report.passes for report in reports] == [2] and len(fused.calls) == 2
    unperturbed.run(plain(), 1)
    perturbed.run(saq(case=3, ball=["weight"], rho=0.3), 1)
    weights, scales = split(fused.state())
    assert all(equal(scales, split(unperturbed.state())[1])) and all(
        equal(weights, split(perturbed.state())[0])
    )
    assert not any(equal(scales, split(perturbed.state())[1]))


@pytest.mark.parametrize("alternate", ["batch", "iteration", "fused"])
def test_the_sharpness_objective_is_saqs_case_3_or_2(alternate: str) -> None:
    for perturb, case in (("quantized", 3), ("latent", 2)):
        roles = ("weight", "other")
        ours, theirs = small(roles=roles), small(roles=roles)
        ours.run(squat(alternate=alternate, perturb=perturb, rho=0.5), 3)
        theirs.run(saq(case=case, ball=["weight"], rho=0.5), 3)
        assert same(ours.state(), theirs.state())


def test_the_loss_rises_by_the_norm_of_the_gradient_times_rho() -> None:
    """First order, at rho 1e-3; the gradient comes from stock layers."""
    made = small()
    start = made.loss().item()
    gradients = gradients_by_hand(made)
    norm = torch.sqrt(sum(gradients[part].square().sum() for part in ("first", "second", "third")))
    offsets: list[list[Tensor]] = []

    def watch(made: Small) -> None:
        offsets.append([layer.tap.offset for layer in made.linears if layer.tap is not None])

    made.watch = watch
    report = made.run(squat(rho=1e-3), 1)[0]
    assert len(offsets[1]) == 3 and torch.sqrt(
        sum(offset.square().sum() for offset in offsets[1])
    ) == pytest.approx(1e-3, rel=1e-5)
    assert (report.loss - start) / 1e-3 == pytest.approx(float(norm), rel=0.02)
    for rho in (1e-2, 0.05, 0.1):
        again = small()
        assert again.run(squat(rho=rho), 1)[0].loss >= start - 1e-6


def test_weight_decay_and_momentum_leave_what_has_no_gradient_alone() -> None:
    """The planted mistake: gradients set to 0 instead of None."""
    made = small(decay=0.5)
    made.run(plain(), 3)
    before = made.state()
    stepper = squat(alternate="iteration")
    stepper.attach(made.net)
    made.update(stepper, 1)
    assert all(equal(split(before)[0], split(made.state())[0]))


def test_scales_are_no_part_of_its_ball() -> None:
    with pytest.raises(ValidationError, match="weight-scale|Input should be"):
        Squat(ball=["weight-scale"])
    assert Squat(ball=["weight", "norm"]).ball == ["weight", "norm"]


@pytest.mark.parametrize("method", ["squat", "saq"])
def test_the_exported_integers_are_the_rounded_weights(line: Callable[..., Line], method: str) -> None:
    """Against numpy, and the folded model's logits are those of training, bit for bit."""
    made = (
        line(method=method, steps=3, format="w4a8", train={"lr": {"weight": 1e-3, "scale": 1e-2}})
        .train()
        .fold()
    )
    trained, folded = made.tensors("train"), made.tensors("fold")
    layers = [item.name for item in made.plan if item.layer.kind == "linear"]
    assert len(layers) == 8
    start = line(method=method, steps=0, format="w4a8").train().tensors("train")
    for name in layers:
        weight, scale = (trained[f"{name}.weight{part}"].numpy() for part in ("", ".scale"))
        if scale.shape[0] != weight.shape[1] or scale.ndim == 2:  # blocks of input channels
            scale = np.repeat(np.atleast_2d(scale), weight.shape[0] // np.atleast_2d(scale).shape[0], axis=0)
        codes = np.clip(np.round(weight / scale), *made.plan[2].weights.bounds)
        assert np.array_equal(folded[f"{name}.weight.codes"].numpy(), codes)
        assert not torch.equal(trained[f"{name}.weight.scale"], start[f"{name}.weight.scale"])
    ids = token_ids()
    assert torch.equal(made.logits("train", ids), made.logits("fold", ids))
