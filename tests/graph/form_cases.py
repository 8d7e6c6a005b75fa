"""Graphs before and after a form for ONNX Runtime, for `test_onnxruntime_forms.py` and
`test_convolution_forms.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from graphs import Graph
from lines import plain_session
from onnx import TensorProto

from qcompress.graph.lint.lint import lint
from qcompress.graph.onnxruntime_forms import drop_unused
from qcompress.schema.targets import TARGETS

Inputs = dict[str, np.ndarray]


def saved(before: onnx.ModelProto, folder: Path, change: Callable[[ir.Model], object]) -> tuple[Path, Path]:
    """The file of a graph, and that of the changed graph."""
    graph = ir.from_proto(before)
    change(graph)
    drop_unused(graph)
    onnx.save(before, folder / "before.onnx")
    ir.save(graph, folder / "after.onnx")
    onnx.checker.check_model(str(folder / "after.onnx"), full_check=True)
    return folder / "before.onnx", folder / "after.onnx"


def assert_same_bits(before: Path, after: Path, inputs: Inputs) -> None:
    old, new = (plain_session(file).run(None, inputs) for file in (before, after))
    for one, other in zip(old, new, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def kernels(file: Path) -> Counter[str]:
    """Operators of the optimized graph, by name."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(file.with_suffix(".optimized.onnx"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def rules(file: Path, target: str) -> set[str]:
    return {finding.rule for finding in lint(file, TARGETS[target]) if finding.severity == "error"}


def pair(graph: Graph, source: str, name: str = "", scale: float = 0.05) -> str:
    name = name or f"{source}.input"
    graph.tensor(f"{name}.scale", np.float32(scale))
    graph.tensor(f"{name}.zero", np.int8(0), TensorProto.INT8)
    parts = [f"{name}.scale", f"{name}.zero"]
    q = graph.node("QuantizeLinear", [source, *parts], f"{name}/QuantizeLinear")
    return graph.node("DequantizeLinear", [q, *parts], f"{name}/DequantizeLinear")
