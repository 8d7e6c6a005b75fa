"""Dynamic activations become static: ranges of the quantized model, without padding, within the clip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import Line, token_ids
from tiny_bert import encoder_line, save_encoder, token_inputs
from torch import Tensor, nn

from qcompress.models import FAMILIES
from qcompress.models.plan import plan_layers
from qcompress.models.prepare import Prepared, initialise, quantize
from qcompress.quant.dynamic import DynamicActivation
from qcompress.quant.quantizers import FrozenActivation
from qcompress.schema.recipe import Recipe
from qcompress.training.observer import make_static, observe

CLIP, WIDE = 2.5, 4.0
"""The default, which all ranges of the tiny model exceed, and one that some do."""

PADDING = 7
LAYERS = 9
"""Quantized matmuls of the tiny model: four in each block, and the head."""


def prepared(line: Line, **quantizer: object) -> Prepared:
    """The tiny model with ternary weights and dynamic activations, fresh from its checkpoint."""
    recipe = line.recipe.model_dump()
    activations = {"name": "dynamic"} | quantizer
    recipe["quantizer"] = {"weights": "ternary", "embeddings": "ternary", "activations": activations}
    model = FAMILIES["gpt2"].load_float(line.source)
    plan = plan_layers(Recipe.model_validate(recipe), line.architecture)
    made = quantize(model, "gpt2", plan)
    initialise(made, {name: None for name, _ in made.input_quantizers()})
    return made


@pytest.fixture
def student(line: Callable[..., Line]) -> Callable[..., Prepared]:
    made = line(format="ternary-a8")
    return lambda **options: prepared(made, **options)


def batches() -> list[dict[str, Tensor]]:
    """Three batches of several lengths; the last is padded on the right with a token of its own."""
    found = []
    for seed, length in enumerate((32, 9, 20)):
        ids = token_ids(4, length, seed)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    mask = found[-1]["attention_mask"]
    mask[1, 11:] = mask[2, 3:] = 0
    found[-1]["input_ids"][mask == 0] = PADDING
    return found


def inputs_seen(model: nn.Module, names: list[str], batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Largest magnitude at the input of each layer, over real tokens, token by token."""
    largest = dict.fromkeys(names, 0.0)
    current: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda module, arguments: current.__setitem__(name, arguments[0].detach())

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    for batch in batches:
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for row, column in batch["attention_mask"].nonzero().tolist():
            for name, value in current.items():
                largest[name] = max(largest[name], float(value[row, column].abs().max()))
    for handle in handles:
        handle.remove()
    return largest


def test_every_range_is_the_largest_that_the_quantized_model_shows(student: Callable[..., Prepared]) -> None:
    made, twin = student(clip=WIDE), student(clip=WIDE)
    names = [name for name, _ in made.input_quantizers()]
    assert len(names) == LAYERS
    expected = inputs_seen(twin.model.eval(), names, batches())
    facts = make_static(made, batches())
    assert list(facts) == names
    for name, quantizer in made.input_quantizers():
        assert isinstance(quantizer, FrozenActivation)
        assert facts[name]["range"] == expected[name]
        scale = quantizer.scale_of()
        assert float(scale) == facts[name]["scale"] == pytest.approx(min(expected[name], WIDE) / 127)
    clipped = [name for name in names if expected[name] > WIDE]
    assert 0 < len(clipped) < LAYERS


def test_the_float_model_would_have_shown_other_ranges(
    line: Callable[..., Line], student: Callable[..., Prepared]
) -> None:
    made = student()
    model = FAMILIES["gpt2"].load_float(line(format="ternary-a8").source)
    tokens = sum(batch["input_ids"].numel() for batch in batches())
    seen = observe(model, made.plan, batches(), tokens)
    facts = make_static(made, batches())
    differ = [abs(float(seen[name].largest.max()) / fact["range"] - 1) for name, fact in facts.items()]
    assert sum(value > 0.05 for value in differ) > LAYERS // 2


def test_padding_does_not_widen_a_range(student: Callable[..., Prepared]) -> None:
    """The padding token's embedding has one channel alone, which the norm makes larger than all others."""
    first = "transformer.h.0.attn.c_attn"
    data = batches()
    for batch in data:
        real = batch["attention_mask"] == 1
        batch["input_ids"][real & (batch["input_ids"] == PADDING)] = PADDING + 1

    def loud() -> Prepared:
        made = student(clip=None)
        with torch.no_grad():
            made.layers["transformer.wte"].weight[PADDING] = 2.0 * torch.eye(64)[5]
        return made

    padded = make_static(loud(), data)[first]["range"]
    assert padded == make_static(student(clip=None), data)[first]["range"]
    for batch in data:
        del batch["attention_mask"]  # now it is a token like any other
    assert make_static(loud(), data)[first]["range"] > 1.5 * padded


def test_points_become_static_at_the_largest_value_that_real_tokens_have_there(
    text_file: Path, tmp_path: Path
) -> None:
    """Q, K, V and the probabilities of an encoder; the masks of their shapes are written out here."""
    source = save_encoder(tmp_path / "source", text_file, "bert")
    form = {"preset": "ternary-a8", "attention": "int8", "residual": "int8"}
    made = encoder_line(tmp_path / "line", source, text_file, "bert", format=form, quantizer="ternary")
    data = [token_inputs("bert", 4, length, pad="right", seed=length) for length in (7, 12)]
    one, twin = (quantize(made.model("float"), "bert", made.plan, made.points) for _ in range(2))
    real = dict.fromkeys(twin.rounding, 0.0)
    whole = dict(real)
    masks: list[Tensor] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x, mask = arguments[0].detach().abs(), masks[-1]
            shaped = {
                "query_point": mask[:, None, :, None],
                "value_point": mask[:, None, :, None],
                "key_point": mask[:, None, None, :],
                "probability_point": mask[:, None, :, None] & mask[:, None, None, :],
            }.get(name.rpartition(".")[2], mask[:, :, None])
            real[name] = max(real[name], float(torch.where(shaped, x, 0.0).max()))
            whole[name] = max(whole[name], float(x.max()))

        return hook

    for name, quantizer in twin.rounding.items():
        quantizer.register_forward_pre_hook(watch(name))
    for batch in data:
        masks.append(batch["attention_mask"].bool())
        with torch.no_grad():
            twin.model.eval()(**batch)
    facts = make_static(one, data)
    assert len(real) == 16 and sum(whole[name] > real[name] for name in real) >= 3  # padding would widen them
    for name, largest in real.items():
        module = one.model.get_submodule(name)
        assert module is one.rounding[name] and isinstance(module, FrozenActivation)
        assert facts[name]["range"] == largest
        assert float(module.scale) == pytest.approx(min(largest, CLIP) / 127, rel=1e-6)


def test_dropout_is_off_while_ranges_are_observed_and_the_mode_comes_back(
    student: Callable[..., Prepared],
) -> None:
    found = []
    for training in (True, False, True):
        made = student()
        made.model.train(training)
        found.append(make_static(made, batches()))
        assert made.model.training is training
    assert found[0] == found[1] == found[2]


def test_a_model_without_dynamic_activations_is_left_alone(line: Callable[..., Line]) -> None:
    made = line(format="w8a8")
    model = FAMILIES["gpt2"].load_float(made.source)
    one = quantize(model, "gpt2", made.plan)
    before = [quantizer for _, quantizer in one.input_quantizers()]

    def none():
        raise AssertionError("no batch is needed")
        yield

    assert make_static(one, none()) == {}
    assert [quantizer for _, quantizer in one.input_quantizers()] == before
    assert not any(isinstance(quantizer, DynamicActivation) for quantizer in before)


def test_training_ends_with_static_scales_and_says_their_ranges(line: Callable[..., Line]) -> None:
    made = line(format="ternary-a8", method="lsq", quantizer="ternary", steps=3).train()
    ranges, tensors = made.facts()["static_ranges"], made.tensors()
    assert len(ranges) == LAYERS
    for name, fact in ranges.items():
        scale = tensors[f"{name}.input.scale"]
        assert scale.shape == () and float(scale) == fact["scale"] <= CLIP / 127 * (1 + 1e-6)
        assert float(scale) == pytest.approx(min(fact["range"], CLIP) / 127)
    assert line(format="w8a8").train().facts()["static_ranges"] == {}
