"""SAQ: where it perturbs, by how much, that nothing of it stays, and what the cheaper variants change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from small_net import (
    CLASSES,
    Small,
    Tied,
    gradients_by_hand,
    plain,
    rounded_by_hand,
    same,
    saq,
    small,
    squat,
    wrap,
)
from tiny import Line, make_recipe
from torch import Tensor
from transformers import GPT2LMHeadModel

from qcompress.errors import ModelError
from qcompress.models.prepare import quantize
from qcompress.pipeline.key_scope import no_result, unselected
from qcompress.quant.layers import Tap, tapped
from qcompress.quant.learned_scale import unit_of
from qcompress.system.fingerprint import code_digest
from qcompress.training.loop import taps_of
from qcompress.training.methods import STEPPERS
from qcompress.training.methods.perturbation import Ball, Perturbation, random_share
from qcompress.training.methods.protocols import Moment
from qcompress.training.parameter_roles import parameter_roles

FULL = ["weight", "bias", "norm", "weight-scale", "activation-scale"]


def seen(made: Small) -> dict[str, Tensor]:
    """The values of one pass: rounded weights, and every parameter (of a learned scale, the scale)."""
    with torch.no_grad():
        found = {
            name: layer.quantized_weight().clone()
            for name, layer in made.net.named_modules()
            if layer in made.taps
        }
        units = {name: unit_of(made.net, name) for name, _ in made.net.named_parameters()}
        return found | {
            f"*{name}": tensor * (1 if units[name] is None else units[name])
            for name, tensor in made.net.named_parameters()
        }


def moves(made: Small) -> dict[str, Tensor]:
    """What the second pass of the last update had changed with respect to the first."""
    first, second = made.calls[-2:]
    return {name: second[name] - first[name] for name in first if not torch.equal(first[name], second[name])}


# The perturbation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"case": 1}, {"case": 2}, {"case": 3}, {"every": 2}, {"subset": 0.5}], ids=str
)
def test_with_rho_0_it_is_plain_training_to_the_last_bit(options: dict[str, object]) -> None:
    """Dropout repeats its masks, and the batch norm counts each batch once."""
    settings = {"activations": True, "dropout": 0.3, "batch_norm": "every" not in options}
    ours, theirs = small(**settings), small(**settings)
    reports = ours.run(saq(rho=0, ball=FULL, **options), 5)
    expected = theirs.run(plain(), 5)
    assert [report.loss for report in reports] == [report.loss for report in expected]
    assert same(ours.state(), theirs.state())
    assert not same(ours.state(), small(**settings).state())


def test_the_perturbation_has_the_norm_rho_and_follows_the_gradient_of_the_rounded_weights() -> None:
    made = small()
    made.watch = seen
    expected = gradients_by_hand(made)
    norm = torch.sqrt(sum(gradient.square().sum() for gradient in expected.values()))
    made.run(saq(rho=0.3), 1)
    found = {name.removeprefix("*"): tensor for name, tensor in moves(made).items()}
    assert found.keys() == expected.keys() and len(found) == 8
    assert torch.sqrt(sum(move.square().sum() for move in found.values())) == pytest.approx(0.3, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], 0.3 * gradient / norm, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("stepper", "scales"),
    [(saq(), False), (saq(ball=["weight", "weight-scale"]), True), (squat(), False),
     (squat(alternate="fused"), True)],
    ids=["saq", "scales in the ball", "squat", "fused"],
)  # fmt: skip
def test_the_search_computes_the_gradients_that_are_asked_of_it_and_no_other(
    stepper, scales: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights' gradients end at their rounded values, so that nothing goes back through a quantizer."""
    made, found = small(activations=True), []
    climb = Ball.climb

    def spy(ball: Ball, *arguments: object) -> object:
        result = climb(ball, *arguments)
        found.append({name for name, tensor in made.net.named_parameters() if tensor.grad is not None})
        return result

    monkeypatch.setattr(Ball, "climb", spy)
    made.run(stepper, 1)
    trained = {name for name, tensor in made.net.named_parameters()}
    assert all(tensor.requires_grad for tensor in made.net.parameters())
    assert not {name for name in found[0] if name.endswith(".weight") and "norm" not in name}
    assert {name for name in found[0] if "weight_quantizer" in name} == {
        name for name in trained if "weight_quantizer" in name and scales
    }


@pytest.mark.parametrize(
    ("ball", "expected"),
    [
        (["weight"], {"first", "second", "third"}),
        (["embedding"], {"table"}),
        (["bias"], {"*first.bias", "*second.bias", "*third.bias"}),
        (["norm"], {"*norm.weight", "*norm.bias", "*batch_norm.weight", "*batch_norm.bias"}),
        (["activation-scale"], {f"*{part}.input_quantizer.ratio" for part in ("first", "second", "third")}),
        (
            ["weight-scale"],
            {f"*{part}.weight_quantizer.ratio" for part in ("table", "first", "second", "third")}
            | {"table", "first", "second", "third"},
        ),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_the_ball_holds_what_it_names_under_one_norm(ball: list[str], expected: set[str]) -> None:
    made = small(activations=True, batch_norm=ball == ["norm"])  # it makes biases in front of it idle
    made.watch, rho = seen, 1e-3 if ball[0].endswith("scale") else 0.1  # a scale keeps half of its value
    made.run(saq(rho=rho, ball=ball), 1)
    found = moves(made)
    assert found.keys() == expected
    own = {name: move for name, move in found.items() if name.startswith("*") or ball != ["weight-scale"]}
    assert torch.sqrt(sum(move.square().sum() for move in own.values())) == pytest.approx(rho, rel=1e-4)


def test_neither_latent_weights_nor_anything_else_is_moved_by_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without an update, an update's perturbation leaves every bit and the optimizer's state as they were."""
    made = small(activations=True)
    made.run(saq(ball=FULL), 2)  # moments exist
    before, moments = made.state(), made.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    made.watch = seen
    monkeypatch.setattr(made.optimizer, "step", lambda: None)
    made.run(saq(ball=FULL, rho=0.5), 1)
    first, second = made.calls[-2:]
    assert len(moves(made)) > 10 and torch.equal(first["*first.weight"], second["*first.weight"])
    assert same(before, made.state())
    assert torch.equal(made.optimizer.state_dict()["state"][0]["exp_avg"], moments)


@pytest.mark.parametrize(
    "stepper", [saq(ball=FULL, rho=0.5), squat(ball=["weight", "bias", "norm"])], ids=["saq", "squat"]
)
def test_a_closure_that_raises_leaves_no_offset_and_no_shift_behind(stepper) -> None:
    made = small(activations=True, batch_norm=True)
    with torch.no_grad():
        made.net.eval()
        expected = made.net(torch.arange(6))
        made.net.train()

    def fail(made: Small) -> None:
        if len(made.calls) == 1:
            assert made.linears[0].tap.offset is not None
            made.net.third = None  # the second pass will fail half way

    before, third = made.state(), made.net.third
    made.watch = fail
    with pytest.raises(TypeError, match="not callable"):
        made.run(stepper, 1)
    made.net.third = third
    assert all(layer.tap is None for layer in made.taps) and made.net.batch_norm.track_running_stats
    after = made.state()
    statistics = [
        name for name in after if name.startswith("batch_norm.") and "running" in name or "tracked" in name
    ]
    assert len(statistics) == 3
    assert all(torch.equal(before[name], after[name]) for name in after if name not in statistics)
    made.net.load_state_dict(before)
    with torch.no_grad():
        assert torch.equal(made.net.eval()(torch.arange(6)), expected)


def test_a_scale_is_never_pushed_below_half_its_value() -> None:
    made = small(activations=True)
    made.watch = seen
    made.run(saq(ball=["activation-scale"], rho=50.0), 1)
    first, second = made.calls[-2:]
    names = [name for name in first if name.endswith("input_quantizer.ratio")]
    assert len(names) == 3
    assert all(second[name] >= first[name] / 2 for name in names)
    assert any(second[name] == first[name] / 2 for name in names)


def test_a_scale_follows_its_own_gradient_and_not_that_of_its_parameter() -> None:
    """With s = unit * ratio, dL/ds is the gradient of the ratio divided by the unit."""
    made = small(activations=True)
    names = [name for name, _ in made.net.named_parameters() if name.endswith("input_quantizer.ratio")]
    for factor, name in enumerate(names, 1):  # other units, equal scales
        quantizer = made.net.get_submodule(name.removesuffix(".ratio"))
        quantizer.unit.mul_(factor)
        quantizer.ratio.data.div_(factor)
    units = [unit_of(made.net, name) for name in names]
    made.loss(0).backward()
    gradients = [made.net.get_parameter(name).grad / unit for name, unit in zip(names, units, strict=True)]
    norm = torch.stack(gradients).norm()
    made.net.zero_grad()
    made.watch = seen
    made.run(saq(ball=["activation-scale"], rho=1e-3), 1)
    found = moves(made)
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(found[f"*{name}"], 1e-3 * gradient / norm, rtol=1e-3, atol=1e-7)


def test_a_tied_head_is_perturbed_with_its_table_by_the_gradient_of_both_uses() -> None:
    torch.manual_seed(0)
    made = wrap(Tied(), ("weight", "scale", "other"))
    made.watch = seen
    table = rounded_by_hand(made.net.table).requires_grad_()
    ids = torch.randint(0, 9, (16,), generator=torch.Generator().manual_seed(0))
    hidden = torch.tanh(table[ids] @ rounded_by_hand(made.net.first).T + made.net.first.bias.detach())
    torch.nn.functional.cross_entropy((hidden @ table.T)[:, :CLASSES], ids % CLASSES).backward()
    made.run(saq(ball=["embedding"], rho=0.1), 1)
    found = moves(made)
    assert found.keys() == {"table"}
    torch.testing.assert_close(found["table"], 0.1 * table.grad / table.grad.norm(), rtol=1e-4, atol=1e-6)
    assert torch.equal(made.net.head._owner[0].quantized_weight(), made.net.table.quantized_weight())


@pytest.mark.parametrize("stepper", [saq(ball=FULL), squat(alternate="fused")], ids=["saq", "squat"])
def test_a_gradient_of_zero_perturbs_nothing_and_is_no_nan(stepper) -> None:
    """0 / 0 without the 1e-12 of the formula."""
    made = small(activations=True, sgd=True)
    made.watch, made.factor, start = seen, 0.0, made.state()
    assert [report.loss for report in made.run(stepper, 2)] == [0.0, 0.0]
    assert moves(made) == {} and same(made.state(), start)


def test_a_ball_of_which_nothing_trains_is_refused() -> None:
    made = small(roles=("scale",))
    with pytest.raises(ModelError, match="perturbs nothing: no member of stepper.ball") as error:
        made.run(saq(ball=["bias", "norm"]), 1)
    assert "stepper: plain" in error.value.fix


# Taps ---------------------------------------------------------------------------------------------


def test_a_kept_rounded_weight_does_not_hide_an_offset_and_outlives_it() -> None:
    layer = small().linears[0].requires_grad_(False)
    x = torch.randn(4, 12)
    kept = layer(x)
    with tapped([layer], [Tap("rounded", torch.full((12, 12), 0.25))]):
        moved = layer(x)
    torch.testing.assert_close(moved - kept, (0.25 * x.sum(1, keepdim=True)).expand(4, 12))
    assert torch.equal(layer(x), kept)
    with tapped(
        [layer], [Tap("latent", 100 * layer.weight_quantizer.scale_of(layer.weight)[:, None].expand(12, 12))]
    ):
        assert torch.equal(
            layer.quantized_weight().amax(1), 7 * layer.weight_quantizer.scale_of(layer.weight)
        )
    assert torch.equal(layer(x), kept)


# The three cases ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [1, 3])
def test_cases_1_and_3_add_eps_to_the_rounded_weight_exactly(case: int) -> None:
    made, offsets = small(), []

    def watch(made: Small) -> dict[str, Tensor]:
        offsets.append([None if layer.tap is None else layer.tap.offset for layer in made.linears])
        return seen(made)

    made.watch = watch
    made.run(saq(case=case, rho=0.2), 1)
    first, second = made.calls
    assert offsets[0] == [None] * 3 and len(offsets) == 2
    for name, offset in zip(("first", "second", "third"), offsets[1], strict=True):
        assert torch.equal(second[name], first[name] + offset) and bool(offset.any())


@pytest.mark.parametrize(("case", "place"), [(1, "rounded"), (2, "latent")])
def test_in_cases_1_and_2_eps_follows_the_gradient_of_the_latent_weights(case: int, place: str) -> None:
    """dL/dw is dL/dQ, from stock layers, where a weight is not clipped, and 0 where it is."""
    made, taps = small(bits=2), []
    gradients, clipped = gradients_by_hand(made), 0
    parts = ("first", "second", "third")
    for name, layer in zip(parts, made.linears, strict=True):
        outside = layer.weight.detach().abs() >= layer.weight_quantizer.start[:, None]  # codes -1, 0 and 1
        gradients[name] = gradients[name].masked_fill(outside, 0.0)
        clipped += int(outside.sum())
    assert clipped > 30
    norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients.values()))
    made.watch = lambda made: taps.append([layer.tap for layer in made.linears])
    made.run(saq(case=case, rho=0.3), 1)
    for name, tap in zip(parts, taps[1], strict=True):
        assert tap.place == place
        torch.testing.assert_close(tap.offset, 0.3 * gradients[name] / norm, rtol=1e-4, atol=2e-6)
        assert torch.equal(tap.offset == 0, gradients[name] == 0)


def test_case_2_moves_rounded_weights_by_whole_steps() -> None:
    made = small()
    made.watch = seen
    made.run(saq(case=2, rho=0.5, ball=["weight"]), 1)
    first, second = made.calls
    changed = 0
    for layer, name in zip(made.linears, ("first", "second", "third"), strict=True):
        start = layer.weight_quantizer.start[:, None]  # the ratio was 1 in both passes
        codes = [(weight[name] / start).round() for weight in (first, second)]
        assert all(
            torch.equal(code * start, weight[name])
            for code, weight in zip(codes, (first, second), strict=True)
        )
        changed += int((codes[0] != codes[1]).sum())
    assert 0 < changed < 60  # of 348 weights: most of a small latent perturbation is rounded away


def test_case_2_below_half_a_step_is_plain_training() -> None:
    ours, theirs = small(), small()
    for made in (ours, theirs):
        for layer in made.linears:
            layer.weight.data.copy_(rounded_by_hand(layer))  # in the middle between two ties
    smallest = min(float(layer.weight_quantizer.start.min()) for layer in ours.linears)
    ours.watch = seen
    below = ours.run(saq(case=2, rho=0.49 * smallest, ball=["weight"]), 1)
    assert below[0].loss == theirs.run(plain(), 1)[0].loss
    assert moves(ours) == {}
    assert small().run(saq(case=3, rho=0.49 * smallest, ball=["weight"]), 1)[0].loss > below[0].loss


def test_cases_1_and_3_agree_where_nothing_is_clipped_and_differ_where_something_is() -> None:
    def after(bits: int, case: int, widen: float) -> tuple[dict[str, Tensor], int]:
        made, clipped = small(bits=bits), 0
        for layer in made.linears:
            layer.weight_quantizer.start.mul_(widen)
            reach = layer.weight_quantizer.start[:, None] * layer.weight_quantizer.bounds[1]
            clipped += int((layer.weight.detach().abs() >= reach).sum())
        made.run(saq(case=case, rho=0.3, ball=["weight"]), 3)
        return made.state(), clipped

    (one, none_clipped), (three, _) = after(8, 1, 4.0), after(8, 3, 4.0)
    assert none_clipped == 0 and same(one, three)
    (one, clipped), (three, _) = after(2, 1, 1.0), after(2, 3, 1.0)
    assert clipped > 30 and not same(one, three)


# Passes -------------------------------------------------------------------------------------------


def test_every_k_takes_1_and_1_over_k_passes_and_keeps_the_perturbation_in_between() -> None:
    made, offsets = small(), []

    def watch(made: Small) -> None:
        offsets.append(None if made.linears[0].tap is None else made.linears[0].tap.offset)

    made.watch = watch
    reports = made.run(saq(every=5), 10)
    assert [report.passes for report in reports] == [2, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    assert len(made.calls) == sum(report.passes for report in reports) == 12
    assert [offset is None for offset in offsets] == [place in (0, 6) for place in range(12)]
    assert all(torch.equal(offsets[1], offset) for offset in offsets[2:6])
    assert not torch.equal(offsets[5], offsets[7])


def test_every_1_is_the_exact_method_and_every_2_is_not() -> None:
    exact, every_1, every_2 = small(), small(), small()
    exact.run(saq(), 4)
    assert [report.passes for report in every_1.run(saq(every=1), 4)] == [2] * 4
    every_2.run(saq(every=2), 4)
    assert same(exact.state(), every_1.state()) and not same(exact.state(), every_2.state())


def test_the_first_update_after_a_resume_is_the_one_that_would_have_come() -> None:
    whole, first, second = small(), small(), small()
    whole.run(saq(every=3, ball=FULL), 6)
    stopped = saq(every=3, ball=FULL)
    first.run(stopped, 4)
    state = stopped.state_dict()
    assert len(state) == 3 + 2 + 3 + 4  # weights; norm; biases; scales of weights and of the table
    second.net.load_state_dict(first.state())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    resumed, forgetful = saq(every=3, ball=FULL), saq(every=3, ball=FULL)
    resumed.load_state_dict(state)
    resumed.attach(second.net)
    for step in (4, 5):
        second.update(resumed, step)
    assert same(second.state(), whole.state())
    second.net.load_state_dict(first.state())
    second.update(forgetful, 4)
    second.update(forgetful, 5)
    assert not same(second.state(), whole.state())
    assert saq().state_dict() == {}


def test_a_subset_is_drawn_anew_for_each_update_and_is_right_on_average() -> None:
    eps = Perturbation((torch.full((200, 50), 2.0),), (torch.full((40,), 3.0), None))
    draws = [random_share(eps, 0.25, Moment(seed=1, phase=0, block=0, step=step)) for step in range(20)]
    again = random_share(eps, 0.25, Moment(seed=1, phase=0, block=0, step=7))
    assert torch.equal(draws[7].offsets[0], again.offsets[0]) and torch.equal(
        draws[7].shifts[0], again.shifts[0]
    )
    others = [Moment(2, 0, 0, 7), Moment(1, 1, 0, 7), Moment(1, 0, 1, 7), Moment(1, 0, 0, 8)]
    for other in others:
        assert not torch.equal(random_share(eps, 0.25, other).offsets[0], again.offsets[0])
    assert set(draws[0].offsets[0].unique().tolist()) == {0.0, 8.0} and draws[0].shifts[1] is None
    share = torch.stack([draw.offsets[0] != 0 for draw in draws]).float().mean()
    assert float(share) == pytest.approx(0.25, abs=0.005)  # 200,000 draws: 5 standard deviations


def test_a_subset_perturbs_that_share_of_the_weights_of_a_step() -> None:
    made, whole = small(), small()
    made.watch = whole.watch = seen
    made.run(saq(subset=0.5, ball=["weight"], rho=0.3), 1)
    whole.run(saq(ball=["weight"], rho=0.3), 1)
    part, full = (torch.cat([move.flatten() for move in moves(each).values()]) for each in (made, whole))
    touched = part != 0
    assert 0.4 < float(touched.float().mean()) < 0.6
    torch.testing.assert_close(part[touched], 2 * full[touched], rtol=1e-3, atol=1e-6)


# Batch norms, processes, precision ----------------------------------------------------------------


@pytest.mark.parametrize("stepper", [saq(), squat(), squat(alternate="fused")], ids=["saq", "squat", "fused"])
def test_running_statistics_count_each_batch_once_and_see_no_perturbed_weight(stepper) -> None:
    ours, theirs = small(batch_norm=True), small(batch_norm=True)
    ours.run(stepper, 1)
    theirs.run(plain(), 1)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(ours.net.batch_norm, name), getattr(theirs.net.batch_norm, name))
    assert int(ours.net.batch_norm.num_batches_tracked) == 1
    assert ours.net.batch_norm.track_running_stats


@pytest.mark.parametrize("alternate", [None, "fused"])
def test_the_search_exchanges_nothing_between_processes_and_the_second_pass_does(
    monkeypatch: pytest.MonkeyPatch, alternate: str | None
) -> None:
    made, quiet, backward = small(), [False], []

    @contextmanager
    def no_sync(self: Accelerator, model: torch.nn.Module):
        assert model is made.net
        quiet[0] = True
        yield
        quiet[0] = False

    plain_backward = Accelerator.backward

    def watch(self: Accelerator, loss: Tensor) -> None:
        backward.append(quiet[0])
        plain_backward(self, loss)

    monkeypatch.setattr(Accelerator, "no_sync", no_sync)
    monkeypatch.setattr(Accelerator, "backward", watch)
    made.watch = lambda made: quiet[0]  # DDP decides in the forward pass
    made.run(squat(alternate=alternate) if alternate else saq(), 2)
    assert backward == made.calls == [True, False, True, False]


def test_every_gradient_of_fused_squat_is_the_mean_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the other process had found a gradient of zero."""
    one, two = small(sgd=True), small(sgd=True)
    start = one.state()
    one.run(squat(alternate="fused", clip_norm=None), 1)
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    monkeypatch.setattr(
        Accelerator, "reduce", lambda self, tensor, reduction: tensor / {"mean": 2}[reduction]
    )
    two.run(squat(alternate="fused", clip_norm=None), 1)
    scales = [name for name in start if name.endswith(".ratio")]
    assert len(scales) == 4
    weights = [name for name in start if name.endswith(".weight")]
    assert len(weights) >= 4
    for name in (*scales, *weights):
        torch.testing.assert_close(
            two.state()[name] - start[name], (one.state()[name] - start[name]) / 2, rtol=1e-3, atol=1e-7
        )


@pytest.mark.parametrize(
    "stepper", [saq, squat, lambda **own: squat(alternate="fused", **own)], ids=["saq", "squat", "fused"]
)
def test_under_a_loss_scale_the_perturbation_is_the_same(monkeypatch: pytest.MonkeyPatch, stepper) -> None:
    """A power of two drops out of every product, so the bits are the same."""
    expected = small()
    expected.run(stepper(rho=0.2), 3)
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    made = small(loss_scale=2.0**70)  # squared, the scaled gradients would overflow
    made.watch = seen
    made.run(stepper(rho=0.2), 3)
    assert same(made.state(), expected.state())


def test_an_overflow_in_the_first_pass_skips_the_perturbation_and_the_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    made = small(loss_scale=2.0**127)
    start, scaler = made.state(), made.accelerator.scaler
    made.watch, made.factor = seen, 1000.0
    stepper = saq(rho=0.2, every=3)
    stepper.attach(made.net)
    report = made.update(stepper, 0)
    assert moves(made) == {} and same(made.state(), start)
    assert report.passes == 2 and torch.isfinite(torch.tensor(report.loss))
    assert scaler.get_scale() == 2.0**126 and stepper.state_dict() == {}
    scaler.update(2.0**10)
    assert [made.update(stepper, step).passes for step in range(1, 5)] == [1, 1, 2, 1]
    assert not same(made.state(), start) and all(tensor.isfinite().all() for tensor in made.state().values())


@pytest.mark.parametrize("clip", [1e-3, None])
def test_each_role_is_clipped_as_the_plain_stepper_clips_it(clip: float | None) -> None:
    ours, theirs, other = small(sgd=True), small(sgd=True), small(sgd=True)
    ours.run(saq(rho=0, clip_norm=clip), 2)
    theirs.run(plain(clip_norm=clip), 2)
    other.run(plain(clip_norm=1e-2), 2)
    assert same(ours.state(), theirs.state()) and not same(ours.state(), other.state())


# In a run -----------------------------------------------------------------------------------------


def test_a_run_reports_its_passes_and_trains_under_bf16(line: Callable[..., Line]) -> None:
    for stepper, passes in (({"every": 3}, 8), ({}, 12)):
        made = line(method="saq", stepper=stepper, steps=6, train={"mixed_precision": "bf16"}).train()
        assert [fact["passes"] for fact in made.facts()["phases"]] == [passes]


def test_each_block_is_calibrated_in_the_ball_of_its_own_weights(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    moments, sizes = [], []

    class Watching(STEPPERS["saq"]):
        def step(self, closure, optimizer, groups, taps, accelerator, moment):
            moments.append((moment.phase, moment.block, moment.step))
            sizes.append(len(taps))
            return super().step(closure, optimizer, groups, taps, accelerator, moment)

    monkeypatch.setitem(STEPPERS, "saq", Watching)
    made = line(method="quadapter", stepper="saq", steps=2).train()
    assert moments == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)]
    assert sizes == [4, 4, 4, 4, 10, 10]  # linear layers of a block; of the model, and its two tables
    assert made.facts()["weights_unchanged"]


def test_the_kinds_of_a_models_parameters(line: Callable[..., Line]) -> None:
    """By counts that can be read off GPT-2's architecture: two blocks of four linear layers, tied head."""
    made = line(format="w8a8", quantizer="lsq", schedule="plain", adapter="none")
    model = GPT2LMHeadModel.from_pretrained(made.source)
    names = set(model.state_dict())
    prepared = quantize(model, "gpt2", made.plan)
    roles = parameter_roles(prepared, made.architecture.layers, names)
    kinds = Counter(item.kind for item in roles.values())
    assert kinds == {"norm": 10, "bias": 8, "other": 10, "weight-scale": 8, "activation-scale": 9}
    assert len(taps_of(prepared)) == 10 and len(taps_of(prepared, "transformer.h.1.")) == 4


def test_a_weight_that_stays_float_is_no_tap(line: Callable[..., Line]) -> None:
    made = line(format={"preset": "w8a8", "layers": {"*.mlp.*": "float"}})
    prepared = quantize(GPT2LMHeadModel.from_pretrained(made.source), "gpt2", made.plan)
    assert len(taps_of(prepared)) == 6
    assert all(layer.weight_quantizer is not None for layer in taps_of(prepared))


def test_another_methods_code_is_no_part_of_the_key(text_file: Path) -> None:
    own = {
        "lsq": set(),
        "saq": {"training/methods/perturbation.py", "training/methods/saq.py"},
        "squat": {"training/methods/perturbation.py", "training/methods/squat.py"},
    }
    every = set.union(*own.values())
    for method, files in own.items():
        unused = unselected(make_recipe(text_file, method=method), "train")
        code = code_digest(["qcompress.pipeline.stages.train"], no_result("train"), unused)
        assert code.keys() & every == files
