"""Joined matmuls: the same bits in ONNX Runtime, and each layer's own columns when they are separated.

The graphs are made node by node; the oracle is ONNX Runtime on the graph before, without optimizations.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import Graph, codes, tensor_value
from lines import plain_session
from onnx import TensorProto, numpy_helper

from qcompress.graph.join_matmuls import join_matmuls
from qcompress.graph.joined import layers_of
from qcompress.graph.onnxruntime_forms import drop_unused
from qcompress.graph.view import read

WIDTHS = {"query": 32, "key": 16, "value": 16}
INNER = 32


def weight(graph: Graph, layer: str, columns: int, bits: int = 8, block: int = 0) -> str:
    """Codes of one value range per layer, decoded per channel or in blocks along the rows."""
    kind = TensorProto.INT8 if bits == 8 else TensorProto.INT4
    graph.tensor(f"{layer}.weight.codes", codes(layer, (INNER, columns), bits), kind)
    shape = (INNER // block, columns) if block else (columns,)
    scale = np.random.default_rng(list(layer.encode())).uniform(0.001, 0.01, shape)
    inputs = [f"{layer}.weight.codes", graph.tensor(f"{layer}.weight.scale", scale)]
    if block:
        return graph.node("DequantizeLinear", inputs, f"{layer}.weight.dq", axis=0, block_size=block)
    inputs.append(graph.tensor(f"{layer}.weight.zero", np.zeros(columns), kind))
    return graph.node("DequantizeLinear", inputs, f"{layer}.weight.dq", axis=1)


def pair(graph: Graph, source: str) -> str:
    scale = graph.tensor(f"{source}.scale", np.float32(0.05))
    zero = graph.tensor(f"{source}.zero", np.int8(0), TensorProto.INT8)
    q = graph.node("QuantizeLinear", [source, scale, zero], f"{source}.q")
    return graph.node("DequantizeLinear", [q, scale, zero], f"{source}.dq")


def product(
    graph: Graph, x: str, layer: str, decoded: str, columns: int, place: str = "", bias: bool = True
) -> str:
    """MatMul, Add of the bias and Tanh, so that no layer's output is an output of the graph."""
    y = graph.node("MatMul", [x, decoded], f"{layer}{place}.matmul")
    if bias:
        if not place:
            graph.tensor(f"{layer}.bias", np.random.default_rng(columns).standard_normal(columns))
        y = graph.node("Add", [y, f"{layer}.bias"], f"{layer}{place}.add")
    return graph.node("Tanh", [y], f"{layer}{place}.out")


def model(graph: Graph, outputs: dict[str, int]) -> onnx.ModelProto:
    made = [
        tensor_value(name, TensorProto.FLOAT, "batch", "tokens", width) for name, width in outputs.items()
    ]
    return graph.model([tensor_value("x", TensorProto.FLOAT, "batch", "tokens", INNER)], made)


def attention(bits: int = 8, block: int = 0, rounds: bool = True, biases: tuple[str, ...] = tuple(WIDTHS),
              parents: tuple[str, str, str] = ("a", "a", "a")) -> onnx.ModelProto:  # fmt: skip
    """Query, key and value of one input."""
    graph, outputs = Graph(), {}
    x = pair(graph, "x") if rounds else "x"
    for parent, (name, columns) in zip(parents, WIDTHS.items(), strict=True):
        layer = f"{parent}.{name}"
        decoded = weight(graph, layer, columns, bits, block)
        outputs[product(graph, x, layer, decoded, columns, bias=name in biases)] = columns
    return model(graph, outputs)


def joined(before: onnx.ModelProto, folder: Path) -> tuple[list[str], Path]:
    """The names that joining gives back, and the file."""
    graph = ir.from_proto(before)
    names = join_matmuls(graph)
    drop_unused(graph)
    ir.save(graph, folder / "joined.onnx")
    onnx.checker.check_model(str(folder / "joined.onnx"), full_check=True)
    return names, folder / "joined.onnx"


def assert_same_bits(before: onnx.ModelProto, after: Path, folder: Path) -> None:
    onnx.save(before, folder / "before.onnx")
    x = np.random.default_rng(5).standard_normal((2, 3, INNER)).astype(np.float32)
    results = [plain_session(file).run(None, {"x": x}) for file in (folder / "before.onnx", after)]
    for old, new in zip(*results, strict=True):
        assert old.tobytes() == new.tobytes()


@pytest.mark.parametrize(
    ("bits", "block", "rounds"), [(8, 0, True), (4, 16, False), (8, 16, False), (8, 0, False)]
)
def test_joined_matmuls_compute_the_same_bits(tmp_path: Path, bits: int, block: int, rounds: bool) -> None:
    before = attention(bits, block, rounds)
    names, after = joined(before, tmp_path)
    assert names == ["a.query+key+value"]
    ops = [node.op_type for node in onnx.load(after).graph.node]
    assert [ops.count(op) for op in ("MatMul", "Add", "Split")] == [1, 1, 1]
    assert ops.count("DequantizeLinear") == 1 + rounds
    assert_same_bits(before, after, tmp_path)


def test_separated_the_file_shows_each_layer_with_its_own_tensors(tmp_path: Path) -> None:
    before = attention()
    _, after = joined(before, tmp_path)
    view = read(after, separated=True)
    for tensor in before.graph.initializer:
        values, stored = numpy_helper.to_array(tensor), view.values(tensor.name)
        assert stored is not None and stored.dtype == values.dtype, tensor.name
        assert stored.tobytes() == values.tobytes() and view.shape(tensor.name) == values.shape
    assert not any("+" in name for name in view.constants)
    for name in WIDTHS:  # the layer's matmul leads to what read the layer
        (decoder,) = view.readers[f"a.{name}.weight.codes"]
        (matmul,) = view.readers[decoder.output[0]]
        (add,) = view.readers[matmul.output[0]]
        assert view.readers[add.output[0]][0].output[0] == f"a.{name}.out"


def test_a_plain_view_keeps_the_joined_weight(tmp_path: Path) -> None:
    _, after = joined(attention(), tmp_path)
    assert read(after).shape("a.query+key+value.weight.codes") == (INNER, 64)
    assert layers_of("a.query+key+value") == ["a.query", "a.key", "a.value"] and layers_of("lm_head") == [
        "lm_head"
    ]


def test_layers_of_other_parents_and_without_a_bias_stay_apart(tmp_path: Path) -> None:
    names, after = joined(attention(parents=("a", "a", "b")), tmp_path)
    assert names == ["a.query+key"]
    assert_same_bits(attention(parents=("a", "a", "b")), after, tmp_path)
    names, after = joined(attention(biases=("query", "value")), tmp_path)  # the key of Whisper has none
    assert names == ["a.query+value"]
    assert_same_bits(attention(biases=("query", "value")), after, tmp_path)
    names, after = joined(attention(biases=()), tmp_path)
    assert names == ["a.query+key+value"]
    assert_same_bits(attention(biases=()), after, tmp_path)
    stored = read(after, separated=True)
    assert stored.shape("a.value.weight.codes") == (INNER, 16)


def test_outputs_of_the_graph_and_other_formats_stay_apart(tmp_path: Path) -> None:
    graph = Graph()
    x = pair(graph, "x")
    outputs = {}
    for name, bits in (("gate", 8), ("up", 4), ("third", 8)):
        decoded = weight(graph, f"a.{name}", 16, bits, 16 if bits == 4 else 0)
        outputs[graph.node("MatMul", [x, decoded], f"{name}.out")] = 16
    assert joined(model(graph, outputs), tmp_path)[0] == []


def shared(partners: bool) -> onnx.ModelProto:
    """Two blocks with the weights of one; with `partners`, query and key read one input in the second too."""
    graph, outputs = Graph(), {}
    decoded = {name: weight(graph, f"a.{name}", 16) for name in ("query", "key")}
    reads = dict.fromkeys(decoded, pair(graph, "x"))
    for place in ("", ".2"):
        for name, value in decoded.items():
            outputs[product(graph, reads[name], f"a.{name}", value, 16, place)] = 16
        if not place:
            graph.node("Concat", ["a.query.out", "a.key.out"], "again", axis=-1)
            graph.node("Concat", ["a.key.out", "a.query.out"], "other", axis=-1)
            second = pair(graph, "again")
            reads = {"query": second, "key": second if partners else pair(graph, "other")}
    return model(graph, outputs)


def test_weights_that_blocks_share_are_joined_once(tmp_path: Path) -> None:
    before = shared(partners=True)
    names, after = joined(before, tmp_path)
    ops = [node.op_type for node in onnx.load(after).graph.node]
    assert names == ["a.query+key"] and ops.count("MatMul") == 2 and ops.count("DequantizeLinear") == 3
    assert_same_bits(before, after, tmp_path)
    view = read(after, separated=True)
    assert len(view.readers[view.readers["a.key.weight.codes"][0].output[0]]) == 2


def test_a_shared_weight_with_other_partners_elsewhere_is_left_alone(tmp_path: Path) -> None:
    before = shared(partners=False)
    names, after = joined(before, tmp_path)
    assert names == []
    assert_same_bits(before, after, tmp_path)


def sizes_off(model: onnx.ModelProto) -> None:
    (sizes,) = [one for one in model.graph.initializer if one.name == "a.query+key+value.columns"]
    sizes.CopyFrom(numpy_helper.from_array(np.array([32, 16, 8]), sizes.name))


def an_output_less(model: onnx.ModelProto) -> None:
    del next(node for node in model.graph.node if node.op_type == "Split").output[-1]


def a_computed_weight(model: onnx.ModelProto) -> None:
    name = "a.query+key+value.weight.codes"
    (codes,) = [one for one in model.graph.initializer if one.name == name]
    codes.name = "elsewhere"
    model.graph.node.insert(0, onnx.helper.make_node("Identity", ["elsewhere"], [name]))


def a_computed_bias(model: onnx.ModelProto) -> None:
    name = "a.query+key+value.bias"
    (bias,) = [one for one in model.graph.initializer if one.name == name]
    bias.name = "elsewhere"
    model.graph.node.insert(0, onnx.helper.make_node("Identity", ["elsewhere"], [name]))


@pytest.mark.parametrize("change", [sizes_off, an_output_less, a_computed_weight, a_computed_bias])
def test_a_graph_whose_columns_are_not_those_of_its_layers_stays_joined(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    """The certificate then finds no initializer of the layers."""
    _, after = joined(attention(), tmp_path)
    model = onnx.load(after)
    change(model)
    onnx.save(model, after)
    view = read(after, separated=True)
    assert "a.query.weight.codes" not in view.constants and view.columns == {}
