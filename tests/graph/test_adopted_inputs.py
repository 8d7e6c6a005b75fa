"""Graphs of other tools whose inputs have another type than ours: what is fed is cast to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from lines import Kind, Project, cli, exported, plain_session, python
from onnx import TensorProto, helper
from test_adopted import make_recipe_around
from tiny import token_ids
from tiny_nets import net_line, save_images

from qcompress.pipeline.stages.export import export
from qcompress.schema.recipe import Export
from qcompress.system.artifacts import read_json

Change = Callable[[onnx.ModelProto], None]


def retyped(source: Path, target: Path, kinds: dict[str, int]) -> Path:
    """The graph with inputs of other types, each cast to the type that it had."""
    model = onnx.load(str(source))
    casts = []
    for value in model.graph.input:
        if value.name not in kinds:
            continue
        had = value.type.tensor_type.elem_type
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name == value.name:
                    node.input[place] = f"{value.name}.cast"
        casts.append(helper.make_node("Cast", [value.name], [f"{value.name}.cast"], to=had))
        value.type.tensor_type.elem_type = kinds[value.name]
    assert len(casts) == len(kinds)
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    onnx.save(model, str(target))
    return target


@pytest.fixture(scope="module")
def ours(tiny_model: Path, text_file: Path) -> Path:
    """The float graph of the tiny GPT-2."""
    return exported(Kind("float"), tiny_model, text_file).file


@pytest.fixture(scope="module")
def as_it_is(tmp_path_factory: pytest.TempPathFactory, ours: Path, tiny_model: Path, text_file: Path) -> dict:
    run = around(ours, tmp_path_factory.mktemp("int64"), tiny_model, text_file).run()
    return rows_of(run.path)


def around(graph: Path, folder: Path, model: Path, text: Path) -> Project:
    return make_recipe_around(graph, folder, model, text, build={"target": "cpu"})


def rows_of(run: Path) -> dict:
    return {row["stage"]: row for row in read_json(run / "parity.json")["rows"]}


INT32 = {
    "all int32": dict.fromkeys(("input_ids", "attention_mask", "position_ids"), TensorProto.INT32),
    "int32 ids, int64 mask": {"input_ids": TensorProto.INT32},
    "a mask of booleans": {"attention_mask": TensorProto.BOOL},
    "int32 positions, boolean mask": {"position_ids": TensorProto.INT32, "attention_mask": TensorProto.BOOL},
}


@pytest.mark.parametrize("name", INT32)
def test_token_inputs_are_cast_to_the_graphs_types(
    tmp_path: Path, ours: Path, as_it_is: dict, tiny_model: Path, text_file: Path, name: str
) -> None:
    made = around(retyped(ours, tmp_path / "theirs.onnx", INT32[name]), tmp_path, tiny_model, text_file)
    run = made.run()
    found = rows_of(run.path)["onnx"]
    assert run.verdict == "accept"
    assert found["metrics"] == as_it_is["onnx"]["metrics"]
    assert found["deployed"]["metrics"] == as_it_is["onnx"]["deployed"]["metrics"]


def test_what_reads_the_run_casts_as_well(
    tmp_path: Path, ours: Path, tiny_model: Path, text_file: Path
) -> None:
    """The probe kit on a device, `predict`, and a bundle, whose types are the graph's."""
    kinds = {"input_ids": TensorProto.INT32, "attention_mask": TensorProto.BOOL}
    run = around(retyped(ours, tmp_path / "theirs.onnx", kinds), tmp_path, tiny_model, text_file).run()
    probe = run.path / "probe"
    done = python(
        "import runpy, sys; sys.argv[0] = 'measure_engine.py'; runpy.run_path(sys.argv[1], run_name='x')",
        probe / "measure_engine.py", folder=probe,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    source = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import numpy as np; from engine_runners import OnnxRunner\n"
        "ids = np.arange(12).reshape(2, 6) + 5\n"
        "feed = {'input_ids': ids, 'attention_mask': np.ones_like(ids)}\n"
        "feed |= {'position_ids': np.arange(6)[None].repeat(2, 0)}\n"
        "print(OnnxRunner(sys.argv[2])(feed).shape)"
    )
    done = python(source, probe, run.path / "model.onnx", folder=tmp_path)
    assert done.code == 0 and done.stdout.startswith("(2, 6,"), done.stderr
    said = cli("predict", run.path, "the cat", "--tokens", "2")
    assert said.code == 0, said.stderr
    bundled = cli("bundle", run.path, "--out", tmp_path / "bundle", "--json")
    assert bundled.code == 0, bundled.stderr
    kinds_of = {item["name"]: item["type"] for item in bundled.json()["inputs"]}
    assert kinds_of == {
        "input_ids": "TYPE_INT32",
        "attention_mask": "TYPE_BOOL",
        "position_ids": "TYPE_INT64",
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a checkpoint and images, and the graph of its float model."""
    folder = tmp_path_factory.mktemp("images")
    archive = save_images(folder / "images.npz")
    line = net_line(
        folder / "line", "basic", archive, format="float", method="float", schedule={"name": "plain"}
    )
    line.train().fold()
    (folder / "export").mkdir()
    export(line.folded, Export(), "cpu", {"version": "0", "recipe": "tiny"}, folder / "export")
    return folder, folder / "export" / "model.onnx"


def image_project(folder: Path, parent: Path, graph: Path) -> Path:
    parent.mkdir(exist_ok=True)
    shutil.copytree(folder / "line" / "model", parent / "model")
    shutil.copyfile(folder / "images.npz", parent / "images.npz")
    shutil.copyfile(graph, parent / "theirs.onnx")
    recipe = {
        "name": "theirs", "model": {"family": "resnet", "source": "model"},
        "task": {"name": "image-classification", "mean": [0.5] * 3, "std": [0.25] * 3, "size": [32, 32]},
        "data": {"evaluate": {"test": {"npz": ["images.npz"], "limit": 24}}},
        "export": {"graph": "theirs.onnx"}, "build": {"target": "cpu"}, "train": {"device": "cpu"},
    }  # fmt: skip
    (parent / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return parent / "recipe.yaml"


def test_images_are_cast_to_half_precision(tmp_path: Path, images: tuple[Path, Path]) -> None:
    folder, graph = images
    half = retyped(graph, tmp_path / "half.onnx", {"pixel_values": TensorProto.FLOAT16})
    found = []
    for place, file in enumerate((graph, half)):
        recipe = image_project(folder, tmp_path / f"project{place}", file)
        done = cli("run", recipe, "--out", tmp_path / f"runs{place}", "--json")
        assert done.code == 0, done.stderr
        row = {one["stage"]: one for one in json.loads(done.stdout)["parity"]["rows"]}["onnx"]
        found.append(row["distance"]["mean_abs"] / row["distance"]["range"])
    assert found[0] != found[1] and abs(found[0] - found[1]) < 2e-3  # half precision of the pixels


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_images_of_another_type_are_refused_for_it(
    tmp_path: Path, images: tuple[Path, Path], kind: int
) -> None:
    folder, graph = images
    recipe = image_project(
        folder, tmp_path / "project", retyped(graph, tmp_path / "other.onnx", {"pixel_values": kind})
    )
    done = cli("run", recipe, "--out", tmp_path / "runs")
    word = TensorProto.DataType.Name(kind).lower()
    assert done.code == 5 and "Traceback" not in done.stderr
    said = " ".join(done.stderr.split())
    assert f"the input pixel_values is {word}, and a resnet model's can be float32 or float16" in said


def test_the_graph_gives_the_logits_that_onnxruntime_gives(tmp_path: Path, ours: Path) -> None:
    """The retyped graph is the same function: what the tests above rest on."""
    ids = token_ids(2, 9).numpy()
    feed = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(9)[None].repeat(2, 0),
    }
    other = retyped(ours, tmp_path / "other.onnx", INT32["all int32"])
    near = plain_session(ours).run(["logits"], feed)[0]
    far = plain_session(other).run(
        ["logits"], {name: array.astype(np.int32) for name, array in feed.items()}
    )[0]
    assert np.array_equal(near, far)
