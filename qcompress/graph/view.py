"""Read-only view of an ONNX file: constants, producers, readers and types. No torch.

Tensors are read on demand (the linter needs scales, not weights). `nodes` includes the nodes of subgraphs and
of inlined functions. `model_file.py` reads the file.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto

from qcompress.encodings.walk import (
    DEQUANTIZE,
    DOMAINS,
    QUANTIZE,
    attribute,
    is_standard,
    operand,
)
from qcompress.errors import ExportError
from qcompress.graph.joined import Columns, separate
from qcompress.graph.model_file import data_files, graphs_of, load
from qcompress.graph.tensors import BITS, misfit, type_word
from qcompress.system.collector import paused

FLOATS = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
}
"""Compute types of a model."""

MOST_NAMES = 4_000_000
"""Maximum number of inputs and outputs of all nodes together."""

Shape = tuple[int | str | None, ...]
"""Dimensions as sizes or names, None for an unknown one."""

UNTYPED = (
    "Shape", "Size", "ArgMax", "ArgMin", "Equal", "Less", "Greater", "And", "Or", "Not", "IsNaN",
    "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger",
)  # fmt: skip
"""Operators whose output type is not that of an input."""


class Wire(NamedTuple):
    """A node with copies of its input and output names, which are slow to read from the protobuf message."""

    node: NodeProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Steps:
    """Budget for all walks through a graph; a malicious graph can make each walk very long."""

    def __init__(self, file: Path, nodes: int) -> None:
        self._file, self._left = file, 1_000_000 + 10 * nodes

    def take(self, count: int = 1) -> None:
        """Use `count` steps. Raises ExportError when the budget is spent."""
        self._left -= count
        if self._left < 0:
            raise ExportError(
                f"{self._file}: the operators behind its quantized tensors branch too often to be followed",
                fix="export the model again; no model moves a tensor through so many operators",
            )


@dataclass(frozen=True)
class View:
    """View of an ONNX model, made by `read`. If the main graph and a subgraph use one name, it belongs to the
    tensor or node of the main graph.
    """

    file: Path
    data_files: tuple[Path, ...]
    """Paths of the external data."""
    opset: int
    inputs: tuple[ValueInfoProto, ...]
    outputs: frozenset[str]
    graphs: tuple[GraphProto, ...]
    """The main graph and its subgraphs."""
    wires: tuple[tuple[Wire, ...], ...]
    """Nodes of each graph in `graphs`."""
    nodes: tuple[NodeProto, ...]
    """Nodes of all graphs."""
    constants: dict[str, TensorProto]
    """Initializers and values of Constant nodes, by name."""
    producers: dict[str, NodeProto]
    readers: dict[str, list[NodeProto]]
    """Nodes that read a tensor, once per input that does."""
    metadata: dict[str, str]
    declared: dict[str, ValueInfoProto]
    fixed: set[str] = field(default_factory=set)
    """Names of constants and of values computed from constants only, which are known at build time."""
    types: dict[str, int] = field(default_factory=dict)
    """Known element types by value name; others are unknown."""
    operators: dict[str, list[tuple[int, NodeProto]]] = field(default_factory=dict)
    """Nodes of standard ONNX operators with their positions in `nodes`, by operator."""
    roots: dict[str, str] = field(default_factory=dict)
    """Cache of `root`."""
    sources: dict[str, NodeProto | None] = field(default_factory=dict)
    """Cache of `qdq.dequantizer_of`."""
    columns: dict[str, Columns] = field(default_factory=dict)
    """Constants that are columns of a joined weight, for `read(file, separated=True)`."""
    steps: Steps = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", Steps(self.file, len(self.nodes)))

    def named(self, *ops: str) -> Iterator[NodeProto]:
        """Nodes of these standard ONNX operators (`walk.is_standard`), in the order of `nodes`."""
        groups = (self.operators.get(op, []) for op in dict.fromkeys(ops))
        return (node for _, node in heapq.merge(*groups, key=_place))

    def root(self, name: str) -> str:
        """Follow first inputs back to a stored tensor; returns its name, or the last name of the chain."""
        seen: dict[str, None] = {}
        while name in self.producers and name not in self.constants and name not in seen:
            if name in self.roots:
                name = self.roots[name]
                break
            seen[name] = None
            name = operand(self.producers[name], 0) or name
        self.roots.update(dict.fromkeys(seen, name))
        return name

    @cached_property
    def places(self) -> dict[int, int]:
        """Positions in `nodes`, by the id of the node."""
        return {id(node): place for place, node in enumerate(self.nodes)}

    def word(self, name: str) -> str:
        """ONNX word of a value's element type, such as INT8; empty if unknown."""
        kind = self.types.get(name)
        return type_word(kind) if kind else ""

    def bits(self, name: str) -> int:
        """Bits of one element of a value, 0 if unknown."""
        return BITS.get(self.word(name), 0)

    def is_float(self, name: str) -> bool:
        """True if a value has one of the compute types."""
        return self.types.get(name) in FLOATS

    def label(self, name: str) -> str:
        """Element type of a value for a listing, such as `fp32` or `int8`."""
        return FLOATS.get(self.types.get(name), self.word(name).lower())

    def shape(self, name: str) -> Shape | None:
        """Shape of a tensor, None if its rank is unknown."""
        if name in self.constants:
            return tuple(self.constants[name].dims)
        value = self.declared.get(name)
        return dimensions(value) if value is not None else None

    def initializer(self, name: str) -> np.ndarray | None:
        """Values of an initializer; None for any other value, also for the output of a Constant node and for
        an omitted input. Raises ExportError for damaged data.
        """
        return self.values(name) if name and name not in self.producers else None

    def values(self, name: str) -> np.ndarray | None:
        """Values of a stored tensor, None if it does not exist. Raises ExportError for damaged data."""
        if name in self.columns:
            return self.columns[name].of(self._array(name, self.columns[name].tensor))
        tensor = self.constants.get(name)
        return None if tensor is None else self._array(name, tensor)

    def _array(self, name: str, tensor: TensorProto) -> np.ndarray:
        """Values of a tensor; messages call it `name`."""
        if problem := misfit(tensor, self.file.parent):  # before memory is allocated for the claimed shape
            raise ExportError(
                f"{self.file}: tensor {name!r} cannot be read ({problem})",
                fix="copy the file and its data again, or export the model again",
            )
        try:
            return onnx.numpy_helper.to_array(_unlinked(tensor), str(self.file.parent))
        except (ValueError, TypeError, KeyError, OSError, onnx.checker.ValidationError) as error:
            raise ExportError(
                f"{self.file}: tensor {name!r} cannot be read ({error})",
                fix="export the model again, and copy it with its .data file",
            ) from None


def _place(entry: tuple[int, NodeProto]) -> int:
    return entry[0]


def _unlinked(tensor: TensorProto) -> TensorProto:
    """Copy a tensor message with external data: onnx loads them into the message, and the view must not keep
    them.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor
    copy = TensorProto()
    copy.CopyFrom(tensor)
    return copy


def dimensions(value: ValueInfoProto) -> Shape | None:
    """Shape of a declared tensor, None if its rank is unknown."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim
    )


@paused()
def read(file: Path, *, separated: bool = False) -> View:
    """Open an ONNX file, without its external data. `separated`: matmuls that `export` joined are shown as
    those of their layers.
    """
    model = load(file)
    columns = separate(model) if separated else {}
    graphs = tuple(graphs_of(model.graph))
    wires = tuple(
        tuple(Wire(node, tuple(node.input), tuple(node.output)) for node in graph.node) for graph in graphs
    )
    everything = [wire for graph in wires for wire in graph]
    if sum(len(wire.inputs) + len(wire.outputs) for wire in everything) > MOST_NAMES:
        raise ExportError(
            f"{file}: its nodes have more than {MOST_NAMES:,} inputs and outputs",
            fix="name a model of one graph",
        )
    constants, declared = {}, {}
    for graph in (*graphs, graphs[0]):
        constants |= {tensor.name: tensor for tensor in graph.initializer}
    for graph in graphs:
        declared |= {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}
    operators: dict[str, list[tuple[int, NodeProto]]] = {}
    readers: dict[str, list[NodeProto]] = {}
    for place, (node, inputs, outputs) in enumerate(everything):
        op = node.op_type
        if op == "Constant" and outputs:
            for item in node.attribute:
                if item.name == "value":
                    constants[outputs[0]] = item.t
        if is_standard(op, node.domain):
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
        producers={name: wire.node for wire in (*everything, *wires[0]) for name in wire.outputs if name},
        readers=readers,
        metadata={item.key: item.value for item in model.metadata_props},
        declared=declared,
        operators=operators,
        columns=columns,
    )
    view.fixed.update(_fixed(view))
    view.types.update(_types(view))
    return view


def _fixed(view: View) -> set[str]:
    """Names of constants and of values computed from constants only."""
    fixed = set(view.constants)
    for graph in view.wires:
        for _, inputs, outputs in graph:
            if inputs and all(name in fixed for name in inputs if name):
                fixed.update(outputs)
    return fixed


def _types(view: View) -> dict[str, int]:
    """Infer element types in graph order: a declared type has priority; outputs of unknown operators stay
    unknown.
    """
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
