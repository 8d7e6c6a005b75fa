"""Graphs that other tools made: what inspect and lint say of them, and whether TensorRT-RTX agrees.

onnxruntime's quantizers run here. Graphs of nvidia-modelopt and brevitas lie in tests/data with the scripts
that made them. Numbers of bytes are counted by hand: codes, scales, zero points.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from float_models import BIASES, CHANNELS, WEIGHTS, convolutions, matmuls, samples, table
from graphs import save
from lines import cli, plain_session

from qcompress.graph.inspect import contents
from qcompress.graph.lint.lint import lint
from qcompress.graph.lint.rules import RULES
from qcompress.schema.targets import TARGETS

DATA = Path(__file__).parents[1] / "data"
EVIDENCE = {rule.id: rule.evidence for rule in RULES}

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")


@dataclass(frozen=True)
class Weights:
    """What inspect must say of the weights of a graph."""

    kind: tuple[str, int, float, str, str]
    """Stored type, stored bits, bits of information, granularity, type of the input."""
    sizes: dict[str, int]
    """Bytes by name."""
    exceptions: dict[str, tuple[str, int, float, str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Foreign:
    """A graph of another tool."""

    name: str
    weights: Weights
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    builds: bool = True


def each(count: Callable[..., float], shapes: dict[str, tuple[int, ...]] = WEIGHTS) -> dict[str, int]:
    """Bytes of weights of these shapes."""
    return {name: int(count(*shape)) for name, shape in shapes.items()}


def out_first(out: int, *rest: int) -> int:
    """int8, with a scale and a zero point for each of the first axis."""
    return out * math.prod(rest) + out * (4 + 1)


CHANNEL = Weights(("int8", 8, 8, "channel", "int8"), each(lambda i, o: i * o + o * (4 + 1)))
TENSOR = Weights(("int8", 8, 8, "tensor", "int8"), each(lambda i, o: i * o + 4 + 1))
CONV = Weights(("int8", 8, 8, "channel", "int8"), each(out_first, CHANNELS))
BLOCKS = Weights(("int4", 4, 4, "block 32", "float"), each(lambda i, o: i * o / 2 + i * o / 32 * 4))
PACKED = Weights(("uint8", 4, 4, "block 32", "float"), BLOCKS.sizes)
FIRST, SECOND = (f"/{index}/weight_quant/export_handler/Constant_2_output_0" for index in (1, 4))
BREVITAS = {FIRST: 48 * 32 + 48 * 5 + 2, SECOND: 24 * 48 + 24 * 5}
"""The bounds of a Clip are stored once for both."""

OPERATORS = ("constant-reader", "integer-operator", "quantizer-alone")

GRAPHS: tuple[Foreign, ...] = (
    Foreign("ort-symmetric", CHANNEL, warnings=("weight-reader",)),
    Foreign("ort-symmetric-conv", CONV, ("int32-bias",), builds=False),
    Foreign("ort-symmetric-conv-float-bias", CONV),
    Foreign("ort-default", TENSOR, ("zero-point",), ("weight-reader",), builds=False),
    Foreign(
        "ort-uint8", Weights(("int8", 8, 8, "tensor", "uint8"), TENSOR.sizes),
        ("integer-type", "uint8-activation", "zero-point"), builds=False,
    ),
    Foreign("ort-own-domain", CHANNEL, (), ("opset-old", "weight-reader")),
    Foreign(
        "ort-own-domain-asymmetric", CHANNEL,
        ("zero-point",), ("opset-old", "weight-reader"), builds=False,
    ),
    Foreign("ort-operators", CHANNEL, OPERATORS, builds=False),
    Foreign(
        "ort-dynamic",
        Weights(("uint8", 8, 8, "tensor", "uint8"), each(lambda i, o: i * o + 1)),
        ("integer-operator",), builds=False,  # scales are multiplied behind the operator
    ),
    Foreign("ort-4bit", BLOCKS, ("scale-not-positive",)),
    Foreign(
        "ort-4bit-asymmetric",
        Weights(("uint4", 4, 4, "block 32", "float"), each(lambda i, o: i * o / 2 + i * o / 32 * 4.5)),
        ("integer-type", "zero-point"), builds=False,
    ),
    Foreign("ort-4bit-operators", PACKED, ("integer-operator",), builds=False),
    Foreign(
        "ort-4bit-operators-fp16", Weights(PACKED.kind, each(lambda i, o: i * o / 2 + i * o / 32 * 2)),
        ("integer-operator",), builds=False,
    ),
    Foreign(
        "ort-4bit-table",
        Weights(
            ("int4", 4, 4, "block 32", ""),
            {"table.weight": 128 * 64 // 2 + 256 * 4, "head.weight": 64 * 32 // 2 + 64 * 4},
            {"head.weight": PACKED.kind},
        ),
        ("constant-reader", "integer-operator"), builds=False,
    ),
    Foreign(
        "modelopt-int8",  # QuantizeLinear and DequantizeLinear have a copy of the parameters each
        Weights(("fp16", 16, 8, "channel", "int8"), each(lambda i, o: 2 * i * o + 2 * o * (2 + 1))),
    ),
    Foreign("modelopt-int8-stored", CHANNEL),
    Foreign(
        "modelopt-int8-conv",
        Weights(
            ("int8", 8, 8, "channel", "int8"),
            {"first.weight": 16 * 144 + 16 * 3, "second.weight": 32 * 144 + 32 * 3, "head.weight": 2 * 320},
            {"head.weight": ("fp16", 16, 16, "", "int8")},
        ),
    ),
    Foreign("modelopt-int4", BLOCKS),
    Foreign("modelopt-int4-awq", BLOCKS),
    Foreign(
        "brevitas-linear", Weights(CHANNEL.kind, BREVITAS), ("constant-reader",), ("opset-old",), builds=False
    ),
    Foreign(
        "brevitas-linear-bias", Weights(CHANNEL.kind, BREVITAS),
        ("constant-reader", "int32-bias"), ("opset-old",), builds=False,
    ),
    Foreign(
        "brevitas-linear-4bit", Weights(("int8", 8, 4, "channel", "int8"), BREVITAS),
        ("constant-reader",), ("opset-old",), builds=False,
    ),
    Foreign(
        "brevitas-linear-4bit-rounded",
        Weights(
            ("fp32", 32, 4, "channel", "int8"),
            {"slice_1": 4 * 48 * 32 + 48 * 5 + 2, "slice_2": 4 * 24 * 48 + 24 * 5},
        ),
    ),
    Foreign(
        "brevitas-conv",
        Weights(
            ("int8", 8, 8, "channel", "int8"), {FIRST: 16 * 36 + 16 * 5 + 2, SECOND: 10 * 256 + 10 * 5},
            {SECOND: ("int8", 8, 8, "channel", "uint8")},
        ),
        ("constant-reader", "uint8-activation"), ("opset-old",), builds=False,
    ),
    Foreign(
        "brevitas-conv-rounded",
        Weights(
            ("fp32", 32, 8, "channel", "int8"),
            {"slice_1": 4 * 16 * 36 + 16 * 5 + 2, "slice_2": 4 * 10 * 256 + 10 * 5},
            {"slice_2": ("fp32", 32, 8, "channel", "uint8")},
        ),
        ("uint8-activation",),
    ),
)  # fmt: skip

OURS = tuple(graph for graph in GRAPHS if not graph.name.startswith("brevitas"))
"""Made of the models in float_models.py."""

each_graph = pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)


def make_static(folder: Path) -> None:
    """onnxruntime's quantizers of 8 bits."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self, model: onnx.ModelProto) -> None:
            self.rows = iter([{"x": samples(model)}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    def static(
        name: str, model: onnx.ModelProto, extra: dict[str, bool] | None = None, **options: Any
    ) -> Path:
        source = save(model, folder / "float.onnx")
        quantize_static(source, folder / f"{name}.onnx", Reader(model), extra_options=extra, **options)
        return folder / f"{name}.onnx"

    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True}
    channel = {"per_channel": True, "activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    static("ort-symmetric", matmuls(), symmetric, **channel)
    static("ort-symmetric-conv", convolutions(), symmetric, **channel)
    static("ort-symmetric-conv-float-bias", convolutions(), symmetric | {"QuantizeBias": False}, **channel)
    static("ort-default", matmuls())
    static("ort-uint8", matmuls(), activation_type=QuantType.QUInt8)
    static("ort-own-domain", matmuls(opset=17), symmetric | {"UseQDQContribOps": True}, **channel)
    static("ort-own-domain-asymmetric", matmuls(opset=17), {"UseQDQContribOps": True}, **channel)
    static("ort-operators", matmuls(), symmetric, quant_format=QuantFormat.QOperator, **channel)
    source = save(matmuls(), folder / "float.onnx")
    quantize_dynamic(source, folder / "ort-dynamic.onnx", weight_type=QuantType.QUInt8)


def make_4bit(folder: Path) -> None:
    """onnxruntime's quantizer of 4 bits."""
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    def weights(name: str, model: onnx.ModelProto, layout: QuantFormat, symmetric: bool = True) -> None:
        quantizer = MatMulNBitsQuantizer(
            model, block_size=32, is_symmetric=symmetric, quant_format=layout,
            op_types_to_quantize=("MatMul", "Gather"),
        )  # fmt: skip
        quantizer.process()
        quantizer.model.save_model_to_file(str(folder / f"{name}.onnx"))

    weights("ort-4bit", matmuls(), QuantFormat.QDQ)
    weights("ort-4bit-asymmetric", matmuls(), QuantFormat.QDQ, symmetric=False)
    weights("ort-4bit-operators", matmuls(), QuantFormat.QOperator)
    weights("ort-4bit-operators-fp16", matmuls("fp16"), QuantFormat.QOperator)
    weights("ort-4bit-table", table(), QuantFormat.QOperator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every graph as a file."""
    pytest.importorskip("onnxruntime.quantization")
    folder = tmp_path_factory.mktemp("foreign")
    logging.disable(logging.WARNING)  # a line for each node
    make_static(folder)
    make_4bit(folder)
    logging.disable(logging.NOTSET)
    for file in DATA.glob("*.onnx"):
        shutil.copy(file, folder)
    (folder / "float.onnx").unlink()
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, dict[str, Any]]:
    """What the real TensorRT-RTX says about each file, in one process."""
    script = Path(__file__).with_name("ask_tensorrt.py")
    files = [str(folder / f"{graph.name}.onnx") for graph in GRAPHS]
    run = subprocess.run(
        [sys.executable, str(script), "89", *files], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(GRAPHS)
    return {Path(answer["file"]).stem: answer for answer in found}


def found_rules(file: Path, severity: str) -> set[str]:
    return {finding.rule for finding in lint(file, TARGETS["rtx-ada"]) if finding.severity == severity}


def test_every_file_is_a_graph_of_the_table(folder: Path) -> None:
    assert {file.stem for file in folder.iterdir()} == {graph.name for graph in GRAPHS}
    assert len(GRAPHS) == 25 and all(
        file.stat().st_size < 20_000 for file in DATA.iterdir() if file.is_file()
    )


@each_graph
def test_inspect_says_what_is_stored(graph: Foreign, folder: Path) -> None:
    found = {weight["name"]: weight for weight in contents(folder / f"{graph.name}.onnx")["weights"]}
    expected = graph.weights
    assert {name: weight["bytes"] for name, weight in found.items()} == expected.sizes
    for name, weight in found.items():
        keys = ("stored", "stored_bits", "information_bits", "granularity", "input")
        assert tuple(weight[key] for key in keys) == expected.exceptions.get(name, expected.kind), name


@each_graph
def test_totals_are_the_file_and_its_tensors(graph: Foreign, folder: Path) -> None:
    file = folder / f"{graph.name}.onnx"
    totals, model = contents(file)["totals"], onnx.load(file)
    assert totals["file"] == file.stat().st_size
    assert totals["weights"] == sum(graph.weights.sizes.values())
    tensors = [node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"]
    tensors += model.graph.initializer
    stored = sum(-(-onnx.numpy_helper.to_array(tensor).size * width(tensor) // 8) for tensor in tensors)
    assert totals["weights"] + totals["float"] + totals["other"] == stored == totals["file"] - totals["graph"]


def width(tensor: onnx.TensorProto) -> int:
    four = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    return 4 if tensor.data_type in four else 8 * onnx.numpy_helper.to_array(tensor).itemsize


@pytest.mark.parametrize("graph", OURS, ids=lambda graph: graph.name)
def test_weights_have_the_shapes_of_the_float_model(graph: Foreign, folder: Path) -> None:
    weights = contents(folder / f"{graph.name}.onnx")["weights"]
    made = table() if "table" in graph.name else convolutions() if "conv" in graph.name else matmuls()
    shapes = {tensor.name: tuple(tensor.dims) for tensor in made.graph.initializer if len(tensor.dims) > 1}
    assert {weight["name"]: tuple(weight["shape"]) for weight in weights} == shapes


@each_graph
def test_lint_finds_what_is_wrong_and_nothing_else(graph: Foreign, folder: Path) -> None:
    file = folder / f"{graph.name}.onnx"
    assert found_rules(file, "error") == set(graph.errors)
    assert found_rules(file, "warning") == set(graph.warnings)


@needs_rtx
@each_graph
def test_tensorrt_agrees_with_lint(graph: Foreign, answers: dict[str, dict[str, Any]]) -> None:
    answer = answers[graph.name]
    assert (answer["bytes"] is not None) is graph.builds, answer["messages"]
    refusing = {EVIDENCE[rule] for rule in graph.errors} & {"parser", "builder"}
    # the one error that TensorRT-RTX does not look for: negative scales of blocks
    assert graph.builds is (not refusing or graph.name == "ort-4bit")
    if not graph.builds:
        assert answer["parsed"] is ("parser" not in refusing), answer["messages"]


def test_onnxruntime_makes_negative_scales_of_symmetric_4_bit_weights(folder: Path) -> None:
    """Its largest value becomes code -8. TensorRT's documents forbid the scale that this takes."""
    model = onnx.load(folder / "ort-4bit.onnx")
    scales = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert any((values < 0).any() for name, values in scales.items() if name.endswith("scales"))
    assert found_rules(DATA / "modelopt-int4.onnx", "error") == set()


@pytest.mark.parametrize("name", ["ort-symmetric", "ort-own-domain", "modelopt-int8-stored", "modelopt-int4"])
def test_a_graph_without_errors_computes_what_the_float_model_does(name: str, folder: Path) -> None:
    model = matmuls()
    x = {"x": samples(model)}
    (expected,) = plain_session(save(model, folder.parent / "float.onnx")).run(None, x)
    (found,) = plain_session(folder / f"{name}.onnx").run(None, x)
    assert np.abs(found - expected).mean() < (0.2 if "4" in name else 0.02) * np.abs(expected).max()


def test_the_commands_take_a_sound_graph(folder: Path, tmp_path: Path) -> None:
    file = folder / "modelopt-int8-stored.onnx"
    assert cli("lint", file, "--target", "rtx-ada").code == 0
    shown = cli("inspect", file)
    assert shown.code == 0 and "fc.weight" in shown.stdout and "fc.weight_quantized" not in shown.stdout
    assert f"other floats {4 * (BIASES + 3):,}" in shown.stdout
    if find_spec("tensorrt_rtx"):
        built = cli("build", file, "--target", "rtx-ada", "--out", tmp_path / "engine")
        assert built.code == 0, built.stderr
        assert (tmp_path / "engine" / "model.plan").stat().st_size > 0


@needs_rtx
@pytest.mark.parametrize(
    ("name", "words"),
    [("ort-default", "zero point"), ("ort-4bit-operators", "FP16"), ("brevitas-linear", "DQ")],
)
def test_the_commands_refuse_a_broken_graph(name: str, words: str, folder: Path, tmp_path: Path) -> None:
    file = folder / f"{name}.onnx"
    assert cli("lint", file, "--target", "rtx-ada").code == 5
    profile = json.dumps([{"batch": [1, 2, 4], "sequence": [1, 2, 4]}])
    built = cli("build", file, "--target", "rtx-ada", "--out", tmp_path / "engine", "--profiles", profile)
    assert built.code == 5 and words in built.stderr
    assert "qcompress lint" in built.stderr
