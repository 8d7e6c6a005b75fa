"""Linter checks of the structure of a graph: one generator per rule. No torch.

They check each graph separately: the main graph and the subgraphs of If, Loop and Scan. A graph produces each
name once; the graph itself and its subgraphs may read it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

import onnx
from onnx import GraphProto

from qcompress.encodings.walk import DOMAINS
from qcompress.errors import ExportError
from qcompress.graph.lint.activations import Broken
from qcompress.graph.model_file import stored_tensors
from qcompress.graph.qdq import node_name
from qcompress.graph.tensors import misfit
from qcompress.graph.view import View, Wire
from qcompress.schema.targets import Target


def _made(graph: GraphProto, wires: Iterable[Wire]) -> Iterator[str]:
    """Names that a graph produces: inputs, initializers and node outputs. An input may also have an
    initializer.
    """
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
        if problem := misfit(tensor, view.file.parent):
            yield Broken(name, problem)


@functools.cache
def _schema(op: str, opset: int) -> onnx.defs.OpSchema | None:
    """Definition of an ONNX operator at an opset, None if the opset does not have it."""
    newest = min(opset, onnx.defs.onnx_opset_version())
    if newest < 1 or not onnx.defs.has(op, newest, ""):
        return None
    return onnx.defs.get_schema(op, newest, "")


def unknown_operators(view: View, target: Target) -> Iterator[Broken]:
    """Operators that ONNX lacks at the graph's opset; other domains are not checked."""
    unknown = {op for op in view.operators if view.opset > 0 and _schema(op, view.opset) is None}
    for node in view.named(*sorted(unknown)):
        if node.domain in DOMAINS:
            yield Broken(node_name(node), f"no operator {node.op_type!r} in opset {view.opset}")


def operands_out_of_number(view: View, target: Target) -> Iterator[Broken]:
    """Nodes with a wrong number of inputs or outputs, or with an empty required one."""
    known: dict[tuple[str, tuple[bool, ...], tuple[bool, ...]], list[str]] = {}
    for wire in itertools.chain(*view.wires):
        if wire.node.domain not in DOMAINS:
            continue
        form = wire.node.op_type, tuple(map(bool, wire.inputs)), tuple(map(bool, wire.outputs))
        if form not in known:
            schema = _schema(form[0], view.opset)
            known[form] = [] if schema is None else list(_unfit(schema, form[0], *form[1:]))
        for problem in known[form]:
            yield Broken(node_name(wire.node), problem)


def _unfit(
    schema: onnx.defs.OpSchema, op: str, inputs: tuple[bool, ...], outputs: tuple[bool, ...]
) -> Iterator[str]:
    """Describe wrong operands of an operator; `inputs` and `outputs` are True for operands with a name."""
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


STRUCTURE: dict[Callable[[View, Target | None], Iterator[Broken]], str] = {
    unknown_opsets: "export the model again, for an opset that this version of onnx knows",
    missing_values: "export the model again; a tool removed a node or a tensor and kept its readers",
    repeated_values: "give the outputs of different nodes different names",
    unsorted_nodes: "sort the nodes topologically; write loops with Loop or Scan",
    broken_tensors: "copy the file and its data again, or export the model again",
}
"""Checks that every valid graph passes, with their fixes."""


def demand_sound(view: View) -> None:
    """Raise ExportError for an invalid graph: unknown opset, cycles, missing or repeated values, or tensors
    whose data do not fit their shapes.
    """
    for check, fix in STRUCTURE.items():
        for broken in check(view, None):
            raise ExportError(f"{view.file}: {broken.layer}: {broken.found}", fix=fix)
