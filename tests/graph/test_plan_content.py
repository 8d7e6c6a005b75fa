"""Float copies of quantized weights are found in the bytes of a plan, in every type and order."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from graphs import Graph, dequantize_weight, linear, save, tensor_value
from onnx import TensorProto

from qcompress.engine import plan_content
from qcompress.engine.plan_bytes import check_plan
from qcompress.engine.plan_content import float_copies
from qcompress.errors import ExportError
from qcompress.graph.view import View, read

SHAPE = (192, 256)


def arrays(file: Path) -> dict[str, np.ndarray]:
    model = onnx.load(file)
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def kernels(size: int = 2**20) -> bytes:
    """What else is in a plan: machine code, zeros, counters, text, and floats of no weight."""
    random = np.random.default_rng(3)
    parts = [
        random.integers(0, 256, size, np.uint8).tobytes(), bytes(size),
        np.arange(size // 4, dtype=np.int32).tobytes(),
        b'{"layer": "MatMul"}' * 1000, random.normal(0, 0.05, size // 8).astype(np.float32).tobytes(),
        random.normal(0, 0.05, size // 8).astype(np.float16).tobytes(),
    ]  # fmt: skip
    return b"".join(parts)


def plan_of(folder: Path, *parts: bytes) -> Path:
    """A plan with these parts behind an odd count of bytes."""
    file = folder / "model.plan"
    file.write_bytes(b"ptrt" + b"x" * 3 + kernels() + b"".join(parts) + b"end")
    return file


def view_of(
    folder: Path, bits: int = 8, block: int | None = None, compute: str = "fp32"
) -> tuple[View, np.ndarray]:
    """A graph with one weight, and the weight decoded by hand."""
    file = save(linear(bits, block, shape=SHAPE, compute=compute), folder / "model.onnx")
    found = arrays(file)
    scale = found["weight.scale"].astype(np.float32)
    scale = scale.repeat(block, 0) if block else scale[None]
    return read(file), found["weight.codes"].astype(np.float32) * scale


ORDERS = {
    "as it is": lambda weight: weight,
    "transposed": lambda weight: weight.T,
    "in tiles of 32 columns": lambda weight: weight.reshape(SHAPE[0], -1, 32).swapaxes(0, 1),
}
TYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("bits", "block"), [(8, None), (4, 32), (4, None)])
def test_a_float_copy_is_found_in_any_order(
    tmp_path: Path, bits: int, block: int | None, kind: str, order: str
) -> None:
    view, weight = view_of(tmp_path, bits, block)
    copy = np.ascontiguousarray(ORDERS[order](weight)).astype(TYPES[kind])
    found = float_copies(plan_of(tmp_path, copy.tobytes()), view)
    assert found == {"weight.codes": copy.nbytes - weight.size * bits // 8}


def test_an_empty_plan_holds_no_copy(tmp_path: Path) -> None:
    view, _ = view_of(tmp_path)
    assert float_copies(plan_of(tmp_path, b""), view) == {}


def test_a_shuffled_copy_in_fp32_is_found(tmp_path: Path) -> None:
    view, weight = view_of(tmp_path)
    copy = np.random.default_rng(0).permutation(weight.ravel())
    assert set(float_copies(plan_of(tmp_path, copy.tobytes()), view)) == {"weight.codes"}


def test_one_value_of_a_weight_many_times_is_no_copy(tmp_path: Path) -> None:
    view, weight = view_of(tmp_path)
    values = weight.ravel()[np.flatnonzero(weight)[:3]]
    assert float_copies(plan_of(tmp_path, values.repeat(weight.size).tobytes()), view) == {}


@pytest.mark.parametrize("compute", ["fp32", "fp16"])
@pytest.mark.parametrize(("bits", "block"), [(8, None), (4, 32)])
def test_integers_scales_and_kernels_are_no_copy(
    tmp_path: Path, bits: int, block: int | None, compute: str
) -> None:
    view, weight = view_of(tmp_path, bits, block, compute)
    found = arrays(view.file)
    stored = onnx.load(view.file).graph.initializer
    parts = [tensor.raw_data for tensor in stored] + [found["weight.scale"].astype(np.float32).tobytes()] * 3
    assert float_copies(plan_of(tmp_path, *parts), view) == {}
    other = np.roll(weight.ravel(), 7) * np.float32(1.01)  # floats of the same size
    assert (
        float_copies(plan_of(tmp_path, *parts, other.tobytes(), other.astype(np.float16).tobytes()), view)
        == {}
    )


def test_a_word_across_two_pieces_of_a_plan_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = read(save(linear(8, shape=(64, 64)), tmp_path / "model.onnx"))
    stored = arrays(view.file)
    copy = stored["weight.codes"].astype(np.float32) * stored["weight.scale"].astype(np.float32)
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"odd" + copy.tobytes())
    assert float_copies(plan, view) == {"weight.codes": 3 * 64 * 64}
    monkeypatch.setattr(plan_content, "CHUNK", 4)
    assert float_copies(plan, view) == {"weight.codes": 3 * 64 * 64}


def test_a_part_of_a_copy_is_no_copy(tmp_path: Path) -> None:
    view, weight = view_of(tmp_path)
    assert float_copies(plan_of(tmp_path, weight[: SHAPE[0] // 3].tobytes()), view) == {}
    assert set(float_copies(plan_of(tmp_path, weight[: 2 * SHAPE[0] // 3].tobytes()), view)) == {
        "weight.codes"
    }


def conv_with_pair(folder: Path) -> tuple[View, np.ndarray]:
    """A float kernel with a Q/DQ pair behind it, as other tools write it."""
    graph = Graph()
    weight = np.random.default_rng(1).normal(0, 0.1, (64, 32, 3, 3)).astype(np.float32)
    graph.tensor("kernel", weight, TensorProto.FLOAT)
    scale = np.abs(weight).max((1, 2, 3)) / 127
    graph.tensor("scale", scale, TensorProto.FLOAT)
    graph.tensor("zero", np.zeros(64), TensorProto.INT8)
    graph.node("QuantizeLinear", ["kernel", "scale", "zero"], "q", axis=0)
    graph.node("DequantizeLinear", ["q", "scale", "zero"], "dq", axis=0)
    graph.node("Conv", ["x", "dq"], "y")
    ends = [tensor_value("x", 1, "batch", 32, 8, 8)], [tensor_value("y", 1, "batch", 64, 6, 6)]
    return read(save(graph.model(*ends), folder / "model.onnx")), weight


@pytest.mark.parametrize("rounded", [False, True])
def test_a_float_weight_in_front_of_a_pair_is_found_as_it_was_and_rounded(
    tmp_path: Path, rounded: bool
) -> None:
    view, weight = conv_with_pair(tmp_path)
    scale = (np.abs(weight).max((1, 2, 3)) / 127).astype(np.float32).reshape(-1, 1, 1, 1)
    copy = np.rint(weight / scale) * scale if rounded else weight
    assert set(float_copies(plan_of(tmp_path, copy.tobytes()), view)) == {"kernel"}
    assert float_copies(plan_of(tmp_path, np.rint(weight / scale).astype(np.int8).tobytes()), view) == {}


def looked_up(folder: Path) -> tuple[View, np.ndarray, np.ndarray]:
    """A weight [in, out] as indices into a table of vectors."""
    graph = Graph()
    table = np.random.default_rng(2).normal(0, 0.1, (64, 8)).astype(np.float32)
    indices = np.random.default_rng(4).integers(0, 64, (64, 256)).astype(np.uint8)
    graph.tensor("w.assignments", indices, TensorProto.UINT8)
    graph.tensor("w.centroids", table, TensorProto.FLOAT)
    graph.tensor("shape", np.int64([512, 256]), TensorProto.INT64)
    graph.node("Cast", ["w.assignments"], "cast", to=TensorProto.INT32)
    graph.node("Gather", ["w.centroids", "cast"], "gather", axis=0)
    graph.node("Transpose", ["gather"], "turned", perm=[0, 2, 1])
    graph.node("Reshape", ["turned", "shape"], "weight")
    graph.node("MatMul", ["x", "weight"], "y")
    ends = [tensor_value("x", 1, "batch", 512)], [tensor_value("y", 1, "batch", 256)]
    weight = table[indices].transpose(0, 2, 1).reshape(512, 256)
    return read(save(graph.model(*ends), folder / "model.onnx")), table, weight


def test_a_codebook_that_was_spelled_out_is_found_and_its_table_is_not(tmp_path: Path) -> None:
    view, table, weight = looked_up(tmp_path)
    assert float_copies(plan_of(tmp_path, table.tobytes() * 2), view) == {}
    assert set(float_copies(plan_of(tmp_path, weight.tobytes()), view)) == {"w.assignments"}


def test_an_engine_is_refused_where_float_copies_alone_break_the_limit(tmp_path: Path) -> None:
    graph = Graph()
    weights = [dequantize_weight(graph, name, (1024, 4096)) for name in ("small", "large")]
    source = "x"
    for place, weight in enumerate(weights):
        graph.node("MatMul", [source, weight], f"y{place}")
    outputs = [tensor_value(f"y{place}", 1, "batch", 4096) for place in range(2)]
    view = read(save(graph.model([tensor_value("x", 1, "batch", 1024)], outputs), tmp_path / "model.onnx"))
    found = arrays(view.file)
    copies = [found[f"{name}.codes"] * found[f"{name}.scale"][None] for name in ("small", "large")]
    filler = np.random.default_rng(8).integers(0, 256, 2**24, np.uint8).tobytes()
    plan = plan_of(tmp_path, *(copy.tobytes() for copy in copies), filler)
    with pytest.raises(ExportError, match="holds float weights; 2 quantized weights .*25,165,824 bytes more"):
        check_plan(plan, 2**23, view)
    one = plan_of(tmp_path, copies[0].astype(np.float16).tobytes(), filler)
    size, warning = check_plan(one, 2**23 - 2**20, view)
    assert (
        size == one.stat().st_size
        and "1 quantized weights lie in it as floats, 4,194,304 bytes more" in warning
    )
