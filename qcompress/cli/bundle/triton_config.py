"""Triton's model configuration (config.pbtxt) as a protobuf message, with tensors from the graph. No torch.

The message is described by model_config.textproto in this folder. It has a descriptor pool of its own, so
that a program may import tritonclient as well.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import Message

from qcompress.errors import ExportError
from qcompress.graph.tensors import type_word
from qcompress.graph.view import View, dimensions

DESCRIPTION = Path(__file__).with_name("model_config.textproto")

ELEMENTS = {
    "FLOAT": "TYPE_FP32", "FLOAT16": "TYPE_FP16", "BFLOAT16": "TYPE_BF16", "DOUBLE": "TYPE_FP64",
    "INT8": "TYPE_INT8", "INT16": "TYPE_INT16", "INT32": "TYPE_INT32", "INT64": "TYPE_INT64",
    "UINT8": "TYPE_UINT8", "UINT16": "TYPE_UINT16", "UINT32": "TYPE_UINT32", "UINT64": "TYPE_UINT64",
    "BOOL": "TYPE_BOOL", "STRING": "TYPE_STRING",
}  # fmt: skip
"""Triton's names of ONNX element types."""


@dataclass(frozen=True)
class Tensor:
    """An input or an output of a graph."""

    name: str
    kind: str
    """TYPE_FP32, TYPE_INT64, ..."""
    axes: tuple[int | str | None, ...]
    """Sizes, or names of dynamic axes."""

    @property
    def dims(self) -> list[int]:
        """Dimensions for Triton: -1 for any size."""
        return [size if isinstance(size, int) else -1 for size in self.axes]


@functools.cache
def message_class() -> type[Message]:
    """Message class of Triton's `inference.ModelConfig`."""
    file = descriptor_pb2.FileDescriptorProto()
    text_format.Parse(DESCRIPTION.read_text(encoding="utf-8"), file)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def to_text(config: Message) -> str:
    """Text of config.pbtxt; parsed once to check that Triton will read an equal message."""
    text = text_format.MessageToString(config)
    assert from_text(text, "config.pbtxt") == config
    return text


def from_text(text: str, where: str) -> Any:
    """Parse a config.pbtxt. Raises ExportError if it is not a model configuration."""
    try:
        return text_format.Parse(text, message_class()())
    except text_format.ParseError as error:
        raise ExportError(
            f"{where} is not a model configuration of Triton: {error}", fix="bundle the run again"
        ) from None


def tensors(view: View) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of a graph, in its order."""
    main = view.graphs[0]
    return [_tensor(view, value) for value in view.inputs], [_tensor(view, value) for value in main.output]


def _tensor(view: View, value: Any) -> Tensor:
    word = type_word(value.type.tensor_type.elem_type)
    axes = dimensions(value)
    if word not in ELEMENTS:
        raise ExportError(
            f"{view.file}: {value.name!r} is of type {word}, which Triton does not have",
            fix="export the graph with inputs and outputs of another type",
        )
    if not axes:
        raise ExportError(
            f"{view.file}: {value.name!r} has no declared shape, and Triton needs one",
            fix="export the graph with shapes of its inputs and outputs, which have at least one dimension",
        )
    return Tensor(value.name, ELEMENTS[word], axes)


def batched(inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """True if the first axis of all tensors is one dynamic axis, so that Triton may batch requests."""
    first = {tensor.axes[0] for tensor in (*inputs, *outputs)}
    names = {axis for axis in first if isinstance(axis, str)}
    return not any(isinstance(axis, int) for axis in first) and len(names) <= 1


def describe(graph_tensors: list[Tensor], batch: bool) -> list[dict[str, Any]]:
    """Entries of config.pbtxt for these tensors; Triton adds the batch dimension itself."""
    return [
        {"name": tensor.name, "data_type": tensor.kind, "dims": tensor.dims[1:] if batch else tensor.dims}
        for tensor in graph_tensors
    ]
