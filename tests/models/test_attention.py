"""The attention function: stock attention to the last bit, with places to look, to change and to round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_model, token_ids
from tiny_bert import BLOCKS, HEADS, WIDTH, make_encoder, token_inputs
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qcompress.errors import ModelError
from qcompress.models import FAMILIES
from qcompress.models.architecture import OPERANDS
from qcompress.models.attention import open_attention, token_vectors
from qcompress.schema.families import DISCOVERED

FAMILY_NAMES = ("gpt2", "bert", "roberta", "distilbert")
ATTENTION = {"gpt2": "transformer.h.{}.attn", "bert": "bert.encoder.layer.{}.attention.self",
             "roberta": "roberta.encoder.layer.{}.attention.self",
             "distilbert": "distilbert.transformer.layer.{}.attention"}  # fmt: skip


def make(family: str) -> nn.Module:
    model = make_model() if family == "gpt2" else make_encoder(family)
    model.set_attn_implementation("eager")
    return model


def inputs_of(family: str, pad: str, length: int = 12) -> dict[str, Tensor]:
    if family != "gpt2":
        return token_inputs(family, length=length, pad=pad)
    mask = token_inputs("bert", length=length, pad=pad)["attention_mask"]
    return FAMILIES["gpt2"].graph_inputs(token_ids(4, length), mask)


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


STATED = set(FAMILIES) - {*DISCOVERED.values()}
"""Families whose architecture is written down."""


def test_the_families_are_all_there_are() -> None:
    """With attention; test_convnets.py holds the others to their stock models, test_vit.py the images'."""
    assert {*FAMILY_NAMES, "vit", "resnet", "cifar-resnet", "efficientnet", "mobilenet-v2"} == STATED
    assert set(FAMILY_NAMES) == set(ATTENTION)


@pytest.mark.parametrize("pad", ["", "left", "right"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_it_is_stock_attention_to_the_last_bit(family: str, pad: str) -> None:
    model = make(family)
    for length in (12, 1):
        inputs = inputs_of(family, pad if length > 1 else "", length)
        model.set_attn_implementation("eager")
        eager = logits(model, inputs)
        model.set_attn_implementation("sdpa")
        sdpa = logits(model, inputs)
        open_attention(model)
        assert model.config._attn_implementation == "qcompress"
        found = logits(model, inputs)
        assert torch.equal(found, eager)
        real = inputs["attention_mask"].bool() if found.dim() == 3 else torch.ones(len(found), dtype=bool)
        limit = 2e-7 * float(eager.abs().max().clamp_min(1))  # a unit in the last place of the largest logit
        assert float((found - sdpa)[real].abs().max()) <= 4 * limit


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_it_is_stock_attention_in_training_with_the_same_dropout(family: str) -> None:
    model, inputs = make(family).train(), inputs_of(family, "right")
    found = []
    for opened in (False, True):
        if opened:
            open_attention(model)
        torch.manual_seed(3)
        model.zero_grad()
        output = model(**inputs).logits
        output.square().sum().backward()
        found.append((output.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(found[0][0], found[1][0]) and len(found[0][1]) > 20
    for stock, own in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(own, stock, rtol=1e-5, atol=1e-5 * float(stock.abs().max()))


def test_a_causal_model_stays_causal() -> None:
    model = make("gpt2")
    open_attention(model)
    ids = token_ids(2, 10)
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 300
    first, second = (logits(model, FAMILIES["gpt2"].graph_inputs(some)) for some in (ids, changed))
    assert torch.equal(first[:, :6], second[:, :6]) and not torch.equal(first[:, 6:], second[:, 6:])


class Recorder:
    """A probe that writes down what it sees, and may put other tensors in its place."""

    def __init__(self, **instead: Tensor) -> None:
        self.seen: dict[str, Tensor] = {}
        self.instead = instead

    def scores(self, s: Tensor) -> None:
        self.seen["scores"] = s

    def probabilities(self, a: Tensor) -> Tensor:
        self.seen["probabilities"] = a
        return self.instead.get("probabilities", a)

    def context(self, c: Tensor) -> Tensor:
        self.seen["context"] = c
        return self.instead.get("context", c)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_probe_sees_scores_probabilities_and_context(family: str) -> None:
    model, inputs = make(family), inputs_of(family, "right")
    expected = logits(model, inputs)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    open_attention(model)
    probes = [Recorder() for _ in range(BLOCKS)]
    for index, probe in enumerate(probes):
        model.get_submodule(ATTENTION[family].format(index)).probe = probe
    assert torch.equal(logits(model, inputs), expected)
    for probe, a in zip(probes, maps, strict=True):
        seen = probe.seen
        assert torch.equal(seen["probabilities"], a)
        scores = seen["scores"].double().numpy()  # with scaling and mask: their softmax is the map
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        np.testing.assert_allclose(powers / powers.sum(-1, keepdims=True), a.numpy(), atol=1e-6)
        assert seen["context"].shape == (4, HEADS, 12, WIDTH // HEADS)


@pytest.mark.parametrize("what", ["probabilities", "context"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_a_probe_returns_is_used(family: str, what: str) -> None:
    """The first attention is given what it has on other tokens."""
    model, inputs = make(family), inputs_of(family, "")
    name = ATTENTION[family].format(0)
    open_attention(model)
    attention = model.get_submodule(name)
    attention.probe = other = Recorder()
    logits(model, {**inputs, "input_ids": inputs["input_ids"].flip(0)})
    outputs: list[Tensor] = []
    handle = attention.register_forward_hook(lambda module, given, output: outputs.append(output[0]))
    plain = Recorder()
    attention.probe = plain
    logits(model, inputs)
    attention.probe = Recorder(**{what: other.seen[what]})
    logits(model, inputs)
    handle.remove()
    assert not torch.equal(outputs[0], outputs[1])
    if what == "context":  # the output of the module follows from the context alone
        attention.probe = Recorder()
        handle = attention.register_forward_hook(lambda module, given, output: outputs.append(output[0]))
        logits(model, {**inputs, "input_ids": inputs["input_ids"].flip(0)})
        handle.remove()
        assert torch.equal(outputs[1], outputs[2])


class Doubled(nn.Module):
    """Marks what passes, so that its place can be seen in the result."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return 2 * x


@pytest.mark.parametrize("point", OPERANDS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_each_operand_passes_its_point_in_front_of_its_matmul(family: str, point: str) -> None:
    model, inputs = make(family), inputs_of(family, "")
    name = ATTENTION[family].format(0)
    open_attention(model)
    module = model.get_submodule(name)
    module.probe = plain = Recorder()
    logits(model, inputs)
    doubled = Doubled()
    FAMILIES[family].install_points(model, {f"{name}.{point}": doubled})
    module.probe = probe = Recorder()
    logits(model, inputs)
    width = WIDTH // HEADS
    shape = {"key_point": (4, HEADS, width, 12), "probability_point": (4, HEADS, 12, 12)}
    assert doubled.shapes == [shape.get(point, (4, HEADS, 12, width))]
    real = plain.seen["scores"] > -1e9
    times = {"query_point": (2, None), "key_point": (2, None)}.get(point, (1, 2))
    assert torch.equal(probe.seen["scores"][real], times[0] * plain.seen["scores"][real])
    if times[1]:  # doubling a factor of the second matmul doubles the context
        assert torch.equal(probe.seen["context"], times[1] * plain.seen["context"])
        assert torch.equal(probe.seen["probabilities"], plain.seen["probabilities"])


def test_token_vectors_leave_padding_out() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.arange(2 * 2 * 3 * 4.0).reshape(2, 2, 3, 4)  # batch, heads, tokens, width
    found = token_vectors("a.query_point", x, mask)
    expected = [x[0, :, 0].flatten(), x[0, :, 1].flatten(), x[1, :, 0].flatten()]
    assert torch.equal(found, torch.stack(expected))
    assert torch.equal(token_vectors("a.key_point", x.transpose(-1, -2), mask), found)
    assert token_vectors("a.value_point", x, None).shape == (6, 8)
    a = torch.arange(2 * 2 * 3 * 3.0).reshape(2, 2, 3, 3)
    pairs = [*a[0, :, :2, :2].flatten().tolist(), *a[1, :, :1, :1].flatten().tolist()]
    assert token_vectors("a.probability_point", a, mask).flatten().tolist() == pairs
    assert token_vectors("a.probability_point", a, None).shape == (36, 1)
    y = torch.arange(2 * 3 * 5.0).reshape(2, 3, 5)
    assert torch.equal(token_vectors("a.skip_point", y, mask), torch.stack([y[0, 0], y[0, 1], y[1, 0]]))


def test_without_probes_and_points_no_model_uses_it(tiny_model: Path) -> None:
    model = FAMILIES["gpt2"].load_float(tiny_model)
    FAMILIES["gpt2"].install_points(model, {})
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_model_of_the_caller_and_the_callers_own_functions_are_not_affected(family: str) -> None:
    inputs = inputs_of(family, "right")
    theirs, ours = make(family).eval(), make(family).eval()
    before = {}
    for name in ("eager", "sdpa"):
        theirs.set_attn_implementation(name)
        before[name] = logits(theirs, inputs)
    functions, masks = dict(ALL_ATTENTION_FUNCTIONS.items()), dict(ALL_MASK_ATTENTION_FUNCTIONS.items())
    assert open_attention(ours) == "eager"
    logits(ours, inputs)
    assert theirs.config._attn_implementation == "sdpa"
    for name, expected in before.items():
        theirs.set_attn_implementation(name)
        assert torch.equal(logits(theirs, inputs), expected)
    added = [
        {name for name, function in table.items() if kept.get(name) is not function}
        for kept, table in ((functions, ALL_ATTENTION_FUNCTIONS), (masks, ALL_MASK_ATTENTION_FUNCTIONS))
    ]
    assert all(names <= {"qcompress"} for names in added)


def test_a_function_of_the_caller_with_our_name_is_not_replaced() -> None:
    model, theirs = make("bert"), lambda *arguments, **keywords: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "qcompress", theirs)
        with pytest.raises(ModelError, match="another function with the name 'qcompress'"):
            open_attention(model)
        assert ALL_ATTENTION_FUNCTIONS["qcompress"] is theirs
    assert model.config._attn_implementation == "eager"
