"""What making dynamic ranges static cost: `dynamic` in the trained row, and what the ladder says of it.

The oracle is a BERT written out below, on weights rounded by hand; of ours it reads scales from the file.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import Line, make_recipe, token_ids
from tiny_bert import BLOCKS, HEADS, LABELS, SEQUENCE, save_encoder
from torch import Tensor
from word_tokenizer import WORDS, word_tokenizer

from qcompress.errors import ContractError
from qcompress.models import FAMILIES, describe
from qcompress.models.plan import plan_layers, plan_points
from qcompress.models.prepare import initialise, quantize
from qcompress.parity.inputs import Artifacts
from qcompress.parity.runners import dynamic_runner, made_static
from qcompress.parity.sample_results import read_samples
from qcompress.pipeline import keys
from qcompress.pipeline.stages.fold import fold
from qcompress.pipeline.stages.load import fingerprint, load
from qcompress.pipeline.stages.train import train
from qcompress.pipeline.stages.verify import verify
from qcompress.report.ladder import cost_of_static, ladder
from qcompress.report.show_table import print_run
from qcompress.schema.quantizers import Dynamic, MinMax
from qcompress.schema.recipe import Model, Recipe
from qcompress.system.artifacts import FloatModel, FoldedModel, TrainedModel, read_json
from qcompress.system.reporter import Reporter
from qcompress.tasks import TASKS

CLIP = 2.5
SETS = {"dev": 23, "bare": 30}
"""Evaluation sets; the second one has no labels."""

STAGES = ["float", "trained", "folded"]
CONTEXT, BATCH = 12, 4
LAYERS, POINTS = 6 * BLOCKS + 2, 8 * BLOCKS
"""Quantized matmuls of the tiny BERT, pooler and head among them, and points."""


def write_rows(file: Path, count: int, labelled: bool) -> None:
    """Texts of 1 to 9 words: a batch of them has padding."""
    random = torch.Generator().manual_seed(count)

    def below(number: int) -> int:
        return int(torch.randint(number, (), generator=random))

    lines = [{"text": " ".join(WORDS[below(len(WORDS))] for _ in range(1 + below(9)))} for _ in range(count)]
    answers = [{"label": LABELS[below(3)]} if labelled else {} for _ in lines]
    file.write_text("\n".join(json.dumps(line | answer) for line, answer in zip(lines, answers, strict=True)))


@dataclass(frozen=True)
class Made:
    """A tiny BERT that was trained and folded, and a way to measure it."""

    folder: Path
    recipe: Recipe
    float_model: FloatModel

    @property
    def trained(self) -> TrainedModel:
        return TrainedModel(self.folder / "train")

    def parity(self, out: Path, trained: TrainedModel | None = None, **options: Any) -> dict[str, Any]:
        """parity.json; `options` change the recipe's section `verify`."""
        change = {"verify": self.recipe.verify.model_copy(update=options)}
        folded = FoldedModel(self.folder / "fold")
        artifacts = Artifacts(self.float_model, trained or self.trained, folded, None, None, {})
        out.mkdir(exist_ok=True)
        recipe = self.recipe.model_copy(update=change)
        verify(recipe, self.folder, artifacts, out, Reporter(silent=True))
        return read_json(out / "parity.json")


def make(folder: Path, text: Path, quantizer: str, **sections: Any) -> Made:
    """Calibrate only: what is measured does not depend on what moved the weights."""
    source = save_encoder(folder / "bert", text, "bert")
    word_tokenizer().save_pretrained(source)
    for name, count in (("train", 16), *SETS.items()):
        write_rows(folder / f"{name}.jsonl", count, name != "bare")
    recipe = make_recipe(
        text,
        model={"family": "bert", "source": "unused"},
        task={"name": SEQUENCE, "labels": list(LABELS), "context": CONTEXT},
        data={
            "calibration": {"table": ["train.jsonl"]},
            "evaluate": {name: {"table": [f"{name}.jsonl"]} for name in SETS},
        },
        quantizer={"weights": "minmax", "activations": quantizer},
        verify={"batch_size": BATCH},
        **sections,
    )
    for name in ("load", "train", "fold"):
        (folder / name).mkdir()
    head = TASKS[SEQUENCE].head(recipe.task)
    load(Model(family="bert", source=str(source)), source, fingerprint(source), folder / "load", head, 0)
    architecture = describe("bert", source, head)
    made = Made(folder, recipe, FloatModel(folder / "load", source=source))
    train(made.float_model, recipe, folder, architecture, plan_layers(recipe, architecture),
          made.trained.path, Reporter(silent=True))  # fmt: skip
    fold(made.float_model, made.trained, folder / "fold")
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Made:
    form = {"preset": "w8a8", "attention": "int8", "residual": "int8"}
    return make(tmp_path_factory.mktemp("dynamic"), text_file, "dynamic", format=form)


@pytest.fixture(scope="module")
def parity(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return made.parity(tmp_path_factory.mktemp("measured"))


def row(parity: dict[str, Any], stage: str = "trained") -> dict[str, Any]:
    return next(one for one in parity["rows"] if one["stage"] == stage)


# The oracle ---------------------------------------------------------------------------------------

Round = Callable[[str, Tensor], Tensor]
"""Rounds the activation that goes by a name."""


def dynamic(_: str, x: Tensor) -> Tensor:
    """The range of what there is, at most the clip; what lies beyond is cut off at -128 and 127."""
    scale = x.clamp(-CLIP, CLIP).abs().max() / 127
    return torch.round(x / scale).clamp(-128, 127) * scale


def static(tensors: dict[str, Tensor]) -> Round:
    def rounding(name: str, x: Tensor) -> Tensor:
        scale = tensors[f"{name}.scale"]
        return (x / scale).round().clamp(-128, 127) * scale

    return rounding


def weights(made: Made, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors, those that have a scale for each row rounded to it."""
    (file,) = (made.folder / "bert").glob("*.safetensors")
    found = load_file(file)
    for key in [key for key in tensors if key.endswith(".weight.scale")]:
        name, scale = key.removesuffix(".scale"), tensors[key][:, None]
        found[name] = (found[name] / scale).round().clamp(-127, 127) * scale
    return found


def bert(w: dict[str, Tensor], inputs: dict[str, Tensor], q: Round) -> Tensor:
    """Logits [batch, labels] of a BERT whose matmuls and additions see rounded activations."""

    def linear(name: str, x: Tensor) -> Tensor:
        return q(f"{name}.input", x) @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    def add(name: str, branch: Tensor, skip: Tensor) -> Tensor:
        total = q(f"{name}.branch_point", branch) + q(f"{name}.skip_point", skip)
        return norm(f"{name}.LayerNorm", total)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()[:, None, None, :]
    base = "bert.embeddings"
    x = w[f"{base}.word_embeddings.weight"][ids]
    x = x + w[f"{base}.token_type_embeddings.weight"][inputs["token_type_ids"]]
    x = norm(f"{base}.LayerNorm", x + w[f"{base}.position_embeddings.weight"][: ids.shape[1]])
    for block in range(BLOCKS):
        base = f"bert.encoder.layer.{block}"
        own = f"{base}.attention.self"
        query, key, value = (heads(linear(f"{own}.{part}", x)) for part in ("query", "key", "value"))
        key = q(f"{own}.key_point", key.transpose(-1, -2))
        scores = q(f"{own}.query_point", query) @ key * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask, -math.inf).softmax(-1)
        context = q(f"{own}.probability_point", scores) @ q(f"{own}.value_point", value)
        context = context.transpose(1, 2).flatten(2)
        x = add(f"{base}.attention.output", linear(f"{base}.attention.output.dense", context), x)
        inner = F.gelu(linear(f"{base}.intermediate.dense", x))
        x = add(f"{base}.output", linear(f"{base}.output.dense", inner), x)
    return linear("classifier", torch.tanh(linear("bert.pooler.dense", x[:, 0])))


def by_hand(made: Made, name: str, q: Round, size: int, w: dict[str, Tensor]) -> Tensor:
    """Logits of a set, [samples, labels]: batches of the longest samples first, padded to their longest."""
    texts = [json.loads(line)["text"] for line in (made.folder / f"{name}.jsonl").read_text().splitlines()]
    order = sorted(range(len(texts)), key=lambda place: len(texts[place].split()), reverse=True)
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), size):
        places = order[start : start + size]
        inputs = word_tokenizer()([texts[place] for place in places], padding=True, return_tensors="pt")
        found |= zip(places, bert(w, inputs, q), strict=True)
    return torch.stack([found[place] for place in range(len(texts))])


# The measurement ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [BATCH, 1])
def test_the_dynamic_measurement_is_a_forward_pass_with_ranges_taken_by_hand(
    made: Made, tmp_path: Path, size: int
) -> None:
    """Batch by batch with its padding, layers' inputs and points alike; the other set agrees with float."""
    found = row(made.parity(tmp_path, batch_size=size))["dynamic"]
    tensors = load_file(made.trained.path / "trained.safetensors")
    assert sum(key.endswith((".input.scale", "_point.scale")) for key in tensors) == LAYERS + POINTS
    rounded, unrounded = weights(made, tensors), weights(made, {})
    logits, by_scale = (by_hand(made, "dev", q, size, rounded) for q in (dynamic, static(tensors)))
    labels = [json.loads(line)["label"] for line in (made.folder / "dev.jsonl").read_text().splitlines()]
    right = [LABELS[best] == label for best, label in zip(logits.argmax(1), labels, strict=True)]
    assert found["metrics"]["dev.accuracy"] == pytest.approx(sum(right) / SETS["dev"])
    plain = by_hand(made, "bare", lambda name, x: x, size, unrounded).argmax(1)
    same = (by_hand(made, "bare", dynamic, size, rounded).argmax(1) == plain).double().mean()
    assert found["metrics"]["bare.agreement"] == pytest.approx(float(same))
    error = (logits - by_scale).abs()
    distance = found["distance"]
    assert distance["to"] == "trained" and distance["positions"] == SETS["dev"]
    assert distance["mean_abs"] == pytest.approx(float(error.mean()), rel=1e-3)
    assert distance["max_abs"] == pytest.approx(float(error.max()), rel=1e-3)
    assert distance["range"] == pytest.approx(float(by_scale.max() - by_scale.min()), rel=1e-3)


def test_coarse_static_ranges_cost_something_and_leave_the_dynamic_measurement_alone(
    made: Made, parity: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(made.trained.path, tmp_path / "coarse")
    file = tmp_path / "coarse" / "trained.safetensors"
    tensors = load_file(file)
    planted = [key for key in tensors if key.endswith((".input.scale", "_point.scale"))]
    assert len(planted) == LAYERS + POINTS
    save_file({key: 8 * value if key in planted else value for key, value in tensors.items()}, file)
    before, after = row(parity), row(made.parity(tmp_path / "out", TrainedModel(tmp_path / "coarse")))
    assert after["dynamic"]["metrics"] == before["dynamic"]["metrics"]
    assert after["metrics"] != before["metrics"]
    # eight times the range clips nothing, so it is not farther from float; from dynamic ranges it is
    assert after["distance"]["mean_abs"] != before["distance"]["mean_abs"]
    far, near = (one["dynamic"]["distance"]["mean_abs"] for one in (after, before))
    assert far > 2 * near > 0


def test_dynamic_ranges_depend_on_the_batch_and_static_ones_do_not(
    made: Made, parity: dict[str, Any], tmp_path: Path
) -> None:
    alone, together = row(made.parity(tmp_path, batch_size=1)), row(parity)
    assert alone["metrics"] == together["metrics"]
    assert alone["distance"]["mean_abs"] == pytest.approx(together["distance"]["mean_abs"], rel=1e-4)
    means = [one["dynamic"]["distance"]["mean_abs"] for one in (alone, together)]
    assert max(means) > 1.005 * min(means)


def test_no_other_row_is_compared_with_the_dynamic_measurement(made: Made, tmp_path: Path) -> None:
    found = made.parity(tmp_path)
    assert [one["stage"] for one in found["rows"] if "dynamic" in one] == ["trained"]
    assert row(found)["distance"]["to"] == "float" and row(found)["dynamic"].keys() == {"metrics", "distance"}
    assert row(found)["dynamic"]["metrics"].keys() == row(found)["metrics"].keys()
    folded = row(found, "folded")["distance"]
    assert folded["to"] == "trained" and folded["max_abs"] == 0.0
    assert not list(tmp_path.glob("*.npy"))
    for entry in read_samples(tmp_path / "samples.json.gz").values():
        assert entry["rows"].keys() == {"float", "trained", "folded"}


@pytest.mark.parametrize(("quantizer", "form"), [("minmax", "w8a8"), ("dynamic", "w8a16")])
def test_without_dynamic_activations_nothing_is_measured_twice_or_said(
    quantizer: str, form: str, text_file: Path, tmp_path: Path
) -> None:
    parity = make(tmp_path, text_file, quantizer, format=form).parity(tmp_path / "out")
    assert [one["stage"] for one in parity["rows"] if one["status"] == "measured"] == STAGES
    assert not any("dynamic" in one for one in parity["rows"])
    assert cost_of_static(parity) == [] and list(map(str, ladder(parity).columns[0].cells))[:3] == STAGES


def test_what_make_static_replaced_is_put_back(line: Callable[..., Line]) -> None:
    """In a GPT-2 too, with a tied head and points: the function right before training ended. Without a clip,
    which nearly all ranges exceed: a dynamic scale would be the static one.
    """
    form = {"preset": "ternary-a8", "attention": "int8"}
    quantizer = {
        "weights": "ternary",
        "embeddings": "ternary",
        "activations": {"name": "dynamic", "clip": None},
    }
    made = line(format=form, quantizer=quantizer, schedule="calibrate").train()
    recipe, points = made.recipe, plan_points(made.recipe, made.architecture)
    student = quantize(FAMILIES["gpt2"].load_float(made.source), "gpt2", made.plan, points)
    initialise(student, {name: None for name in [*student.layers, *student.rounding]})
    ids = token_ids()
    inputs = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    cpu = torch.device("cpu")
    runner = dynamic_runner(made.float_model, made.trained, recipe.quantizer.activations, cpu)
    with torch.no_grad():
        expected = student.model.eval()(
            **FAMILIES["gpt2"].graph_inputs(*map(torch.from_numpy, inputs.values()))
        )
    assert len(made_static(made.trained)) == 9 + len(points) == 17
    assert torch.equal(torch.from_numpy(runner(inputs)), expected.logits)
    assert not torch.equal(made.logits("train", ids), expected.logits)


def test_a_recipe_that_did_not_train_the_model_is_refused(made: Made) -> None:
    with pytest.raises(
        ContractError, match="was trained with dynamic activations, and quantizer.activations is minmax"
    ):
        dynamic_runner(made.float_model, made.trained, MinMax(), torch.device("cpu"))


def test_verify_runs_again_when_the_clip_changes(made: Made) -> None:
    def values(clip: float) -> object:
        quantizers = made.recipe.quantizer.model_copy(update={"activations": Dynamic(clip=clip)})
        recipe = made.recipe.model_copy(update={"quantizer": quantizers})
        plan = keys.Plan(SimpleNamespace(recipe=recipe, base=made.folder), made.folder, {}, None)
        return keys.parts(plan, "verify", {})["values"]

    assert values(2.5) == values(2.5) != values(3.0)


# What is shown ------------------------------------------------------------------------------------


def report() -> dict[str, Any]:
    """As verify leaves it: two sets, of the first one two metrics."""
    far = {"to": "float", "max_abs": 0.5, "mean_abs": 0.25, "range": 5.0, "top1_agreement": 0.75}

    def metrics(*values: float) -> dict[str, float]:
        return dict(zip(("dev.mcc", "dev.accuracy", "bare.agreement"), values, strict=True))

    rows = [
        {"stage": "float", "metrics": metrics(0.625, 0.75, 1.0), "distance": None},
        {"stage": "trained", "metrics": metrics(0.5, 0.625, 0.9), "distance": far,
         "dynamic": {"metrics": metrics(0.53125, 0.5, 0.9), "distance": {**far, "to": "trained"}}},
        {"stage": "folded", "metrics": metrics(0.5, 0.625, 0.9), "distance": {**far, "to": "trained"}},
    ]  # fmt: skip
    main = {"dev": ["mcc"], "bare": ["agreement"]}
    return {"rows": [{**one, "status": "measured"} for one in rows], "sets": ["dev", "bare"], "main": main}


def test_the_ladder_has_a_line_below_trained_and_a_note_on_what_static_ranges_cost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = SimpleNamespace(parity=report(), verdict={"reasons": [], "verdict": "accept"},
                          name="tiny", path=Path("runs/tiny"), smoke=False)  # fmt: skip
    print_run(Console(width=80), run)
    lines = capsys.readouterr().out.splitlines()
    below = [line.split() for line in lines if line.split()[:1] in (["trained"], ["dynamic"], ["folded"])]
    assert below == [
        ["trained", "0.5", "0.9", "float", "1.0e-01", "5.0e-02", "0.7500"],
        ["dynamic", "0.53125", "0.9", "trained", "1.0e-01", "5.0e-02", "0.7500"],
        ["folded", "0.5", "0.9", "trained", "1.0e-01", "5.0e-02", "0.7500"],
    ]
    assert any(line.startswith("   dynamic ") for line in lines)
    note = "static ranges in place of dynamic ones: dev.mcc -0.0312, bare.agreement +0 (trained - dynamic)"
    assert lines[-2:] == [note, "accept  tiny  runs/tiny"]


def test_a_single_set_has_all_its_main_metrics_in_the_note() -> None:
    found = report() | {"sets": ["dev"], "main": {"dev": ["accuracy", "mcc"]}}
    note = "static ranges in place of dynamic ones: dev.accuracy +0.125, dev.mcc -0.0312 (trained - dynamic)"
    assert cost_of_static(found) == [note]
