"""Kernels in sizes.json, held against the graph that ONNX Runtime executes, for graphs made by hand."""

from __future__ import annotations

import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import Graph, dequantize_weight, quantize_activation, save, tensor_value
from lines import QUICK, exported
from onnx import TensorProto as T  # noqa: N817
from onnx import helper

from qcompress.graph import kernels as module
from qcompress.graph.joined import layers_of
from qcompress.graph.kernels import kernels
from qcompress.graph.lint.lint import lint
from qcompress.graph.sizes import measure_sizes
from qcompress.models.architecture import Layer
from qcompress.models.plan import LayerPlan
from qcompress.schema.formats import WeightFormat
from qcompress.schema.targets import TARGETS
from qcompress.system.artifacts import read_json

x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="int8 inputs are not converted"
)
WIDTH = 64


def planned(name: str, kind: str = "linear", rows: int = WIDTH, tied_to: str | None = None) -> LayerPlan:
    """An int8 layer of WIDTH inputs."""
    return LayerPlan(Layer(name, kind, WIDTH, rows, tied_to), WeightFormat(bits=8), None)


def model(graph: Graph, *outputs: str, kind: int = T.FLOAT, width: int = WIDTH) -> onnx.ModelProto:
    """x [batch, sequence, WIDTH] of floats, or [batch, sequence] of ids -> the outputs."""
    size = ("batch", "sequence", WIDTH) if kind == T.FLOAT else ("batch", "sequence")
    ends = [tensor_value(name, T.FLOAT, "batch", "sequence", width) for name in outputs]
    return graph.model([tensor_value("x", kind, *size)], ends)


def attention(form: str) -> onnx.ModelProto:
    """Layers h.q, h.k and h.v that read one pair, as three matmuls or with joined weights, and h.out."""
    graph, shape = Graph(), (WIDTH, WIDTH)
    pair = quantize_activation(graph, "x")
    if form == "joined":
        weight = dequantize_weight(graph, "h.q+k+v.weight", (WIDTH, 3 * WIDTH))
        product = graph.node("MatMul", [pair, weight], "qkv")
        sizes = graph.tensor("sizes", np.int64([WIDTH] * 3), T.INT64)
        graph.nodes.append(
            helper.make_node("Split", [product, sizes], ["q", "k", "v"], name="split", axis=-1)
        )
    else:
        for name in "qkv":
            graph.node("MatMul", [pair, dequantize_weight(graph, f"h.{name}.weight", shape)], name)
    total = graph.node("Add", [graph.node("Add", ["q", "k"], "qk"), "v"], "sum")
    weight = dequantize_weight(graph, "h.out.weight", shape)
    graph.node("MatMul", [quantize_activation(graph, total), weight], "y")
    return model(graph, "y")


ATTENTION = tuple(planned(f"h.{name}") for name in ("q", "k", "v", "out"))


def table(form: str, activations: bool = True) -> onnx.ModelProto:
    """Table `wte` of 100 rows, and the head `head` with the same weight."""
    graph = Graph()
    rng = np.random.default_rng(0)
    graph.tensor("wte.weight.codes", rng.integers(-127, 128, (100, WIDTH)), T.INT8)
    graph.tensor("wte.weight.scale", rng.uniform(0.01, 0.02, 100))
    stored = ["wte.weight.codes", "wte.weight.scale"]
    if form == "decoded":
        decoded = graph.node("DequantizeLinear", stored, "table", axis=0)
        graph.node("Gather", [decoded, "x"], "rows")
        head = graph.node("Transpose", [decoded], "head", perm=[1, 0])
    else:
        codes = graph.node("Gather", [stored[0], "x"], "row.codes")
        scale = graph.node("Gather", [stored[1], "x"], "row.scales")
        scale = graph.node("Unsqueeze", [scale, graph.tensor("last", np.int64([-1]), T.INT64)], "row.scale")
        graph.node("Mul", [graph.node("Cast", [codes], "floats", to=T.FLOAT), scale], "rows")
        moved = graph.node("Transpose", [stored[0]], "moved", perm=[1, 0])
        head = graph.node("DequantizeLinear", [moved, stored[1]], "head", axis=1)
    source = quantize_activation(graph, "rows") if activations else "rows"
    graph.node("MatMul", [source, head], "y")
    return model(graph, "y", kind=T.INT64, width=100)


TABLE = (planned("wte", "embedding", 100), planned("head", "head", 100, tied_to="wte"))


def asked(
    graph: onnx.ModelProto, plan: tuple[LayerPlan, ...], folder: Path, **options: Any
) -> dict[str, Any]:
    """What ONNX Runtime answers for a graph, with the entries by layer."""
    before = set(folder.iterdir())
    file = save(graph, folder / "model.onnx", **options)
    answer = kernels(file, plan)["onnxruntime"]
    assert set(folder.iterdir()) - before == {file, *folder.glob("model.onnx.data")}  # nothing is left behind
    assert answer["read"] and answer["reason"] is None
    assert answer["version"] == onnxruntime.__version__ and answer["machine"] == platform.machine()
    return {**answer, "layers": {layer["name"]: layer for layer in answer["layers"]}}


@x86
def test_layers_that_read_one_pair_are_decoded_and_say_so(tmp_path: Path) -> None:
    answer = asked(attention("apart"), ATTENTION, tmp_path)
    assert (answer["integer"], answer["products"]) == (1, 4)
    assert answer["decoded_bytes"] == 3 * 4 * WIDTH * WIDTH
    for name in "qkv":
        assert answer["layers"][f"h.{name}"] == {
            "name": f"h.{name}", "table": False, "operator": "MatMul", "form": "decoded",
            "reason": "decoded in each run: 3 nodes read one Q/DQ pair", "decoded_bytes": 4 * WIDTH * WIDTH,
        }  # fmt: skip
    out = answer["layers"]["h.out"]
    assert (out["operator"], out["form"], out["reason"]) == ("MatMulIntegerToFloat", "integer", None)


@x86
def test_each_layer_of_joined_weights_counts(tmp_path: Path) -> None:
    answer = asked(attention("joined"), ATTENTION, tmp_path)
    assert (answer["integer"], answer["products"], answer["decoded_bytes"]) == (4, 4, 0)
    assert {layer["operator"] for layer in answer["layers"].values()} == {"MatMulIntegerToFloat"}


def test_names_of_joined_layers() -> None:
    assert layers_of("q_proj+k_proj") == ["q_proj", "k_proj"] and layers_of("head") == ["head"]
    assert layers_of("a.0.gate+up") == ["a.0.gate", "a.0.up"]


def test_joined_layers_share_the_bytes_by_their_weights(tmp_path: Path) -> None:
    graph = Graph()
    weight = dequantize_weight(graph, "h.gate+up.weight", (WIDTH, 3 * WIDTH))
    product = graph.node("MatMul", [quantize_activation(graph, "x"), weight], "product")
    columns = graph.tensor("columns", np.array([WIDTH, 2 * WIDTH]), T.INT64)
    graph.nodes.append(helper.make_node("Split", [product, columns], ["gate", "y"], axis=-1))
    file = save(model(graph, "y", width=2 * WIDTH), tmp_path / "model.onnx")
    plan = (planned("h.gate", rows=WIDTH), planned("h.up", rows=2 * WIDTH))
    sizes = measure_sizes(file, plan, {})
    bytes_of = {layer["name"]: layer["bytes"] for layer in sizes["layers"]}
    column = WIDTH + 4 + 1  # codes, scale, zero point
    assert bytes_of == {"h.gate": WIDTH * column, "h.up": 2 * WIDTH * column}
    assert sizes["quantized_bytes"] == 3 * WIDTH * column


def test_a_table_that_is_decoded_before_gather_is_named_with_its_bytes(tmp_path: Path) -> None:
    answer = asked(table("decoded"), TABLE, tmp_path)
    assert (answer["codes"], answer["tables"]) == (0, 1)
    wte = answer["layers"]["wte"]
    assert wte["reason"] == "decoded in each run: the table is decoded before Gather"
    assert wte["decoded_bytes"] == answer["decoded_bytes"] == 4 * 100 * WIDTH


@x86
def test_a_head_is_found_where_onnx_runtime_moved_and_renamed_its_codes(tmp_path: Path) -> None:
    """It folds the Transpose of the codes into a tensor named QuantizeLinear_out0."""
    answer = asked(table("decoded", activations=False), TABLE, tmp_path)
    head = answer["layers"]["head"]
    assert (head["operator"], head["form"]) == ("MatMul", "decoded")
    assert "more than one node reads the decoded weight" in head["reason"]
    assert answer["decoded_bytes"] == 2 * 4 * 100 * WIDTH  # by two nodes


@x86
def test_rows_of_codes_and_a_head_on_integers(tmp_path: Path) -> None:
    answer = asked(table("rows"), TABLE, tmp_path)
    forms = {name: layer["form"] for name, layer in answer["layers"].items()}
    assert forms == {"wte": "codes", "head": "integer"}
    assert (answer["codes"], answer["integer"], answer["decoded_bytes"]) == (1, 1, 0)


def test_a_weight_only_kernel_tells_bits_and_accuracy_level(tmp_path: Path) -> None:
    graph = Graph()
    graph.node("MatMul", ["x", dequantize_weight(graph, "h.weight", (WIDTH, WIDTH), 4, 32)], "y")
    answer = asked(model(graph, "y"), (planned("h"),), tmp_path)
    (node,) = executed(tmp_path / "model.onnx", tmp_path)
    level = next(item.i for item in node.attribute if item.name == "accuracy_level")
    assert node.op_type == "MatMulNBits" and level == 4
    assert answer["layers"]["h"]["reason"] == (
        "MatMulNBits: weights of 4 bits, inputs rounded to int8 by blocks in each run (accuracy level 4)"
    )
    assert (answer["integer"], answer["weight_only"], answer["decoded_bytes"]) == (0, 1, 0)


def test_an_int4_table_is_looked_up_by_an_operator_of_onnx_runtime(tmp_path: Path) -> None:
    """Gather takes no int4. The operator is sound for ONNX Runtime alone."""
    graph = Graph()
    graph.tensor("wte.weight.codes", np.arange(100 * WIDTH).reshape(100, WIDTH) % 15 - 7, T.INT4)
    graph.tensor("wte.weight.scale", np.full((100, WIDTH // 32), 0.01))
    inputs = ["wte.weight.codes", "x", "wte.weight.scale"]
    sizes = {"gather_axis": 0, "quantize_axis": 1, "block_size": 32}
    graph.node("GatherBlockQuantized", inputs, "y", domain="com.microsoft", **sizes)
    made = model(graph, "y", kind=T.INT64)
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    layer = asked(made, (planned("wte", "embedding", 100),), tmp_path)["layers"]["wte"]
    assert (layer["operator"], layer["form"], layer["reason"]) == ("GatherBlockQuantized", "codes", None)
    assert lint(tmp_path / "model.onnx", TARGETS["cpu"]) == []
    assert {item.rule for item in lint(tmp_path / "model.onnx", TARGETS["a100"])} >= {"integer-operator"}


def convolved(behind: bool) -> onnx.ModelProto:
    graph = Graph()
    graph.tensor("c.weight.codes", np.arange(64 * 64).reshape(64, 64, 1, 1) % 255 - 127, T.INT8)
    stored = ["c.weight.codes", graph.tensor("c.weight.scale", np.full(64, 0.01))]
    weight = graph.node("DequantizeLinear", stored, "c.dq", axis=0)
    end = graph.node("Conv", [quantize_activation(graph, "x"), weight], "c")
    graph.node("Relu", [quantize_activation(graph, end) if behind else end], "y")
    size = ("batch", 64, 8, 8)
    return graph.model([tensor_value("x", T.FLOAT, *size)], [tensor_value("y", T.FLOAT, *size)])


@x86
@pytest.mark.parametrize("behind", [True, False])
def test_a_convolution_needs_quantize_linear_behind_it(behind: bool, tmp_path: Path) -> None:
    layer = asked(convolved(behind), (planned("c", "conv"),), tmp_path)["layers"]["c"]
    if behind:
        assert (layer["operator"], layer["form"], layer["reason"]) == ("QLinearConv", "integer", None)
    else:
        assert layer["form"] == "decoded" and layer["reason"] == (
            "decoded in each run: no QuantizeLinear directly behind the convolution (it is read by Relu)"
        )


def executed(file: Path, folder: Path) -> list[onnx.NodeProto]:
    """Nodes of the graph that ONNX Runtime executes by default."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "executed.onnx")
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return list(onnx.load(folder / "executed.onnx").graph.node)


@pytest.mark.parametrize("kind", QUICK, ids=str)
def test_an_export_tells_what_onnx_runtime_executes(
    kind: Any, tiny_model: Path, untied_model: Path, text_file: Path, tmp_path: Path
) -> None:
    graph = exported(kind, tiny_model if kind.tied else untied_model, text_file)
    answer = read_json(graph.folder / "sizes.json")["kernels"]["onnxruntime"]
    operators = Counter(node.op_type for node in executed(graph.file, tmp_path))
    assert answer["read"] and answer["integer"] == operators["MatMulIntegerToFloat"]
    assert answer["weight_only"] == operators["MatMulNBits"] == 2
    quantized = [item for item in graph.plan if item.weights]
    assert [layer["name"] for layer in answer["layers"]] == [item.name for item in quantized]
    assert answer["products"] + answer["tables"] == len(quantized) and answer["tables"] == 2
    for layer in answer["layers"]:
        assert layer["form"] != "unknown" and (layer["reason"] is None) is (
            layer["form"] in ("integer", "codes")
        )
    (clipped,) = [layer for layer in answer["layers"] if layer["name"] == "transformer.h.1.attn.c_attn"]
    assert clipped["reason"].endswith("Clip between QuantizeLinear and DequantizeLinear")
    if kind.compute == "fp16":
        reason = "decoded in each run: the pair decodes to fp16, and kernels take fp32 scales"
        assert sum(reason in (layer["reason"] or "") for layer in answer["layers"]) == 6


# What cannot be asked ------------------------------------------------------------------------------


def test_tensors_beside_the_graph_are_read(tmp_path: Path) -> None:
    answer = asked(attention("joined"), ATTENTION, tmp_path, external=True)
    assert (tmp_path / "model.onnx.data").is_file()
    assert answer["products"] == 4 and all(item["form"] != "unknown" for item in answer["layers"].values())


def test_the_optimized_graph_keeps_its_tensors_beside_it(tmp_path: Path) -> None:
    """A protobuf message is limited to 2 GiB."""
    file = save(attention("joined"), tmp_path / "model.onnx")
    version, reason = module._optimize(file, tmp_path / module.FILE)
    assert (version, reason) == (onnxruntime.__version__, "")
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / module.FILE, load_external_data=False)
              .graph.initializer}  # fmt: skip
    assert stored["h.q+k+v.weight.codes"].data_location == T.EXTERNAL
    assert (tmp_path / f"{module.FILE}.data").stat().st_size > 3 * WIDTH * WIDTH


def refused(file: Path) -> str:
    answer = kernels(file, ATTENTION)["onnxruntime"]
    assert answer["read"] is False and "layers" not in answer
    return answer["reason"]


def test_a_graph_that_onnx_runtime_refuses_is_a_reason(tmp_path: Path) -> None:
    graph = attention("joined")
    graph.graph.node[-1].op_type = "NoSuchOperator"
    reason = refused(save(graph, tmp_path / "model.onnx"))
    assert reason.startswith("ONNX Runtime refuses the graph: ") and "NoSuchOperator" in reason
    assert str(tmp_path) not in reason  # sizes.json names no folder
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_without_onnxruntime_there_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    reason = refused(save(attention("joined"), tmp_path / "model.onnx"))
    assert reason.startswith("onnxruntime is not installed")


def test_a_folder_that_takes_no_file_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.tempfile, "TemporaryDirectory", full)
    assert "No space left on device" in refused(save(attention("joined"), tmp_path / "model.onnx"))


def test_a_layer_without_stored_codes_is_unknown(tmp_path: Path) -> None:
    answer = asked(attention("joined"), (*ATTENTION, planned("h.other")), tmp_path)
    assert answer["layers"]["h.other"]["form"] == "unknown"
    assert answer["layers"]["h.other"]["reason"] == "model.onnx does not store its codes"


def test_an_engine_is_not_asked_at_export(tmp_path: Path) -> None:
    engine = kernels(save(attention("joined"), tmp_path / "model.onnx"), ATTENTION)["engine"]
    assert engine["read"] is False and "measure_engine.py" in engine["reason"]
