"""Training: it learns, it is a plain function of its recipe, and it refuses what cannot work."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import CONTEXT, WIDTH, Line, make_checkpoint, token_ids
from torch import Tensor
from transformers import GPT2LMHeadModel

import qcompress.pipeline.stages.train
from qcompress.errors import ContractError, MachineError, ModelError, UsageError
from qcompress.models import load_tokenizer
from qcompress.models.prepare import quantize
from qcompress.models.rebuild import rebuild
from qcompress.quant.quantizers import LsqActivation, LsqWeight
from qcompress.schema.recipe import TextData
from qcompress.tasks import TASKS
from qcompress.training.artifact import snap
from qcompress.training.batches import batch_rows
from qcompress.training.methods import STEPPERS
from qcompress.training.methods.plain import OneUpdate
from qcompress.training.observer import observe


def train_ids(made: Line, data: TextData | None = None) -> Tensor:
    task = made.recipe.task
    data = data or made.recipe.data.train
    return TASKS["causal-lm"].examples(data, made.text.parent, load_tokenizer(made.source), task).ids


@torch.no_grad()
def loss_on_training_data(made: Line) -> float:
    ids = train_ids(made)
    logits = made.logits("train", ids)
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def changed_checkpoint(source: Path, folder: Path, **changes: Callable[[Tensor], Tensor]) -> Path:
    """A copy of a checkpoint with some tensors changed; names with dots written as double underscores."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    for name, change in changes.items():
        tensors[name.replace("__", ".")] = change(tensors[name.replace("__", ".")]).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# It learns -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantizer", "form"),
    [("lsq", "w4a8"), ("minmax", "w4a8"), ("lsq", "w2a8"), ("dynamic", "w4a8"), ("ternary", "ternary-a8")],
)
def test_training_through_the_quantizers_lowers_the_loss(
    line: Callable[..., Line], quantizer: str, form: str
) -> None:
    options = {"quantizer": quantizer, "format": form}
    rates = {"lr": {"weight": 3e-3, "other": 3e-3}}
    before = loss_on_training_data(line(method="lsq", steps=0, **options).train())
    made = line(method="lsq", steps=60, **options, train=rates).train()
    after = loss_on_training_data(made)
    assert after < before - 1.0
    (fact,) = made.facts()["phases"]
    assert fact["name"] == "finetune" and fact["steps"] == fact["passes"] == 60
    assert fact["last_loss"] == pytest.approx(after, abs=0.4)


def test_float_training_is_the_training_loop_everyone_would_write(
    line: Callable[..., Line], without_dropout: Path
) -> None:
    steps, size = 6, 4
    made = line(source=without_dropout, method="float", format="float", steps=steps, seed=3,
                stepper={"name": "plain", "clip_norm": None},
                train={"lr": {"weight": 1e-3, "other": 5e-4}, "weight_decay": 0.1,
                       "warmup": 0.34})  # fmt: skip
    made.train()
    model = GPT2LMHeadModel.from_pretrained(without_dropout, attn_implementation="eager")
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2]
    vectors = [p for name, p in model.named_parameters() if p.dim() == 1]
    assert len(matrices) == 2 + 2 * 4 and len(vectors) == 2 * 8 + 2
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    )
    ids = train_ids(made)
    factors = [1 / 2, 2 / 2, 1.0, 3 / 4, 2 / 4, 1 / 4]  # two steps up, then linearly down
    for step, factor in enumerate(factors):
        batch = ids[batch_rows(np.ones(len(ids)), size, step, seed=3)]
        for group, rate in zip(optimizer.param_groups, (1e-3, 5e-4), strict=True):
            group["lr"] = rate * factor
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = made.tensors()
    trained = dict(model.named_parameters())
    assert set(tensors) == set(trained) == set(made.facts()["changed"])
    start = load_file(without_dropout / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(
            "c_attn.bias"
        ):  # softmax cancels the key's bias: its gradient is noise, which Adam magnifies
            tensor[WIDTH : 2 * WIDTH] = trained[name][WIDTH : 2 * WIDTH].detach()
        torch.testing.assert_close(tensor, trained[name].detach(), rtol=0, atol=1e-4)
        assert (tensor - start[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize(("method", "phase"), [("lsq", "finetune"), ("quadapter", "calibrate")])
def test_no_learning_rate_brings_a_scale_below_its_floor(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch, method: str, phase: str
) -> None:
    """In both loops. The least ratio before a projection is below zero: without it, the scale would be."""
    options = {"method": method, "quantizer": {"name": "lsq", "floor": 0.2}}
    start = line(**options, steps=0).train().tensors()
    quiet = {"finetune": {"steps": 0}} if method == "quadapter" else {}
    phases, rates = {**quiet, phase: {"steps": 4}}, {"warmup": 0.0, "lr": {"scale": 3.0}}
    lowest: list[float] = []
    monkeypatch.setattr(
        LsqWeight, "advance", lambda self: (lowest.append(self.ratio.min().item()), project(self))
    )
    project = LsqActivation.advance
    after = line(**options, train={**rates, "phases": phases}).train().tensors()
    scales = [name for name in start if ".h." in name and name.endswith(".scale")]
    assert len(scales) == 16 and min(lowest) < 0
    for name in scales:
        assert (after[name] >= 0.2 * start[name] * (1 - 1e-5)).all(), name


def test_a_float_run_folds_into_the_model_it_trained(line: Callable[..., Line]) -> None:
    made = line(method="float", format="float", steps=2).train().fold()
    ids = token_ids()
    assert torch.equal(made.logits("train", ids), made.logits("fold", ids))
    assert not torch.equal(made.logits("train", ids), made.logits("float", ids))
    assert all(tensor.is_floating_point() for tensor in made.tensors("fold").values())


def test_minmax_with_the_plain_schedule_is_quantization_aware_training_on_ranges_that_follow(
    line: Callable[..., Line],
) -> None:
    """Weight scales are those of the weights that came out; activation scales are the calibrated ones."""
    options = {"method": "lsq", "quantizer": "minmax"}
    start, made = (
        line(steps=0, **options).train(),
        line(steps=5, **options, train={"lr": {"weight": 1e-2}}).train(),
    )
    before, after = start.tensors(), made.tensors()
    linears = [name for name in after if name.endswith("weight.scale") and ".h." in name]
    assert len(linears) == 8
    for name in linears:
        weight = after[name.removesuffix(".scale")]
        assert torch.equal(after[name], weight.abs().amax(0) / 127)
        assert not torch.equal(after[name], before[name])
    inputs = [name for name in after if name.endswith("input.scale")]
    assert len(inputs) == 9
    assert all(torch.equal(after[name], before[name]) for name in inputs)


# A plain function of the recipe ----------------------------------------------------------------------


def files(made: Line) -> dict[str, bytes]:
    return {name: (made.trained.path / name).read_bytes() for name in ("trained.safetensors", "trained.json")}


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_does_not(line: Callable[..., Line]) -> None:
    once, again, other = (files(line(method="lsq", steps=3, seed=seed).train()) for seed in (0, 0, 1))
    assert once == again
    assert once["trained.safetensors"] != other["trained.safetensors"]


def watch(monkeypatch: pytest.MonkeyPatch, see: Callable[..., None]) -> None:
    """Call `see(model, optimizer, groups)` before every update."""
    models = []
    quantize = qcompress.pipeline.stages.train.quantize

    def remember(*arguments: object):
        prepared = quantize(*arguments)
        models.append(prepared.model)
        return prepared

    class Watching(OneUpdate):
        def step(self, closure, optimizer, groups, taps, accelerator, moment):
            see(models[-1], optimizer, groups)
            return super().step(closure, optimizer, groups, taps, accelerator, moment)

    monkeypatch.setattr(qcompress.pipeline.stages.train, "quantize", remember)
    monkeypatch.setitem(STEPPERS, "plain", Watching)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, *(0.5 + 0.5 * math.cos(math.pi * k / 4) for k in (1, 2, 3))]),
    ],
)
def test_learning_rates_rise_then_follow_the_decay_each_role_from_its_own(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch, decay: str, expected: list[float]
) -> None:
    seen: list[dict[str, float]] = []

    def see(model, optimizer, groups) -> None:
        rates = [group["lr"] for group in optimizer.param_groups]
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        assert decays == [0.05 if group.role == "weight" else 0.0 for group in groups]
        seen.append(dict(zip([group.role for group in groups], rates, strict=True)))

    watch(monkeypatch, see)
    phases = {"finetune": {"steps": 6, "lr": {"other": 7.0e-5}}}
    rates = {"decay": decay, "warmup": 0.34, "lr": {"scale": 2e-3, "other": 1.0}, "weight_decay": 0.05}
    line(method="lsq", train={**rates, "phases": phases}).train()
    assert len(seen) == 6
    for rates, factor in zip(seen, expected, strict=True):
        assert rates == pytest.approx(
            {"weight": 2e-5 * factor, "scale": 2e-3 * factor, "other": 7e-5 * factor}
        )


@pytest.mark.parametrize(("method", "expected"), [("lsq", {True}), ("quadapter", {False})])
def test_dropout_is_on_where_weights_train_and_off_where_they_do_not(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch, method: str, expected: set[bool]
) -> None:
    modes: set[bool] = set()
    watch(
        monkeypatch,
        lambda model, optimizer, groups: modes.add(model.transformer.h[0].attn.attn_dropout.training),
    )
    line(method=method, steps=2).train()
    assert modes == expected


@pytest.mark.parametrize(("count", "size"), [(10, 4), (4, 4), (3, 8)])
def test_batches_are_shuffled_epochs_without_a_gap(count: int, size: int) -> None:
    same = np.full(count, 7)
    stream = np.concatenate([batch_rows(same, size, step, seed=5) for step in range(3 * count)])
    rows = stream.reshape(-1, count)
    assert len(rows) == 3 * size
    assert all(sorted(epoch.tolist()) == list(range(count)) for epoch in rows)
    if count == 10:
        assert len({tuple(epoch.tolist()) for epoch in rows}) > 6
    assert batch_rows(same, size, 2, seed=5) == batch_rows(same, size, 2, seed=5)
    assert any(batch_rows(np.ones(10), 4, k, 5) != batch_rows(np.ones(10), 4, k, 6) for k in range(3))


def test_batches_of_examples_of_many_lengths_hold_little_padding_and_come_in_any_order() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 1003)
    size, steps = 8, 1003 * 8 // 8
    rows = [batch_rows(lengths, size, step, seed=1) for step in range(steps)]
    for epoch in np.concatenate(rows).reshape(-1, 1003):
        assert sorted(epoch.tolist()) == list(range(1003))
    first = rows[: 1003 // size]
    padding = sum(lengths[batch].max() * size - lengths[batch].sum() for batch in first) / lengths.sum()
    assert padding < 0.05  # 0.7 where batches are drawn at random
    longest = [lengths[batch].max() for batch in first[:32]]
    assert longest != sorted(longest) and rows[0] != rows[126]


def batches(ids: Tensor, size: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": piece} for piece in ids.split(size)]


def test_padding_leaves_no_trace_in_the_ranges(line: Callable[..., Line]) -> None:
    made = line(method="ptq", quantizer={"name": "minmax", "range": "mse"})
    ids = token_ids(4)
    model = GPT2LMHeadModel.from_pretrained(made.source, attn_implementation="eager").eval()
    alone = observe(model, made.plan, batches(ids[:, :20], 4), 80)
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    padded = observe(model, made.plan, [{"input_ids": ids, "attention_mask": mask}], ids.numel())
    for name, seen in alone.items():
        torch.testing.assert_close(padded[name].largest, seen.largest, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(padded[name].mean, seen.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(padded[name].rows, seen.rows, rtol=1e-4, atol=1e-4)


# Ranges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 12])
def test_observed_statistics_are_those_of_every_token_however_the_data_is_batched(
    line: Callable[..., Line], batch: int
) -> None:
    made = line(method="ptq", quantizer={"name": "minmax", "range": "mse"})
    ids = token_ids(12)
    model = GPT2LMHeadModel.from_pretrained(made.source, attn_implementation="eager").eval()
    inputs: dict[str, list[Tensor]] = {}
    names = ["transformer.h.1.mlp.c_proj", "lm_head"]
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, arguments, output, name=name: inputs.setdefault(name, []).append(arguments[0])
        )
        for name in names
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    found = observe(model, made.plan, batches(ids, batch), ids.numel())
    assert len(found) == 9
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name in names:
        x = torch.cat(inputs[name]).flatten(0, -2).double().numpy()
        np.testing.assert_allclose(found[name].largest.numpy(), np.abs(x).max(0), rtol=1e-5)
        np.testing.assert_allclose(found[name].mean.numpy(), np.abs(x).mean(0), rtol=1e-5)
        assert found[name].rows.shape == x.shape  # fewer tokens than rows to keep: all of them
        np.testing.assert_allclose(found[name].rows.numpy(), x, rtol=1e-4, atol=1e-4)


def test_kept_rows_are_spread_evenly_over_all_batches(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompress.training.observer.ROWS", 50)
    made = line(method="ptq", quantizer={"name": "minmax", "range": "percentile"})
    ids = token_ids(11)  # 352 tokens: every 7th is kept
    model = GPT2LMHeadModel.from_pretrained(made.source, attn_implementation="eager").eval()
    whole = observe(model, made.plan, batches(ids, 11), ids.numel())["transformer.h.0.attn.c_attn"].rows
    parts = observe(model, made.plan, batches(ids, 3), ids.numel())["transformer.h.0.attn.c_attn"].rows
    assert len(whole) == len(range(0, 352, 7))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_installing_quantizers_replaces_every_planned_layer_and_shares_a_tied_table(
    line: Callable[..., Line],
) -> None:
    made = line()
    model = GPT2LMHeadModel.from_pretrained(made.source)
    table = model.transformer.wte.weight
    prepared = quantize(model, "gpt2", made.plan)
    assert set(prepared.layers) == {item.name for item in made.plan} and len(prepared.layers) == 11
    assert all(model.get_submodule(name) is layer for name, layer in prepared.layers.items())
    assert model.lm_head.weight is table and prepared.layers["transformer.wte"].weight is table
    assert len(list(prepared.weight_quantizers())) == 10 and len(list(prepared.input_quantizers())) == 9


# Compute types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compute", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_scales_are_ones_that_the_compute_type_holds_and_codes_do_not_change_in_folding(
    line: Callable[..., Line], compute: str, dtype: torch.dtype
) -> None:
    made = line(method="lsq", steps=2, format={"preset": "w8a8", "compute": compute}).train().fold()
    scales = {name: tensor for name, tensor in made.tensors().items() if name.endswith(".scale")}
    assert len(scales) == 19
    assert all(
        torch.equal(tensor, tensor.to(dtype).float()) and (tensor > 0).all() for tensor in scales.values()
    )
    folded = made.tensors("fold")
    prepared = rebuild(made.float_model, made.trained)
    for name, layer in prepared.layers.items():
        if f"{name}.weight.codes" in folded:
            assert torch.equal(layer.codes()[0], folded[f"{name}.weight.codes"])
    ids = token_ids()
    assert torch.equal(made.logits("train", ids), made.logits("fold", ids))


def test_snapping_is_rounding_to_the_nearest_number_of_the_type() -> None:
    scale = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 0.01 + 1e-4
    assert torch.equal(snap(scale, torch.float32, "x"), scale)
    expected = scale.numpy().astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(snap(scale, torch.float16, "x").numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_tiny_scale_of_a_channel_of_zeros_does_not_vanish(dtype: torch.dtype) -> None:
    assert float(snap(torch.tensor([1e-8]), dtype, "x").to(dtype)) > 0


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1e6, torch.float16),
        (float("inf"), torch.float32),
        (float("nan"), torch.float32),
        (3.4e38, torch.bfloat16),
    ],
)
def test_a_scale_that_does_not_fit_is_refused(value: float, dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=rf"lm_head.input: a scale of .* does not fit into {dtype}"):
        snap(torch.tensor([1.0, value]), dtype, "lm_head.input")


def test_a_model_too_large_for_fp16_is_refused_with_the_layer(
    line: Callable[..., Line], tiny_model: Path, tmp_path: Path
) -> None:
    source = changed_checkpoint(tiny_model, tmp_path / "large", transformer__ln_f__weight=lambda t: t * 1e8)
    with pytest.raises(ModelError, match=r"lm_head.input: a scale of .* does not fit into torch.float16"):
        line(source=source, format={"preset": "w8a8", "compute": "fp16"}).train()
    line(source=source, format="w8a8").train()


def test_bfloat16_autocast_trains_and_what_it_trained_folds(line: Callable[..., Line]) -> None:
    made = line(method="lsq", steps=3, train={"mixed_precision": "bf16"}).train().fold()
    assert all(tensor.dtype == torch.float32 for tensor in made.tensors().values())
    ids = token_ids()
    assert torch.equal(made.logits("train", ids), made.logits("fold", ids))
    plain = line(method="lsq", steps=3).train()  # in one process, after another precision
    assert loss_on_training_data(made) == pytest.approx(loss_on_training_data(plain), abs=0.05)
    assert files(made) != files(plain)


# Refusals --------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_ends_the_run_and_says_where(line: Callable[..., Line]) -> None:
    with pytest.raises(ModelError, match=r"the loss is nan at phase finetune, step [2-9]") as caught:
        line(method="lsq", steps=9, train={"warmup": 0.0, "lr": {"weight": 1e30, "other": 1e30}}).train()
    assert "learning rates" in caught.value.fix


def test_a_block_whose_loss_is_not_a_number_ends_the_run_and_says_which(
    line: Callable[..., Line], tiny_model: Path, tmp_path: Path
) -> None:
    # finite, and too large for what the block makes of it
    broken = {"transformer__h__1__mlp__c_proj__weight": lambda t: t * 1e38}
    source = changed_checkpoint(tiny_model, tmp_path / "large", **broken)
    made = line(source=source, method="quadapter", format="w8a16")
    says = r"the loss is (nan|inf) at phase calibrate, block transformer.h.1, step 1"
    with pytest.raises(ModelError, match=says):
        made.train()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "torch sees no CUDA device"),
        ({"mixed_precision": "fp16"}, "mixed_precision is fp16, and it needs a CUDA device"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(
    line: Callable[..., Line], options: dict[str, str], message: str
) -> None:
    with pytest.raises(MachineError, match=message):
        line(method="lsq", train=options).train()


def test_a_stepper_that_moves_a_frozen_weight_is_caught(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    def meddle(model, optimizer, groups) -> None:
        with torch.no_grad():
            model.transformer.ln_f.bias[3] += 1e-3

    watch(monkeypatch, meddle)
    with pytest.raises(ContractError, match="only scales and adapters has changed a weight"):
        line(method="quadapter", steps=1).train()


def test_text_shorter_than_a_sequence_is_refused(
    line: Callable[..., Line], text_file: Path, tmp_path: Path
) -> None:
    (text_file.parent / "short.txt").write_text("few words")
    with pytest.raises(UsageError, match=f"fewer than one sequence of {CONTEXT}"):
        line(
            data={"calibration": {"text": ["short.txt"]}, "evaluate": {"test": {"text": ["short.txt"]}}}
        ).train()


def test_an_untied_head_and_another_width_inside_train_like_any_other(
    line: Callable[..., Line], text_file: Path, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "odd", text_file, tied=False, inner=96)
    made = line(source=source, method="lsq", steps=2).train().fold()
    assert "lm_head.weight" in made.facts()["changed"]
    ids = token_ids()
    assert torch.equal(made.logits("train", ids), made.logits("fold", ids))
