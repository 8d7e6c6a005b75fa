"""Products of 8-bit codes in ONNX Runtime on this processor."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from lines import exact_options
from onnx import TensorProto, helper, numpy_helper

from qcompress.engine.probe_kit.engine_runners import saturates

SCALE = 2.0**-7


def product(activations: np.ndarray, weights: np.ndarray) -> bytes:
    """A matmul of int8 Q/DQ activations and int8 weights."""
    stored = {
        "scale": np.array(SCALE, np.float32), "zero": np.array(0, np.int8), "codes": weights,
        "each": np.full(weights.shape[1], SCALE, np.float32),
        "zeros": np.zeros(weights.shape[1], np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["a"]),
        helper.make_node("DequantizeLinear", ["codes", "each", "zeros"], ["w"], axis=1),
        helper.make_node("MatMul", ["a", "w"], ["y"]),
    ]
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))]
        for name, shape in (("x", activations.shape), ("y", (len(activations), weights.shape[1])))
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "product", *ends, tensors)
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()


@pytest.fixture(scope="module")
def product_case() -> tuple[bytes, np.ndarray, np.ndarray]:
    """A graph, its input, and the product by hand in integers: sums of two products beyond 16 bits."""
    random = np.random.default_rng(0)
    codes = random.integers(-128, 128, (16, 64)).astype(np.int8)
    weights = random.integers(-127, 128, (64, 32)).astype(np.int8)
    wanted = (codes.astype(np.int64) @ weights.astype(np.int64)) * SCALE**2
    return product(codes, weights), codes.astype(np.float32) * np.float32(SCALE), wanted


def test_the_sessions_of_this_package_multiply_exactly(
    product_case: tuple[bytes, np.ndarray, np.ndarray],
) -> None:
    graph, x, wanted = product_case
    session = onnxruntime.InferenceSession(graph, exact_options(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], wanted, rtol=1e-6)


def test_a_processor_is_known_by_what_its_default_session_computes(
    product_case: tuple[bytes, np.ndarray, np.ndarray],
) -> None:
    graph, x, wanted = product_case
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    is_exact = np.allclose(session.run(None, {"x": x})[0], wanted, rtol=1e-6)
    assert saturates() is not is_exact


@pytest.mark.parametrize(
    ("machine", "listing", "expected"),
    [
        ("x86_64", "flags\t\t: fpu avx2 fma\n", True),
        ("x86_64", "flags\t\t: avx512f avx512bw\n", True),
        ("AMD64", "flags\t\t: avx512f avx512_vnni\n", False),
        ("x86_64", "model name : vnni\nflags : avx_vnni avx2\n", False),
        ("x86_64", "model name : vnni\nflags : avx2\n", True),
        ("aarch64", "Features : asimddp\n", False),
        ("x86_64", "", False),
    ],
)
def test_instructions_are_read_from_the_systems_list(machine: str, listing: str, expected: bool) -> None:
    assert saturates(machine, listing) is expected
