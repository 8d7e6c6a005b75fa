"""Forms for ONNX Runtime: the same bits as before without its optimizations, and the kernels with them.

The graphs are made node by node. Kernels are those of the optimized graph that a session writes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from form_cases import assert_same_bits, kernels, pair, rules, saved
from graphs import Graph, codes, dequantize_weight, tensor_value
from lines import plain_session
from onnx import TensorProto, helper, numpy_helper

from qcompress.encodings.int_qdq import IntegerQdq
from qcompress.encodings.walk import lookups_of
from qcompress.graph import onnxruntime_forms as forms
from qcompress.graph.view import read
from qcompress.models.architecture import Layer
from qcompress.models.plan import LayerPlan
from qcompress.schema.formats import WeightFormat

ROWS, WIDTH = 40, 64


# Tables -------------------------------------------------------------------------------------------


def table(bits: int, block: int, head: bool = False, compute: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """Gather of a decoded table; with `head`, the table is that of the output's matmul too."""
    graph = Graph()
    kind = TensorProto.INT8 if bits == 8 else TensorProto.INT4
    graph.tensor("wte.weight.codes", codes("wte", (ROWS, WIDTH), bits), kind)
    shape = (ROWS, WIDTH // block) if block else (ROWS,)
    scale = np.random.default_rng(1).uniform(0.001, 0.01, shape)
    graph.tensor("wte.weight.scale", scale, compute)
    attributes = {"axis": 1, "block_size": block} if block else {"axis": 0}
    decoded = graph.node("DequantizeLinear", ["wte.weight.codes", "wte.weight.scale"], "dq", **attributes)
    rows = graph.node("Gather", [decoded, "ids"], "rows")
    if head:
        turned = graph.node("Transpose", [decoded], "turned", perm=[1, 0])
        graph.node("MatMul", [pair(graph, rows), turned], "y")
    else:
        graph.node("Mul", [rows, rows], "y")
    outputs = [tensor_value("y", compute, "batch", "tokens", ROWS if head else WIDTH)]
    return graph.model([tensor_value("ids", TensorProto.INT64, "batch", "tokens")], outputs)


IDS = {"ids": np.array([[0, 39, 7], [7, 0, 21]])}


@pytest.mark.parametrize(
    ("bits", "block", "compute", "kernel"),
    [
        (8, 0, TensorProto.FLOAT, "Cast"),
        (8, 0, TensorProto.FLOAT16, "DequantizeLinear"),
        (8, 16, TensorProto.FLOAT, "DequantizeLinear"),
        (4, 32, TensorProto.FLOAT, "GatherBlockQuantized"),
    ],
)
def test_rows_are_looked_up_as_codes_with_the_same_bits(
    tmp_path: Path, bits: int, block: int, compute: int, kernel: str
) -> None:
    before, after = saved(table(bits, block, compute=compute), tmp_path, forms.look_up_codes)
    if bits == 8:
        assert_same_bits(before, after, IDS)
    else:  # the plain session has no kernel for int4 in blocks of a table but its own
        old, new = (onnxruntime.InferenceSession(str(file)).run(None, IDS) for file in (before, after))
        assert old[0].tobytes() == new[0].tobytes()
    view = read(after)
    (lookup,) = lookups_of(view, "wte.weight.codes")
    assert lookup.scale == "wte.weight.scale" and lookup.block in (block, block or WIDTH)
    assert kernel in {node.op_type for node in view.nodes}
    (stored,) = [one for one in IntegerQdq().find(view) if one.name == "wte.weight.codes"]
    assert stored.shape == (ROWS, WIDTH) and stored.block == block and set(stored.parts()) == {
        "wte.weight.codes", "wte.weight.scale"
    }  # fmt: skip
    (values,) = stored.decoded(10**9)
    whole = np.concatenate([values[IDS["ids"]]])
    np.testing.assert_array_equal((whole * whole).astype(np.float16), _run(after).astype(np.float16))
    assert rules(after, "cpu") == set() and "constant-reader" in rules(after, "rtx-ada")


def _run(file: Path) -> np.ndarray:
    return onnxruntime.InferenceSession(str(file)).run(None, IDS)[0]


def test_int4_rows_without_blocks_stay_decoded(tmp_path: Path) -> None:
    model = table(4, 0)
    graph = ir.from_proto(model)
    assert forms.look_up_codes(graph) == [] and forms.look_up_codes(ir.from_proto(table(4, 8))) == []
    assert [node.op_type for node in graph.graph] == ["DequantizeLinear", "Gather", "Mul"]


def test_a_tied_table_is_looked_up_and_its_head_multiplies_codes(tmp_path: Path) -> None:
    before, after = saved(table(8, 0, head=True), tmp_path, forms.look_up_codes)
    assert_same_bits(before, after, IDS)
    assert kernels(before)["DequantizeLinear"] == 1  # of the whole table
    assert kernels(after)["DequantizeLinear"] == 0 and kernels(after)["MatMulIntegerToFloat"] == 1


def test_scales_of_other_rows_are_no_lookup_of_the_table(tmp_path: Path) -> None:
    _, after = saved(table(8, 0), tmp_path, forms.look_up_codes)
    model = onnx.load(after)
    (scales,) = [node for node in model.graph.node if node.name == "wte.weight.rows.scale/Gather"]
    model.graph.input.append(tensor_value("others", TensorProto.INT64, "batch", "tokens"))
    scales.input[1] = "others"
    onnx.save(model, after)
    (lookup,) = lookups_of(read(after), "wte.weight.codes")
    assert lookup.scale == ""


class Folded:
    """Tensors of folded.safetensors."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}

    def get_tensor(self, name: str) -> np.ndarray:
        values = self.tensors[name]
        return values.astype(np.int8) if name.endswith(".codes") else values


@pytest.mark.parametrize(("bits", "block"), [(8, 0), (4, 32)])
def test_the_certificate_follows_the_rows(tmp_path: Path, bits: int, block: int) -> None:
    before = table(bits, block)
    _, after = saved(before, tmp_path, forms.look_up_codes)
    form = WeightFormat(bits=bits, block=block or None)
    item = LayerPlan(Layer("wte", "embedding", WIDTH, ROWS), form, None)
    certified = IntegerQdq().certify(read(after), Folded(before), item)
    assert certified.reasons == [] and certified.codes_equal and certified.scales_equal

    def reasons(change: Callable[[onnx.ModelProto], None]) -> str:
        model = onnx.load(after)
        change(model)
        onnx.save(model, tmp_path / "changed.onnx")
        return "; ".join(IntegerQdq().certify(read(tmp_path / "changed.onnx"), Folded(before), item).reasons)

    def scale(model: onnx.ModelProto) -> None:
        (tensor,) = [one for one in model.graph.initializer if one.name == "wte.weight.scale"]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(2), tensor.name))

    def copy(model: onnx.ModelProto) -> None:
        rows = [node for node in model.graph.node if node.name == "wte.weight.rows/Gather"]
        read = rows[0].output[0] if rows else "wte.weight.codes"
        model.graph.node.append(helper.make_node("Identity", [read], ["copied"]))

    assert "scale" in reasons(scale) and "nothing else" in reasons(copy)
    if block:
        other = LayerPlan(item.layer, WeightFormat(bits=bits, block=64), None)
        found = IntegerQdq().certify(read(after), Folded(before), other).reasons
        assert any(f"has block {block}, expected 64" in reason for reason in found)


# Matmuls ------------------------------------------------------------------------------------------


def matmul(batch: bool = False, gelu: bool = False) -> onnx.ModelProto:
    """x [batch, in] or [batch, tokens, in], a quantized matmul, its bias and an activation."""
    graph = Graph()
    weight = dequantize_weight(graph, "fc.weight", (WIDTH, 32))
    y = graph.node("MatMul", [pair(graph, "x"), weight], "product")
    graph.tensor("fc.bias", np.random.default_rng(2).standard_normal(32))
    y = graph.node("Add", [y, "fc.bias"], "sum")
    graph.nodes.append(helper.make_node("Gelu" if gelu else "Tanh", [y], ["y"], name="y"))
    axes = ("batch", "tokens") if batch else ("batch",)
    model = graph.model(
        [tensor_value("x", TensorProto.FLOAT, *axes, WIDTH)],
        [tensor_value("y", TensorProto.FLOAT, *axes, 32)],
    )
    return onnx.shape_inference.infer_shapes(model)


X = {"x": np.random.default_rng(3).standard_normal((5, WIDTH)).astype(np.float32)}


def test_a_matmul_of_two_axes_becomes_an_integer_kernel(tmp_path: Path) -> None:
    before, after = saved(matmul(), tmp_path, forms.keep_three_axes)
    assert_same_bits(before, after, X)
    assert kernels(before)["MatMulIntegerToFloat"] == 0  # Gemm with the bias
    assert kernels(after)["MatMulIntegerToFloat"] == 1 and kernels(after)["Gemm"] == 0
    assert forms.keep_three_axes(ir.from_proto(matmul(batch=True))) == 0


def test_zero_points_go_and_the_bias_stays_out_of_gelu(tmp_path: Path) -> None:
    before, after = saved(matmul(batch=True, gelu=True), tmp_path, forms.lighten_products)
    assert_same_bits(before, after, {"x": X["x"][None]})
    assert kernels(before)["BiasGelu"] == 1
    assert kernels(after)["Gelu"] == 1 and kernels(after)["MatMulIntegerToFloat"] == 1
    view = read(after)
    assert "fc.weight.zero" not in view.constants and view.shape("fc.bias") == (1, 32)


def test_forgotten_shapes_keep_the_sum_out_of_the_norm(tmp_path: Path) -> None:
    graph = Graph()
    graph.node("Add", ["x", "skip"], "sum")
    for name in ("weight", "bias"):
        graph.tensor(f"norm.{name}", np.ones(WIDTH))
    graph.node("Relu", ["sum"], "again")
    graph.node("Add", ["again", "skip"], "second")
    graph.node("LayerNormalization", ["second", "norm.weight", "norm.bias"], "y", axis=-1)
    axes = "batch", "tokens", WIDTH
    inputs = [tensor_value(name, TensorProto.FLOAT, *axes) for name in ("x", "skip")]
    model = onnx.shape_inference.infer_shapes(
        graph.model(inputs, [tensor_value("y", TensorProto.FLOAT, *axes)])
    )
    graph = ir.from_proto(model)
    forms.forget_shapes(graph)
    assert all(value.shape is None for node in graph.graph for value in node.outputs if value.name != "y")
    assert graph.graph.outputs[0].shape is not None


def test_masked_scores_are_raised_and_no_visible_probability_changes(tmp_path: Path) -> None:
    graph = Graph()
    graph.node("Add", ["scores", "mask"], "masked")
    graph.node("Softmax", ["masked"], "probabilities", axis=-1)
    graph.node("MatMul", ["probabilities", "values"], "context")
    axes = {"scores": (2, 6, 6), "mask": (6, 6), "values": (2, 6, 4)}
    inputs = [tensor_value(name, TensorProto.FLOAT, *shape) for name, shape in axes.items()]
    outputs = [
        tensor_value(name, TensorProto.FLOAT, 2, 6, width)
        for name, width in (("probabilities", 6), ("context", 4))
    ]
    model = onnx.shape_inference.infer_shapes(graph.model(inputs, outputs))
    before, after = saved(model, tmp_path, forms.raise_masked_scores)
    assert "Max" in {node.op_type for node in read(after).nodes}
    random = np.random.default_rng(8)
    least = np.finfo(np.float32).min
    mask = np.triu(np.full((6, 6), least, np.float32), 1)
    mask[5] = least  # a row of padding
    fed = {
        "scores": 9 * random.standard_normal((2, 6, 6), np.float32), "mask": mask,
        "values": random.standard_normal((2, 6, 4), np.float32),
    }  # fmt: skip
    (old, context), (new, found) = (plain_session(file).run(None, fed) for file in (before, after))
    visible = np.broadcast_to(mask == 0, old.shape)
    assert old[visible].tobytes() == new[visible].tobytes() and old[:, 5].tobytes() == new[:, 5].tobytes()
    np.testing.assert_allclose(new, old, rtol=0, atol=1e-21)
    assert 1e-30 < new[0, 0, 1] < 1e-21  # products with it are normal numbers
    np.testing.assert_allclose(found, context, rtol=0, atol=1e-20)


def test_a_tied_head_with_a_float_input_multiplies_codes(tmp_path: Path) -> None:
    graph = Graph()
    graph.tensor("wte.weight.codes", codes("wte", (ROWS, WIDTH)), TensorProto.INT8)
    graph.tensor("wte.weight.scale", np.random.default_rng(1).uniform(0.001, 0.01, ROWS))
    decoded = graph.node("DequantizeLinear", ["wte.weight.codes", "wte.weight.scale"], "dq", axis=0)
    rows = graph.node("Gather", [decoded, "ids"], "rows")
    turned = graph.node("Transpose", [decoded], "turned", perm=[1, 0])
    graph.node("MatMul", [graph.node("Tanh", [rows], "tanh"), turned], "y")
    outputs = [tensor_value("y", TensorProto.FLOAT, "batch", "tokens", ROWS)]
    model = graph.model([tensor_value("ids", TensorProto.INT64, "batch", "tokens")], outputs)

    def both(model: ir.Model) -> None:
        forms.look_up_codes(model)
        assert forms.turn_codes(model) == 1

    before, after = saved(model, tmp_path, both)
    assert_same_bits(before, after, IDS)
    assert kernels(before)["MatMulNBits"] == 0 and kernels(before)["DequantizeLinear"] >= 1
    assert kernels(after)["MatMulNBits"] == 1 and kernels(after)["DequantizeLinear"] == 0
    assert rules(after, "cpu") == set()
