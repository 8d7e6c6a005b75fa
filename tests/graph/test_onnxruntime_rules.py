"""Rules for ONNX Runtime, held against the operators of the graph that it executes.

The graphs are those of lint_cases.py. ONNX Runtime takes int8 inputs as they are on Arm processors, where two
of the rules do not hold, so the tests of matmuls need x86-64.
"""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import linear, save, tensor_value
from lint_cases import CASES, SOUND, T, biased, float_weight, readers_of_one_pair, table
from onnx import helper

from qcompress.graph.lint.lint import lint
from qcompress.schema.targets import TARGETS

RULES = ("table-decoded", "pair-shared", "pair-no-zero-point", "gemm-float-bias", "pair-one-sided")

INTEGER = {"MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "QLinearConv", "MatMulNBits"}
"""Operators that read codes."""

x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="int8 inputs are not converted"
)

BROKEN = {f"{case.rule}: {case.name}": case.make for case in CASES if case.rule in RULES[1:]}

NEAR = {
    "one matmul": readers_of_one_pair("MatMul"),
    "uint8 pair of three": readers_of_one_pair("MatMul", "MatMul", "MatMul", kind=T.UINT8),
    "one convolution": readers_of_one_pair("Conv", behind=True),
    "joined": SOUND["pair-shared"][0],
    "zero point": linear,
    "rank 3": biased(rank=3),
    "rank 3, QuantizeLinear": biased(rank=3, behind="Q"),
    "QuantizeLinear behind the bias": biased(behind="Q"),
    "QuantizeLinear behind Gemm": biased("Gemm", behind="Q"),
    "one bias for all columns": biased(bias=(1,)),
    "float weight of Gemm between pairs": float_weight("Gemm", behind=True),
    "float input": biased(rank=3, activations=False),
}
"""Graphs that ONNX Runtime computes on codes."""


def executed(model: onnx.ModelProto, folder: Path) -> list[onnx.NodeProto]:
    """Nodes of the graph that ONNX Runtime executes by default."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "executed.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(onnx.load(folder / "executed.onnx").graph.node)


def found(model: onnx.ModelProto, folder: Path) -> list[str]:
    return [item.rule for item in lint(save(model, folder / "model.onnx"), TARGETS["cpu"])]


@x86
@pytest.mark.parametrize("name", BROKEN)
def test_a_graph_that_breaks_a_rule_has_no_integer_operator(name: str, tmp_path: Path) -> None:
    assert found(BROKEN[name](), tmp_path) == [name.partition(":")[0]]
    operators = {node.op_type for node in executed(BROKEN[name](), tmp_path)}
    assert not operators & INTEGER and operators & {"MatMul", "Gemm", "FusedGemm", "Conv"}


@x86
@pytest.mark.parametrize("name", NEAR)
def test_a_graph_that_comes_close_is_computed_on_codes(name: str, tmp_path: Path) -> None:
    model = NEAR[name]()
    assert found(model, tmp_path) == []
    operators = {node.op_type for node in executed(model, tmp_path)}
    assert operators & INTEGER and not operators & {"MatMul", "Gemm", "FusedGemm", "Conv"}


@x86
def test_gemm_without_a_bias_takes_int8_as_it_is(tmp_path: Path) -> None:
    """Neither a shared pair nor a missing zero point of QuantizeLinear keeps it from the integers."""
    model = readers_of_one_pair("MatMul", "MatMul")()
    assert found(model, tmp_path) == ["pair-shared"]
    for node in model.graph.node:
        node.op_type = "Gemm" if node.op_type == "MatMul" else node.op_type
    for value in (*model.graph.input, *model.graph.output):
        del value.type.tensor_type.shape.dim[1]
    assert found(model, tmp_path) == []
    assert [node.op_type for node in executed(model, tmp_path)] == ["QuantizeLinear", "QGemm", "QGemm"]
    quantize = model.graph.node[0]
    del quantize.input[2]
    quantize.attribute.append(helper.make_attribute("output_dtype", T.INT8))
    assert found(model, tmp_path) == []
    assert [node.op_type for node in executed(model, tmp_path)] == ["QuantizeLinear", "QGemm", "QGemm"]
    del model.graph.node[1].input[2]
    assert found(model, tmp_path) == ["pair-no-zero-point"] * 2
    assert not {node.op_type for node in executed(model, tmp_path)} & INTEGER


@x86
def test_convolutions_without_quantize_linear_behind_them_may_share_a_pair(tmp_path: Path) -> None:
    """They are float with pairs of their own as well."""
    model = readers_of_one_pair("Conv", "Conv")()
    assert found(model, tmp_path) == []
    assert not {node.op_type for node in executed(model, tmp_path)} & INTEGER


@x86
def test_a_product_that_is_float_anyway_breaks_no_rule_of_fusion(tmp_path: Path) -> None:
    """Clip lies between QuantizeLinear and DequantizeLinear: rank 3 would not help."""
    model = biased()()
    assert found(model, tmp_path) == ["gemm-float-bias"]
    place = next(index for index, node in enumerate(model.graph.node) if node.op_type == "DequantizeLinear")
    model.graph.node[place].input[0] = "clipped"
    model.graph.node.insert(place, helper.make_node("Clip", ["x.q", "low", "high"], ["clipped"], name="clip"))
    bounds = {"low": np.int8(-8), "high": np.int8(7)}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array(value), name) for name, value in bounds.items()
    )
    assert found(model, tmp_path) == []
    assert not {node.op_type for node in executed(model, tmp_path)} & INTEGER


@x86
def test_equal_pairs_of_one_tensor_are_one_pair(tmp_path: Path) -> None:
    """ONNX Runtime merges them, also if the scale is stored twice; it does not merge two zero points."""
    model = readers_of_one_pair("MatMul", "MatMul")()
    scales = ["x.input.scale", "x.input.zero"]
    second = [
        helper.make_node("QuantizeLinear", ["x", *scales], ["q2"], name="q2"),
        helper.make_node("DequantizeLinear", ["q2", *scales], ["dq2"]),
    ]
    product = next(node for node in model.graph.node if node.name == "y1")
    product.input[0] = "dq2"
    nodes = [*second, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert found(model, tmp_path) == ["pair-shared"]
    assert not {node.op_type for node in executed(model, tmp_path)} & INTEGER
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "x.input.scale")
    other = model.graph.initializer.add()
    other.CopyFrom(scale)
    other.name = "other.scale"
    for node in model.graph.node[:2]:
        node.input[1] = "other.scale"
    assert found(model, tmp_path) == ["pair-shared"]
    assert not {node.op_type for node in executed(model, tmp_path)} & INTEGER
    other.CopyFrom(onnx.numpy_helper.from_array(np.float32(0.0500001), "other.scale"))
    assert found(model, tmp_path) == []
    assert [node.op_type for node in executed(model, tmp_path)].count("MatMulIntegerToFloat") == 2
    other.CopyFrom(scale)
    other.name = "other.scale"
    zero = model.graph.initializer.add()
    zero.CopyFrom(next(tensor for tensor in model.graph.initializer if tensor.name == "x.input.zero"))
    zero.name = "other.zero"
    for node in model.graph.node[:2]:
        node.input[2] = "other.zero"
    assert found(model, tmp_path) == []
    assert [node.op_type for node in executed(model, tmp_path)].count("MatMulIntegerToFloat") == 2


def test_onnx_runtime_decodes_a_table_before_gather_and_rows_behind_it(tmp_path: Path) -> None:
    first, second = executed(table("decoded")(), tmp_path)
    assert (first.op_type, second.op_type) == ("DequantizeLinear", "Gather")
    assert first.input[0] == "table.codes" and second.input[0] == first.output[0]
    nodes = {node.output[0]: node for node in executed(table("rows")(), tmp_path)}
    assert nodes["rows.codes"].op_type == "Gather" and nodes["rows.codes"].input[0] == "table.codes"
    assert nodes["y"].op_type == "DequantizeLinear" and nodes["y"].input[0] == "rows.codes"


def test_rows_of_codes_are_sound_for_onnx_runtime_and_refused_for_tensorrt(tmp_path: Path) -> None:
    file = save(table("rows")(), tmp_path / "model.onnx")
    assert lint(file, TARGETS["cpu"]) == []
    for target in ("rtx-ada", "a100", "orin-jp7"):
        assert [item.rule for item in lint(file, TARGETS[target])] == [
            "scale-not-constant", "constant-reader"
        ]  # fmt: skip


def test_a_scale_from_outside_is_no_row_of_a_table(tmp_path: Path) -> None:
    model = table("rows")()
    gather = next(node for node in model.graph.node if node.name == "rows.scale")
    model.graph.input.append(tensor_value("scales", T.FLOAT, 128))
    gather.input[0] = "scales"
    assert found(model, tmp_path) == ["scale-not-constant"]


def test_a_moved_table_is_sound_for_onnx_runtime_alone(tmp_path: Path) -> None:
    """A tied head reads the table's codes behind a Transpose, which ONNX Runtime folds."""
    model = next(case.make for case in CASES if (case.rule, case.name) == ("constant-reader", "Transpose"))()
    assert found(model, tmp_path) == []
    assert "Transpose" not in {node.op_type for node in executed(model, tmp_path)}


@pytest.mark.parametrize("name", sorted({name for name, target in TARGETS.items() if target.backend}))
def test_no_rule_of_onnx_runtime_is_asked_of_an_engine(name: str, tmp_path: Path) -> None:
    for index, case in enumerate(case for case in CASES if case.rule in RULES):
        file = save(case.make(), tmp_path / f"{index}.onnx")
        assert not {item.rule for item in lint(file, TARGETS[name])} & set(RULES)
