from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from graphs import Graph, Shape, codes, decoder, dequantize_weight, linear, save, tensor_value
from onnx import TensorProto

from qcompress.engine.plan_bytes import check_plan, limit_bytes, predicted_bytes
from qcompress.graph.view import read

MIB = 2**20


def test_every_tensor_counts_as_it_is_stored(tmp_path: Path) -> None:
    # codes, scale fp32, zero points; scale and zero point of the activation, which two nodes read.
    expected = 128 * 64 + 64 * 4 + 64 + (4 + 1) * 2
    assert predicted_bytes(save(linear(), tmp_path / "model.onnx")) == expected


def test_int4_counts_half_a_byte(tmp_path: Path) -> None:
    model = linear(4, 64, activations=False, compute="fp16", shape=(128, 63))
    assert predicted_bytes(save(model, tmp_path / "model.onnx")) == 128 * 63 // 2 + 2 * 63 * 2


def test_an_odd_count_of_int4_fills_its_last_byte(tmp_path: Path) -> None:
    model = linear(4, None, activations=False, shape=(5, 3))
    assert predicted_bytes(save(model, tmp_path / "model.onnx")) == 8 + 3 * 4 + 2


def table_used(dequantizers: int, readers: int) -> Graph:
    """A table of 64 x 32 bytes with so many DQ nodes, each with so many Gather nodes behind it."""
    graph = Graph()
    graph.tensor("table", codes("table", (64, 32)), TensorProto.INT8)
    graph.tensor("scale", np.full(64, 0.01))
    for index in range(dequantizers):
        graph.node("DequantizeLinear", ["table", "scale"], f"dq{index}", axis=0)
        for reader in range(readers):
            graph.node("Gather", [f"dq{index}", "ids"], f"rows{index}.{reader}")
    return graph


@pytest.mark.parametrize(("dequantizers", "readers", "copies"), [(1, 1, 1), (2, 1, 2), (1, 2, 2), (2, 3, 6)])
def test_a_tensor_counts_once_for_each_node_that_uses_it(
    tmp_path: Path, dequantizers: int, readers: int, copies: int
) -> None:
    graph = table_used(dequantizers, readers)
    outputs = [tensor_value(node.output[0], 1, "n", 32) for node in graph.nodes if node.op_type == "Gather"]
    model = graph.model([tensor_value("ids", TensorProto.INT64, "n")], outputs)
    assert predicted_bytes(save(model, tmp_path / "model.onnx")) == copies * 64 * 32 + dequantizers * 64 * 4


@pytest.mark.parametrize(("readers", "copies"), [(1, 1), (2, 2)])
def test_a_float_weight_that_is_rounded_in_the_graph_counts_as_its_codes(
    tmp_path: Path, readers: int, copies: int
) -> None:
    """Measured with TensorRT-RTX 1.7 on 2048 x 2048 floats (16 MB): a plan of 4.4 MB for Gather or MatMul."""
    graph = Graph()
    graph.tensor("table", np.ones((64, 32)))
    inputs = [graph.tensor("scale", np.full(64, 0.01)), graph.tensor("zero", np.zeros(64), TensorProto.INT8)]
    rounded = graph.node("QuantizeLinear", ["table", *inputs], "q", axis=0)
    graph.node("DequantizeLinear", [rounded, *inputs], "dq", axis=0)
    outputs = [graph.node("Gather", ["dq", "ids"], f"rows{index}") for index in range(readers)]
    ends = [tensor_value("ids", TensorProto.INT64, "n")], [tensor_value(name, 1, "n", 32) for name in outputs]
    file = save(graph.model(*ends), tmp_path / "model.onnx")
    assert predicted_bytes(file) == copies * 64 * 32 + 2 * (64 * 4 + 64)


def test_a_float_weight_that_is_also_read_as_it_is_counts_in_full(tmp_path: Path) -> None:
    graph = Graph()
    graph.tensor("table", np.ones((64, 32)))
    inputs = [graph.tensor("scale", np.float32(0.01)), graph.tensor("zero", np.int8(0), TensorProto.INT8)]
    graph.node("DequantizeLinear", [graph.node("QuantizeLinear", ["table", *inputs], "q"), *inputs], "dq")
    outputs = [graph.node("Gather", [name, "ids"], f"{name}.rows") for name in ("table", "dq")]
    ends = [tensor_value("ids", TensorProto.INT64, "n")], [tensor_value(name, 1, "n", 32) for name in outputs]
    assert predicted_bytes(save(graph.model(*ends), tmp_path / "model.onnx")) == 2 * (4 * 64 * 32 + 5)


def test_a_table_shared_by_embedding_and_head_counts_twice(tmp_path: Path) -> None:
    tied = predicted_bytes(save(decoder(), tmp_path / "model.onnx"))
    stored = sum(len(tensor.raw_data) for tensor in decoder().graph.initializer)
    table = Shape().vocabulary * Shape().width
    assert stored + table <= tied <= stored + table + 200  # the rest: scales that Q and DQ share


def test_the_place_of_the_data_does_not_matter(tmp_path: Path) -> None:
    inside = save(decoder(), tmp_path / "inside.onnx")
    outside = save(decoder(), tmp_path / "outside.onnx", external=True)
    assert outside.stat().st_size < inside.stat().st_size / 2
    assert predicted_bytes(outside) == predicted_bytes(inside)


def test_constants_made_by_nodes_count_as_well(tmp_path: Path) -> None:
    graph = Graph()
    weight = dequantize_weight(graph, "weight", (128, 64))
    codes_tensor = graph.tensors.pop(0)
    constant = graph.nodes.pop()
    graph.node("Constant", [], "weight.codes", value=codes_tensor)
    graph.nodes.append(constant)
    graph.node("MatMul", ["x", weight], "y")
    model = graph.model([tensor_value("x", 1, "batch", 128)], [tensor_value("y", 1, "batch", 64)])
    assert predicted_bytes(save(model, tmp_path / "model.onnx")) == 128 * 64 + 64 * 4 + 64


def test_the_limit_is_a_tenth_more_and_twelve_mib() -> None:
    assert limit_bytes(0) == 12 * MIB
    assert limit_bytes(1000 * MIB) == 1112 * MIB


@pytest.mark.parametrize(
    ("more", "said"), [(0, ""), (1, "13,736,346 bytes .* predict 1,048,576 .*no float copy")]
)
def test_a_plan_beyond_its_limit_is_told_of(tmp_path: Path, more: int, said: str) -> None:
    plan = tmp_path / "model.plan"
    with plan.open("wb") as file:
        file.truncate(limit_bytes(MIB) + more)  # sparse
    size, warning = check_plan(plan, MIB, read(save(linear(), tmp_path / "model.onnx")))
    assert size == limit_bytes(MIB) + more
    assert re.search(said, warning) and bool(warning) == bool(more)


def test_a_prediction_of_any_size_has_a_limit() -> None:
    assert limit_bytes(2**2000) > 2**2000
