"""The adapters `smoothquant` and `awq`: scales are nvidia-modelopt's, the function stays, outliers shrink.

The oracles are the two papers' formulas by hand, on activations seen by hooks on stock models.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import OUTLIER, Line, token_ids
from tiny_bert import StandInExamples, encoder_line, save_encoder, token_inputs
from torch import Tensor
from transformers import AutoModelForSequenceClassification, GPT2LMHeadModel

from qcompress.errors import MachineError, ModelError
from qcompress.models import load_tokenizer
from qcompress.models.folded import assemble
from qcompress.models.plan import plan_sites
from qcompress.models.prepare import quantize
from qcompress.quant.layers import QuantizedWeight
from qcompress.quant.rescaling import FixedScale
from qcompress.tasks import TASKS
from qcompress.training.methods import ADAPTERS

SITES = [f"transformer.h.{block}.ln_{norm}" for block in (0, 1) for norm in (1, 2)]
W4 = {"weights": {"bits": 4, "block": 32}, "embeddings": "float"}


class KilledError(RuntimeError):
    """Stands in for the end of a process."""


def reader_of(writer: str) -> str:
    names = {"ln_1": "attn.c_attn", "ln_2": "mlp.c_fc", "c_attn": "c_proj"}
    place, _, own = writer.rpartition(".")
    return f"{place}.{names[own]}"


def scales_of(made: Line) -> dict[str, Tensor]:
    tensors = made.tensors()
    return {name.removesuffix(".rescale"): t for name, t in tensors.items() if name.endswith(".rescale")}


def calibration_batches(made: Line) -> list[Tensor]:
    """The calibration data in the batches of the recipe."""
    recipe, tokenizer = made.recipe, load_tokenizer(made.source)
    data = TASKS["causal-lm"].examples(recipe.data.calibration, made.text.parent, tokenizer, recipe.task)
    return list(data.ids.split(recipe.train.batch_size))


def inputs_seen(made: Line, name: str) -> list[Tensor]:
    """Inputs of a layer of the stock model, one for each calibration batch."""
    seen: list[Tensor] = []
    model = GPT2LMHeadModel.from_pretrained(made.source, attn_implementation="eager").eval()
    model.get_submodule(name).register_forward_pre_hook(
        lambda module, given: seen.append(given[0].flatten(0, 1))
    )
    with torch.no_grad():
        for ids in calibration_batches(made):
            model(ids)
    return seen


# Their scales ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 0.8])
def test_smoothquants_scales_are_equation_4_of_its_paper(
    line: Callable[..., Line], outlier_model: Path, alpha: float | None
) -> None:
    adapter = {"name": "smoothquant", "sites": "all"} | ({} if alpha is None else {"alpha": alpha})
    made = line(source=outlier_model, adapter=adapter).train()
    found, source = scales_of(made), load_file(outlier_model / "model.safetensors")
    power = 0.5 if alpha is None else alpha
    assert len(found) == 6
    for writer, scale in found.items():
        reader = reader_of(writer)
        largest = torch.cat(inputs_seen(made, reader)).abs().amax(0).double().numpy()
        weight = source[f"{reader}.weight"].abs().amax(1).double().numpy()  # Conv1D: [in, out]
        np.testing.assert_allclose(scale, weight ** (1 - power) / largest**power, rtol=1e-5)
        if "ln_" in writer:
            assert int(scale.argmin()) == OUTLIER


def rounded(weight: Tensor, bits: int, block: int | None) -> Tensor:
    """Nearest integers of absolute maxima, per block of the input or per output channel; weight [in, out]."""
    top = 2 ** (bits - 1) - 1
    pieces = weight[None] if block is None else weight.reshape(-1, block, weight.shape[1])
    scale = pieces.abs().amax(1, keepdim=True) / top
    return ((pieces / scale).round().clamp(-top - 1, top) * scale).reshape(weight.shape)


@pytest.mark.parametrize(("bits", "block", "step"), [(4, 32, 0.1), (3, None, 0.25)])
def test_awqs_scales_are_those_of_the_best_alpha_by_hand(
    line: Callable[..., Line], outlier_model: Path, bits: int, block: int | None, step: float
) -> None:
    form = {"weights": {"bits": bits, "block": block}}
    made = line(source=outlier_model, adapter={"name": "awq", "alpha_step": step}, format=form).train()
    found, source = scales_of(made), load_file(outlier_model / "model.safetensors")
    assert list(sorted(found)) == SITES
    for writer, scale in found.items():
        weight = source[f"{reader_of(writer)}.weight"]
        batches = inputs_seen(made, reader_of(writer))
        mean = torch.stack([x.abs().mean(0) for x in batches]).mean(0)
        pieces = (weight[None] if block is None else weight.reshape(-1, block, weight.shape[1])).abs()
        salience = (pieces / pieces.amax(1, keepdim=True)).reshape(weight.shape).mean(1)
        errors, candidates = [], []
        for power in np.arange(0, 1 + 1e-6, step):
            s = mean**power / salience ** (1 - power)
            s = s / (s.max() * s.min()).sqrt()
            own = rounded(weight * s[:, None], bits, block)
            errors.append(sum(float(((x / s) @ own - x @ weight).square().mean()) for x in batches))
            candidates.append(1 / s)
        torch.testing.assert_close(scale, candidates[int(np.argmin(errors))], rtol=1e-4, atol=0)
        assert len(set(errors)) == len(errors) == round(1 / step) + 1
        assert int(scale.argmin()) == OUTLIER


def test_padding_has_no_part_in_the_scales(tmp_path: Path, text_file: Path) -> None:
    source = save_encoder(tmp_path / "checkpoint", text_file, "bert")
    made = encoder_line(tmp_path / "line", source, text_file, "bert", method="smoothquant").train().fold()
    tensors = load_file(made.trained.path / "trained.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    seen: dict[str, list[Tensor]] = {}
    for block in range(2):
        place = f"bert.encoder.layer.{block}.attention.output.dense"
        keep = seen.setdefault(place, [])
        model.get_submodule(place).register_forward_pre_hook(
            lambda module, given, keep=keep: keep.append(given[0].abs().flatten(0, 1).amax(0))
        )
    data = StandInExamples(made.recipe.task)
    with torch.no_grad():
        for row in range(len(data)):  # one at a time: no padding
            model(**{key: value for key, value in data.batch([row]).items() if key != "labels"})
    assert len(seen) == 2
    for place, peaks in seen.items():
        largest = torch.stack(peaks).amax(0)
        weight = model.get_submodule(place).weight.detach().abs().amax(0)
        writer = place.replace("output.dense", "self.value")
        torch.testing.assert_close(tensors[f"{writer}.rescale"], (weight / largest).sqrt(), rtol=1e-4, atol=0)
    inputs = token_inputs("bert", pad="right")
    assert torch.equal(made.logits("train", inputs), made.logits("fold", inputs))


def test_readers_of_one_norm_share_the_mean_of_modelopts_scales(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = line(adapter="smoothquant")
    (first, second, *_) = plan_sites(made.recipe, made.architecture, made.plan)
    both = replace(first, readers=(*first.readers, *second.readers))
    scales = {first.readers[0]: torch.full((64,), 2.0), second.readers[0]: torch.full((64,), 4.0)}
    monkeypatch.setattr("qcompress.training.methods.modelopt.pre_quant_scales", lambda *given: scales)
    adapter = ADAPTERS["smoothquant"](made.recipe.adapter)
    adapter.fit(torch.nn.Identity(), made.plan, [both], list)
    assert torch.equal(adapter.fitted[first.writer], torch.full((64,), 3.0))
    scales[first.readers[0]][5] = torch.nan
    with pytest.raises(
        ModelError, match=r"c_attn, transformer\.h\.0\.mlp\.c_fc scales that are not positive"
    ):
        adapter.fit(torch.nn.Identity(), made.plan, [both], list)


# What may not change ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), [("smoothquant", "w8a8"), ("awq", W4)])
def test_without_rounding_it_is_the_float_model_and_rounded_what_is_folded(
    line: Callable[..., Line], outlier_model: Path, name: str, form: object
) -> None:
    made = line(source=outlier_model, method=name, format=form).train().fold()
    facts = made.facts()
    assert facts["changed"] == [] and facts["phases"] == [] and len(facts["rescalings"]) == 4
    ids = token_ids()
    assert torch.equal(made.logits("train", ids), made.logits("fold", ids))
    expected = GPT2LMHeadModel.from_pretrained(outlier_model, attn_implementation="eager").eval()
    prepared = quantize(GPT2LMHeadModel.from_pretrained(outlier_model).eval(), "gpt2", made.plan)
    for site in plan_sites(made.recipe, made.architecture, made.plan):
        prepared.rescale(site, FixedScale(scales_of(made)[site.writer]))
    for layer in prepared.layers.values():
        if isinstance(layer, QuantizedWeight):
            layer.weight_quantizer = None
        layer.input_quantizer = None
    with torch.no_grad():
        logits = prepared.model(ids).logits
        torch.testing.assert_close(logits, expected(ids).logits, rtol=0, atol=1e-5)
    assert not torch.equal(made.logits("train", ids), logits)
    source, folded = load_file(outlier_model / "model.safetensors"), made.tensors("fold")
    for norm, scale in scales_of(made).items():
        assert torch.equal(folded[f"{norm}.weight"], source[f"{norm}.weight"] * scale)
        assert torch.equal(folded[f"{norm}.bias"], source[f"{norm}.bias"] * scale)


def test_weights_may_train_around_fixed_scales(line: Callable[..., Line], outlier_model: Path) -> None:
    """The scales stay, the weights move, and what was trained is what is folded."""
    options = {"source": outlier_model, "adapter": "smoothquant"}
    still = line(**options).train()
    made = line(method="lsq", steps=3, **options).train().fold()
    assert {name: True for name in SITES} == {
        name: torch.equal(scale, scales_of(still)[name]) for name, scale in scales_of(made).items()
    }
    assert "transformer.h.0.attn.c_attn.weight" in made.facts()["changed"]
    ids = token_ids()
    assert torch.equal(made.logits("train", ids), made.logits("fold", ids))


# What must get better --------------------------------------------------------------------------------


def block_errors(made: Line) -> list[float]:
    """Mean squared error of the output of each block of the folded model, on its own inputs."""
    ids = torch.cat(calibration_batches(made))
    stock = GPT2LMHeadModel.from_pretrained(made.source, attn_implementation="eager").eval()
    ours = assemble(made.folded)
    with torch.no_grad():
        exact = stock(ids, output_hidden_states=True).hidden_states
        pairs = []
        for index, name in enumerate(made.architecture.blocks):
            outputs = [model.get_submodule(name)(exact[index]) for model in (stock, ours)]
            pairs.append([output[0] if isinstance(output, tuple) else output for output in outputs])
    return [float((a - b).double().square().mean()) for a, b in pairs]


@pytest.mark.parametrize(("name", "form", "factor"), [("smoothquant", "w8a8", 10), ("awq", W4, 1.2)])
def test_an_outlier_costs_less(
    line: Callable[..., Line], outlier_model: Path, name: str, form: object, factor: float
) -> None:
    """An outlier of 40, which one scale for all activations, or for a block of weights, does not hold."""
    plain = block_errors(line(source=outlier_model, method="ptq", format=form).train().fold())
    ours = block_errors(line(source=outlier_model, method=name, format=form).train().fold())
    assert len(ours) == 2
    for error, before in zip(ours, plain, strict=True):
        assert error < before / factor


# Machines and tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smoothquant", "awq"])
@pytest.mark.parametrize("lost", ["modelopt", "requests"])
def test_a_machine_without_modelopt_is_told_the_command_before_anything_is_read(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch, name: str, lost: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "qcompress.training.methods.modelopt.find_spec",
        lambda package: None if package == lost else found(package),
    )
    made = line(adapter=name)
    monkeypatch.setattr("qcompress.pipeline.stages.train._read", None)
    with pytest.raises(MachineError, match=f"adapter: {name} .*{lost} is not installed") as refused:
        made.train()
    assert "pip install nvidia-modelopt requests" in refused.value.fix


def test_modelopt_leaves_stock_models_and_standard_output_alone(
    line: Callable[..., Line], capsys: pytest.CaptureFixture[str]
) -> None:
    made, ids = line(adapter="awq", format=W4), token_ids()
    before = made.logits("float", ids)
    made.train()
    assert "modelopt" in sys.modules and capsys.readouterr().out == ""
    assert torch.equal(before, made.logits("float", ids))


def test_a_resumed_run_takes_its_scales_from_the_checkpoint(
    line: Callable[..., Line], outlier_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed after calibration does not ask modelopt a second time."""
    options = {"source": outlier_model, "adapter": "smoothquant", "method": "lsq", "steps": 2}
    whole = line(**options).train()
    made = line(**options)

    def killed(*given: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("qcompress.pipeline.stages.train.run_model_phase", killed)
        with pytest.raises(KilledError):
            made.train()
    monkeypatch.setattr("qcompress.training.methods.modelopt.pre_quant_scales", killed)
    made.train()
    tensors, expected = made.tensors(), whole.tensors()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
