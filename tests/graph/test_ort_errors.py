"""The exceptions of ONNX Runtime, raised by ONNX Runtime itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from qcompress.graph.ort_errors import ORT_ERRORS

CPU = ["CPUExecutionProvider"]


def graph(operator: str) -> bytes:
    """A graph of one node, y = operator(x), x fp32 [2]."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    made = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "one", [x], [y])
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()


def raised(source: bytes | str, **fed: np.ndarray) -> type[BaseException]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(source, options, providers=CPU).run(None, fed)
    except ORT_ERRORS as error:
        return type(error)
    raise AssertionError("nothing was raised")


def test_what_onnx_runtime_raises_is_caught(tmp_path: Path) -> None:
    assert raised(b"not a graph").__name__ == "InvalidProtobuf"
    assert raised(str(tmp_path / "nothing.onnx")).__name__ == "NoSuchFile"
    assert raised(graph("NoSuchOperator")).__name__ in ("InvalidGraph", "Fail")
    assert raised(graph("Relu"), x=np.zeros(3, np.float32)).__name__ == "InvalidArgument"
    assert raised(graph("Relu"), z=np.zeros(2, np.float32)) is ValueError


def test_onnx_runtime_exports_no_exception_publicly() -> None:
    """Checked with 1.31.1; when this fails, `graph/ort_errors.py` can import the public names."""
    public = [
        name
        for name, value in vars(onnxruntime).items()
        if isinstance(value, type) and issubclass(value, BaseException)
    ]
    assert public == [], f"ONNX Runtime {onnxruntime.__version__} exports {public}"


def test_the_list_has_every_exception_but_those_of_other_apis() -> None:
    """The four others belong to compiled models and to models that are loaded twice or cancelled."""
    native = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    known = {name for name, value in vars(native).items()
             if isinstance(value, type) and issubclass(value, BaseException)}  # fmt: skip
    others = {"NoModel", "ModelLoaded", "ModelLoadCanceled", "ModelRequiresCompilation"}
    assert known - {kind.__name__ for kind in ORT_ERRORS} == others, onnxruntime.__version__
