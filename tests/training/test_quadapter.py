"""Quadapter: a rescaling that changes no float function, no weight, and only ever helps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import OUTLIER, WIDTH, Line, token_ids
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

import qcompress.pipeline.stages.train
from qcompress.models import load_tokenizer
from qcompress.models.plan import plan_sites
from qcompress.models.prepare import Prepared, initialise, quantize
from qcompress.models.rebuild import rebuild
from qcompress.quant.layers import QuantizedWeight
from qcompress.quant.ranges import Statistics
from qcompress.schema.adapters import QuadapterOptions
from qcompress.tasks import TASKS
from qcompress.training.methods import STEPPERS
from qcompress.training.methods.plain import OneUpdate
from qcompress.training.methods.quadapter import Quadapter, balanced
from qcompress.training.observer import observe

IDENTITY = {"name": "quadapter", "init": "identity"}
SITES = [f"transformer.h.{block}.ln_{norm}" for block in (0, 1) for norm in (1, 2)]


def reader_of(norm: str) -> str:
    return norm.replace("ln_1", "attn.c_attn").replace("ln_2", "mlp.c_fc")


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stock(source: Path) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel.from_pretrained(source, attn_implementation="eager").eval()
    model.config.use_cache = False
    return model


def adapted(made: Line, theta: float = 0.0, **options: object) -> tuple[Prepared, Quadapter]:
    """The model with quantizers and adapters, theta drawn from N(0, theta^2)."""
    model = stock(made.source)
    statistics = observe(model, made.plan, [{"input_ids": token_ids(8)}], 8 * 32)
    prepared = quantize(model, "gpt2", made.plan)
    adapter = Quadapter(QuadapterOptions(**{"init": "identity", **options}))
    adapter.attach(prepared, plan_sites(made.recipe, made.architecture, made.plan), statistics)
    if theta:
        for seed, scale in enumerate(adapter.scales.values()):
            with torch.no_grad():
                scale.theta.copy_(theta * random(scale.theta.shape, seed))
    initialise(prepared, statistics)
    return prepared, adapter


def without_rounding(prepared: Prepared) -> nn.Module:
    """The same model with every quantizer taken out; what is left are the rescalings."""
    for layer in prepared.layers.values():
        if isinstance(layer, QuantizedWeight):
            layer.weight_quantizer = None
        layer.input_quantizer = None
    return prepared.model


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return TASKS["causal-lm"].loss(model(input_ids=ids).logits, {"input_ids": ids})


# What may not change ---------------------------------------------------------------------------------


def test_without_rounding_any_rescaling_computes_the_float_model(line: Callable[..., Line]) -> None:
    made = line(method="quadapter")
    prepared, adapter = adapted(made, theta=0.7)
    assert list(adapter.scales) == SITES
    largest = max(float(scale().detach().max()) for scale in adapter.scales.values())
    assert largest > 4
    ids = token_ids()
    model = without_rounding(prepared)
    expected = stock(made.source)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
    with torch.no_grad():
        difference = model.double()(ids).logits - expected.double()(ids).logits
    assert float(difference.abs().max()) < 1e-12


def test_what_is_trained_is_the_fused_form_that_is_folded(
    line: Callable[..., Line], outlier_model: Path
) -> None:
    made = line(source=outlier_model, method="quadapter", adapter=IDENTITY, steps=6,
                train={"lr": {"adapter": 0.3, "scale": 0.01}}).train().fold()  # fmt: skip
    tensors = made.tensors()
    scales = {name.removesuffix(".rescale"): t for name, t in tensors.items() if name.endswith(".rescale")}
    assert list(sorted(scales)) == SITES and max(float(scale.max()) for scale in scales.values()) > 1.5
    ids = token_ids()
    assert torch.equal(made.logits("train", ids), made.logits("fold", ids))
    # by hand: gamma a, beta a, and codes of W / a
    source, folded = load_file(outlier_model / "model.safetensors"), made.tensors("fold")
    for norm in SITES:
        reader, scale = reader_of(norm), scales[norm]
        for part in ("weight", "bias"):
            assert torch.equal(folded[f"{norm}.{part}"], source[f"{norm}.{part}"] * scale)
        quotient = (source[f"{reader}.weight"] / scale[:, None]) / folded[f"{reader}.weight.scale"]
        assert torch.equal(folded[f"{reader}.weight.codes"], quotient.round().clamp(-128, 127).to(torch.int8))


@pytest.mark.parametrize("quantizer", ["minmax", "lsq"])
def test_scales_of_one_and_no_training_are_plain_post_training_quantization(
    line: Callable[..., Line], quantizer: str
) -> None:
    same = {"quantizer": quantizer, "train": {"lr": {}}}
    plain = line(method="ptq", **same).train().fold()
    ours = line(method="quadapter", adapter=IDENTITY, steps=0, **same).train().fold()
    tensors, expected = ours.tensors(), plain.tensors()
    assert set(tensors) - set(expected) == {f"{norm}.rescale" for norm in SITES}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected.get(name, torch.ones(WIDTH))), name
    ids = token_ids()
    assert torch.equal(ours.logits("fold", ids), plain.logits("fold", ids))


def test_neither_phase_moves_a_weight_and_only_adapters_and_scales_get_gradients(
    line: Callable[..., Line], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[Prepared] = []
    touched: list[set[str]] = []

    def remember(*arguments: object) -> Prepared:
        prepared.append(quantize(*arguments))
        return prepared[-1]

    class Watching(OneUpdate):
        def step(self, closure, optimizer, groups, taps, accelerator, moment):
            closure().backward()
            parameters = dict(prepared[0].model.named_parameters())
            touched.append({name for name, parameter in parameters.items() if parameter.grad is not None})
            wanted = {name for name, parameter in parameters.items() if parameter.requires_grad}
            assert wanted == touched[-1]  # nothing else may keep a graph either
            optimizer.zero_grad()
            return super().step(closure, optimizer, groups, taps, accelerator, moment)

    monkeypatch.setattr(qcompress.pipeline.stages.train, "quantize", remember)
    monkeypatch.setitem(STEPPERS, "plain", Watching)
    made = line(method="quadapter", steps=3).train()
    assert len(touched) == 3 * 2 + 3  # three updates of each of two blocks, then three of the model
    assert all(name.endswith((".theta", "_quantizer.ratio")) for names in touched for name in names)
    assert all(name.startswith("transformer.h.0.") for names in touched[:3] for name in names)
    assert all(name.startswith("transformer.h.1.") for names in touched[3:6] for name in names)
    assert {f"{norm}.rescale.theta" for norm in SITES} <= touched[-1]
    assert (
        len(touched[-1]) == len(SITES) + 2 * 8 + 1
    )  # and a scale for weight and input of 8 linears, and the head's

    facts, tensors = made.facts(), made.tensors()
    assert facts["changed"] == []
    assert all(name.endswith((".scale", ".rescale")) for name in tensors)
    source = load_file(tiny_model / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(source):
        digest.update(name.encode() + source[name].numpy().tobytes())
    assert facts["weights_unchanged"] == {"sha256": digest.hexdigest()}


# What must get better --------------------------------------------------------------------------------


def calibration_ids(made: Line) -> Tensor:
    recipe, tokenizer = made.recipe, load_tokenizer(made.source)
    return TASKS["causal-lm"].examples(recipe.data.calibration, made.text.parent, tokenizer, recipe.task).ids


def block_errors(made: Line) -> list[float]:
    """Mean squared error of each block of the trained model on float inputs, measured with hooks alone."""
    ids = calibration_ids(made)
    models = stock(made.source), rebuild(made.float_model, made.trained).model
    inputs: dict[str, Tensor] = {}
    outputs: list[dict[str, Tensor]] = [{}, {}]
    for index, model in enumerate(models):
        for name in made.architecture.blocks:
            block = model.get_submodule(name)

            def enter(module, arguments, name=name, index=index):
                if index == 0:
                    inputs[name] = arguments[0]
                return (inputs[name], *arguments[1:])

            def leave(module, arguments, output, name=name, index=index):
                outputs[index][name] = output[0] if isinstance(output, tuple) else output

            block.register_forward_pre_hook(enter)
            block.register_forward_hook(leave)
        with torch.no_grad():
            model(input_ids=ids)
    ours, exact = outputs[1], outputs[0]
    return [float((ours[name] - exact[name]).double().square().mean()) for name in made.architecture.blocks]


@pytest.mark.parametrize("init", ["identity", "balanced"])
def test_the_first_phase_more_than_halves_the_error_that_an_outlier_channel_causes(
    line: Callable[..., Line], outlier_model: Path, init: str
) -> None:
    options = {"source": outlier_model, "adapter": {"name": "quadapter", "init": init}, "method": "quadapter"}
    phases = {"calibrate": {"steps": 60}, "finetune": {"steps": 0}}
    made = line(**options, train={"phases": phases, "lr": {"adapter": 0.1}}).train()
    identity = line(**{**options, "adapter": IDENTITY}, steps=0).train()
    without, found = block_errors(identity), block_errors(made)
    facts = made.facts()["phases"]
    assert [fact["block"] for fact in facts] == list(made.architecture.blocks)
    for fact, error, worst in zip(facts, found, without, strict=True):
        assert error < worst / 2
        assert fact["after"] == pytest.approx(error, rel=1e-4)
        assert fact["after"] <= fact["before"]
        if init == "identity":
            assert fact["before"] == pytest.approx(worst, rel=1e-4)
    scale = made.tensors()["transformer.h.0.ln_1.rescale"]
    assert int(scale.argmin()) == OUTLIER


@pytest.mark.parametrize("lr", [0.03, 30.0])
def test_the_first_phase_never_leaves_a_block_worse_than_it_was(line: Callable[..., Line], lr: float) -> None:
    """At the larger rate every step is a disaster, and the starting point is what remains."""
    schedule = {"name": "blockwise-then-end-to-end", "evaluate_every": 1}
    phases = {"calibrate": {"steps": 6}, "finetune": {"steps": 0}}
    rates = {"warmup": 0.0, "decay": "constant", "lr": {"adapter": lr, "scale": lr}}
    options = {"method": "quadapter", "adapter": IDENTITY, "schedule": schedule}
    made = line(**options, train={"phases": phases, **rates}).train()
    facts, found = made.facts()["phases"], block_errors(made)
    assert len(facts) == 2
    for fact, error in zip(facts, found, strict=True):
        assert fact["after"] <= fact["before"]
        assert fact["after"] == pytest.approx(error, rel=1e-4)
    if lr == 30.0:
        assert all(fact["after"] == fact["before"] for fact in facts)
        start = line(method="quadapter", adapter=IDENTITY, steps=0).train().tensors()
        assert all(torch.equal(tensor, start[name]) for name, tensor in made.tensors().items())


def test_calibrated_ranges_are_those_of_the_rescaled_activations(
    line: Callable[..., Line], outlier_model: Path
) -> None:
    made = line(source=outlier_model, method="quadapter", quantizer="minmax", steps=0)
    tensors = made.train().tensors()
    ids = calibration_ids(made)
    for norm in SITES:
        inputs: list[Tensor] = []
        model, scale = stock(outlier_model), tensors[f"{norm}.rescale"]
        model.get_submodule(reader_of(norm)).register_forward_pre_hook(
            lambda module, arguments, inputs=inputs: inputs.append(arguments[0])
        )
        with torch.no_grad():
            model(ids)
        expected = (inputs[0] * scale).abs().max() / 127
        torch.testing.assert_close(tensors[f"{reader_of(norm)}.input.scale"], expected, rtol=1e-5, atol=0)
        assert float(inputs[0].abs().max() / 127 / expected) > 2


# Gradients -------------------------------------------------------------------------------------------


def test_the_gradient_of_a_rescaling_is_zero_without_rounding_and_not_zero_with_it(
    line: Callable[..., Line],
) -> None:
    made, ids = line(method="quadapter"), token_ids()
    prepared, adapter = adapted(made, theta=0.3)
    loss_of(prepared.model, ids).backward()
    with_rounding = {norm: scale.theta.grad.clone() for norm, scale in adapter.scales.items()}
    assert all(grad.isfinite().all() and grad.abs().max() > 1e-4 for grad in with_rounding.values())

    model = without_rounding(prepared).double()
    model.zero_grad()
    loss_of(model, ids).backward()
    for norm, scale in adapter.scales.items():
        # the loss itself is taken in fp32
        assert float(scale.theta.grad.abs().max()) < 1e-6 * float(with_rounding[norm].abs().max() + 1), norm
    with torch.no_grad():
        before = model(ids).logits
        for scale in adapter.scales.values():
            scale.theta.add_(0.01)
        difference = (model(ids).logits - before).abs().max() / 0.01
    assert float(difference) < 1e-10


# The starting value and the bound --------------------------------------------------------------------


def reader(weight: Tensor, axis: int = 1) -> QuantizedWeight:
    return QuantizedWeight(nn.Parameter(weight if axis == 1 else weight.t().contiguous()), None, axis)


@pytest.mark.parametrize("axis", [0, 1])
def test_balanced_is_its_formula(axis: int) -> None:
    first, second = random((24, 40), 0), 3 * random((24, 10), 1)
    largest = random((24,), 2).abs() * 5
    seen = Statistics(largest=largest, mean=largest / 3, rows=torch.empty(0, 24))
    found = balanced(seen.largest, [reader(first, axis), reader(second, axis)], bound=1000.0).double().numpy()
    weight = np.maximum(np.abs(first.double().numpy()).max(1), np.abs(second.double().numpy()).max(1))
    expected = np.sqrt(weight / largest.double().numpy())
    expected /= math.prod(expected) ** (1 / 24)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert math.prod(found) == pytest.approx(1.0, rel=1e-4)


def test_a_balanced_adapter_starts_from_the_activations_and_weights_of_its_own_site(
    line: Callable[..., Line], outlier_model: Path
) -> None:
    made = line(source=outlier_model, method="quadapter")
    _, adapter = adapted(made, init="balanced")
    model, ids = stock(outlier_model), token_ids(8)
    for norm, scale in adapter.scales.items():
        reader = model.get_submodule(reader_of(norm))
        inputs: list[Tensor] = []
        handle = reader.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))  # noqa: B023
        with torch.no_grad():
            model(ids)
        handle.remove()
        expected = (reader.weight.abs().amax(1) / inputs[0].abs().flatten(0, 1).amax(0)).detach().sqrt()
        expected /= expected.log().mean().exp()
        torch.testing.assert_close(scale().detach(), expected, rtol=1e-4, atol=0)
        assert int(expected.argmin()) == OUTLIER


def test_balanced_leaves_channels_alone_that_are_never_active_or_never_read() -> None:
    weight, largest = random((8, 5), 0), torch.full((8,), 2.0)
    weight[1] = 0
    largest[2] = 0
    seen = Statistics(largest=largest, mean=largest, rows=torch.empty(0, 8))
    scale = balanced(seen.largest, [reader(weight)], bound=100.0)
    assert scale[1] == 1 and scale[2] == 1
    live = [0, 3, 4, 5, 6, 7]
    assert float(scale[live].log().mean()) == pytest.approx(0.0, abs=1e-6)
    dead = Statistics(largest=torch.zeros(8), mean=torch.zeros(8), rows=torch.empty(0, 8))
    assert torch.equal(balanced(dead.largest, [reader(weight)], bound=100.0), torch.ones(8))


def test_balanced_stays_within_the_bound() -> None:
    largest = torch.tensor([1e-6, 1.0, 1.0, 1e6])
    seen = Statistics(largest=largest, mean=largest, rows=torch.empty(0, 4))
    scale = balanced(seen.largest, [reader(torch.ones(4, 3))], bound=8.0)
    assert float(scale.max()) == 8.0 and float(scale.min()) == 0.125


def test_training_keeps_every_scale_within_the_bound(line: Callable[..., Line]) -> None:
    made = line(method="quadapter", adapter={"name": "quadapter", "bound": 1.5}, steps=4,
                train={"lr": {"adapter": 5.0}, "warmup": 0.0}).train()  # fmt: skip
    scales = [tensor for name, tensor in made.tensors().items() if name.endswith(".rescale")]
    assert len(scales) == 4
    reached = torch.cat(scales)
    assert float(reached.max()) <= 1.5 * (1 + 1e-6) and float(reached.min()) >= 1 / 1.5 * (1 - 1e-6)
    assert float(reached.max()) == pytest.approx(1.5)  # the learning rate would have gone far beyond


def test_a_site_whose_reader_stays_float_gets_no_rescaling(line: Callable[..., Line]) -> None:
    form = {"preset": "w8a8", "layers": {"transformer.h.0.attn.c_attn": "float"}}
    made = line(method="quadapter", format=form, steps=1).train().fold()
    assert sorted(site["norm"] for site in made.facts()["rescalings"]) == SITES[1:]
    ids = token_ids()
    assert torch.equal(made.logits("train", ids), made.logits("fold", ids))
