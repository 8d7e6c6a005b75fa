"""Exceptions of ONNX Runtime, which share no base class and are exported only by a private module.

Checked with ONNX Runtime 1.31.1. A version that renames the module or a class fails here, at import.
"""

from __future__ import annotations

from onnxruntime.capi.onnxruntime_pybind11_state import (
    DeviceReset,
    EngineError,
    EPFail,
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NoSuchFile,
    NotFound,
    NotImplemented,  # noqa: A004
    RuntimeException,
)

ORT_ERRORS = (
    DeviceReset, EngineError, EPFail, Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, NoSuchFile,
    NotFound, NotImplemented, RuntimeException, RuntimeError, ValueError, OSError,
)  # fmt: skip
"""Errors that ONNX Runtime raises if it or a provider cannot read, load or run a graph."""
