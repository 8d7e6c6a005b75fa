"""A read-only view of an ONNX file: what is constant, who reads what, and of which type it is. No torch.

Tensors are read on demand (a linter needs scales, not weights). Subgraphs and functions are looked into as
well: `nodes` holds the nodes of all of them. `model_file.py` reads the file.
"""

from __future__ import annotations

import gc
import heapq
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto

from qcompress.errors import ExportError
from qcompress.graph.model_file import data_files, graphs_of, load
from qcompress.graph.tensors import misfit

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
DOMAINS = ("", "ai.onnx")
RUNTIME = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
CODER_DOMAINS = (*DOMAINS, RUNTIME)
"""Domains of QuantizeLinear and DequantizeLinear."""

FLOATS = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
}
"""Types that a model computes in."""

MOST_NAMES = 4_000_000
"""Most inputs and outputs of all nodes together."""

Shape = tuple[int | str | None, ...]
"""Dimensions as numbers and names, None for one that has neither."""

UNTYPED = (
    "Shape", "Size", "ArgMax", "ArgMin", "Equal", "Less", "Greater", "And", "Or", "Not", "IsNaN",
    "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger",
)  # fmt: skip
"""Operators whose output does not have the type of an input."""


class Wire(NamedTuple):
    """A node with its names, which are slow to ask a message for."""

    node: NodeProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Steps:
    """Bounds the walks through a graph: a hostile one makes each of them long."""

    def __init__(self, file: Path, nodes: int) -> None:
        self._file, self._left = file, 1_000_000 + 10 * nodes

    def take(self, count: int = 1) -> None:
        """Raise ExportError where all walks together are longer than those of any model."""
        self._left -= count
        if self._left < 0:
            raise ExportError(
                f"{self._file}: the operators behind its quantized tensors branch too often to be followed",
                fix="export the model again; no model moves a tensor through so many operators",
            )


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
    wires: tuple[tuple[Wire, ...], ...]
    """Nodes of each graph."""
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
    operators: dict[str, list[tuple[int, NodeProto]]] = field(default_factory=dict)
    """Nodes of ONNX's own operators with their places in `nodes`, by operator."""
    roots: dict[str, str] = field(default_factory=dict)
    """Results of `root`, by name."""
    sources: dict[str, NodeProto | None] = field(default_factory=dict)
    """Results of `quantizers.dequantizer_of`, by name."""
    steps: Steps = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", Steps(self.file, len(self.nodes)))

    def named(self, *ops: str) -> Iterator[NodeProto]:
        """Nodes of these operators of ONNX itself. ONNX Runtime writes QuantizeLinear and DequantizeLinear in
        its own domain for opsets that lack a type; TensorRT reads them as ONNX's.
        """
        found = (self.operators.get(op, []) for op in dict.fromkeys(ops))
        return (node for _, node in heapq.merge(*found, key=_place))

    def root(self, name: str) -> str:
        """The stored tensor at the start of a chain of first inputs, or where the chain ends."""
        seen: dict[str, None] = {}
        while name in self.producers and name not in self.constants and name not in seen:
            if name in self.roots:
                name = self.roots[name]
                break
            seen[name] = None
            name = operand(self.producers[name], 0) or name
        self.roots.update(dict.fromkeys(seen, name))
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
        if found := misfit(tensor, self.file.parent):  # before memory is taken for what it claims
            raise ExportError(
                f"{self.file}: tensor {name!r} cannot be read ({found})",
                fix="copy the file and its data again, or export the model again",
            )
        try:
            return onnx.numpy_helper.to_array(_copy(tensor), str(self.file.parent))
        except (ValueError, TypeError, KeyError, OSError, onnx.checker.ValidationError) as error:
            raise ExportError(
                f"{self.file}: tensor {name!r} cannot be read ({error})",
                fix="export the model again, and copy it with its .data file",
            ) from None


def _place(entry: tuple[int, NodeProto]) -> int:
    return entry[0]


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


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((item.i for item in node.attribute if item.name == name), default)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Python's collector of garbage is off: it would go through the nodes of a large graph again and again
    while they are read.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_without_collector()
def read(file: Path) -> View:
    """Open an ONNX file, without its external data."""
    model = load(file)
    graphs = tuple(graphs_of(model.graph))
    wires = tuple(
        tuple(Wire(node, tuple(node.input), tuple(node.output)) for node in graph.node) for graph in graphs
    )
    everything = [wire for graph in wires for wire in graph]
    if sum(len(wire.inputs) + len(wire.outputs) for wire in everything) > MOST_NAMES:
        raise ExportError(
            f"{file}: its nodes read and make more than {MOST_NAMES:,} values",
            fix="name a model of one graph",
        )
    constants, declared = {}, {}
    for graph in graphs:
        constants |= {tensor.name: tensor for tensor in graph.initializer}
        declared |= {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}
    operators: dict[str, list[tuple[int, NodeProto]]] = {}
    readers: dict[str, list[NodeProto]] = {}
    for place, (node, inputs, outputs) in enumerate(everything):
        op = node.op_type
        if op == "Constant" and outputs:
            for item in node.attribute:
                if item.name == "value":
                    constants[outputs[0]] = item.t
        if node.domain in (CODER_DOMAINS if op in (QUANTIZE, DEQUANTIZE) else DOMAINS):
            operators.setdefault(op, []).append((place, node))
        for name in filter(None, inputs):
            readers.setdefault(name, []).append(node)
    view = View(
        file=file,
        data_files=data_files(file, graphs),
        opset=max((item.version for item in model.opset_import if item.domain in DOMAINS), default=0),
        inputs=tuple(value for value in model.graph.input if value.name not in constants),
        outputs=frozenset(value.name for value in model.graph.output),
        graphs=graphs,
        wires=wires,
        nodes=tuple(wire.node for wire in everything),
        constants=constants,
        producers={name: wire.node for wire in everything for name in wire.outputs if name},
        readers=readers,
        metadata={item.key: item.value for item in model.metadata_props},
        declared=declared,
        operators=operators,
    )
    view.fixed.update(_fixed(view))
    view.types.update(_types(view))
    return view


def _fixed(view: View) -> set[str]:
    fixed = set(view.constants)
    for graph in view.wires:
        for _, inputs, outputs in graph:
            if inputs and all(name in fixed for name in inputs if name):
                fixed.update(outputs)
    return fixed


def _types(view: View) -> dict[str, int]:
    """Element types, by following the graph in its order: a declared type wins, an unknown operator stops."""
    types = {name: tensor.data_type for name, tensor in view.constants.items()}
    for name, value in view.declared.items():
        if value.type.tensor_type.elem_type:
            types.setdefault(name, value.type.tensor_type.elem_type)
    for graph in view.wires:
        for wire in graph:
            kind = _output_type(wire, types)
            for name in wire.outputs:
                if kind and name:
                    types.setdefault(name, kind)
    return types


def _output_type(wire: Wire, types: dict[str, int]) -> int:
    """Type of a node's output, 0 if unknown."""
    node, op = wire.node, wire.node.op_type
    kinds = [types.get(name, 0) for name in (*wire.inputs[:3], "", "", "")]
    if op in ("Cast", "CastLike"):
        return attribute(node, "to", 0)
    if op == DEQUANTIZE:
        return attribute(node, "output_dtype", 0) or kinds[1]
    if op == QUANTIZE:
        return kinds[2] or attribute(node, "output_dtype", 0) or TensorProto.UINT8
    if op in UNTYPED or (node.domain not in DOMAINS and not op.startswith("QLinear")):
        return 0
    return kinds[1 if op == "Where" else 0]
