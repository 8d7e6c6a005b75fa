"""Stage `verify` and the probe kit for tasks that are no language models.

The graph adds up a row of a table for each token (or gives the rows themselves, for a tagger), so numpy is
the oracle for every logit. ONNX Runtime stands in for the device. The float row's table differs a little.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lines import environment
from onnx import TensorProto, checker, helper, numpy_helper, save
from scipy import stats
from word_tokenizer import FIRST, WORDS, word_tokenizer

from qcompress.cli.predict import continue_text
from qcompress.engine.probe import SCRIPT, read_measurement
from qcompress.errors import UsageError
from qcompress.parity.gpu import take_engine_row
from qcompress.parity.inputs import Artifacts
from qcompress.parity.sample_results import known_of, read_samples, results_of
from qcompress.pipeline.stages import verify as stage
from qcompress.report.ladder import ladder, order_metrics
from qcompress.schema.goals import Gate
from qcompress.schema.recipe import Recipe
from qcompress.system.artifacts import FloatModel, OnnxModel, read_json
from qcompress.system.reporter import Reporter
from qcompress.tasks import TASKS
from qcompress.verdict.judge import judge

COUNT = 23
NAMES = ["x", "y", "z"]
TAGS = ["O", "B-PER", "I-PER"]

KINDS: dict[str, dict[str, Any]] = {
    "single": {"name": "sequence-classification", "labels": NAMES},
    "multi": {"name": "sequence-classification", "kind": "multi", "labels": NAMES},
    "regression": {"name": "sequence-classification", "kind": "regression"},
    "tokens": {"name": "token-classification", "labels": TAGS},
}
PAIRS = {"name": "feature-extraction", "pooling": "mean", "normalize": False}


def table(kind: str, noise: float = 0.0) -> np.ndarray:
    """What each token adds to each logit, [vocabulary, outputs]."""
    width = 1 if kind == "regression" else 3
    random = np.random.default_rng(3)
    exact = random.normal(size=(FIRST + len(WORDS), width))
    return (exact + noise * random.normal(size=exact.shape)).astype(np.float32)


def logits_of(rows: np.ndarray, kind: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    found = rows[inputs["input_ids"]]
    return (
        found if kind == "tokens" else (found * inputs["attention_mask"][..., None]).sum(1, dtype=np.float32)
    )


def write_graph(file: Path, kind: str) -> None:
    shape = ["batch", "sequence"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape)
              for name in ("input_ids", "attention_mask", "position_ids")]  # fmt: skip
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["logits" if kind == "tokens" else "each"])]
    if kind != "tokens":
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["float", "last"], ["mask"]),
            helper.make_node("Mul", ["each", "mask"], ["counted"]),
            helper.make_node("ReduceSum", ["counted", "axis"], ["logits"], keepdims=0),
        ]
    name = "logits"
    if kind == "pairs":
        nodes[-1].output[0] = name = "embeddings"
    constants = {"table": table(kind), "last": np.array([2]), "axis": np.array([1])}
    output = ["batch", None] if kind != "tokens" else [*shape, None]
    graph = helper.make_graph(
        nodes, "adds", inputs, [helper.make_tensor_value_info(name, TensorProto.FLOAT, output)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    checker.check_model(model)
    save(model, file)


def write_rows(file: Path, kind: str, labelled: bool) -> None:
    random = np.random.default_rng(5)
    lines = []
    for number in range(COUNT):
        words = list(random.choice(WORDS, random.integers(1, 8)))
        label = {
            "single": NAMES[random.integers(3)],
            "multi": [name for name in NAMES if random.random() < 0.5],
            "regression": float(random.normal()),
            "tokens": [TAGS[random.integers(3)] for _ in words],
        }.get(kind)
        texts = {"tokens": words} if kind == "tokens" else {"text": " ".join(words)}
        if kind == "pairs":
            texts["text_pair"] = " ".join(random.choice(WORDS, random.integers(1, 8)))
            label = float(random.normal())
        key = {"tokens": "tags", "pairs": "score"}.get(kind, "label")
        answer = {key: label} if labelled else {}
        parts = {"language": ("de", "fr", None)[number % 3], "fold": number % 2}
        lines.append(json.dumps({**texts, **answer, **parts}))
    file.write_text("\n".join(lines))


@dataclass(frozen=True)
class Measured:
    """A folder that verify has filled, laid out as a run."""

    folder: Path
    recipe: Recipe
    said: list[str]

    @property
    def parity(self) -> dict[str, Any]:
        return read_json(self.folder / "parity.json")

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.parity["rows"] if row["stage"] == name)


class Listener(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(silent=True)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Measured]:
    """`measure("single", labelled=False)`: a float row and an onnx row, measured."""

    def run(kind: str, labelled: bool = True, slices: list[str] | None = None, **options: Any) -> Measured:
        write_graph(tmp_path / "model.onnx", kind)
        tokenizer = word_tokenizer()
        tokenizer.model_input_names = ["input_ids", "attention_mask"]  # as the family's graph has them
        tokenizer.save_pretrained(tmp_path)
        task = KINDS.get(kind, PAIRS)
        labels = task.get("labels", ["LABEL_0"])
        config = {"id2label": dict(enumerate(labels)), "model_type": "bert", "hidden_size": 3}
        (tmp_path / "config.json").write_text(json.dumps(config))
        write_rows(tmp_path / "dev.jsonl", kind, labelled)
        columns = {"text_pair": "text_pair"} if kind == "pairs" else None
        recipe = Recipe.model_validate({
            "name": "adds",
            "model": {"family": "gpt2", "source": "unused"},
            "task": {**task, "context": 8, **options},
            "data": {"evaluate": {"dev": {"table": ["dev.jsonl"], "slices": slices, "columns": columns},
                                  "few": {"table": ["dev.jsonl"], "limit": 5, "columns": columns}}},
            "format": "w8a8",
            "train": {"device": "cpu"},
            "verify": {"batch_size": 4, "distance_samples": 6},
        })  # fmt: skip
        rows = table(kind, noise=0.5)
        monkeypatch.setattr(stage, "float_runner", lambda *_: lambda inputs: logits_of(rows, kind, inputs))
        artifacts = Artifacts(
            FloatModel(tmp_path, source=tmp_path), None, None, OnnxModel(tmp_path), None, {}
        )
        listener = Listener()
        stage.verify(recipe, tmp_path, artifacts, tmp_path, listener)
        return Measured(tmp_path, recipe, listener.said)

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_the_columns_that_a_user_names_are_kept_beside_the_results(
    kind: str, measure: Callable[..., Measured]
) -> None:
    found = measure(kind, slices=["language", "fold"])
    sets = read_samples(found.folder / "samples.json.gz")
    assert "slices" not in sets["few"] and sets["dev"].keys() - sets["few"].keys() == {"slices"}
    assert sets["dev"]["slices"] == {
        "language": [("de", "fr", None)[number % 3] for number in range(COUNT)],
        "fold": [str(number % 2) for number in range(COUNT)],
    }
    assert "verify: dev: 7 of 23 samples have no language, and no slice has them" in found.said
    assert not any("fold" in line for line in found.said)
    assert "slices" not in known_of(sets["dev"])[0]


def on_device(folder: Path) -> subprocess.CompletedProcess[str]:
    """The kit's script as a device runs it."""
    kit = folder / "probe"
    command = [sys.executable, str(kit / SCRIPT.name), "--onnx", "../model.onnx", "--batch", "3",
               "--out", "../engine.json"]  # fmt: skip
    return subprocess.run(command, env=environment(), cwd=kit, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_measured_and_compared(kind: str, measure: Callable[..., Measured]) -> None:
    found = measure(kind)
    task = TASKS[KINDS[kind]["name"]]
    settled = task.settled(found.recipe.task, read_json(found.folder / "config.json"))
    samples = task.samples(found.recipe.data.evaluate["dev"], found.folder, word_tokenizer(), settled, None)
    for name, noise in (("float", 0.5), ("onnx", 0.0)):
        rows = table(kind, noise)
        each = [task.measure([one], logits_of(rows, kind, task.collate([one])))[0] for one in samples]
        expected = task.metrics(each, settled)
        metrics = {
            metric: value for metric, value in found.row(name)["metrics"].items() if metric[:4] == "dev."
        }
        assert metrics == pytest.approx({f"dev.{metric}": value for metric, value in expected.items()})
        assert found.row(name)["samples"] == COUNT + 5
    distance = found.row("onnx")["distance"]
    lengths = [min(sample.length, 8) for sample in samples[:6]]
    # the recipe asks for 6 samples; a classifier's are one position each, and all of them are compared
    expected_positions = sum(lengths) if kind == "tokens" else len(samples)
    assert distance["to"] == "float" and distance["positions"] == expected_positions
    assert (
        distance["max_abs"] > 0.1 and found.row("onnx")["deployed"]["metrics"] == found.row("onnx")["metrics"]
    )
    assert (distance["top1_agreement"] is None) == (kind == "regression")
    main = {"single": ["accuracy"], "multi": ["f1_micro"], "regression": ["spearman"], "tokens": ["span_f1"]}
    assert found.parity["main"] == {"dev": main[kind], "few": main[kind]}
    cut = sum(sample.cut for sample in samples)
    assert cut > 0 and f"verify: dev: {cut} of {COUNT} examples are cut at 8 tokens" in found.said


def test_a_batch_holds_samples_of_like_length_and_results_stand_in_the_order_of_the_data(
    measure: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    np.save(tmp_path / "logits-float.npy", np.zeros((1, 1, 1), np.float32))  # a killed measurement left it
    lengths: list[list[int]] = []
    task = TASKS["sequence-classification"]
    collate = task.collate

    def spy(batch: list[Any]) -> dict[str, np.ndarray]:
        lengths.append([sample.length for sample in batch])
        return collate(batch)

    monkeypatch.setattr(task, "collate", spy)
    found = measure("single")
    # the first row of the ladder: 23 samples of the first set, then 5 of the second, four in a batch
    batches = [each for each in lengths if len(each) > 1][:8]
    assert [len(each) for each in batches] == [4, 4, 4, 4, 4, 3, 4, 4]  # the fifth sample is alone
    flat = sum(batches[:6], [])
    assert flat == sorted(flat, reverse=True)
    rows = read_samples(found.folder / "samples.json.gz")["dev"]["rows"]["onnx"]["prediction"]
    settled = task.settled(found.recipe.task, read_json(found.folder / "config.json"))
    samples = task.samples(found.recipe.data.evaluate["dev"], found.folder, word_tokenizer(), settled, None)
    each = [logits_of(table("single"), "single", collate([one]))[0].argmax() for one in samples]
    assert rows == [int(best) for best in each]


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_results_reproduce_every_metric(kind: str, measure: Callable[..., Measured]) -> None:
    found = measure(kind)
    sets = read_samples(found.folder / "samples.json.gz")
    assert sets.keys() == {"dev", "few"} and len(sets["dev"]["ids"]) == COUNT
    assert sets["dev"].keys() == {"ids", "rows", "label"} | ({"positions"} if kind == "tokens" else set())
    module = TASKS[KINDS[kind]["name"]]
    for name in ("float", "onnx"):
        assert sets["dev"]["rows"][name].keys() == {"loss", "prediction"}
        metrics = module.metrics(results_of(sets["dev"], name), found.recipe.task)
        for metric, value in metrics.items():
            assert found.row(name)["metrics"][f"dev.{metric}"] == pytest.approx(value, rel=1e-12)
    assert results_of(sets["dev"], "engine") is None


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_device_measures_comes_back_as_the_engine_row(
    kind: str, labelled: bool, measure: Callable[..., Measured]
) -> None:
    found = measure(kind, labelled)
    done = on_device(found.folder)
    assert done.returncode == 0, done.stderr
    assert f"{COUNT + 5} samples" in done.stdout and "perplexity" not in done.stdout
    measurement = read_measurement(
        found.folder / "engine.json", found.folder / "probe", found.folder / "model.onnx"
    )
    assert measurement.samples is None and {name: len(one) for name, one in measurement.logits.items()} == {
        "dev": COUNT, "few": 5,
    }  # fmt: skip
    take_engine_row(found.folder, found.recipe.task, found.folder / "engine.json")
    engine, onnx = found.row("engine"), found.row("onnx")
    assert engine["status"] == "measured" and engine["samples"] == COUNT + 5
    assert engine["metrics"] == pytest.approx(onnx["metrics"]) and len(engine["metrics"]) >= 2
    assert engine["distance"]["to"] == "onnx" and engine["distance"]["max_abs"] < 1e-6
    assert engine["distance"]["positions"] == onnx["distance"]["positions"]
    assert (engine["distance"]["top1_agreement"] is None) == (kind == "regression")
    entry = read_samples(found.folder / "samples.json.gz")["dev"]
    for name in ("prediction", "loss") if labelled else ("prediction",):
        theirs, ours = (np.hstack(entry["rows"][row][name]) for row in ("engine", "onnx"))
        np.testing.assert_allclose(theirs, ours, rtol=1e-5)  # fp32: the order of sums


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": None}, "is not a measurement .KeyError.'logits'"),
        ({"logits": {"shape": [28, 3], "float32": "AAAA"}}, "is not a measurement"),
        ({"logits": {"shape": [1], "float32": "AAAAAA=="}}, "has 1 samples under 'logits', the probe has 28"),
        ({"logits": {"shape": [1], "float32": "?"}}, "is not a measurement"),
        ({"logits": [1.0]}, "is not a measurement"),
        ({"inputs_sha256": "1" * 64}, "measured on another inputs"),
    ],
)
def test_logits_that_do_not_belong_to_the_run_are_refused(
    changes: dict[str, Any], message: str, measure: Callable[..., Measured]
) -> None:
    found = measure("single")
    assert on_device(found.folder).returncode == 0
    file = found.folder / "engine.json"
    content = {key: value for key, value in {**read_json(file), **changes}.items() if value is not None}
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        read_measurement(file, found.folder / "probe", found.folder / "model.onnx")


def test_a_set_without_labels_is_measured_by_agreement_with_float(measure: Callable[..., Measured]) -> None:
    found = measure("single", labelled=False)
    assert found.row("float")["metrics"] == {"dev.agreement": 1.0, "few.agreement": 1.0}
    entry = read_samples(found.folder / "samples.json.gz")["dev"]
    assert entry.keys() == {"ids", "rows"} and entry["rows"]["float"].keys() == {"prediction"}
    pairs = zip(entry["rows"]["float"]["prediction"], entry["rows"]["onnx"]["prediction"], strict=True)
    share = sum(a == b for a, b in pairs) / COUNT
    assert found.row("onnx")["metrics"]["dev.agreement"] == share and 0.4 < share < 1
    assert found.row("onnx")["deployed"]["metrics"]["dev.agreement"] == share
    assert found.parity["main"] == {"dev": ["agreement"], "few": ["agreement"]}


def test_the_agreement_of_a_regression_is_a_correlation(measure: Callable[..., Measured]) -> None:
    found = measure("regression", labelled=False)
    rows = read_samples(found.folder / "samples.json.gz")["dev"]["rows"]
    expected = np.corrcoef(rows["float"]["prediction"], rows["onnx"]["prediction"])[0, 1]
    assert found.row("onnx")["metrics"]["dev.agreement"] == pytest.approx(expected) and expected < 0.999


def test_the_kit_holds_the_graphs_own_inputs(measure: Callable[..., Measured]) -> None:
    found = measure("single")
    assert read_json(found.folder / "probe" / "probe.json")["per_sample"] == "logits"
    with np.load(found.folder / "probe" / "inputs.npz") as archive:
        inputs = {name: archive[name] for name in archive.files}
    assert inputs.keys() == {"length", "set", "input.input_ids", "input.attention_mask", "input.position_ids"}
    assert {array.dtype for array in inputs.values()} == {np.dtype(np.int32)}
    assert inputs["input.input_ids"].shape == (COUNT + 5, 8)
    assert np.array_equal(inputs["input.attention_mask"].sum(1), inputs["length"])
    assert inputs["set"].tolist() == [0] * COUNT + [1] * 5


# Verdict and ladder -------------------------------------------------------------------------------


def verdict(found: Measured, **goals: Any) -> dict[str, Any]:
    gates = Gate.model_validate({"parity": {"onnx": {"mean_abs": 1.0, "top1_agreement": 0.0}}, **goals})
    return judge(found.parity, gates, ["float", "onnx"], "fp32", float_trains=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_judges_every_task_and_asks_no_top_1_of_a_regression(
    kind: str, measure: Callable[..., Measured]
) -> None:
    found = verdict(measure(kind))
    assert found["verdict"] == "accept", found["reasons"]
    judged = [goal["metric"] for goal in found["goals"]]
    assert ("parity.onnx.top1_agreement" in judged) == (kind != "regression")
    assert "parity.onnx.mean_abs" in judged


def test_a_ladder_shows_the_main_metrics_of_one_set_and_the_first_of_several() -> None:
    metrics = {"dev.accuracy": 0.8, "dev.f1": 0.85, "few.accuracy": 0.5, "few.f1": 0.4}
    rows = [{"stage": "float", "status": "measured", "metrics": metrics, "distance": None}]
    main = {"dev": ["f1", "accuracy"], "few": ["f1", "accuracy"]}
    assert order_metrics(rows, ["few", "dev"], main) == ["few.f1", "dev.f1"]
    one = [{**rows[0], "metrics": {"dev.accuracy": 0.8, "dev.f1": 0.85}}]
    assert order_metrics(one, ["dev"], {"dev": ["f1", "accuracy"]}) == ["dev.f1", "dev.accuracy"]
    assert order_metrics(one, ["dev"], {}) == ["dev.accuracy"]


def test_a_regression_has_a_dash_for_its_best_label(measure: Callable[..., Measured]) -> None:
    found = measure("regression")
    shown = list(map(str, ladder(found.parity).columns[-1].cells))
    assert "-" in shown and not any("." in cell for cell in shown)


def test_broken_logits_are_anomalous(measure: Callable[..., Measured]) -> None:
    found = measure("single")
    report = found.parity
    report["rows"][-2]["metrics"]["dev.accuracy"] = math.nan
    gates = Gate.model_validate({"parity": {"onnx": {"mean_abs": 1.0}}})
    judged = judge(report, gates, ["float", "onnx"], "fp32", float_trains=True)
    assert judged["verdict"] == "anomalous" and "onnx: dev.accuracy is nan" in judged["reasons"]


def test_only_a_language_model_continues_a_text(measure: Callable[..., Measured]) -> None:
    run = SimpleNamespace(recipe=measure("single").recipe)
    with pytest.raises(UsageError, match="and this one is of sequence-classification"):
        continue_text(run, "good", 3)


def cosines(noise: float, folder: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Embeddings [rows, 2, width] of the two texts of each row, and the rows."""
    rows = [json.loads(line) for line in (folder / "dev.jsonl").read_text().splitlines()]
    weights = table("pairs", noise).astype(np.float64)

    def embedded(text: str) -> np.ndarray:
        words = [FIRST + WORDS.index(word) for word in text.split()][:6]  # a context of 8, two of them marks
        return weights[[1, *words, 2]].sum(0)

    return np.array([[embedded(row["text"]), embedded(row["text_pair"])] for row in rows]), rows


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_the_embeddings_of_scored_pairs_are_compared_and_their_cosines_ranked(
    measure: Callable[..., Measured],
) -> None:
    found = measure("pairs", slices=["fold"])
    entry = read_samples(found.folder / "samples.json.gz")["dev"]
    assert len(entry["ids"]) == len(entry["slices"]["fold"]) == COUNT
    for name, noise in (("float", 0.5), ("onnx", 0.0)):
        embeddings, rows = cosines(noise, found.folder)
        expected = cosine(embeddings[:, 0], embeddings[:, 1])
        assert entry["rows"][name].keys() == {"prediction"}
        np.testing.assert_allclose(entry["rows"][name]["prediction"], expected, atol=1e-6)
        scores = [row["score"] for row in rows]
        assert entry["label"] == scores
        metrics = found.row(name)["metrics"]
        assert metrics["dev.cosine_spearman"] == pytest.approx(stats.spearmanr(scores, expected).statistic)
        assert metrics["dev.cosine_pearson"] == pytest.approx(stats.pearsonr(scores, expected).statistic)
        assert found.row(name)["samples"] == COUNT + 5
    distance = found.row("onnx")["distance"]
    assert distance["top1_agreement"] is None and distance["positions"] == 2 * COUNT
    assert found.parity["main"] == {"dev": ["cosine_spearman"], "few": ["cosine_spearman"]}
    assert judge(found.parity, Gate(), ["float", "onnx"], "fp32")["goals"] is not None


@pytest.mark.parametrize("labelled", [True, False])
def test_a_device_measures_the_embeddings_of_pairs(labelled: bool, measure: Callable[..., Measured]) -> None:
    found = measure("pairs", labelled)
    done = on_device(found.folder)
    assert done.returncode == 0 and "top-1" not in done.stdout, done.stderr
    take_engine_row(found.folder, found.recipe.task, found.folder / "engine.json")
    engine, onnx = found.row("engine"), found.row("onnx")
    assert engine["metrics"] == pytest.approx(onnx["metrics"]) and engine["samples"] == COUNT + 5
    assert engine["distance"]["max_abs"] < 1e-6 and engine["distance"]["top1_agreement"] is None
    assert engine["distance"]["positions"] == 2 * COUNT
    if not labelled:
        ours, _ = cosines(0.0, found.folder)
        theirs, _ = cosines(0.5, found.folder)
        assert found.row("float")["metrics"]["dev.agreement"] == 1
        assert onnx["metrics"]["dev.agreement"] == pytest.approx(cosine(ours, theirs).mean(), abs=1e-6)
        assert found.parity["main"] == {"dev": ["agreement"], "few": ["agreement"]}
