"""Repeated key and value heads: codes are repeated in place of values."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompress.graph.repeated_heads import repeat_codes


def shared_heads(reader: bool = False) -> onnx.ModelProto:
    """Queries of 4 heads times keys of 2 heads, [batch, heads, width, tokens], whose int8 codes are decoded
    and then repeated. `reader`: the decoded keys are an output as well.
    """
    constants = {
        "scale": np.float32(0.05), "zero": np.int8(0), "axis": np.array([2], np.int64),
        "wide": np.array([1, 2, 2, 4, 5], np.int64), "merged": np.array([1, 4, 4, 5], np.int64),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["keys", "scale", "zero"], ["codes"], name="point/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["decoded"], name="point/Decoder"),
        helper.make_node("Unsqueeze", ["decoded", "axis"], ["row"]),
        helper.make_node("Expand", ["row", "wide"], ["rows"]),
        helper.make_node("Reshape", ["rows", "merged"], ["heads"]),
        helper.make_node("MatMul", ["queries", "heads"], ["scores"]),
    ]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 4, 3, 5])]
    if reader:
        outputs.append(helper.make_tensor_value_info("decoded", TensorProto.FLOAT, [1, 2, 4, 5]))
    graph = helper.make_graph(
        nodes, "heads",
        [helper.make_tensor_value_info("queries", TensorProto.FLOAT, [1, 4, 3, 4]),
         helper.make_tensor_value_info("keys", TensorProto.FLOAT, [1, 2, 4, 5])],
        outputs, [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def computed(model: onnx.ModelProto) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    random = np.random.default_rng(0)
    feed = {"queries": (1, 4, 3, 4), "keys": (1, 2, 4, 5)}
    return session.run(
        ["scores"], {name: random.normal(size=size).astype(np.float32) for name, size in feed.items()}
    )[0]


def test_codes_are_repeated_and_decoded_in_front_of_the_matmul() -> None:
    before = shared_heads()
    model = ir.from_proto(before)
    assert repeat_codes(model) == 1
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    makers = {name: node for node in after.graph.node for name in node.output}
    (matmul,) = (node for node in after.graph.node if node.op_type == "MatMul")
    decoder = makers[matmul.input[1]]
    assert decoder.op_type == "DequantizeLinear" and decoder.name == "point/Decoder"
    assert [node.op_type for node in after.graph.node].count("DequantizeLinear") == 1
    assert makers[decoder.input[0]].op_type == "Reshape"
    assert np.array_equal(computed(after), computed(before))


@pytest.mark.parametrize("change", ["reader", "table"])
def test_other_decoders_stay_where_they_are(change: str) -> None:
    """Decoded keys that an output reads too, and a stored tensor that is repeated."""
    proto = shared_heads(reader=change == "reader")
    if change == "table":
        codes = numpy_helper.from_array(np.ones((1, 2, 4, 5), np.int8), "codes")
        proto.graph.initializer.append(codes)
        proto.graph.node.pop(0)
    model = ir.from_proto(proto)
    assert repeat_codes(model) == 0
    assert [node.op_type for node in model.graph] == [node.op_type for node in proto.graph.node]
