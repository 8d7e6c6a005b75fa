"""Norms and softmaxes of a half-precision graph that compute in fp32."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from lines import plain_session
from onnx import TensorProto, helper
from onnx import numpy_helper as numeric
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file
from test_export import feed, ids_of
from tiny import make_recipe, start_line, token_ids

from qcompress.graph.keep_fp32 import keep_fp32
from qcompress.pipeline.keys import provenance
from qcompress.pipeline.stages.build import build_file
from qcompress.pipeline.stages.export import export
from qcompress.schema.recipe import Build
from qcompress.system.artifacts import read_json


def graph(shared: bool) -> onnx.ModelProto:
    """A norm and a softmax in fp16; with `shared`, an addition reads the norm's scale as well."""
    half = TensorProto.FLOAT16
    values = {"gamma": [1.0, 2.0, 3.0, 4.0], "beta": [0.5, 0.0, -0.5, 0.0]}
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["n"], name="norm"),
        helper.make_node("Add", ["n", "gamma" if shared else "n"], ["s"]),
        helper.make_node("Softmax", ["s"], ["y"], name="softmax"),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", half, ["rows", 4])],
        [helper.make_tensor_value_info("y", half, ["rows", 4])],
        [numeric.from_array(np.array(array, np.float16), name) for name, array in values.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def widened(model: onnx.ModelProto, *kinds: str) -> onnx.ModelProto:
    found = ir.from_proto(model)
    parameters = {"gamma": np.array([1.0, 2.0, 3.0, 4.0001], np.float32)}
    assert keep_fp32(found, kinds, parameters) == len(kinds)
    made = ir.to_proto(found)
    onnx.checker.check_model(made, full_check=True)
    return made


@pytest.mark.parametrize("shared", [False, True])
def test_operators_get_casts_around_them_and_their_parameters_in_fp32(shared: bool) -> None:
    made = widened(graph(shared), "norm", "softmax")
    assert [node.op_type for node in made.graph.node] == [
        "Cast", "LayerNormalization", "Cast", "Add", "Cast", "Softmax", "Cast",
    ]  # fmt: skip
    stored = {tensor.name: tensor for tensor in made.graph.initializer}
    wide = stored["gamma/fp32" if shared else "gamma"]
    assert numeric.to_array(wide).tolist() == [1.0, 2.0, 3.0, np.float32(4.0001)]
    assert stored["beta"].data_type == TensorProto.FLOAT
    assert ("gamma/fp32" in stored) is shared
    assert stored["gamma"].data_type == (TensorProto.FLOAT16 if shared else TensorProto.FLOAT)
    (output,) = made.graph.output
    assert output.name == "y" and output.type.tensor_type.elem_type == TensorProto.FLOAT16


def test_a_norm_whose_squares_overflow_fp16_is_right_in_fp32() -> None:
    """ONNX's reference computes the mean of the squares in the type of the input."""
    x = np.array([[300.0, -300.0, 299.0, 0.0]], np.float16)
    exact = x.astype(np.float64) - x.astype(np.float64).mean()
    exact = exact / np.sqrt((exact**2).mean() + 1e-5) * [1, 2, 3, 4] + [0.5, 0, -0.5, 0]
    model = graph(False)
    del model.graph.node[1:]
    model.graph.output[0].name = "n"
    made = widened(model, "norm")
    found = ReferenceEvaluator(made).run(None, {"x": x})[0]
    assert np.abs(found - exact).max() < 2e-3


def test_only_what_is_named_is_changed() -> None:
    made = widened(graph(False), "softmax")
    assert [node.op_type for node in made.graph.node] == [
        "LayerNormalization", "Add", "Cast", "Softmax", "Cast",
    ]  # fmt: skip
    assert {tensor.data_type for tensor in made.graph.initializer} == {TensorProto.FLOAT16}


def test_an_fp32_graph_stays_as_it_is() -> None:
    model = ir.from_proto(graph(False))
    for value in [*model.graph.inputs, *(node.outputs[0] for node in model.graph)]:
        value.dtype = ir.DataType.FLOAT
    before = ir.to_proto(model).SerializeToString()
    assert keep_fp32(model, ["norm", "softmax"], {}) == 0
    assert ir.to_proto(model).SerializeToString() == before


# The line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["float", "int8"])
def test_a_model_keeps_its_norms_and_softmaxes_in_fp32(
    tiny_model: Path, text_file: Path, tmp_path: Path, attention: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    form = {"preset": "w8a8", "compute": "fp16", "attention": attention}
    recipe = make_recipe(text_file, format=form, export={"keep_fp32": ["norm", "softmax"]})
    line = start_line(tmp_path / "line", tiny_model, text_file, recipe).train().fold()
    (tmp_path / "export").mkdir()
    export(line.folded, recipe.export, "rtx-ada", provenance(recipe), tmp_path / "export")
    file = tmp_path / "export" / "model.onnx"
    model = onnx.shape_inference.infer_shapes(onnx.load(str(file)))
    values = [*model.graph.value_info, *model.graph.output]
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    counts = Counter(
        (node.op_type, kinds[node.output[0]] == TensorProto.FLOAT)
        for node in model.graph.node
        if node.op_type in ("LayerNormalization", "Softmax", "MatMul")
    )
    assert counts["LayerNormalization", True] == 5 and counts["Softmax", True] == 2
    assert not counts["LayerNormalization", False] and not counts["MatMul", True]
    tensors = load_file(line.folded.path / "folded.safetensors")
    stored = {tensor.name: numeric.to_array(tensor) for tensor in model.graph.initializer}
    for name in ("transformer.h.0.ln_1.weight", "transformer.ln_f.bias"):
        assert np.array_equal(stored[name], tensors[name]) and stored[name].dtype == np.float32
    assert read_json(tmp_path / "export" / "certificate.json")["complete"]
    assert read_json(tmp_path / "export" / "lint.json")["findings"] == []

    (tmp_path / "engine").mkdir()
    build_file(file, Build(target="rtx-ada", profiles=[{"sequence": [1, 8, 32]}]), tmp_path / "engine")
    assert read_json(tmp_path / "engine" / "build.json")["status"] == "built"
    ids = ids_of(8, 9)
    found = plain_session(file).run(["logits"], feed(ids))[0].astype(np.float32)
    exact = line.logits("fold", token_ids(8, 9)).numpy()
    assert np.abs(found - exact).mean() <= 5e-3 * np.ptp(exact)
