"""A user's module with any inputs and outputs, from the file to a verdict; its data, loss and metrics."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blobs_net
import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from blobs_shapes import pictures
from lines import cli, exact_options

from qcompress.models.checkpoint_files import read_config
from qcompress.models.python_child import main
from qcompress.models.python_source import make_checkpoint
from qcompress.parity.sample_results import read_samples
from qcompress.recipe.check import all_mistakes
from qcompress.recipe.load import load_recipe
from qcompress.schema.any_task import AnyTask
from qcompress.system.artifacts import read_json
from qcompress.system.user_code import files_of, problem_of
from qcompress.tasks import any_task
from qcompress.verdict.replicates import REPLICATES

HERE = Path(__file__).parent
FILES = ("blobs_net.py", "blobs_shapes.py", "blobs_metrics.py", "blobs_rule.py")
METRICS = {"score": "blobs_metrics.py:iou", "error": "blobs_metrics.py:share_error"}


@pytest.fixture(autouse=True, scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Folder of made checkpoints, of this module alone."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp() / "kept-any"
        patch.setenv("QCOMPRESS_STRUCTURES", str(folder / "structures"))
        yield


def recipe(folder: Path, **sections: Any) -> Path:
    """A recipe beside the user's files and data."""
    for name in FILES:
        if not (folder / name).exists():
            shutil.copyfile(HERE / name, folder / name)
    for name, seed in (("train", 1), ("test", 2)):
        picture, level, truth = (tensor.numpy() for tensor in pictures(24, 1000 + seed))
        half = np.arange(24) < 12
        np.savez(folder / f"{name}.npz", picture=picture, level=level, truth=truth, half=half)
    values = {
        "name": "blobs", "model": {"python": "blobs_net.py"}, "format": "w8a8", "method": "ptq",
        "task": {"name": "any", **METRICS}, "build": {"target": "cpu"},
        "data": {"calibration": {"npz": ["train.npz"]}, "evaluate": {"test": {"npz": ["test.npz"]}}},
        **sections,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an accepted recipe."""
    folder = tmp_path_factory.mktemp("any")
    data, test = {"npz": ["train.npz"]}, {"npz": ["test.npz"], "slices": ["half"]}
    file = recipe(
        folder, method="lsq", task={"name": "any", **METRICS, "loss": "blobs_net.py:loss"},
        train={"phases": {"finetune": {"steps": 2}}, "batch_size": 4},
        data={"train": data, "calibration": data, "evaluate": {"test": test}},
        gate={"float_floor": {"test.score": 0.5, "test.error": 0.2}},
    )  # fmt: skip
    said = cli("run", file, "--out", folder / "runs")
    assert said.code == 0, said.stderr
    return (folder / "runs" / "blobs" / "latest").resolve()


@pytest.fixture(scope="module")
def made() -> Path:
    """The checkpoint of the user's module."""
    return make_checkpoint("blobs_net.py", HERE, "any")


def graph_outputs(graph: Path, data: Path, level: Any) -> dict[str, np.ndarray]:
    """Outputs of a graph in onnxruntime, by name."""
    options = exact_options()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    with np.load(data) as archive:
        feed = {item.name: archive[item.name] for item in session.get_inputs()}
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def test_the_graph_has_the_modules_inputs_and_outputs_and_its_metrics_are_the_users(done: Path) -> None:
    verdict = read_json(done / "verdict.json")
    assert verdict["verdict"] == "accept" and read_json(done / "certificate.json")["complete"]
    data = done.parents[2] / "test.npz"
    outputs = graph_outputs(done / "model.onnx", data, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC)
    assert {name: array.shape for name, array in outputs.items()} == {
        "mask": (24, 1, 16, 16), "share": (24,)
    }  # fmt: skip
    truth = np.load(data)["truth"]
    found = outputs["mask"] > 0
    shared, either = (found & (truth > 0.5)).sum((1, 2, 3)), (found | (truth > 0.5)).sum((1, 2, 3))
    rows = {row["stage"]: row for row in read_json(done / "parity.json")["rows"]}
    assert rows["onnx"]["metrics"]["test.score"] == pytest.approx((shared / either).mean(), abs=1e-3)
    off = np.abs(outputs["share"] - truth.mean((1, 2, 3))).mean()
    assert rows["onnx"]["metrics"]["test.error"] == pytest.approx(off, abs=1e-4)
    net, _ = blobs_net.make()
    picture, level, _ = pictures(24, 1002)
    with torch.no_grad():
        stock = net(picture, level)
    stock_off = (stock["share"] - torch.from_numpy(truth).mean((1, 2, 3))).abs().mean()
    assert rows["float"]["metrics"]["test.error"] == pytest.approx(float(stock_off), rel=1e-5)
    assert rows["trained"]["metrics"] != rows["float"]["metrics"]
    assert rows["float"]["distance"] is None and rows["trained"]["distance"]["top1_agreement"] is None


def test_a_device_measures_all_outputs_and_their_agreement(done: Path, tmp_path: Path) -> None:
    """The kit's script on the graph. The user's functions stay behind: the row has the agreement alone."""
    import subprocess

    kit = done / "probe"
    assert read_json(kit / "probe.json")["outputs"] == ["mask", "share"]
    made = tmp_path / "engine.json"
    command = [sys.executable, kit / "measure_engine.py", "--onnx", done / "model.onnx", "--out", made]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    measured = read_json(made)
    assert measured["distance"]["max_abs"] <= 0.1 and measured["logits"]["shape"] == [24, 257]
    run = tmp_path / "run"
    shutil.copytree(done, run)
    said = cli("verify", run, "--engine", made)
    assert said.code == 0, said.stderr
    (row,) = (row for row in read_json(run / "parity.json")["rows"] if row["stage"] == "engine")
    assert list(row["metrics"]) == ["test.agreement"] and row["metrics"]["test.agreement"] > 0.99
    samples = read_samples(run / "samples.json.gz")["test"]["rows"]
    assert "outputs" in samples["float"] and "outputs" not in samples["onnx"]
    assert len(samples["onnx"]["score"]) == 24 and set(samples["engine"]) == {"cosine"}


def test_the_loss_gets_outputs_and_arrays_by_name(made: Path) -> None:
    outputs = any_task.outputs_in(read_config(made))
    task = AnyTask(loss="blobs_net.py:loss").of(outputs)
    net, _ = blobs_net.make()
    picture, level, truth = pictures(5, 77)
    named = net(picture, level)
    side = torch.cat([named["mask"].flatten(1), named["share"][:, None]], 1)
    batch = {"picture": picture, "level": level, "labels.truth": truth}
    expected = blobs_net.loss(named, {"truth": truth})
    torch.testing.assert_close(any_task.own_loss(task, HERE)(side, batch), expected)


def test_outputs_are_compared_in_their_own_units(done: Path) -> None:
    """An output of small values, wrong by all of its magnitude, is as far as one of large values."""
    outputs = any_task.outputs_in(read_config(done))
    scales = {output.name: output.scale for output in outputs}
    assert scales["mask"] > 5 * scales["share"] > 0
    sample = any_task.ArraySample({}, {}, outputs, {})
    row = np.zeros(257, np.float32)
    row[256] = scales["share"]
    assert np.abs(any_task.compared(sample, row)).max() == pytest.approx(1)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("without_batch", r"output is \[16\], and \[16\] with each input twice: its first axis is not"),
        ("scalar", r"output is \[\], and \[\] with each input twice: its first axis is not the batch"),
        ("of_half_inputs", r"the input x is float16, and a graph's is one of float32, int64, int32, bool"),
        ("of_one_name", r"an input and an output are both named x"),
        ("of_text", r"the module's said is a str, and no tensor"),
        ("of_nothing", r"the module returns no tensor"),
        ("named_labels", r"the input labels has a name of the labels"),
        ("of_two_many", r"of_two_many of blobs_net.py returned Plain, tuple"),
    ],
)  # fmt: skip
def test_a_module_that_no_graph_can_be_is_refused(
    function: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The child process, in this one."""
    monkeypatch.setattr(sys, "argv", ["", str(HERE / "blobs_net.py"), function, "any", str(tmp_path)])
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert main() == 1
    said, fix = capsys.readouterr().out.splitlines()
    assert re.search(message, said) and fix


def test_a_tuple_names_its_outputs_by_number() -> None:
    config = read_config(make_checkpoint("blobs_net.py:pair", HERE, "any"))
    assert [(one["name"], one["shape"]) for one in config["python"]["outputs"]] == [
        ("output_0", [16]), ("output_1_0", [2])
    ]  # fmt: skip
    assert config["python"]["inputs"] == [{"name": "x", "shape": [16], "element": "float32"}]


@pytest.mark.parametrize(
    ("sections", "key", "message"),
    [
        ({"task": {"name": "any", "score": "absent.py:iou"}}, "task.score", "absent.py does not exist"),
        ({"task": {"name": "any", "score": "blobs_net.py:iou"}}, "task.score", "blobs_net.py defines no iou"),
        ({"task": {"name": "any", "score": "iou"}}, "task.score", "write FILE:FUNCTION"),
        ({"method": "lsq"}, "task.loss", "has no loss, and the phase finetune trains with it"),
        ({"export": {"graph": "x.onnx"}}, "export.graph", "belongs to other tasks than any"),
        ({"model": {"source": "."}}, "model", "models of `python` alone"),
        ({"gate": {"recovery": {"test.agreement": {"threshold": 0.9}}}}, "gate.recovery",
         "test has a metric, and agreement is measured where there are none"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_runs(
    sections: dict[str, Any], key: str, message: str, tmp_path: Path, made: Path
) -> None:
    data = {"npz": ["train.npz"]}
    sections = {"data": {"train": data, "calibration": data, "evaluate": {"test": data}}, **sections}
    _, _, mistakes = all_mistakes(recipe(tmp_path, **sections), (), made)
    assert any(one.key.startswith(key) and message in one.message for one in mistakes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture": None}, "holds level, truth, half, and the model's input picture is float32 [samp"),
        ({"level": np.zeros((24, 2))}, "level is float64 [24, 2], and the model's input level is float32 [s"),
        ({"level": np.zeros(24, np.complex64)}, "level is complex64 [24]"),
        ({"half": np.zeros(7)}, "one row of every array is a sample"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_the_model_are_refused_by_check(
    change: dict[str, Any], message: str, tmp_path: Path, made: Path
) -> None:
    file = recipe(tmp_path)
    with np.load(tmp_path / "test.npz") as archive:
        arrays = {**archive, **change}
    np.savez(tmp_path / "test.npz", **{name: one for name, one in arrays.items() if one is not None})
    _, _, (mistake,) = all_mistakes(file, (), made)
    assert message in mistake.message and mistake.key.startswith("data.evaluate.test.npz")


def test_a_module_that_the_exporter_refuses_ends_with_its_reason(tmp_path: Path) -> None:
    file = recipe(tmp_path, model={"python": "blobs_net.py:branching"}, task="any")
    for name in ("train", "test"):
        np.savez(tmp_path / f"{name}.npz", x=np.ones((8, 16), np.float32))
    refused = cli("run", file, "--out", tmp_path / "runs")
    assert refused.code == 5 and "torch's exporter makes no graph of this model" in refused.stderr


def test_a_recipe_that_extends_another_moves_the_users_files(tmp_path: Path) -> None:
    task = {"name": "any", **METRICS, "loss": "blobs_net.py:loss"}
    recipe(tmp_path, task=task)
    (tmp_path / "sub").mkdir()
    child = tmp_path / "sub" / "child.yaml"
    child.write_text("extends: ../recipe.yaml\nname: child\n")
    moved = load_recipe(child, ()).recipe
    assert moved.model.python == "../blobs_net.py" and moved.task.loss == "../blobs_net.py:loss"
    assert (moved.task.score, moved.task.error) == (
        "../blobs_metrics.py:iou", "../blobs_metrics.py:share_error"
    )  # fmt: skip


def test_a_files_digests_are_those_of_its_imports_beside_it(tmp_path: Path) -> None:
    for name in ("net.py", "part.py", "pack/__init__.py", "pack/inner.py", "pack/other.py", "far.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "net.py").write_text("import numpy, part\ndef f():\n    from pack import inner\n")
    (tmp_path / "pack" / "inner.py").write_text("from . import other\n")
    assert list(files_of("net.py:f", tmp_path)) == [
        "net.py", "pack/__init__.py", "pack/inner.py", "pack/other.py", "part.py"
    ]  # fmt: skip
    (tmp_path / "far.py").write_text("def g(:\n")
    assert "is not Python" in problem_of("far.py:g", tmp_path)
    assert problem_of("net.py:f", tmp_path) is None and "defines no h" in problem_of("net.py:h", tmp_path)


def test_a_bootstrap_draws_whole_samples() -> None:
    columns = {"score": [1.0, 4.0], "error": [3.0, 5.0], "cosine": [1.0, 1.0]}
    counts = np.array([[2.0, 0.0], [1.0, 1.0]])
    assert REPLICATES["score"](columns, counts).tolist() == [1.0, 2.5]
    assert REPLICATES["error"](columns, counts).tolist() == [3.0, 4.0]


def test_without_a_metric_the_agreement_is_the_mean_cosine_of_the_outputs() -> None:
    outputs = (any_task.Output("a", (2,)), any_task.Output("b", ()))
    known = [{"thinned": [np.array([3.0, 4.0]), np.array([2.0])]}]
    reference = any_task.joined(known, None)
    row = any_task.joined([{"thinned": [np.array([4.0, 3.0]), np.array([-1.0])]}], reference)
    assert any_task.metrics(row, AnyTask(), reference) == {"agreement": pytest.approx((0.96 - 1) / 2)}
    broken = any_task.joined([{"thinned": [np.array([np.nan, 3.0]), np.array([1.0])]}], reference)
    assert np.isnan(any_task.metrics(broken, AnyTask(), reference)["agreement"])
    sample = any_task.ArraySample({}, {}, (any_task.Output("a", (9999,)),), {})
    (thinned,) = any_task.measure([sample], np.arange(9999.0)[None])[0]["thinned"]
    assert len(thinned) == any_task.MOST and (thinned[0], thinned[-1]) == (0, 9998)
    assert len(outputs) == 2


def test_a_changed_function_runs_its_stages_again(done: Path) -> None:
    """The last test of the run, which it changes: the rule that the metrics import."""
    folder = done.parents[2]
    rule = folder / "blobs_rule.py"
    rule.write_text(rule.read_text().replace("mask > 0", "mask > 0.5"))
    again = cli("run", folder / "recipe.yaml", "--out", folder / "runs")
    assert "verify: runs (data: task.error changed, data: task.score changed)" in again.stderr
    assert "train: reused" in again.stderr and "train: runs" not in again.stderr
