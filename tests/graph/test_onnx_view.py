from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Graph, decoder, linear, save, tensor_value
from onnx import TensorProto, helper

from qcompress.errors import ExportError
from qcompress.graph.lint.lint import lint
from qcompress.graph.lint.rules import RULES
from qcompress.graph.view import read
from qcompress.schema.targets import TARGETS

ADA = TARGETS["rtx-ada"]


def move_data(file: Path, location: str) -> None:
    """Make every tensor's data lie somewhere else."""
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    file.write_bytes(model.SerializeToString())


def external(folder: Path) -> Path:
    return save(decoder(), folder / "model.onnx", external=True)


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname", "sub/../../secret", ""])
def test_data_outside_the_folder_are_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(4_000_000))
    folder = tmp_path / "model"
    folder.mkdir()
    file = external(folder)
    move_data(file, place)
    with pytest.raises(ExportError, match="lie outside the model's folder"):
        read(file)


def test_data_behind_a_link_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    file = external(folder)
    (folder / "model.onnx.data").rename(tmp_path / "elsewhere")
    (folder / "model.onnx.data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match="lie outside the model's folder"):
        read(file)


def test_missing_data_are_told_with_the_file_to_copy(tmp_path: Path) -> None:
    file = external(tmp_path)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ExportError, match=r"model.onnx.data, with the data of .* is missing(.|\n)*copy"):
        read(file)


def test_data_that_end_too_early_are_told_with_the_tensor(tmp_path: Path) -> None:
    file = external(tmp_path)
    os.truncate(tmp_path / "model.onnx.data", 100)
    with pytest.raises(ExportError, match=r"tensor 'wte.zero' cannot be read"):
        lint(file, ADA)


def with_codes_beside(folder: Path, size: int) -> Path:
    """A graph whose codes of 65,536 bytes lie in a file of their own, of another size."""
    model = linear(shape=(256, 256))
    (codes,) = [tensor for tensor in model.graph.initializer if tensor.name == "weight.codes"]
    codes.ClearField("raw_data")
    codes.data_location = TensorProto.EXTERNAL
    codes.external_data.add(key="location", value="codes")
    (folder / "codes").write_bytes(bytes(size))
    return save(model, folder / "model.onnx")


def test_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, seen = with_codes_beside(tmp_path, 65_536), []
    original = onnx.numpy_helper.to_array
    monkeypatch.setattr(
        onnx.numpy_helper,
        "to_array",
        lambda tensor, *rest: [seen.append(tensor.name), original(tensor, *rest)][1],
    )
    assert lint(file, ADA) == []
    assert "weight.scale" in seen and "weight.codes" not in seen


def test_data_that_are_cut_off_are_found_without_reading_them(tmp_path: Path) -> None:
    file = with_codes_beside(tmp_path, 5)
    (found,) = lint(file, ADA)
    assert (found.rule, found.layer, found.severity) == ("tensor-data", "weight.codes", "error")
    assert "of a file of 5" in found.found
    with pytest.raises(ExportError, match="'weight.codes' cannot be read"):
        read(file).values("weight.codes")


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02 no protobuf", b"PK\x03\x04"])
def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ExportError, match="is not a readable ONNX file|is empty") as error:
        read(tmp_path / "model.onnx")
    assert error.value.exit_code == 5


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not exist"):
        read(tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="is a folder"):
        read(tmp_path)


def test_a_name_without_onnx_at_its_end_is_read_all_the_same(tmp_path: Path) -> None:
    """onnx.load would take `.json` for another format."""
    file = tmp_path / "model.json"
    file.write_bytes(linear().SerializeToString())
    assert read(file).opset == 21


def test_nodes_in_subgraphs_are_looked_at(tmp_path: Path) -> None:
    inner = Graph()
    inner.node("QuantizeLinear", ["x", inner.tensor("scale", np.float32(-1)), "zero"], "q")
    inner.node("DequantizeLinear", ["q", "scale", "zero"], "then")
    output = [tensor_value("then", TensorProto.FLOAT, "batch", 8)]
    branch = helper.make_graph(inner.nodes, "then", [], output, inner.tensors)
    outer = Graph()
    outer.tensor("zero", np.int8(0), TensorProto.INT8)
    outer.node("If", ["condition"], "y", then_branch=branch, else_branch=branch)
    inputs = [tensor_value("x", TensorProto.FLOAT, "batch", 8), tensor_value("condition", TensorProto.BOOL)]
    model = outer.model(inputs, [tensor_value("y", TensorProto.FLOAT, "batch", 8)])
    findings = lint(save(model, tmp_path / "model.onnx"), ADA)
    assert [finding.rule for finding in findings] == ["scale-not-positive"] * 2  # one for each branch


def test_functions_are_looked_into(tmp_path: Path) -> None:
    body = [
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["b"]),
    ]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ours", 1)]
    function = helper.make_function("ours", "fake_quantize", ["a", "s", "z"], ["b"], body, opsets[:1])
    graph = Graph()
    graph.tensor("scale", np.float32(0))
    graph.tensor("zero", np.int8(0), TensorProto.INT8)
    graph.nodes.append(helper.make_node("fake_quantize", ["x", "scale", "zero"], ["y"], domain="ours"))
    ends = [tensor_value("x", TensorProto.FLOAT, 8)], [tensor_value("y", TensorProto.FLOAT, 8)]
    model = graph.model(*ends)
    model.opset_import.append(opsets[1])
    model.functions.append(function)
    onnx.checker.check_model(model)
    findings = lint(save(model, tmp_path / "model.onnx"), ADA)
    assert [finding.rule for finding in findings] == ["scale-not-positive"]


def test_nodes_of_other_domains_are_not_taken_for_onnx(tmp_path: Path) -> None:
    model = linear()
    model.graph.node[0].domain = "ours"
    model.opset_import.append(helper.make_opsetid("ours", 1))
    nodes = list(read(save(model, tmp_path / "model.onnx")).named("QuantizeLinear"))
    assert nodes == []


def test_q_dq_of_onnxruntime_are_taken_for_onnx_and_nothing_else_of_its(tmp_path: Path) -> None:
    """What TensorRT does is measured in test_interchange.py."""
    model = linear()
    for node in model.graph.node:
        node.domain = "com.microsoft"
    view = read(save(model, tmp_path / "model.onnx"))
    found = [node.op_type for node in view.named("QuantizeLinear", "DequantizeLinear", "MatMul")]
    assert found == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear"]


@pytest.mark.parametrize("op", ["QuantizeLinear", "DequantizeLinear", "MatMul", "Cast", "Constant", "Where"])
@pytest.mark.parametrize("inputs", [0, 1, 3])
def test_malformed_nodes_are_survived(tmp_path: Path, op: str, inputs: int) -> None:
    graph = Graph()
    graph.nodes.append(helper.make_node(op, ["nowhere"] * inputs, [], axis=99, block_size=-1))
    graph.nodes.append(helper.make_node(op, [], ["a"]))
    graph.nodes.append(helper.make_node("Reshape", ["b"], ["c"]))
    graph.nodes.append(helper.make_node("Reshape", ["c"], ["b"]))  # a circle
    graph.nodes.append(helper.make_node("MatMul", ["b", "c"], ["y"]))
    model = graph.model([], [])
    file = tmp_path / "model.onnx"
    file.write_bytes(model.SerializeToString())
    view = read(file)
    assert view.root("b") in ("b", "c")
    for rule in RULES:
        list(rule.check(view, ADA))


def test_types_follow_the_graph(tmp_path: Path) -> None:
    view = read(save(linear(4, 64, compute="fp16"), tmp_path / "model.onnx"))
    kinds = {name: view.types[name] for name in ("x", "x.q", "x.q.dq", "weight.codes", "weight.dq", "y")}
    half, int8, int4 = TensorProto.FLOAT16, TensorProto.INT8, TensorProto.INT4
    assert list(kinds.values()) == [half, int8, half, int4, half, half]


def test_types_agree_with_onnx_shape_inference(tmp_path: Path) -> None:
    """The oracle is ONNX's own inference, on a graph with casts, lookups and integers in it."""
    inferred = onnx.shape_inference.infer_shapes(decoder(), strict_mode=True).graph.value_info
    view = read(save(decoder(), tmp_path / "model.onnx"))
    assert len(inferred) > 50
    for value in inferred:
        assert view.types[value.name] == value.type.tensor_type.elem_type, value.name
