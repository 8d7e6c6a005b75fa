"""What makes a file no ONNX graph at all: one generator for each rule of the linter. No torch.

These look at each graph by itself, the main one and those of If, Loop and Scan: a name is made once in a
graph, and read in it and in those inside it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

import onnx
from onnx import GraphProto

from qcompress.errors import ExportError
from qcompress.graph.lint.activations import Broken
from qcompress.graph.model_file import stored_tensors
from qcompress.graph.qdq import node_name
from qcompress.graph.tensors import misfit
from qcompress.graph.view import DOMAINS, View, Wire
from qcompress.schema.targets import Target


def _made(graph: GraphProto, wires: Iterable[Wire]) -> Iterator[str]:
    """Names that a graph makes, before its nodes and by them; an input's value may be stored, too."""
    inputs = [value.name for value in graph.input]
    yield from inputs
    known = set(inputs)
    yield from (tensor.name for tensor in graph.initializer if tensor.name not in known)
    yield from (tensor.values.name for tensor in graph.sparse_initializer)
    yield from (name for wire in wires for name in wire.outputs if name)


def missing_values(view: View, target: Target) -> Iterator[Broken]:
    made = {
        name for graph, wires in zip(view.graphs, view.wires, strict=True) for name in _made(graph, wires)
    }
    for graph, wires in zip(view.graphs, view.wires, strict=True):
        for node, inputs, _ in wires:
            for name in inputs:
                if name and name not in made:
                    yield Broken(node_name(node), f"reads {name!r}, which nothing makes")
        for value in graph.output:
            if value.name not in made:
                yield Broken(value.name or "(graph)", "is an output, and nothing makes it")


def repeated_values(view: View, target: Target) -> Iterator[Broken]:
    for graph, wires in zip(view.graphs, view.wires, strict=True):
        seen: set[str] = set()
        for name in _made(graph, wires):
            if name in seen:
                yield Broken(name, "is made twice")
            seen.add(name)


def unsorted_nodes(view: View, target: Target) -> Iterator[Broken]:
    for wires in view.wires:
        last = {name: place for place, wire in enumerate(wires) for name in wire.outputs}
        for place, (node, inputs, outputs) in enumerate(wires):
            late = next((name for name in inputs if name and last.get(name, -1) >= place), None)
            if late is not None:
                how = "makes itself" if late in outputs else "is made by a later node"
                yield Broken(
                    node_name(node), f"reads {late!r}, which {'it ' if late in outputs else ''}{how}"
                )


def empty_graphs(view: View, target: Target) -> Iterator[Broken]:
    main = view.graphs[0]
    if not main.output:
        yield Broken("(graph)", "no output")
    if view.opset < 1:
        yield Broken("(graph)", "no opset of ONNX")


def unknown_opsets(view: View, target: Target) -> Iterator[Broken]:
    newest = onnx.defs.onnx_opset_version()
    if not 0 < view.opset <= newest:
        yield Broken("(graph)", f"opset {view.opset}, and onnx {onnx.__version__} knows 1 to {newest}")


def broken_tensors(view: View, target: Target) -> Iterator[Broken]:
    for name, tensor in stored_tensors(view.graphs):
        if found := misfit(tensor, view.file.parent):
            yield Broken(name, found)


@functools.cache
def _schema(op: str, opset: int) -> onnx.defs.OpSchema | None:
    """The definition of an operator of ONNX, None if the opset has none."""
    newest = min(opset, onnx.defs.onnx_opset_version())
    if newest < 1 or not onnx.defs.has(op, newest, ""):
        return None
    return onnx.defs.get_schema(op, newest, "")


def unknown_operators(view: View, target: Target) -> Iterator[Broken]:
    """Operators that ONNX does not have at the graph's opset; other domains are not judged."""
    unknown = {op for op in view.operators if view.opset > 0 and _schema(op, view.opset) is None}
    for node in view.named(*sorted(unknown)):
        if node.domain in DOMAINS:
            yield Broken(node_name(node), f"no operator {node.op_type!r} in opset {view.opset}")


def operands_out_of_number(view: View, target: Target) -> Iterator[Broken]:
    """More or fewer inputs and outputs than the operator has."""
    known: dict[tuple[str, tuple[bool, ...], tuple[bool, ...]], list[str]] = {}
    for wire in itertools.chain(*view.wires):
        if wire.node.domain not in DOMAINS:
            continue
        form = wire.node.op_type, tuple(map(bool, wire.inputs)), tuple(map(bool, wire.outputs))
        if form not in known:
            schema = _schema(form[0], view.opset)
            known[form] = [] if schema is None else list(_unfit(schema, form[0], *form[1:]))
        for found in known[form]:
            yield Broken(node_name(wire.node), found)


def _unfit(
    schema: onnx.defs.OpSchema, op: str, inputs: tuple[bool, ...], outputs: tuple[bool, ...]
) -> Iterator[str]:
    """Operands that an operator must not have so; each is True if it has a name."""
    if not schema.min_input <= len(inputs) <= schema.max_input:
        yield f"{len(inputs)} inputs of {op}"
    elif not schema.min_output <= len(outputs) <= schema.max_output:
        yield f"{len(outputs)} outputs of {op}"
    for word, named, parameters in (("input", inputs, schema.inputs), ("output", outputs, schema.outputs)):
        needed = [
            place
            for place, (is_named, parameter) in enumerate(zip(named, parameters, strict=False))
            if not is_named and parameter.option == onnx.defs.OpSchema.FormalParameterOption.Single
        ]
        if needed:
            yield f"{word} {needed[0]} of {op} is empty"


STRUCTURE: tuple[tuple[Callable[[View, Target | None], Iterator[Broken]], str], ...] = (
    (unknown_opsets, "export the model again, for an opset that this version of onnx knows"),
    (missing_values, "export the model again; something has removed a node or a tensor and not its readers"),
    (repeated_values, "give the results of different nodes different names"),
    (unsorted_nodes, "sort the nodes; no loop can be written without Loop or Scan"),
    (broken_tensors, "copy the file and its data again, or export the model again"),
)
"""The rules without which a file is not a graph at all, and their fixes."""


def demand_sound(view: View) -> None:
    """Raise ExportError for a file that is not a graph: circles, missing and repeated values, tensors whose
    data do not fit.
    """
    for check, fix in STRUCTURE:
        for broken in check(view, None):
            raise ExportError(f"{view.file}: {broken.layer}: {broken.found}", fix=fix)
