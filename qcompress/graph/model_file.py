"""Reader of ONNX files of unknown origin, with bounded memory. No torch.

Files that are not regular, too large for the format or truncated are refused before parsing. Functions are
inlined only if the result has a plausible size. External data must be inside the file's folder.
"""

from __future__ import annotations

import mmap
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from qcompress.errors import ExportError
from qcompress.graph.tensors import location_of
from qcompress.system.child_process import command, environment
from qcompress.system.memory import bounded
from qcompress.system.untrusted_file import demand_file, misfit_of

LARGEST_FILE = 2**31 - 1
"""Maximum bytes of a protobuf message."""

PARSED_MIB = 256
"""Memory limit for parsing a small file."""

MOST_FIELDS = 1_000_000
"""Maximum number of nodes, tensors and declared values of a graph."""

MOST_NODES, MOST_BYTES = 500_000, 2**26
"""Maximum nodes and bytes of a graph after its functions are inlined."""

INLINER_MIB, INLINER_S = 1024, 120
"""Memory (in addition to the file's size) and time limit of the process that inlines functions."""

ENDLESS = 10**15
"""Upper bound of node and byte counts."""

GRAPH = 7
"""Number of the field `graph` in ModelProto."""

AGAIN = "export it again, and copy it whole"


def load(file: Path) -> ModelProto:
    """Load a model without its external data, with its functions inlined."""
    demand_file(file, ExportError, limit=LARGEST_FILE, fix="name an ONNX file")
    model = _parsed(file, file)
    if not model.graph.node:
        raise ExportError(f"{file} holds no graph", fix="name an ONNX file with at least one node")
    return _inlined(file, model) if model.functions else model


def _parsed(file: Path, shown: Path) -> ModelProto:
    """Parse a file; messages name it `shown`. Memory is limited in proportion to the file's size, since two
    bytes can become a hundred when they are parsed.
    """
    allowance = PARSED_MIB * 2**20 + 3 * file.stat().st_size
    try:
        _scan(file, shown)
        with bounded(allowance):
            return onnx.load(file, format="protobuf", load_external_data=False)
    except (DecodeError, OSError, MemoryError) as error:
        if isinstance(error, MemoryError) or "alloc" in str(error):
            raise ExportError(
                f"{shown} needs more than {allowance >> 20:,} MiB of memory to parse, and has "
                f"{file.stat().st_size:,} bytes",
                fix="do not trust this file; export the model again",
            ) from None
        raise ExportError(f"{shown} is not a readable ONNX file ({error})", fix=AGAIN) from None


# The wire format ----------------------------------------------------------------------------------


def _scan(file: Path, shown: Path) -> None:
    """Walk the fields of the model and its graph without reading their content. Refuses a field that ends
    beyond the file and a graph with too many fields, before parsing allocates memory.
    """
    if not file.stat().st_size:
        raise ExportError(f"{shown} is empty", fix=AGAIN)
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        left = MOST_FIELDS
        for number, start, end in _fields(content, 0, len(content)):
            left -= 1
            if number == GRAPH:
                left -= sum(1 for _, _ in zip(_fields(content, start, end), range(left + 1), strict=False))
            if left < 0:
                raise ExportError(
                    f"{shown} has more than {MOST_FIELDS:,} nodes and tensors",
                    fix="name a model of one graph",
                )


def _fields(content: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field of a message. Raises DecodeError for bytes that are not fields."""
    while place < end:
        tag, start = _varint(content, place, end)
        kind = tag & 7
        if kind == 0:
            stop = _varint(content, start, end)[1]
        elif kind == 2:
            length, start = _varint(content, start, end)
            stop = start + length
        elif kind in (1, 5):
            stop = start + (8 if kind == 1 else 4)
        else:
            raise DecodeError("its bytes are not fields of a message")
        if not tag >> 3:
            raise DecodeError("its bytes are not fields of a message")
        if stop > end:
            raise DecodeError(f"cut short: a field ends at byte {stop:,} of {end:,}")
        yield tag >> 3, start, stop
        place = stop


def _varint(content: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    """Decode a protobuf varint; returns the number and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            raise DecodeError("cut short")
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise DecodeError("its bytes are not fields of a message")


# Functions ----------------------------------------------------------------------------------------

Key = tuple[str, str, str]
"""Domain, name and overload of a function."""


@dataclass(frozen=True)
class _Size:
    """Size of a function after inlining one call."""

    nodes: int
    bytes: int


def _inlined(file: Path, model: ModelProto) -> ModelProto:
    """Inline the functions of a model in a child process. Raises ExportError if that fails."""
    _bound_expansion(file, model)
    with tempfile.TemporaryDirectory(prefix="qcompress-inline-") as folder:
        result = Path(folder) / "model.onnx"
        mib = INLINER_MIB + 8 * (file.stat().st_size >> 20)
        words = command("qcompress.graph.inline", str(file.resolve()), str(result), str(mib))
        try:
            done = subprocess.run(
                words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=INLINER_S
            )
            if done.returncode == 0:
                return _parsed(result, file)
            lines = done.stderr.strip().splitlines()
            reason = lines[-1] if lines else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"not done after {INLINER_S} s"
    raise ExportError(
        f"{file}: its functions cannot be inlined ({reason})",
        fix="export the model without functions",
    )


def _bound_expansion(file: Path, model: ModelProto) -> None:
    """Raise ExportError for functions that call themselves or whose inlining makes the graph too large."""
    functions = {_key(function): function for function in model.functions}
    sizes: dict[Key, _Size] = {}
    for key in _callees_first(file, functions):
        sizes[key] = _expanded(functions[key].node, functions[key].ByteSize(), sizes)
    whole = _expanded(model.graph.node, 0, sizes)
    if whole.nodes > MOST_NODES or whole.bytes > MOST_BYTES + 4 * model.ByteSize():
        size = f"{_about(whole.nodes)} nodes and {_about(whole.bytes)} bytes"
        raise ExportError(
            f"{file}: its functions become {size} when inlined, and the limit is {MOST_NODES:,} nodes and "
            f"{MOST_BYTES:,} bytes",
            fix="export the model without functions",
        )


def _about(count: int) -> str:
    """Format a count that may have reached its upper bound."""
    return f"{count:,}" if count < ENDLESS else "more than 10^15"


def _key(function: FunctionProto | NodeProto) -> Key:
    """Key of a function, or of the function that a node calls."""
    name = function.name if isinstance(function, FunctionProto) else function.op_type
    return function.domain, name, function.overload


def _expanded(nodes: Iterator[NodeProto], own: int, sizes: Mapping[Key, _Size]) -> _Size:
    """Size of `nodes` and their subgraphs after inlining the functions in `sizes`; `own`: their bytes."""
    count, size = 0, own
    for node in _all_nodes(nodes):
        called = sizes.get(_key(node))
        count += 1 if called is None else called.nodes
        size += 0 if called is None else called.bytes
    return _Size(min(count, ENDLESS), min(size, ENDLESS))


def _all_nodes(nodes: Iterator[NodeProto]) -> Iterator[NodeProto]:
    """Nodes, including those of subgraphs."""
    for node in nodes:
        yield node
        for item in node.attribute:
            for graph in subgraphs(item):
                yield from _all_nodes(graph.node)


def _callees_first(file: Path, functions: Mapping[Key, FunctionProto]) -> list[Key]:
    """Functions in topological order, callees first. Raises ExportError for recursive calls."""
    order: list[Key] = []
    state: dict[Key, str] = {}
    for first in functions:
        waiting = [first]
        while waiting:
            key = waiting[-1]
            if key in state:
                waiting.pop()
                if state[key] == "open":
                    state[key] = "done"
                    order.append(key)
                continue
            state[key] = "open"
            for called in dict.fromkeys(map(_key, _all_nodes(functions[key].node))):
                if called in functions and state.get(called) == "open":
                    raise ExportError(
                        f"{file}: its function {called[1]!r} calls itself", fix="export it without functions"
                    )
                if called in functions and called not in state:
                    waiting.append(called)
    return order


# Tensors and their files --------------------------------------------------------------------------


def subgraphs(item: AttributeProto) -> tuple[GraphProto, ...]:
    """Graphs that an attribute holds; its declared type is ignored."""
    own = (item.g,) if item.HasField("g") else ()
    return (*own, *item.graphs) if item.graphs else own


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and its subgraphs."""
    yield graph
    for node in graph.node:
        for item in node.attribute:
            for inner in subgraphs(item):
                yield from graphs_of(inner)


def stored_tensors(graphs: tuple[GraphProto, ...]) -> Iterator[tuple[str, TensorProto]]:
    """Yield all stored tensors with a name for messages, including those of attributes and sparse tensors."""
    for graph in graphs:
        yield from ((tensor.name, tensor) for tensor in graph.initializer)
        for sparse in graph.sparse_initializer:
            yield from ((sparse.values.name, tensor) for tensor in (sparse.values, sparse.indices))
        for node in graph.node:
            for item in node.attribute:
                name = node.output[0] if node.output else node.name
                held = [item.t] if item.HasField("t") else []
                sparse = [item.sparse_tensor] if item.HasField("sparse_tensor") else []
                for one in (*sparse, *item.sparse_tensors):
                    held += [one.values, one.indices]
                yield from ((name, tensor) for tensor in (*held, *item.tensors))


def data_files(file: Path, graphs: tuple[GraphProto, ...]) -> tuple[Path, ...]:
    """Paths of the external data. The locations of all tensors are checked, including tensors that are not
    read here, because TensorRT reads external data itself. Raises ExportError for a location outside the
    file's folder or a missing file.
    """
    folder, locations = file.parent.resolve(), {}
    for name, tensor in stored_tensors(graphs):
        if tensor.data_location == TensorProto.EXTERNAL:
            locations.setdefault(location_of(tensor), name)
    for location, name in locations.items():
        if not _inside(folder, location):
            raise ExportError(
                f"{file}: the data of tensor {name!r} lie outside the model's folder, at {location!r}",
                fix="do not trust this file; export the model again with its data beside it",
            )
        if problem := misfit_of(folder / location):
            problem = problem.replace("does not exist", "is missing")
            raise ExportError(
                f"{file}: {location}, with the data of tensor {name!r}, {problem}",
                fix=f"copy {location} beside {file.name}" if problem == "is missing" else AGAIN,
            )
    return tuple(file.parent / location for location in sorted(locations))


def _inside(folder: Path, location: str) -> bool:
    """True if `location` is a path inside the folder; links are followed."""
    path = PurePath(location)
    if not location or path.is_absolute() or ".." in path.parts:
        return False
    try:
        (folder / location).stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError):  # name too long, cyclic links, or a zero byte
        return False
    return (folder / location).resolve().is_relative_to(folder)
