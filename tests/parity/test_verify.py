"""Stage `verify`: every row on the same samples, and what is said of a row that cannot run."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lines import COMPARED, CONTEXT, SETS, Project, finished, plain_session
from transformers import AutoTokenizer, GPT2LMHeadModel

from qcompress.api import load
from qcompress.errors import UsageError
from qcompress.parity.inputs import Artifacts
from qcompress.parity.sample_results import read_samples
from qcompress.pipeline.stages.verify import verify
from qcompress.system.artifacts import Engine, FloatModel, FoldedModel, OnnxModel, TrainedModel, read_json
from qcompress.system.reporter import Reporter

ROWS = ["float", "trained", "folded", "onnx", "engine"]


@pytest.fixture(scope="module")
def project(tiny_model: Path, text_file: Path) -> Project:
    return finished(tiny_model, text_file)


@pytest.fixture(scope="module")
def parity(project: Project) -> dict[str, Any]:
    return read_json(project.latest / "parity.json")


@pytest.fixture(scope="module")
def rows(parity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row for row in parity["rows"]}


@pytest.fixture
def measure(project: Project, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`measure(folded=None, distance_samples=3)`: verify once more with changed artifacts or options."""
    loaded = load(project.latest)
    whole = Artifacts(
        float_model=FloatModel(loaded.stage("load"), source=project.folder / "model"),
        trained=TrainedModel(loaded.stage("train")),
        folded=FoldedModel(loaded.stage("fold")),
        onnx=OnnxModel(loaded.path),
        engine=Engine(loaded.stage("build")),
        missing={},
    )

    def run(compute: str = "fp32", **changes: Any) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(Artifacts)}
        artifacts = dataclasses.replace(whole, **{key: changes.pop(key) for key in names & changes.keys()})
        options = loaded.recipe.verify.model_copy(update=changes)
        recipe = loaded.recipe.model_copy(
            update={
                "verify": options,
                "format": loaded.recipe.format.model_copy(update={"compute": compute}),
            }
        )
        verify(recipe, project.folder, artifacts, tmp_path, Reporter(silent=True))
        return {row["stage"]: row for row in read_json(tmp_path / "parity.json")["rows"]}

    return run


def windows(project: Project, name: str) -> list[list[int]]:
    """Token ids of an evaluation set, cut by hand."""
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "model")
    ids = tokenizer((project.folder / "text.txt").read_text())["input_ids"]
    return [ids[start : start + CONTEXT] for start in range(0, len(ids), CONTEXT)][: SETS[name]]


def losses(logits: np.ndarray, ids: list[int]) -> tuple[float, int]:
    """Summed loss of one window's targets, and how many the model ranks first."""
    scores, targets = torch.from_numpy(logits[:-1]).double(), torch.tensor(ids[1:])
    return F.cross_entropy(scores, targets, reduction="sum").item(), int((scores.argmax(1) == targets).sum())


# Rows ---------------------------------------------------------------------------------------------


def test_every_row_is_there_in_order_and_all_but_the_engine_are_measured(parity: dict[str, Any]) -> None:
    assert [row["stage"] for row in parity["rows"]] == ROWS
    assert [row["status"] for row in parity["rows"]] == ["measured"] * 4 + ["not-run"]
    assert "measure_engine.py" in parity["rows"][-1]["reason"]
    assert parity["sets"] == list(SETS)


def test_every_measured_row_has_all_metrics_on_all_samples(rows: dict[str, dict[str, Any]]) -> None:
    names = {f"{name}.{metric}" for name in SETS for metric in ("perplexity", "token_accuracy")}
    for stage in ROWS[:4]:
        assert rows[stage]["metrics"].keys() == names and len(names) == 4
        assert all(math.isfinite(value) for value in rows[stage]["metrics"].values())
        assert rows[stage]["samples"] == sum(SETS.values())


def test_each_row_is_compared_with_the_row_before_it(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["float"]["distance"] is None
    assert [rows[stage]["distance"]["to"] for stage in ROWS[1:4]] == ROWS[:3]
    assert {rows[stage]["distance"]["positions"] for stage in ROWS[1:4]} == {COMPARED * CONTEXT}


def test_trained_to_folded_is_exactly_nothing(rows: dict[str, dict[str, Any]]) -> None:
    distance = rows["folded"]["distance"]
    assert distance["max_abs"] == 0.0 and distance["mean_abs"] == 0.0 and distance["snr_db"] is None
    assert distance["top1_agreement"] == 1.0 and distance["range"] > 1
    assert rows["folded"]["metrics"] == rows["trained"]["metrics"]
    assert rows["trained"]["metrics"] != rows["float"]["metrics"]


def test_the_deployed_session_stands_beside_the_onnx_row(rows: dict[str, dict[str, Any]]) -> None:
    deployed = rows["onnx"]["deployed"]
    assert deployed["metrics"].keys() == rows["onnx"]["metrics"].keys()
    assert deployed["distance"]["positions"] == COMPARED * CONTEXT
    assert not any("deployed" in rows[stage] for stage in ("float", "trained", "folded"))


def test_the_float_row_is_stock_transformers(project: Project, rows: dict[str, dict[str, Any]]) -> None:
    model = GPT2LMHeadModel.from_pretrained(project.folder / "model").eval()
    for name in SETS:
        pieces = windows(project, name)
        with torch.no_grad():
            found = [losses(model(torch.tensor([ids])).logits[0].numpy(), ids) for ids in pieces]
        tokens = sum(len(ids) - 1 for ids in pieces)
        perplexity = math.exp(sum(loss for loss, _ in found) / tokens)
        assert rows["float"]["metrics"][f"{name}.perplexity"] == pytest.approx(perplexity, rel=1e-5)
        accuracy = sum(hits for _, hits in found) / tokens
        assert rows["float"]["metrics"][f"{name}.token_accuracy"] == pytest.approx(accuracy, abs=2 / tokens)


def test_the_onnx_row_is_what_onnxruntime_says_of_the_file(
    project: Project, rows: dict[str, dict[str, Any]]
) -> None:
    session = plain_session(project.latest / "model.onnx")
    ids = np.array(windows(project, "other"), np.int64)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids),
            "position_ids": np.tile(np.arange(CONTEXT), (len(ids), 1))}  # fmt: skip
    logits = session.run(["logits"], feed)[0]
    total = sum(losses(logits[row], list(ids[row]))[0] for row in range(len(ids)))
    perplexity = math.exp(total / (len(ids) * (CONTEXT - 1)))
    assert rows["onnx"]["metrics"]["other.perplexity"] == pytest.approx(perplexity, rel=1e-3)


# Samples ------------------------------------------------------------------------------------------


def test_per_sample_results_reproduce_every_metric(project: Project, rows: dict[str, dict[str, Any]]) -> None:
    content = gzip.decompress((project.latest / "samples.json.gz").read_bytes())
    sets = json.loads(content)["sets"]
    assert sets.keys() == SETS.keys()
    for name, entry in sets.items():
        assert entry["ids"] == [f"{name}:{index}" for index in range(SETS[name])]
        assert entry["rows"].keys() == set(ROWS[:4])
        for stage, found in entry["rows"].items():
            assert len(found["nll"]) == len(found["correct"]) == len(entry["tokens"]) == SETS[name]
            tokens = sum(entry["tokens"])
            metrics = rows[stage]["metrics"]
            assert metrics[f"{name}.perplexity"] == pytest.approx(math.exp(sum(found["nll"]) / tokens))
            assert metrics[f"{name}.token_accuracy"] == pytest.approx(sum(found["correct"]) / tokens)


def test_a_window_counts_each_of_its_targets_once(project: Project) -> None:
    sets = read_samples(project.latest / "samples.json.gz")
    for name in SETS:
        assert sets[name]["tokens"] == [len(ids) - 1 for ids in windows(project, name)]


def test_measuring_again_gives_the_same_files_and_leaves_no_logits(
    project: Project, measure: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    measure()
    for name in ("parity.json", "samples.json.gz", "probe/inputs.npz", "probe/reference.npz"):
        assert (tmp_path / name).read_bytes() == (project.latest / name).read_bytes(), name
    assert {path.name for path in tmp_path.iterdir()} == {"parity.json", "samples.json.gz", "probe"}


def test_only_so_many_samples_are_compared_logit_by_logit(measure: Callable[..., dict[str, Any]]) -> None:
    rows = measure(distance_samples=3)
    assert {rows[stage]["distance"]["positions"] for stage in ROWS[1:4]} == {3 * CONTEXT}
    assert rows["onnx"]["samples"] == sum(SETS.values())


def test_samples_bound_what_is_measured_whatever_the_batches(measure: Callable[..., dict[str, Any]]) -> None:
    rows = measure(samples=4, distance_samples=1000, batch_size=3)
    assert {rows[stage]["samples"] for stage in ROWS[:4]} == {8}
    assert {rows[stage]["distance"]["positions"] for stage in ROWS[1:4]} == {4 * CONTEXT}


def test_the_report_names_the_graph_and_the_weights_beside_it(
    project: Project, measure: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """A graph whose initializers lie in a file of their own says nothing of them by itself."""
    apart = tmp_path / "apart"
    apart.mkdir()
    onnx.save(
        onnx.load(project.latest / "model.onnx"), apart / "model.onnx", save_as_external_data=True,
        location="weights.bin",
    )  # fmt: skip
    measure(samples=2, float_model=None, trained=None, onnx=OnnxModel(apart))
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in apart.iterdir()}
    found = read_json(tmp_path / "parity.json")["onnx"]
    assert found == {"sha256": digests["model.onnx"], "data": {"weights.bin": digests["weights.bin"]}}


# Rows that cannot run -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "not_run", "previous"),
    [
        ("float_model", ["float", "trained"], {"folded": None, "onnx": "folded"}),
        ("trained", ["trained"], {"folded": "float", "onnx": "folded"}),
        ("folded", ["folded"], {"trained": "float", "onnx": "trained"}),
        ("onnx", ["onnx"], {"trained": "float", "folded": "trained"}),
        ("engine", ["engine"], {"onnx": "folded"}),
    ],
)
def test_an_artifact_that_is_gone_is_a_row_that_was_not_run_with_its_reason(
    gone: str, not_run: list[str], previous: dict[str, str | None], measure: Callable[..., dict[str, Any]]
) -> None:
    rows = measure(**{gone: None})
    for stage in not_run:
        assert rows[stage]["status"] == "not-run" and rows[stage]["reason"], stage
        assert "metrics" not in rows[stage]
    for stage, to in previous.items():
        distance = rows[stage]["distance"]
        assert rows[stage]["status"] == "measured" and (distance["to"] if distance else None) == to


def test_a_reason_that_the_caller_knows_is_the_one_given(measure: Callable[..., dict[str, Any]]) -> None:
    rows = measure(float_model=None, trained=None, onnx=None, missing={"onnx": "export was not asked for"})
    assert rows["onnx"]["reason"] == "export was not asked for"


def test_nothing_to_measure_is_said_and_does_not_crash(measure: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match="nothing to measure: the float"):
        measure(float_model=None, folded=None, onnx=None)


def test_a_bf16_graph_is_built_and_not_measured_here(measure: Callable[..., dict[str, Any]]) -> None:
    rows = measure(compute="bf16", float_model=None, trained=None)
    assert rows["onnx"]["status"] == "not-run" and "bf16" in rows["onnx"]["reason"]
    assert rows["folded"]["status"] == "measured"


@pytest.mark.parametrize(
    ("status", "shown"), [("deferred", "deferred"), ("none", "not-run"), ("built", "not-run")]
)
def test_the_engine_row_says_what_the_build_said(
    status: str, shown: str, measure: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    facts = {"status": status, "reason": "why", "command": "qcompress build", "backend": "tensorrt_rtx"}
    (folder / "build.json").write_text(json.dumps(facts))
    row = measure(float_model=None, trained=None, folded=None, engine=Engine(folder))["engine"]
    assert row["status"] == shown
    if status == "deferred":
        assert row["reason"] == "why" and row["command"] == "qcompress build"
