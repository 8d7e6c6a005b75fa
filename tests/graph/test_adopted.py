"""Graphs of other tools through the whole line: linted, measured, built, gated."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from lines import CONTEXT, SETS, Kind, Project, cli, environment, exported, plain_session, values
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from tiny import token_ids
from tokenizers import Tokenizer

from qcompress import api
from qcompress.pipeline.run import Run
from qcompress.system.artifacts import read_json, sha256_file

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")

DATA = Path(__file__).parents[1] / "data"

UNMADE = ("method", "format", "train")


class Windows(CalibrationDataReader):
    """Random tokens, as the quantizer of ONNX Runtime asks for them."""

    def __init__(self) -> None:
        ids = token_ids(8, 24).numpy()
        positions = np.broadcast_to(np.arange(24), (8, 24)).copy()
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
        self.rows = iter([feed])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rows, None)


@pytest.fixture(scope="module")
def foreign(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float graph, quantized by onnxruntime: QDQ, symmetric, per channel."""
    source = exported(Kind("float"), tiny_model, text_file).file
    file = tmp_path_factory.mktemp("foreign") / "ort.onnx"
    shutil.copyfile(text_file, file.with_name("text.txt"))
    quantize_static(
        source, file, Windows(), per_channel=True, op_types_to_quantize=["MatMul", "Gemm"],
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )  # fmt: skip
    return file


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path, foreign: Path) -> Run:
    """A finished run for the target cpu. Read only."""
    folder = tmp_path_factory.mktemp("done")
    return make_recipe_around(foreign, folder, tiny_model, text_file, build={"target": "cpu"}).run()


def make_recipe_around(
    graph: Path, parent: Path, tiny_model: Path, text_file: Path, **sections: Any
) -> Project:
    """A recipe around a graph, in a folder of its own."""
    folder = parent / "project"
    folder.mkdir()
    shutil.copytree(tiny_model, folder / "model")
    shutil.copyfile(text_file, folder / "text.txt")
    shutil.copyfile(graph, folder / "theirs.onnx")
    recipe = {key: value for key, value in values().items() if key not in UNMADE}
    recipe["data"] = {"evaluate": recipe["data"]["evaluate"]}
    recipe["gate"] = {key: value for key, value in recipe["gate"].items() if key != "parity"}
    recipe |= {"export": {"graph": "theirs.onnx"}, **sections}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return Project(folder)


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, text_file: Path, foreign: Path) -> Callable[..., Project]:
    """A recipe around a graph."""

    def make(graph: Path = foreign, **sections: Any) -> Project:
        return make_recipe_around(graph, tmp_path, tiny_model, text_file, **sections)

    return make


@needs_rtx
def test_a_graph_of_another_tool_is_measured_built_and_gated(project: Callable[..., Project]) -> None:
    made = project()
    run = made.run()
    assert run.verdict == "accept"
    assert [step.stage for step in run.steps] == ["load", "export", "build", "verify", "gate"]
    rows = {row["stage"]: row for row in read_json(run.path / "parity.json")["rows"]}
    measured = [name for name, row in rows.items() if row["status"] == "measured"]
    assert measured == ["float", "onnx"] and len(rows) == 5
    assert rows["folded"]["reason"] == "the graph is external"
    assert rows["onnx"]["distance"]["to"] == "float"
    build = read_json(run.path / "engine" / "build.json")
    assert build["status"] == "built" and build["onnx"]["sha256"] == sha256_file(made.folder / "theirs.onnx")
    certificate = read_json(run.path / "certificate.json")
    assert certificate["complete"] is False and certificate["reason"] == "the graph is external"
    verdict = read_json(run.path / "verdict.json")
    assert {goal["metric"] for goal in verdict["goals"]} == {"float.test.perplexity", "test.perplexity"}
    assert (run.path / "tokenizer.json").is_file() and read_json(run.path / "lint.json")["findings"] == []
    sizes = read_json(run.path / "sizes.json")
    assert len(sizes["layers"]) == 8  # the quantizer leaves the tied head alone
    assert {layer["stored_bits"] for layer in sizes["layers"]} == {8}
    again = api.verify(run.path)
    assert again["verdict"] == "accept"
    assert all(step.reused for step in made.run().steps)


@needs_rtx
@pytest.mark.slow
def test_the_whole_model_of_modelopts_quantizer_is_gated_as_well(
    project: Callable[..., Project], tiny_model: Path
) -> None:
    run = project(DATA / "models" / "modelopt-int8-gpt2.onnx").run()
    assert run.verdict == "accept" and read_json(run.path / "lint.json")["findings"] == []
    (row,) = [row for row in read_json(run.path / "parity.json")["rows"] if row["stage"] == "onnx"]
    assert 0 < row["distance"]["mean_abs"] / row["distance"]["range"] < 0.01
    assert read_json(run.path / "engine" / "build.json")["status"] == "built"
    layers = {layer["name"]: layer for layer in read_json(run.path / "sizes.json")["layers"]}
    assert len([name for name in layers if ".h." in name]) == 8
    assert all(layer["stored_bits"] == 8 for name, layer in layers.items() if ".h." in name)


def test_its_perplexity_is_what_onnxruntime_gives_by_itself(done: Run, foreign: Path) -> None:
    run = done
    tokenizer = Tokenizer.from_file(str(run.path / "tokenizer.json"))
    ids = np.array(tokenizer.encode((foreign.parent / "text.txt").read_text()).ids)
    ids = ids[: SETS["test"] * CONTEXT].reshape(-1, CONTEXT)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feed["position_ids"] = np.broadcast_to(np.arange(CONTEXT), ids.shape).copy()
    logits = plain_session(foreign).run(["logits"], feed)[0][:, :-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(scores, ids[:, 1:, None], -1).mean()
    (row,) = [row for row in read_json(run.path / "parity.json")["rows"] if row["stage"] == "onnx"]
    assert row["metrics"]["test.perplexity"] == pytest.approx(np.exp(nll), rel=3e-3)
    assert api.load(run.path).manifest["phases"] == []


@pytest.mark.slow
def test_another_graph_is_another_run_and_a_worse_one_a_regression(
    project: Callable[..., Project], foreign: Path
) -> None:
    made = project(build={"target": "cpu"})
    first = made.run()
    model = onnx.load(str(foreign))
    (last,) = [node for node in model.graph.node if "logits" in node.output]
    last.output[0] = "quiet"  # the weights are random, so that only confidence can make them worse
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(3), "three"))
    model.graph.node.append(helper.make_node("Mul", ["quiet", "three"], ["logits"]))
    onnx.save(model, str(made.folder / "theirs.onnx"))
    second = made.run()
    assert second.path != first.path and second.verdict == "regression"
    assert [step.reused for step in second.steps][0] is True
    assert api.gate(second.path)["verdict"] == "regression"


@pytest.mark.slow
def test_a_graph_with_external_data_comes_along(project: Callable[..., Project], foreign: Path) -> None:
    made = project(build={"target": "cpu"})
    model = onnx.load(str(foreign))
    onnx.save(
        model,
        str(made.folder / "theirs.onnx"),
        save_as_external_data=True,
        location="w.bin",
        size_threshold=64,
    )
    run = made.run()
    assert (run.path / "model.onnx.data").is_file()
    ids = token_ids(2, 9).numpy()
    feed = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(9)[None].repeat(2, 0),
    }
    near, far = (plain_session(file).run(["logits"], feed)[0] for file in (foreign, run.path / "model.onnx"))
    assert np.array_equal(near, far)
    (made.folder / "w.bin").write_bytes((made.folder / "w.bin").read_bytes()[:-1] + b"\x01")
    assert made.run().path != run.path  # its data count too


# Refusals -----------------------------------------------------------------------------------------


def relu(**changes: Any) -> onnx.ModelProto:
    """A graph with the right names that computes nothing sensible."""
    kind, shape = changes.get("kind", TensorProto.INT64), changes.get("shape", ["batch", "sequence"])
    name, output = changes.get("name", "input_ids"), changes.get("output", "logits")
    graph = helper.make_graph(
        [helper.make_node(changes.get("op", "Cast"), [name], [output], to=TensorProto.FLOAT)],
        "g",
        [helper.make_tensor_value_info(name, kind, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "tokens"}, "has the inputs tokens, and a gpt2 model has input_ids, attention_mask"),
        (
            {"kind": TensorProto.UINT8},
            "the input input_ids is uint8, and a gpt2 model's can be int64 or int32",
        ),
        ({"kind": TensorProto.BOOL}, "the input input_ids is bool, and a gpt2 model's can be int64 or int32"),
        (
            {"shape": ["batch", "sequence", 1]},
            r"input_ids has 3 axes \['batch', 'sequence', 1\], and a gpt2 model's has 2, \[batch, sequence\]",
        ),
        ({"shape": None}, "input_ids has no shape, and a gpt2 model's has 2"),
        (
            {"shape": [1, "sequence"]},
            r"must be \[batch, sequence\] of any size, and is \[1, 'sequence'\]",
        ),
        ({"output": "scores"}, "has the outputs scores, and none is called `logits`"),
        ({}, r"the logits of 2 rows of 5 tokens are float32 \[2, 5\], and this model .*\[2, 5, 300\]"),
    ],
)
def test_a_graph_that_is_not_the_models_is_refused(
    project: Callable[..., Project], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    onnx.save(relu(**changes), str(tmp_path / "other.onnx"))
    made = project(tmp_path / "other.onnx", build={"target": "cpu"})
    done = cli(*made.command())
    assert done.code == 5 and "Traceback" not in done.stderr
    assert re.search(words, " ".join(done.stderr.split())), done.stderr


def test_a_graph_that_onnxruntime_cannot_run_is_refused(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    model = relu()
    model.graph.node[0].domain = "mine"
    model.opset_import.append(helper.make_opsetid("mine", 1))
    onnx.save(model, str(tmp_path / "other.onnx"))
    done = cli(*project(tmp_path / "other.onnx", build={"target": "cpu"}).command())
    assert done.code == 5 and "Traceback" not in done.stderr


def test_a_graph_that_the_target_would_refuse_ends_the_run(
    project: Callable[..., Project], tmp_path: Path, foreign: Path
) -> None:
    model = onnx.load(str(foreign))
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_scale") and len(tensor.dims) == 0:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(-1.0), tensor.name))
            break
    onnx.save(model, str(tmp_path / "bad.onnx"))
    done = cli(*project(tmp_path / "bad.onnx").command())
    assert done.code == 5 and "rtx-ada would refuse or change" in done.stderr
    assert "scale-not-positive" in done.stderr


IDLE = [
    ({"method": "lsq"}, "method: has no effect: `export.graph` is a graph that is made"),
    ({"format": "w8a8"}, "format"),
    ({"train": {"lr": {"weight": 1.0e-4}}}, "train.lr: has no effect"),
    ({"export": {"graph": "theirs.onnx", "keep_fp32": ["norm"]}}, "export.keep_fp32: has no effect"),
    ({"export": {"graph": "nothing.onnx"}}, "export.graph: 'nothing.onnx' does not exist"),
    ({"export": {"graph": "model"}}, "export.graph: 'model' is not a file"),
    (
        {"verify": {"require": ["float", "folded", "onnx"]}},
        "requires the row `folded`, and an external graph",
    ),
]


@pytest.mark.parametrize(("sections", "words"), IDLE)
def test_what_only_a_graph_of_ours_has_is_a_mistake(
    project: Callable[..., Project], sections: dict[str, Any], words: str
) -> None:
    made = project(**sections)
    done = cli("check", made.recipe)
    assert done.code == 2 and "1 mistake" in done.stderr
    assert words in " ".join(done.stderr.split())


def test_a_stage_that_there_is_not_is_named(project: Callable[..., Project]) -> None:
    done = cli(*project().command("--until", "fold"))
    assert done.code == 2 and "stage fold does not run for `export.graph`, an external graph" in done.stderr


def test_a_file_beside_the_graph_is_not_imported(project: Callable[..., Project]) -> None:
    """The process that runs the graph first must not take its modules from where the graph lies."""
    made = project(build={"target": "cpu"})
    for name in ("onnxruntime", "json", "numpy"):
        (made.folder / f"{name}.py").write_text("raise SystemExit('not this one')")
    assert made.run(until="export").steps[-1].stage == "export"


def test_a_graph_that_was_changed_in_the_run_is_refused(done: Run, tmp_path: Path) -> None:
    run = shutil.copytree(done.path, tmp_path / "run")
    with (run / "model.onnx").open("ab") as file:
        file.write(b"\0\0")
    refused = cli("verify", run)
    assert refused.code == 5 and "model.onnx is not the imported graph" in refused.stderr


def test_a_run_of_it_is_compared_and_continues_a_text(done: Run, tmp_path: Path) -> None:
    run = done
    certificate = read_json(run.path / "certificate.json")
    assert certificate["disabled_optimizers"] == ["QDQPropagationTransformer"]
    compared = cli("compare", f"a={run.path}", f"b={run.path}")
    assert compared.code == 0 and "Traceback" not in compared.stderr, compared.stderr
    text = cli("predict", run.path, "the", "--tokens", "2")
    assert text.code == 0 and text.stdout.startswith("the")
    script, file = run.path / "probe" / "measure_engine.py", run.path / "model.onnx"
    kit = [sys.executable, str(script), "--onnx", str(file), "--out", str(tmp_path / "engine.json")]
    measured = subprocess.run(kit, env=environment(), capture_output=True, text=True)
    assert measured.returncode == 0, measured.stderr


def test_a_graph_may_read_fewer_inputs(project: Callable[..., Project], tmp_path: Path) -> None:
    """Logits from a table of the tokens alone."""
    rows = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)
    shape = ["batch", "sequence"]
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["logits"])],
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape, 300])],
        [onnx.numpy_helper.from_array(rows, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(tmp_path / "table.onnx"))
    made = project(tmp_path / "table.onnx", build={"target": "cpu"}, gate={})
    run = made.run()
    done = cli("predict", run.path, "the", "--tokens", "3")
    assert done.code == 0, done.stderr


def test_a_folder_that_there_is_not_cannot_be_kept(project: Callable[..., Project]) -> None:
    done = cli(*project().command("--keep", "fold"))
    assert done.code == 2 and "stage fold does not run" in done.stderr


def test_check_names_the_graph(project: Callable[..., Project]) -> None:
    done = cli("check", project().recipe)
    assert done.code == 0 and "graph theirs.onnx, external; target rtx-ada" in done.stdout
    assert "method" not in done.stdout and "train" not in done.stdout


def test_two_blocks_of_a_whole_graph_are_refused(project: Callable[..., Project]) -> None:
    done = cli(*project().command("--smoke"))
    assert done.code == 2 and "`export.graph` has all of them" in done.stderr


def test_layers_cannot_be_compared_without_a_folded_model(done: Run) -> None:
    refused = cli("verify", done.path, "--layers")
    assert refused.code == 2 and "the graph is external" in refused.stderr


def test_a_recipe_that_extends_another_finds_its_graph(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    project()
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "mine.yaml").write_text("extends: ../project/recipe.yaml\nname: mine\nbuild: {target: cpu}\n")
    done = cli("check", other / "mine.yaml")
    assert done.code == 0, done.stderr
