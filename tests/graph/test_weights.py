"""Weights of a graph as the encodings find them; an encoding that the package does not know is one entry."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Graph, codes, dequantize_weight, linear, quantize_activation, save, tensor_value
from onnx import NodeProto, TensorProto

import qcompress.graph.weights
from qcompress.encodings import ENCODINGS
from qcompress.encodings.base import Stored
from qcompress.engine.plan_bytes import predicted_bytes
from qcompress.engine.plan_content import float_copies
from qcompress.graph.inspect import contents
from qcompress.graph.lint.lint import lint
from qcompress.graph.view import View, read
from qcompress.graph.weights import find_weights, stored_weights
from qcompress.schema.targets import TARGETS

SHAPE = (64, 32)


class CastWeight(Stored):
    """Int4 codes behind Cast and Mul."""

    block = 16
    granularity = "whole"
    shape = SHAPE

    def parts(self) -> Iterator[str]:
        yield from (self.name, "w.scale", "table")

    def readers(self) -> Iterator[NodeProto]:
        return iter(self.view.readers["w"])

    def information_bits(self) -> float:
        return 3.5

    def decoded(self, most: int) -> Iterator[np.ndarray]:
        yield self.view.values(self.name).astype(np.float32) * self.view.values("w.scale")


class CastEncoding:
    """The part of an encoding that a graph's readers call."""

    name = "cast"

    def find(self, view: View) -> Iterator[Stored]:
        for node in view.named("Cast"):
            yield CastWeight(view, node.input[0], node.input[0], node)


def with_cast(folder: Path) -> Path:
    """Int4 codes that Cast and Mul decode, and an int8 table beside them behind DequantizeLinear."""
    graph = Graph()
    graph.tensor("w.codes", codes("w", SHAPE, 4), TensorProto.INT4)
    graph.node("Cast", ["w.codes"], "cast", to=TensorProto.FLOAT)
    graph.node("Mul", ["cast", graph.tensor("w.scale", np.float32(0.05))], "w")
    graph.node("MatMul", [quantize_activation(graph, "x"), "w"], "y")
    graph.tensor("table", codes("table", (8, 4)), TensorProto.INT8)
    graph.node("DequantizeLinear", ["table", "w.scale"], "table.dq")
    ends = (
        [tensor_value("x", TensorProto.FLOAT, "batch", 64)],
        [
            tensor_value("y", TensorProto.FLOAT, "batch", 32),
            tensor_value("table.dq", TensorProto.FLOAT, 8, 4),
        ],
    )
    return save(graph.model(*ends), folder / "model.onnx")


@pytest.mark.parametrize("known", [False, True])
def test_a_new_encoding_is_listed_checked_and_searched_for_without_another_edit(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if known:
        monkeypatch.setattr(qcompress.graph.weights, "ENCODINGS", (*ENCODINGS, CastEncoding()))
    file = with_cast(tmp_path)
    listed = {weight["name"]: weight for weight in contents(file)["weights"]}
    assert ("w" in listed, "table" in listed) == (known, not known)  # the table is a part of the weight
    rules = {finding.rule for finding in lint(file, TARGETS["t4"]) if finding.layer == "w.codes"}
    assert ("int4-target" in rules) is known
    assert [weight.name for weight in find_weights(read(file))] == ["table", *["w.codes"] * known]
    values = codes("w", SHAPE, 4).astype(np.float32) * np.float32(0.05)
    (tmp_path / "model.plan").write_bytes(b"abc" + values.tobytes())
    assert ("w.codes" in float_copies(tmp_path / "model.plan", read(file))) is known
    if known:
        weight = listed["w"]
        assert (weight["stored"], weight["stored_bits"], weight["information_bits"]) == ("int4", 4, 3.5)
        assert (weight["granularity"], weight["readers"], weight["input"]) == ("whole", ("MatMul",), "float")
        assert weight["bytes"] == 64 * 32 // 2 + 4 + 8 * 4


def codebook(folder: Path, *, rows: bool = True) -> Path:
    """An int8 table of vectors [16, 4] that a matmul looks up, and rows of it an embedding."""
    graph = Graph()
    graph.tensor("w.assignments", np.arange(8 * 32).reshape(8, 32) % 16, TensorProto.UINT8)
    graph.tensor("w.centroids", codes("table", (16, 4)), TensorProto.INT8)
    graph.tensor("w.scale", np.float32(0.5))
    graph.tensor("shape", np.int64([32, 32]), TensorProto.INT64)
    table = graph.node("DequantizeLinear", ["w.centroids", "w.scale"], "table")
    indices = graph.node("Cast", ["w.assignments"], "indices", to=TensorProto.INT32)
    vectors = graph.node("Gather", [table, indices], "vectors")
    turned = graph.node("Transpose", [vectors], "turned", perm=[0, 2, 1])
    graph.node("MatMul", ["x", graph.node("Reshape", [turned, "shape"], "w")], "y")
    inputs, outputs = [tensor_value("x", 1, "batch", 32)], [tensor_value("y", 1, "batch", 32)]
    if rows:
        picked = graph.node("Gather", [indices, "ids"], "picked")
        graph.node("Gather", [table, picked], "z")
        inputs.append(tensor_value("ids", TensorProto.INT64, "batch"))
        outputs.append(tensor_value("z", 1, "batch", 32, 4))
    return save(graph.model(inputs, outputs), folder / "model.onnx")


def test_a_codebook_is_one_weight_with_two_look_ups_and_its_table_is_none(tmp_path: Path) -> None:
    view = read(codebook(tmp_path))
    weights = stored_weights(view)
    assert [(weight.name, weight.source, weight.node.op_type) for weight in weights] == [
        ("w.assignments", "w.centroids", "DequantizeLinear")
    ] * 2
    assert [[node.op_type for node in weight.readers()] for weight in weights] == [["MatMul"], ["Gather"]]
    assert weights[0].shape == (32, 32) and set(weights[0].parts()) == {
        "w.assignments", "w.centroids", "w.scale"
    }  # fmt: skip
    table = codes("table", (16, 4)).astype(np.float32) * 0.5
    for weight in weights:
        (values,) = weight.decoded(2**20)
        np.testing.assert_array_equal(values, table[np.arange(8 * 32).reshape(8, 32) % 16])
    assert {weight.name for weight in find_weights(view)} == {"w.centroids", "w.assignments"}
    assert predicted_bytes(view) >= 8 * 32 * 4  # an engine's indices are int32
    (listed,) = contents(view.file)["weights"]
    assert (listed["name"], listed["readers"]) == ("w", ("MatMul", "Gather"))


def test_a_scale_that_is_computed_leaves_a_weight_undecoded(tmp_path: Path) -> None:
    """Float copies of it cannot be searched for."""
    model = linear(activations=False)
    (node,) = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    model.graph.node.insert(0, onnx.helper.make_node("Abs", ["weight.scale"], ["abs"]))
    node.input[1] = "abs"
    (weight,) = stored_weights(read(save(model, tmp_path / "model.onnx")))
    assert weight.name == "weight.codes" and list(weight.decoded(2**20)) == []
    node.input[1], node.input[2] = "weight.scale", "nothing"
    (weight,) = stored_weights(read(save(model, tmp_path / "other.onnx")))
    assert list(weight.decoded(2**20)) == []


@pytest.mark.parametrize("between", ["", "Clip", "Transpose"])
def test_a_float_weight_that_the_graph_quantizes_is_decoded_only_if_its_codes_are_known(
    between: str, tmp_path: Path
) -> None:
    graph = Graph()
    values = np.linspace(-1, 1, 64 * 32, dtype=np.float32).reshape(64, 32)
    source = graph.tensor("w", values)
    scale = [graph.tensor("s", np.float32(0.01)), graph.tensor("z", 0, TensorProto.INT8)]
    if between == "Transpose":
        source = graph.node("Transpose", [source], "turned")
    name = graph.node("QuantizeLinear", [source, *scale], "q")
    if between == "Clip":
        ends = [graph.tensor(end, np.int8(at), TensorProto.INT8) for end, at in (("low", -7), ("high", 7))]
        name = graph.node("Clip", [name, *ends], "clip")
    graph.node("MatMul", ["x", graph.node("DequantizeLinear", [name, *scale], "dq")], "y")
    ends = [tensor_value("x", 1, "batch", None)], [tensor_value("y", 1, "batch", None)]
    (weight,) = stored_weights(read(save(graph.model(*ends), tmp_path / "model.onnx")))
    decoded = list(weight.decoded(2**20))
    assert weight.name == "w" and len(decoded) == (0 if between else 2)
    if decoded:
        np.testing.assert_array_equal(decoded[0], values)
        np.testing.assert_allclose(decoded[1], np.rint(values / np.float32(0.01)) * 0.01, rtol=1e-6)


def test_a_portion_of_a_large_weight_is_whole_rows(tmp_path: Path) -> None:
    graph = Graph()
    graph.node("MatMul", ["x", dequantize_weight(graph, "w", (256, 64), 4, 32)], "y")
    ends = [tensor_value("x", 1, "batch", 256)], [tensor_value("y", 1, "batch", 64)]
    (weight,) = stored_weights(read(save(graph.model(*ends), tmp_path / "model.onnx")))
    (whole,), (part,) = weight.decoded(2**20), weight.decoded(100 * 64)
    assert whole.shape == (256, 64)
    np.testing.assert_array_equal(part, whole[:100])


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.INT8])
def test_indices_are_not_checked_as_integer_weights(kind: int, tmp_path: Path) -> None:
    """Vectors of 4 are not blocks, and any operator may read decoded floats."""
    graph = Graph()
    graph.tensor("w.assignments", np.arange(8 * 32).reshape(8, 32) % 16, kind)
    graph.tensor("w.centroids", np.ones((16, 4)))
    indices = graph.node("Cast", ["w.assignments"], "indices", to=TensorProto.INT32)
    graph.node("Relu", [graph.node("Gather", ["w.centroids", indices], "vectors")], "y")
    file = save(graph.model([], [tensor_value("y", 1, 8, 32, 4)]), tmp_path / "model.onnx")
    assert [weight.code_type for weight in find_weights(read(file))] == ["UINT8" if kind == 2 else "INT8"]
    rules = [finding.rule for finding in lint(file, TARGETS["rtx-ada"])]
    assert rules == ([] if kind == TensorProto.UINT8 else ["constant-reader"])


def test_a_table_of_empty_vectors_is_not_a_codebook(tmp_path: Path) -> None:
    graph = Graph()
    graph.tensor("w.assignments", np.zeros((8, 32)), TensorProto.UINT8)
    graph.tensor("w.centroids", np.zeros((16, 0)))
    graph.node("Cast", ["w.assignments"], "indices", to=TensorProto.INT32)
    graph.node("Gather", ["w.centroids", "indices"], "y")
    model = graph.model([], [tensor_value("y", 1, 8, 32, 0)])
    assert find_weights(read(save(model, tmp_path / "model.onnx"))) == []


@pytest.mark.parametrize("first", ["floats", "codes"])
def test_floats_that_the_graph_also_quantizes_are_listed_by_their_first_reader(
    first: str, tmp_path: Path
) -> None:
    """A table in float that a tied head reads through a Q/DQ pair."""
    graph = Graph()
    parameters = [graph.tensor("s", np.float32(0.01)), graph.tensor("z", 0, TensorProto.INT8)]
    graph.tensor("table", np.ones((64, 32)))
    coded = Graph()
    codes_name = coded.node("QuantizeLinear", ["table", *parameters], "q")
    coded.node("MatMul", ["x", coded.node("DequantizeLinear", [codes_name, *parameters], "dq")], "y")
    direct = Graph()
    direct.node("Gather", ["table", "ids"], "rows")
    graph.nodes = [*direct.nodes, *coded.nodes] if first == "floats" else [*coded.nodes, *direct.nodes]
    inputs = [tensor_value("x", 1, "batch", 64), tensor_value("ids", TensorProto.INT64, "batch")]
    outputs = [tensor_value("y", 1, "batch", 32), tensor_value("rows", 1, "batch", 32)]
    (listed,) = contents(save(graph.model(inputs, outputs), tmp_path / "model.onnx"))["weights"]
    shown = (listed["readers"], listed["information_bits"], listed["granularity"], listed["bytes"])
    if first == "floats":
        assert shown == (("Gather", "DequantizeLinear", "MatMul"), 32, "", 64 * 32 * 4 + 5)
    else:
        assert shown == (("MatMul",), 8, "tensor", 64 * 32 * 4 + 5)


def test_a_view_is_freed_with_its_last_weight(tmp_path: Path) -> None:
    """It holds the whole file: a weight that the view refers to would keep it until the next collection."""
    gc.disable()
    try:
        view = read(codebook(tmp_path))
        weights, alive = [*find_weights(view), *stored_weights(view)], weakref.ref(view)
        assert len(weights) == 5
        del view, weights
        assert alive() is None
    finally:
        gc.enable()


def test_a_scale_of_two_weights_is_counted_for_the_first(tmp_path: Path) -> None:
    graph = Graph()
    scale = graph.tensor("s", np.ones(32))
    for name in ("a", "b"):
        graph.tensor(name, codes(name, SHAPE), TensorProto.INT8)
        graph.node("MatMul", ["x", graph.node("DequantizeLinear", [name, scale], f"{name}.dq")], f"{name}.y")
    outputs = [tensor_value(f"{name}.y", 1, "batch", 32) for name in ("a", "b")]
    file = save(graph.model([tensor_value("x", 1, "batch", 64)], outputs), tmp_path / "model.onnx")
    content = contents(file)
    assert [weight["bytes"] for weight in content["weights"]] == [64 * 32 + 32 * 4, 64 * 32]
    assert content["totals"]["weights"] == 2 * 64 * 32 + 32 * 4
