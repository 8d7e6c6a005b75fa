"""Blocks that share their weights, from training to the file: stored once, rounded for each place."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from lines import make_project, plain_session
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2LMHeadModel

from qcompress import api
from qcompress.graph.certificate.layers import certify, matmul_inputs
from qcompress.graph.view import read
from qcompress.models import describe, gpt2
from qcompress.models.folded import assemble
from qcompress.models.plan import plan_layers, plans_from_json
from qcompress.models.rebuild import rebuild
from qcompress.pipeline import keys
from qcompress.pipeline.stages.build import build_file
from qcompress.pipeline.stages.export import export
from qcompress.pipeline.stages.load import fingerprint, load
from qcompress.schema.recipe import Model
from qcompress.system.artifacts import FloatModel, read_json

BLOCKS, SHARED = 4, [0, 0, 2, 2]
FORMATS = {
    "w8a8": {"format": {"preset": "w8a8", "attention": "int8"}, "method": "lsq"},
    "w4a16": {"format": "w4a16-g32", "method": "ptq"},
    "ipq": {"format": {"preset": "ipq", "compute": "fp16"}, "method": "ipq"},
    "float": {"format": "float", "method": "float"},
}


@dataclass(frozen=True)
class Made:
    """One format on its way through the stages."""

    line: tiny.Line
    file: Path

    @property
    def plan(self) -> Any:
        return plans_from_json(read_json(self.line.folded.path / "folded.json")["plan"])


@pytest.fixture(scope="module")
def source(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_checkpoint(tmp_path_factory.mktemp("deep"), text_file, blocks=BLOCKS)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name in ("ipq", "w4a16") else name for name in FORMATS
    ],
)
def made(request: pytest.FixtureRequest, source: Path, text_file: Path, tmp_path_factory: Any) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    phases = {"schedule": {"name": "staged"}} if request.param == "ipq" else {}
    recipe = tiny.make_recipe(text_file, steps=4, **FORMATS[request.param], **phases)
    line = shared_line(folder, source, text_file, recipe).train().fold()
    out = folder / "export"
    out.mkdir()
    export(line.folded, recipe.export, "rtx-ada", keys.provenance(recipe), out)
    return Made(line, out / "model.onnx")


def shared_line(folder: Path, source: Path, text: Path, recipe: Any) -> tiny.Line:
    loaded = folder / "load"
    loaded.mkdir()
    load(Model(family="gpt2", source=str(source), blocks=SHARED), source, fingerprint(source), loaded)
    architecture = describe("gpt2", source, blocks=SHARED)
    plan = plan_layers(recipe, architecture)
    return tiny.Line(recipe, text, folder, source, FloatModel(loaded, source=loaded), architecture, plan)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**gpt2.graph_inputs(tiny.token_ids())).logits


def test_the_float_model_is_what_the_load_stage_has_copied(made: Made, source: Path, tmp_path: Path) -> None:
    copied = made.line.float_model.path
    assert FloatModel.of(copied, "", source).source == copied
    load(Model(family="gpt2", source=str(source)), source, fingerprint(source), tmp_path)
    assert FloatModel.of(tmp_path, "", source).source == source


def test_training_keeps_the_weights_shared_and_folding_keeps_the_function(made: Made) -> None:
    trained = rebuild(made.line.float_model, made.line.trained).model
    folded = assemble(made.line.folded)
    assert torch.equal(logits(trained), logits(folded))
    float_logits = logits(gpt2.load_float(made.line.float_model.source))
    assert not torch.equal(logits(trained), float_logits)
    stored = load_file(made.line.folded.path / "folded.safetensors")
    users = tuple(f"transformer.h.{number}." for number, owner in enumerate(SHARED) if owner != number)
    rounded = ("input.scale", "point.scale")
    assert all(name.endswith(rounded) for name in stored if name.startswith(users))
    scales = [name for name in stored if name.endswith("attn.c_attn.input.scale")]
    assert len(scales) == (BLOCKS if "w8a8" in str(made.file) else 0)
    assert len({float(stored[name]) for name in scales}) == len(scales)


def test_a_shared_bias_fits_int32_at_the_smallest_input_scale_of_its_blocks(
    source: Path, text_file: Path, tmp_path: Path
) -> None:
    """A channel of tiny weights behind a bias: int32 needs a scale for the smallest input scale."""
    changed = tmp_path / "model"
    shutil.copytree(source, changed)
    tensors = load_file(changed / "model.safetensors")
    layer = "mlp.c_fc"
    owners = sorted(set(SHARED))
    for owner in owners:
        tensors[f"transformer.h.{owner}.{layer}.weight"][:, 3] *= 1e-9
        tensors[f"transformer.h.{owner}.{layer}.bias"][3] = 1.0
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    line = (
        shared_line(tmp_path, changed, text_file, tiny.make_recipe(text_file, format="w8a8")).train().fold()
    )
    stored = load_file(line.folded.path / "folded.safetensors")
    spread = 1.0
    for owner in owners:
        users = [number for number, other in enumerate(SHARED) if other == owner]
        inputs = [float(stored[f"transformer.h.{number}.{layer}.input.scale"]) for number in users]
        name = f"transformer.h.{owner}.{layer}"
        products = stored[f"{name}.weight.scale"].double() * min(inputs)
        assert (stored[f"{name}.bias"].double().abs() / products).max() <= 2**30 * (1 + 1e-6)
        spread = max(spread, max(inputs) / min(inputs))
    assert spread > 1.01  # so that another block's input scale would not do


def test_the_file_holds_what_is_shared_once_under_the_first_name(made: Made) -> None:
    certificate = certify(made.file, made.line.folded.path, made.plan)
    assert certificate["complete"], certificate
    stored = load_file(made.line.folded.path / "folded.safetensors")
    model = onnx.load(str(made.file))
    names = {tensor.name for tensor in model.graph.initializer}
    users = tuple(f"transformer.h.{number}." for number, owner in enumerate(SHARED) if owner != number)
    assert not [name for name in names if name.startswith(users) and name not in stored]
    weights = [name for name in stored if name.endswith((".codes", ".assignments", ".bias", "ln_1.weight"))]
    codes = [name for name in weights if not name.endswith("lm_head.weight.codes")]
    assert names.issuperset(codes)
    nodes = [node.name for node in model.graph.node if node.op_type == "QuantizeLinear"]
    rounded = [f"{item.name}.input/QuantizeLinear" for item in made.plan if item.activations]
    assert set(rounded) <= set(nodes) and not [name for name in nodes if name.endswith("_2")]
    sizes = read_json(made.file.parent / "sizes.json")
    assert (
        sizes["initializer_bytes"]
        < 1.1 * sum(tensor.numel() * min(tensor.element_size(), 4) for tensor in stored.values()) + 2**16
    )


def test_onnxruntime_computes_the_folded_model(made: Made) -> None:
    inputs = gpt2.graph_inputs(tiny.token_ids())
    dtype = torch.float16 if "ipq" in str(made.file) else torch.float32
    session: onnxruntime.InferenceSession = plain_session(made.file)
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        expected = assemble(made.line.folded, dtype)(**inputs).logits.float().numpy()
    apart = np.abs(found.astype(np.float32) - expected).mean() / np.ptp(expected)
    assert apart < (2e-3 if dtype == torch.float16 else 2e-4)


def test_each_place_has_its_own_rounding_in_the_graph(made: Made) -> None:
    inputs = matmul_inputs(read(made.file), made.plan)
    linear = [item.name for item in made.plan if item.layer.kind != "embedding"]
    floats = made.line.recipe.format.is_float
    assert list(inputs) == linear[:-1] if floats else linear  # a float head reads the table turned around
    assert len({value for value, _ in inputs.values()}) == len(inputs)


def test_tensorrt_rtx_builds_it(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    recipe = tiny.make_recipe(made.line.text, build={"target": "rtx-ada", "profiles": [
        {"batch": [1, 2, 4], "sequence": [1, 8, tiny.CONTEXT]}]})  # fmt: skip
    build_file(made.file, recipe.build, tmp_path, lambda what, share: None)
    assert (tmp_path / "model.plan").stat().st_size > 0


@pytest.mark.slow
def test_roundings_that_changed_places_fail_the_certificate(
    source: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = tiny.make_recipe(text_file, **FORMATS["w8a8"])
    line = shared_line(tmp_path, source, text_file, recipe).train().fold()
    (tmp_path / "export").mkdir()
    export(line.folded, recipe.export, "rtx-ada", keys.provenance(recipe), tmp_path / "export")
    model = onnx.load(str(tmp_path / "export" / "model.onnx"))
    first, second = (f"transformer.h.{number}.mlp.c_fc.input.scale" for number in (2, 3))
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] in (first, second):
            node.input[1] = second if node.input[1] == first else first
    onnx.save(model, str(tmp_path / "changed.onnx"))
    plan = plans_from_json(read_json(line.folded.path / "folded.json")["plan"])
    found = certify(tmp_path / "changed.onnx", line.folded.path, plan)
    wrong = {item["name"] for item in found["layers"] if not item["passed"]}
    assert wrong == {name.removesuffix(".input.scale") for name in (first, second)}


def test_float_training_is_that_of_the_stock_model_with_tied_blocks(
    source: Path, text_file: Path, tmp_path: Path
) -> None:
    """Steps of gradient descent by hand on transformers' model, whose list holds each module twice."""
    train = {"lr": {"weight": 0.1, "other": 0.1}, "decay": "constant", "warmup": 0.0, "optimizer": "sgd"}
    train["momentum"] = 0.0
    recipe = tiny.make_recipe(text_file, steps=3, format="float", method="float", train=train)
    line = shared_line(tmp_path, without_dropout(source, tmp_path / "plain"), text_file, recipe).train()
    trained = rebuild(line.float_model, line.trained).model

    stock = GPT2LMHeadModel.from_pretrained(tmp_path / "plain", attn_implementation="eager").train()
    stock.config.use_cache = False
    stock.transformer.h = nn.ModuleList([stock.transformer.h[number] for number in SHARED])
    optimizer = torch.optim.SGD(stock.parameters(), lr=0.1)
    for batch in batches(line, 3):
        loss = stock(**gpt2.graph_inputs(batch), labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        clip_by_role(stock, line)
        optimizer.step()
    for (name, found), (_, expected) in zip(
        trained.transformer.h[2].named_parameters(), stock.transformer.h[2].named_parameters(), strict=True
    ):
        assert torch.allclose(found, expected, atol=2e-5), name


@pytest.mark.slow
def test_a_run_that_shares_is_the_model_of_the_next_one(
    source: Path, text_file: Path, tmp_path: Path
) -> None:
    """Shared and trained with LayerDrop in float, then quantized, then without its second pair of blocks."""
    project = make_project(tmp_path, source, text_file)
    short = ["train.phases=", "train.phases={finetune: {steps: 6}}"]
    first = project.run("model.blocks=pairs", "format=float", "method=float", *short, "train.layer_drop=0.2")
    config = read_json(first.path / "config.json")
    assert config["shared_blocks"] == SHARED and config["n_layer"] == BLOCKS
    run = f"model={{family: gpt2, run: {first.path}}}"
    whole = project.run(run, "method=lsq", *short)
    half = project.run(run, "model.blocks=every-other", "method=lsq", *short)
    assert first.verdict == whole.verdict == half.verdict == "accept"
    assert read_json(half.path / "config.json")["shared_blocks"] == [0, 0]
    sizes = [(found.path / "model.onnx").stat().st_size for found in (half, whole, first)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    before = read_json(half.path / "parity.json")["rows"]
    assert api.verify(half.path)["verdict"] == "accept"
    after = read_json(half.path / "parity.json")["rows"]
    assert [row.get("metrics") for row in after] == [row.get("metrics") for row in before]
    small = project.run(run, "method=lsq", *short, smoke=True)
    assert small.verdict == "unjudged"


def without_dropout(source: Path, out: Path) -> Path:
    model = GPT2LMHeadModel.from_pretrained(source)
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(model.config, name, 0.0)
    model.save_pretrained(out)
    for file in source.glob("tokenizer*"):
        (out / file.name).write_bytes(file.read_bytes())
    return out


def batches(line: tiny.Line, steps: int) -> list[torch.Tensor]:
    """The token ids that training sees."""
    from qcompress.tasks import TASKS
    from qcompress.training.batches import batch_rows

    task = TASKS["causal-lm"]
    reader = task.reader(line.float_model.path)
    options = task.settled(line.recipe.task, read_json(line.float_model.path / "config.json"))
    data = task.examples(line.recipe.data.train, line.text.parent, reader, options)
    rows = [batch_rows(data.lengths, 4, step, line.recipe.seed) for step in range(steps)]
    return [data.batch(one, (line.recipe.seed, 0, step))["input_ids"] for step, one in enumerate(rows)]


def clip_by_role(model: nn.Module, line: tiny.Line) -> None:
    """To a norm of 1 for each role, as the plain stepper does."""
    weights = {f"{layer.name}.weight" for layer in line.architecture.layers}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name in weights].append(parameter)
    for group in groups.values():
        nn.utils.clip_grad_norm_(group, 1.0)
