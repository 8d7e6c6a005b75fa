"""What makes a file no ONNX graph at all: one generator for each rule of the linter. No torch.

These look at each graph by itself, the main one and those of If, Loop and Scan: a name is made once in a
graph, and read in it and in those inside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
from onnx import GraphProto, TensorProto

from qcompress.targets.checks import Broken
from qcompress.targets.graph import DOMAINS, View, type_word
from qcompress.targets.quantizers import node_name
from qcompress.targets.sizes import BITS, stored_bytes
from qcompress.targets.table import Target


def _made(graph: GraphProto) -> Iterator[str]:
    """Names that a graph makes, before its nodes and by them; an input's value may be stored, too."""
    inputs = [value.name for value in graph.input]
    yield from inputs
    yield from (tensor.name for tensor in graph.initializer if tensor.name not in inputs)
    yield from (tensor.values.name for tensor in graph.sparse_initializer)
    yield from (name for node in graph.node for name in node.output if name)


def missing_values(view: View, target: Target) -> Iterator[Broken]:
    made = {name for graph in view.graphs for name in _made(graph)}
    for graph in view.graphs:
        for node in graph.node:
            for name in node.input:
                if name and name not in made:
                    yield Broken(node_name(node), f"reads {name!r}, which nothing makes")
        for value in graph.output:
            if value.name not in made:
                yield Broken(value.name or "(graph)", "is an output, and nothing makes it")


def repeated_values(view: View, target: Target) -> Iterator[Broken]:
    for graph in view.graphs:
        seen: set[str] = set()
        for name in _made(graph):
            if name in seen:
                yield Broken(name, "is made twice")
            seen.add(name)


def unsorted_nodes(view: View, target: Target) -> Iterator[Broken]:
    for graph in view.graphs:
        last = {name: place for place, node in enumerate(graph.node) for name in node.output}
        for place, node in enumerate(graph.node):
            late = next((name for name in node.input if name and last.get(name, -1) >= place), None)
            if late is not None:
                how = "makes itself" if late in node.output else "is made by a later node"
                yield Broken(
                    node_name(node), f"reads {late!r}, which {'it ' if late in node.output else ''}{how}"
                )


def empty_graphs(view: View, target: Target) -> Iterator[Broken]:
    main = view.graphs[0]
    if not main.output:
        yield Broken("(graph)", "no output")
    if not view.opset:
        yield Broken("(graph)", "no opset of ONNX")


def broken_tensors(view: View, target: Target) -> Iterator[Broken]:
    for name, tensor in view.constants.items():
        if found := _misfit(view, tensor):
            yield Broken(name, found)


def _misfit(view: View, tensor: TensorProto) -> str:
    """What is wrong with a stored tensor, empty if nothing is."""
    if type_word(tensor.data_type) not in (*BITS, "STRING"):
        return f"element {type_word(tensor.data_type).lower()}"
    if any(length < 0 for length in tensor.dims):
        return f"shape {list(tensor.dims)}"
    needed = stored_bytes(tensor)
    if tensor.data_location == TensorProto.EXTERNAL:
        return _misplaced(view, tensor, needed)
    if tensor.HasField("raw_data"):
        found = len(tensor.raw_data)
        return (
            ""
            if found == needed
            else f"{found:,} bytes for shape {list(tensor.dims)}, which takes {needed:,}"
        )
    fields = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
    values, wanted = sum(len(getattr(tensor, field)) for field in fields), math.prod(tensor.dims)
    if BITS.get(type_word(tensor.data_type), 8) < 8:
        wanted = needed  # two or four to a number
    wanted *= 2 if type_word(tensor.data_type).startswith("COMPLEX") else 1
    return "" if values == wanted else f"{values:,} values for shape {list(tensor.dims)}"


def _misplaced(view: View, tensor: TensorProto, needed: int) -> str:
    entries = {item.key: item.value for item in tensor.external_data}
    size = (view.file.parent / entries.get("location", "")).stat().st_size
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or needed)
    except ValueError:
        return f"offset {entries.get('offset')!r}, length {entries.get('length')!r}"
    if offset < 0 or length != needed or offset + length > size:
        return f"{length:,} bytes from {offset:,} of a file of {size:,}, and its shape takes {needed:,}"
    return ""


def unknown_operators(view: View, target: Target) -> Iterator[Broken]:
    """Operators that ONNX does not have at the graph's opset; other domains are not judged."""
    newest = min(view.opset, onnx.defs.onnx_opset_version())
    for node in view.nodes:
        if node.domain in DOMAINS and newest > 0 and not onnx.defs.has(node.op_type, newest, ""):
            yield Broken(node_name(node), f"no operator {node.op_type!r} in opset {view.opset}")


def operands_out_of_number(view: View, target: Target) -> Iterator[Broken]:
    """More or fewer inputs and outputs than the operator has."""
    newest = min(view.opset, onnx.defs.onnx_opset_version())
    for node in view.nodes:
        if node.domain not in DOMAINS or newest < 1 or not onnx.defs.has(node.op_type, newest, ""):
            continue
        schema = onnx.defs.get_schema(node.op_type, newest, "")
        if not schema.min_input <= len(node.input) <= schema.max_input:
            yield Broken(node_name(node), f"{len(node.input)} inputs of {node.op_type}")
        elif not schema.min_output <= len(node.output) <= schema.max_output:
            yield Broken(node_name(node), f"{len(node.output)} outputs of {node.op_type}")
        for word, names, parameters in (
            ("input", node.input, schema.inputs),
            ("output", node.output, schema.outputs),
        ):
            needed = [
                place
                for place, (name, parameter) in enumerate(zip(names, parameters, strict=False))
                if not name and parameter.option == onnx.defs.OpSchema.FormalParameterOption.Single
            ]
            if needed:
                yield Broken(node_name(node), f"{word} {needed[0]} of {node.op_type} is empty")
