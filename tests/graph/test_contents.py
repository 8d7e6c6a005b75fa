"""`qcompress inspect`: what a file stores, recounted with onnx alone and by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import GPT2_SMALL, Graph, Shape, decoder, linear, save, tensor_value
from lines import QUICK, Exported, cli, exported
from onnx import TensorProto, helper

from qcompress.graph.inspect import DECODERS, contents
from qcompress.system.artifacts import read_json

WIDE = Shape(blocks=1, width=256, vocabulary=4096, context=64)


def found_in(model: onnx.ModelProto, folder: Path, *, external: bool = False) -> dict[str, Any]:
    return contents(save(model, folder / "model.onnx", external))


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    names = {weight["name"]: weight for weight in found["weights"]}
    assert len(names) == len(found["weights"])
    return names


@pytest.mark.parametrize("external", [False, True])
def test_totals_are_the_file_and_its_tensors(tmp_path: Path, external: bool) -> None:
    found = found_in(decoder(WIDE), tmp_path, external=external)
    totals = found["totals"]
    assert totals["file"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    parts = [totals[name] for name in ("weights", "float", "other", "graph")]
    assert sum(parts) == totals["file"] and min(parts) > 0
    assert totals["weights"] == sum(weight["bytes"] for weight in found["weights"])
    # everything but nodes and names: within 2 % of the file
    assert totals["weights"] + totals["float"] + totals["other"] > 0.98 * totals["file"]
    assert sum(weight["share"] for weight in found["weights"]) == pytest.approx(
        totals["weights"] / totals["file"]
    )
    tensors = onnx.load(str(tmp_path / "model.onnx")).graph.initializer
    assert totals["file"] - totals["graph"] == sum(len(tensor.raw_data) for tensor in tensors)


def test_a_tied_table_is_stored_once_and_read_twice(tmp_path: Path) -> None:
    table = by_name(found_in(decoder(WIDE), tmp_path))["wte"]
    assert table == {
        "name": "wte",
        "readers": ("Gather", "MatMul"),
        "shape": (4096, 256),
        "stored": "int8",
        "stored_bits": 8,
        "information_bits": 8,
        "granularity": "channel",
        "input": "int8",
        "bytes": 4096 * 256 + 4096 * 4 + 4096,
        "share": table["share"],
    }


def test_blocks_of_int4_and_their_float_inputs(tmp_path: Path) -> None:
    found = by_name(found_in(decoder(WIDE, bits=4, activations=False), tmp_path))["h.0.fc"]
    assert (found["stored"], found["stored_bits"], found["information_bits"]) == ("int4", 4, 4)
    assert (found["granularity"], found["input"]) == ("block 64", "float")
    assert found["bytes"] == 256 * 1024 // 2 + 256 // 64 * 1024 * 4


def test_a_float_weight_is_a_weight_too(tmp_path: Path) -> None:
    found = found_in(decoder(WIDE, bits=None, activations=False, table_bits=None), tmp_path)
    weights = by_name(found)
    assert len(weights) == 6 and {weight["stored"] for weight in weights.values()} == {"fp32"}
    assert weights["h.0.attn.weight"]["bytes"] == 256 * 768 * 4
    assert weights["h.0.attn.weight"]["granularity"] == ""
    assert found["totals"]["float"] == (768 + 256 + 1024 + 256) * 4  # biases


@pytest.mark.parametrize(
    ("values", "bits"),
    [([-1, 0, 1], math.log2(3)), ([-2, -1, 0, 1], 2), ([-4, 3], 3), ([-7, 7], 4), ([0, 1], 1), ([0], 1)],
)
@pytest.mark.parametrize(("kind", "stored"), [(TensorProto.INT8, 8), (TensorProto.INT4, 4)])
def test_information_is_counted_from_the_codes(
    tmp_path: Path, values: list[int], bits: float, kind: int, stored: int
) -> None:
    model = linear(bits=stored, activations=False)
    other = Graph()
    other.tensor("weight.codes", np.resize(values, (128, 64)), kind)
    for tensor in model.graph.initializer:
        if tensor.name == "weight.codes":
            tensor.CopyFrom(other.tensors[0])
    (weight,) = found_in(model, tmp_path)["weights"]
    assert (weight["stored_bits"], weight["information_bits"]) == (stored, bits)


def test_a_weight_that_is_rounded_in_the_graph_is_stored_in_float(tmp_path: Path) -> None:
    """Other tools write the float weight, QuantizeLinear and DequantizeLinear."""
    graph = Graph()
    graph.tensor("w", np.linspace(-1, 1, 128 * 64).reshape(128, 64))
    parameters = [graph.tensor("w.scale", np.float32(0.01)), graph.tensor("w.zero", 0, TensorProto.INT8)]
    codes = graph.node("QuantizeLinear", ["w", *parameters], "q")
    graph.node("MatMul", ["x", graph.node("DequantizeLinear", [codes, *parameters], "dq")], "y")
    ends = (
        [tensor_value("x", TensorProto.FLOAT, "batch", 128)],
        [tensor_value("y", TensorProto.FLOAT, "b", 64)],
    )
    (weight,) = found_in(graph.model(*ends), tmp_path)["weights"]
    assert (weight["stored"], weight["stored_bits"], weight["information_bits"]) == ("fp32", 32, 8)
    assert (weight["granularity"], weight["bytes"]) == ("tensor", 128 * 64 * 4 + 5)


def test_packed_weights_of_onnxruntime_are_known(tmp_path: Path) -> None:
    graph = Graph()
    graph.tensor("w", np.zeros((64, 4, 16)), TensorProto.UINT8)
    graph.tensor("s", np.ones(256))
    graph.nodes.append(
        helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=128, N=64, bits=4,
                         block_size=32)
    )  # fmt: skip
    ends = [tensor_value("x", TensorProto.FLOAT, "b", 128)], [tensor_value("y", TensorProto.FLOAT, "b", 64)]
    (weight,) = found_in(graph.model(*ends), tmp_path)["weights"]
    assert (weight["information_bits"], weight["granularity"], weight["input"]) == (4, "block 32", "float")
    assert weight["bytes"] == 64 * 4 * 16 + 1024
    assert (weight["shape"], weight["stored"], weight["stored_bits"]) == ((128, 64), "uint8", 4)


def test_a_float_table_is_known_whatever_looks_it_up_and_by_all_its_readers(tmp_path: Path) -> None:
    graph = Graph()
    graph.tensor("table", np.ones((64, 32)))
    graph.node("Gather", ["table", graph.tensor("places", np.ones((2, 3)), TensorProto.INT64)], "rows")
    graph.node("MatMul", ["x", "table"], "y")
    ends = [tensor_value("x", TensorProto.FLOAT, "b", 64)], [tensor_value("y", TensorProto.FLOAT, "b", 32)]
    (weight,) = found_in(graph.model(*ends), tmp_path)["weights"]
    assert (weight["name"], weight["readers"], weight["input"]) == ("table", ("Gather", "MatMul"), "float")


@pytest.mark.parametrize(("low", "high", "bits"), [(-7, 7, 4), (-127, 127, 8), (-1, 1, math.log2(3))])
def test_bounds_of_codes_that_the_graph_rounds_are_their_information(
    tmp_path: Path, low: int, high: int, bits: float
) -> None:
    graph = Graph()
    parameters = [graph.tensor("w.scale", np.float32(0.01)), graph.tensor("w.zero", 0, TensorProto.INT8)]
    codes = graph.node("QuantizeLinear", [graph.tensor("w", np.ones((128, 64))), *parameters], "q")
    bounds = [graph.tensor(name, at, TensorProto.INT8) for name, at in (("low", low), ("high", high))]
    clipped = graph.node("Clip", [codes, *bounds], "clip")
    graph.node("MatMul", ["x", graph.node("DequantizeLinear", [clipped, *parameters], "dq")], "y")
    ends = [tensor_value("x", TensorProto.FLOAT, "b", 128)], [tensor_value("y", TensorProto.FLOAT, "b", 64)]
    (weight,) = found_in(graph.model(*ends), tmp_path)["weights"]
    assert (weight["stored"], weight["information_bits"]) == ("fp32", bits)
    assert weight["bytes"] == 128 * 64 * 4 + 5 + 2


@pytest.mark.parametrize("shape", [(), (0,), (0, 0), (4, 4)])
@pytest.mark.parametrize("kind", [TensorProto.INT8, TensorProto.STRING])
def test_malformed_operators_on_codes_are_survived(tmp_path: Path, shape: tuple[int, ...], kind: int) -> None:
    graph = Graph()
    values = [b"a"] * math.prod(shape) if kind == TensorProto.STRING else [1] * math.prod(shape)
    graph.tensors.append(helper.make_tensor("c", kind, shape, values))
    graph.tensors.append(helper.make_tensor("w", TensorProto.FLOAT, (2, 2), [1.0] * 4))
    for op in DECODERS:
        graph.node(op, ["c"] * 6, op)
    clipped = graph.node("Clip", [graph.node("QuantizeLinear", ["w", "c"], "q"), "c", "c"], "clip")
    graph.node("MatMul", ["x", graph.node("DequantizeLinear", [clipped, "c"], "dq")], "y")
    file = tmp_path / "model.onnx"
    file.write_bytes(graph.model([tensor_value("x", TensorProto.FLOAT, 2, 2)], []).SerializeToString())
    assert "w" in {weight["name"] for weight in contents(file)["weights"]}


def test_tensors_that_the_file_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = linear()
    model.graph.initializer[0].dims[:] = [2**62] * 40
    save(model, tmp_path / "model.onnx")
    done = cli("inspect", tmp_path / "model.onnx")
    assert done.code == 5 and "which takes" in done.stderr


@pytest.mark.parametrize("kind", QUICK, ids=str)
def test_an_export_of_ours_says_what_sizes_json_says(
    kind: Any, tiny_model: Path, untied_model: Path, text_file: Path
) -> None:
    graph: Exported = exported(kind, tiny_model if kind.tied else untied_model, text_file)
    found, sizes = contents(graph.file), read_json(graph.folder / "sizes.json")
    weights = by_name(found)
    for layer in sizes["layers"]:
        weight = weights[f"{layer['name']}.weight"]
        assert weight["stored_bits"] == layer["stored_bits"]
        assert weight["information_bits"] <= layer["information_bits"]
        assert math.prod(weight["shape"]) == layer["weights"]
        # scales that two layers share are stored once
        assert 0 <= layer["bytes"] - weight["bytes"] <= 0.1 * layer["bytes"]
    assert found["totals"]["file"] == sizes["file_bytes"]
    known = sizes["initializer_bytes"]
    assert found["totals"]["file"] - found["totals"]["graph"] >= known


def test_the_command_prints_a_line_for_each_weight(tmp_path: Path) -> None:
    file = save(decoder(WIDE), tmp_path / "model.onnx")
    shown = cli("inspect", file)
    assert shown.code == 0
    lines = shown.stdout.splitlines()
    (line,) = [line for line in lines if "h.0.fc" in line]
    assert line.split() == [
        "h.0.fc",
        "256",
        "x",
        "1024",
        "int8",
        "8",
        "channel",
        "int8",
        "MatMul",
        *line.split()[-2:],
    ]
    assert "5 QuantizeLinear nodes" in shown.stdout
    found = cli("inspect", file, "--json").json()
    assert [weight["name"] for weight in found["weights"]] == [
        "wte",
        "wpe",
        *(f"h.0.{x}" for x in ("attn", "proj", "fc", "out")),
    ]
    assert cli("inspect", tmp_path / "none.onnx").code == 2


@pytest.mark.slow
def test_gpt2_small_takes_seconds(tmp_path: Path) -> None:
    found = found_in(decoder(GPT2_SMALL), tmp_path, external=True)
    assert len(found["weights"]) == 2 + 12 * 4
    assert 120e6 < found["totals"]["file"] < 130e6
