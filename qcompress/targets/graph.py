"""A read-only view of an ONNX file: what is constant, who reads what, and of which type it is. No torch.

Tensors are read on demand (a linter needs scales, not weights). Subgraphs and functions are looked into as
well: `nodes` holds the nodes of all of them. External data is taken from the file's own folder only.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from qcompress.errors import ExportError
from qcompress.targets.child import command, environment

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
DOMAINS = ("", "ai.onnx")
RUNTIME = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

FLOATS = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
}
"""Types that a model computes in."""

INLINER_MIB, INLINER_S = 4096, 120
"""What the process may take that inlines functions."""

Shape = tuple[int | str | None, ...]
"""Dimensions as numbers and names, None for one that has neither."""

UNTYPED = (
    "Shape", "Size", "ArgMax", "ArgMin", "Equal", "Less", "Greater", "And", "Or", "Not", "IsNaN",
    "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger",
)  # fmt: skip
"""Operators whose output does not have the type of an input."""


@dataclass(frozen=True)
class View:
    """An ONNX model. Made by `read`."""

    file: Path
    data_files: tuple[Path, ...]
    """Files with external data."""
    opset: int
    inputs: tuple[ValueInfoProto, ...]
    outputs: frozenset[str]
    graphs: tuple[GraphProto, ...]
    """The main graph, and those inside its nodes."""
    nodes: tuple[NodeProto, ...]
    """Of all graphs."""
    constants: dict[str, TensorProto]
    """Initializers, and the values of Constant nodes, by name."""
    producers: dict[str, NodeProto]
    readers: dict[str, list[NodeProto]]
    """Nodes that read a tensor, once for each input that does."""
    metadata: dict[str, str]
    declared: dict[str, ValueInfoProto]
    fixed: set[str] = field(default_factory=set)
    """Constants, and what is computed from constants alone: what a parser can know when it builds."""
    types: dict[str, int] = field(default_factory=dict)
    """Element types as far as they are known; a missing one may be anything."""

    def named(self, *ops: str) -> Iterator[NodeProto]:
        """Nodes of these operators of ONNX itself. ONNX Runtime writes QuantizeLinear and DequantizeLinear in
        its own domain for opsets that lack a type; TensorRT reads them as ONNX's.
        """
        domains = {op: (*DOMAINS, RUNTIME) if op in (QUANTIZE, DEQUANTIZE) else DOMAINS for op in ops}
        return (node for node in self.nodes if node.domain in domains.get(node.op_type, ()))

    def root(self, name: str) -> str:
        """The stored tensor at the start of a chain of first inputs, or where the chain ends."""
        seen: set[str] = set()
        while name in self.producers and name not in self.constants and name not in seen:
            seen.add(name)
            name = operand(self.producers[name], 0) or name
        return name

    def shape(self, name: str) -> Shape | None:
        """Shape of a tensor, None if not even its rank is known."""
        if name in self.constants:
            return tuple(self.constants[name].dims)
        value = self.declared.get(name)
        return dimensions(value) if value is not None else None

    def values(self, name: str) -> np.ndarray | None:
        """The stored tensor as numbers, None if there is none of that name."""
        tensor = self.constants.get(name)
        if tensor is None:
            return None
        try:
            return onnx.numpy_helper.to_array(_copy(tensor), str(self.file.parent))
        except (ValueError, TypeError, KeyError, OSError, onnx.checker.ValidationError) as error:
            raise ExportError(
                f"{self.file}: tensor {name!r} cannot be read ({error})",
                fix="export the model again, and copy it with its .data file",
            ) from None


def _copy(tensor: TensorProto) -> TensorProto:
    """External data is loaded into the message: into one of its own, or the view would keep it all."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    return copy


def dimensions(value: ValueInfoProto) -> Shape | None:
    """Dimensions of a declared tensor, as `View.shape` gives them."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim
    )


def operand(node: NodeProto, index: int) -> str:
    """Name of a node's input, empty where it has none."""
    return node.input[index] if index < len(node.input) else ""


def result(node: NodeProto) -> str:
    """Name of a node's first output, empty where it has none."""
    return node.output[0] if node.output else ""


def type_word(kind: int) -> str:
    """An element type in the words of ONNX: INT8."""
    return next((word for word, value in TensorProto.DataType.items() if value == kind), f"type {kind}")


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((item.i for item in node.attribute if item.name == name), default)


def read(file: Path) -> View:
    """Open an ONNX file, without its external data."""
    model = _load(file)
    graphs = tuple(_graphs(model.graph))
    nodes, constants, declared = [], {}, {}
    for graph in graphs:
        nodes += graph.node
        constants |= {tensor.name: tensor for tensor in graph.initializer}
        declared |= {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}
    for node in nodes:
        if node.op_type == "Constant" and node.output:
            for item in node.attribute:
                if item.name == "value":
                    constants[node.output[0]] = item.t
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in filter(None, node.input):
            readers.setdefault(name, []).append(node)
    view = View(
        file=file,
        data_files=_data_files(file, constants),
        opset=max((item.version for item in model.opset_import if item.domain in DOMAINS), default=0),
        inputs=tuple(value for value in model.graph.input if value.name not in constants),
        outputs=frozenset(value.name for value in model.graph.output),
        graphs=graphs,
        nodes=tuple(nodes),
        constants=constants,
        producers={name: node for node in nodes for name in node.output if name},
        readers=readers,
        metadata={item.key: item.value for item in model.metadata_props},
        declared=declared,
    )
    view.fixed.update(_fixed(view))
    view.types.update(_types(view))
    return view


def _load(file: Path) -> ModelProto:
    try:
        model = onnx.load(file, format="protobuf", load_external_data=False)
    except FileNotFoundError:
        raise ExportError(f"{file} does not exist", fix="name an ONNX file") from None
    except (DecodeError, OSError) as error:
        raise ExportError(f"{file} is not a readable ONNX file ({error})", fix="export it again") from None
    if not model.graph.node:
        raise ExportError(f"{file} holds no graph", fix="name an ONNX file that an exporter has finished")
    return _inlined(file) if model.functions else model


def _inlined(file: Path) -> ModelProto:
    """The model with its functions in the places of their calls; made by a process of its own."""
    with tempfile.TemporaryDirectory(prefix="qcompress-inline-") as folder:
        result = Path(folder) / "model.onnx"
        words = command("qcompress.targets.inline", str(file.resolve()), str(result), str(INLINER_MIB))
        try:
            done = subprocess.run(
                words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=INLINER_S
            )
            if done.returncode == 0:
                return onnx.load(result, format="protobuf", load_external_data=False)
            lines = done.stderr.strip().splitlines()
            reason = lines[-1] if lines else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"not done after {INLINER_S} s"
    raise ExportError(
        f"{file}: its functions cannot be put in the places of their calls ({reason})",
        fix="export the model without functions",
    )


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for item in node.attribute:
            if item.type == AttributeProto.GRAPH:
                yield from _graphs(item.g)


def _data_files(file: Path, constants: dict[str, TensorProto]) -> tuple[Path, ...]:
    """Where external data lie. Every place is checked, also of tensors that are not read here: TensorRT reads
    external data itself.
    """
    folder, locations = file.parent.resolve(), {}
    for name, tensor in constants.items():
        if tensor.data_location == TensorProto.EXTERNAL:
            location = next((item.value for item in tensor.external_data if item.key == "location"), "")
            locations.setdefault(location, name)
    for location, name in locations.items():
        if not _inside(folder, location):
            raise ExportError(
                f"{file}: the data of tensor {name!r} lie outside the model's folder, at {location!r}",
                fix="do not trust this file; export the model again with its data beside it",
            )
        if not (folder / location).is_file():
            raise ExportError(
                f"{file}: {location}, with the data of tensor {name!r}, is missing",
                fix=f"copy {location} beside {file.name}",
            )
    return tuple(file.parent / location for location in sorted(locations))


def _inside(folder: Path, location: str) -> bool:
    """Whether a place is a file name inside the folder; links are followed."""
    path = PurePath(location)
    if not location or path.is_absolute() or ".." in path.parts:
        return False
    try:
        (folder / location).stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError):  # too long, or with a zero byte
        return False
    return (folder / location).resolve().is_relative_to(folder)


def _fixed(view: View) -> set[str]:
    fixed = set(view.constants)
    for node in view.nodes:
        if node.input and all(name in fixed for name in node.input if name):
            fixed.update(node.output)
    return fixed


def _types(view: View) -> dict[str, int]:
    """Element types, by following the graph in its order: a declared type wins, an unknown operator stops."""
    types = {name: tensor.data_type for name, tensor in view.constants.items()}
    for name, value in view.declared.items():
        if value.type.tensor_type.elem_type:
            types.setdefault(name, value.type.tensor_type.elem_type)
    for node in view.nodes:
        kind = _output_type(node, types)
        for name in node.output:
            if kind and name:
                types.setdefault(name, kind)
    return types


def _output_type(node: NodeProto, types: dict[str, int]) -> int:
    """Type of a node's output, 0 if unknown."""
    if node.op_type in ("Cast", "CastLike"):
        return attribute(node, "to", 0)
    if node.op_type == DEQUANTIZE:
        return attribute(node, "output_dtype", 0) or types.get(operand(node, 1), 0)
    if node.op_type == QUANTIZE:
        return types.get(operand(node, 2), 0) or attribute(node, "output_dtype", 0) or TensorProto.UINT8
    if node.op_type in UNTYPED or (node.domain not in DOMAINS and not node.op_type.startswith("QLinear")):
        return 0
    if node.op_type == "Where":
        return types.get(operand(node, 1), 0)
    return types.get(operand(node, 0), 0)
