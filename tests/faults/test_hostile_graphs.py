"""ONNX files of unknown origin: bombs, circles, places outside the folder, sizes that no file has."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacked import attacked, no_traceback, refused
from lines import cli
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx import numpy_helper as arrays

pytestmark = pytest.mark.attack("hostile ONNX files")

SECONDS, MIB = 20, 500
"""The issue's limits are 5 s and 500 MB on a free machine; tests run beside others."""


def value(name: str, shape: Sequence[int] = (1, 4), kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: Sequence[NodeProto],
    tensors: Sequence[TensorProto] = (),
    functions: Sequence[FunctionProto] = (),
    opset: int = 21,
    inputs: Sequence[Any] = (),
    name: str = "y",
) -> ModelProto:
    """A model of one graph from x to y."""
    graph = helper.make_graph(nodes, "g", inputs or [value("x")], [value(name)], tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("d", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions)


def relu() -> ModelProto:
    return model([helper.make_node("Relu", ["x"], ["y"])])


def external(
    location: str, offset: object = 0, length: object = 16, dims: Sequence[int] = (4,)
) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.dims.extend(dims)
    for key, entry in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(entry))
    return tensor


def added(tensor: TensorProto) -> ModelProto:
    """x + w, where w is under attack."""
    return model([helper.make_node("Add", ["x", "w"], ["y"])], [tensor])


def function(name: str, called: Sequence[str], constants: Sequence[TensorProto] = ()) -> FunctionProto:
    """A function that calls others one after the other; a Relu where it calls none."""
    nodes, last = [helper.make_node("Constant", [], [f"k{i}"], value=t) for i, t in enumerate(constants)], "a"
    for place, inner in enumerate(called or [""]):
        result = "b" if place == len(called or [""]) - 1 else f"c{place}"
        nodes.append(helper.make_node(inner or "Relu", [last], [result], domain="d" if inner else ""))
        last = result
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("d", 1)]
    return helper.make_function("d", name, ["a"], ["b"], nodes, opsets)


def calling(name: str, functions: Sequence[FunctionProto]) -> ModelProto:
    return model([helper.make_node(name, ["x"], ["y"], domain="d")], functions=functions)


def doubling(levels: int, width: int = 2) -> ModelProto:
    """F0 is a Relu, and every next function calls the one before it `width` times."""
    functions = [function("F0", [])]
    functions += [function(f"F{level}", [f"F{level - 1}"] * width) for level in range(1, levels)]
    return calling(f"F{levels - 1}", functions)


def heavy_function() -> ModelProto:
    """A constant of 1 MB, a thousand times."""
    return calling(
        "F1",
        [
            function("F0", [], [arrays.from_array(np.zeros(2**18, np.float32), "big")]),
            function("F1", ["F0"] * 1000),
        ],
    )


def bomb_in_a_branch() -> ModelProto:
    """The calls lie in the branch of an If."""
    inner = helper.make_graph([helper.make_node("F20", ["x"], ["o"], domain="d")], "then", [], [value("o")])
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    functions = list(doubling(21).functions)
    return model([node], functions=functions, inputs=[value("x"), value("c", (), TensorProto.BOOL)])


def nested(depth: int) -> ModelProto:
    """If in If in If."""
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["o"])], "s", [], [value("o")])
    other = helper.make_graph([helper.make_node("Relu", ["x"], ["o"])], "e", [], [value("o")])
    for level in range(depth):
        node = helper.make_node("If", ["c"], ["o"], then_branch=graph, else_branch=other)
        graph = helper.make_graph([node], f"s{level}", [], [value("o")])
    node = helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=other)
    return model([node], inputs=[value("x"), value("c", (), TensorProto.BOOL)])


def branch_data() -> ModelProto:
    """External data outside the folder, of a tensor inside a branch."""
    tensor = external("/etc/passwd")
    inner = helper.make_graph([helper.make_node("Add", ["x", "w"], ["o"])], "t", [], [value("o")], [tensor])
    other = helper.make_graph([helper.make_node("Relu", ["x"], ["o"])], "e", [], [value("o")])
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=other)
    return model([node], inputs=[value("x"), value("c", (), TensorProto.BOOL)])


def attribute_data() -> ModelProto:
    """External data outside the folder, of a tensor that is an attribute."""
    node = helper.make_node("ConstantOfShape", ["x"], ["y"])
    node.attribute.append(AttributeProto(name="value", type=AttributeProto.TENSOR, t=external("../secret")))
    return model([node])


def sparse_data() -> ModelProto:
    """External data outside the folder, of a sparse tensor."""
    made = relu()
    sparse = made.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external("/etc/hostname"))
    sparse.dims.extend([4])
    return made


def hidden_graph() -> ModelProto:
    """A graph in an attribute that claims to be a number."""
    made = relu()
    inner = helper.make_graph([helper.make_node("Add", ["x", "w"], ["o"])], "t", [], [value("o")])
    inner.initializer.append(external("/etc/passwd"))
    made.graph.node[0].attribute.append(AttributeProto(name="body", type=AttributeProto.INT, g=inner))
    return made


def claim(kind: int, dims: Sequence[int], **fields: Any) -> ModelProto:
    tensor = TensorProto(name="w", data_type=kind, **fields)
    tensor.dims.extend(dims)
    return added(tensor)


def scale_claim() -> ModelProto:
    """A scale whose external data claim a petabyte."""
    return model(
        [
            helper.make_node("QuantizeLinear", ["x", "w"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "w"], ["y"]),
        ],
        [external("d.bin", 0, 10**15)],
    )


GRAPHS: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "a function bomb of 2^29": (lambda: doubling(30), "nodes"),
    "a function bomb of 10^12": (lambda: doubling(13, 10), "nodes"),
    "a function bomb of 2^2000": (lambda: doubling(2001), "more than 10^15"),
    "a function bomb in a branch": (bomb_in_a_branch, "nodes"),
    "a heavy function": (heavy_function, "bytes"),
    "a function that calls itself": (lambda: calling("F", [function("F", ["F"])]), "calls itself"),
    "two functions that call each other": (
        lambda: calling("F", [function("F", ["G"]), function("G", ["F"])]),
        "calls itself",
    ),
    "a circle of three functions, not called": (
        lambda: calling(
            "A", [function("A", []), function("F", ["G"]), function("G", ["H"]), function("H", ["F"])]
        ),
        "calls itself",
    ),
    "a circle of nodes": (
        lambda: model(
            [
                helper.make_node("Add", ["x", "b"], ["a"]),
                helper.make_node("Relu", ["a"], ["b"]),
                helper.make_node("Relu", ["b"], ["y"]),
            ]
        ),
        "later node",
    ),
    "a node that reads itself": (lambda: model([helper.make_node("Relu", ["y"], ["y"])]), "makes itself"),
    "an output that is made twice": (
        lambda: model([helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["y"])]),
        "made twice",
    ),
    "an input that nothing makes": (
        lambda: model([helper.make_node("Add", ["x", "nothere"], ["y"])]),
        "nothing makes",
    ),
    "an output that nothing makes": (
        lambda: model([helper.make_node("Relu", ["x"], ["z"])]),
        "nothing makes",
    ),
    "data outside, in a branch": (branch_data, "outside the model's folder"),
    "data outside, in an attribute": (attribute_data, "outside the model's folder"),
    "data outside, of a sparse tensor": (sparse_data, "outside the model's folder"),
    "data outside, in a graph that claims to be a number": (hidden_graph, "outside the model's folder"),
    "data above": (lambda: added(external("../../../etc/passwd")), "outside the model's folder"),
    "data at an absolute place": (lambda: added(external("/dev/zero")), "outside the model's folder"),
    "data behind a link": (lambda: added(external("link.bin")), "outside the model's folder"),
    "data behind a folder that is a link": (lambda: added(external("etc/passwd")), "outside"),
    "data behind a circle of links": (lambda: added(external("loop.bin")), "outside the model's folder"),
    "data in a pipe": (lambda: added(external("pipe.bin")), "is a pipe"),
    "data in a socket": (lambda: added(external("sock.bin")), "is a socket"),
    "data in a folder": (lambda: added(external(".")), "is a folder"),
    "data of no name": (lambda: added(external("")), "outside the model's folder"),
    "data with a NUL in their name": (lambda: added(external("a\0b")), "outside the model's folder"),
    "data with a very long name": (lambda: added(external("a" * 5000)), "outside the model's folder"),
    "missing data": (lambda: added(external("nope.bin")), "is missing"),
    "an offset beyond the file": (lambda: added(external("d.bin", 10**18)), "of a file of 16"),
    "a negative offset": (lambda: added(external("d.bin", -5)), "of a file of 16"),
    "an offset that is text": (lambda: added(external("d.bin", "abc")), "offset 'abc'"),
    "an offset of a thousand digits": (lambda: added(external("d.bin", "9" * 1000)), "of a file of 16"),
    "an offset of ten thousand digits": (lambda: added(external("d.bin", "9" * 10_000)), "offset"),
    "a length of a petabyte": (lambda: added(external("d.bin", 0, 10**15)), "of a file of 16"),
    "a negative length": (lambda: added(external("d.bin", 0, -16)), "of a file of 16"),
    "three terabytes": (lambda: added(external("d.bin", 0, 3 * 10**12, (750_000_000_000,))), "of a file"),
    "a scale of a petabyte": (scale_claim, "of a file of 16"),
    "a shape of 2^60": (lambda: claim(TensorProto.FLOAT, [2**40, 2**20]), "0 values for shape"),
    "a shape of 2^2480": (lambda: claim(TensorProto.INT4, [2**62] * 40), "0 values for shape"),
    "a negative shape": (lambda: claim(TensorProto.FLOAT, [-4]), "shape [-4]"),
    "two negative axes": (lambda: claim(TensorProto.FLOAT, [-2, -2], raw_data=bytes(16)), "shape [-2, -2]"),
    "an unknown element type": (lambda: claim(9999, [4]), "type 9999"),
    "a negative element type": (lambda: claim(-1, [4], raw_data=bytes(4)), "type -1"),
    "too few bytes": (lambda: claim(TensorProto.FLOAT, [4], raw_data=b"abc"), "3 bytes"),
    "opset 10^9": (lambda: model([helper.make_node("Relu", ["x"], ["y"])], opset=10**9), "opset 1000000000"),
    "opset 0": (lambda: model([helper.make_node("Relu", ["x"], ["y"])], opset=0), "opset"),
    "a negative opset": (lambda: model([helper.make_node("Relu", ["x"], ["y"])], opset=-7), "opset"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the files above name."""
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "d.bin").write_bytes(bytes(16))
    (folder / "link.bin").symlink_to("/etc/passwd")
    (folder / "etc").symlink_to("/etc")
    (folder / "loop.bin").symlink_to("loop.bin")
    os.mkfifo(folder / "pipe.bin")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(folder)  # a socket's path must be short
        try:
            server.bind("sock.bin")
        finally:
            os.chdir(here)
    return folder


QUICK = ("a function bomb of 2^29", "a circle of nodes", "a scale of a petabyte")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in GRAPHS]
)
def test_a_hostile_graph_is_refused(name: str, place: Path, tried: Callable[[int], None]) -> None:
    make, word = GRAPHS[name]
    file = place / "model.onnx"
    file.write_bytes(make().SerializeToString())
    commands = (
        ("lint", file, "--target", "rtx-ada"),
        ("inspect", file),
        ("build", file, "--target", "cpu", "--out", place / "built"),
    )
    for words in commands:
        begin = time.monotonic()
        done = cli(*words)
        assert time.monotonic() - begin < SECONDS
        assert done.code == 5, (words, done)
        assert "error" in done.stderr + done.stdout and word in done.stderr + done.stdout, (words, done)
    tried(len(commands))


def _bytes(name: str) -> bytes:
    whole = relu().SerializeToString()
    return {
        "empty": b"",
        "random": np.random.default_rng(0).bytes(5000),
        "zeros": bytes(10**6),
        "text": b"hello, world\n" * 99,
        "half": whole[: len(whole) // 2],
        "all but one byte": whole[:-1],
        "a graph of 2 GB in 10 bytes": b"\x3a\xff\xff\xff\xff\x07abcd",
        "a length beyond 64 bits": b"\x3a" + b"\xff" * 10 + b"\x01",
        "field 0": b"\x02\x00",
        "a group that never ends": b"\x3b" * 100_000,
        "deep messages": _deep(3000),
        "another protobuf": GraphProto(name="g").SerializeToString() * 40,
    }[name]


def _deep(levels: int) -> bytes:
    """A graph in an attribute of a node of a graph, and so on; written by hand, as protobuf refuses to."""
    content = b""
    for _ in range(levels):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            content = tag + _varint(len(content)) + content
    return b"\x3a" + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


CONTENTS = (
    "empty", "random", "zeros", "text", "half", "all but one byte", "a graph of 2 GB in 10 bytes",
    "a length beyond 64 bits", "field 0", "a group that never ends", "deep messages", "another protobuf",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_that_is_not_a_model_is_refused(
    name: str, tmp_path: Path, tried: Callable[[int], None]
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(_bytes(name))
    for words in (("lint", file, "--target", "rtx-ada"), ("inspect", file)):
        done = cli(*words)
        assert done.code == 5 and done.stderr.startswith("error: "), (words, done)
    tried(2)


# In processes of their own: what they take ---------------------------------------------------------


def _giant(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(3 * 2**30)


def _almost_giant(file: Path) -> None:
    """Zeros of 1.9 GB that take no place."""
    with file.open("wb") as stream:
        stream.truncate(1900 * 2**20)


def _cut_giant(file: Path) -> None:
    """A graph that claims 2 GB more than the 1.9 GB that are there."""
    with file.open("wb") as stream:
        stream.write(b"\x3a\xff\xff\xff\xff\x07")
        stream.truncate(1900 * 2**20)


def _empty_nodes(file: Path) -> None:
    """Twenty megabytes that would be ten million nodes."""
    content = b"\x0a\x00" * 10_000_000
    file.write_bytes(b"\x3a" + _varint(len(content)) + content)


def _empty_attributes(file: Path) -> None:
    """The graph of the test above inside one node."""
    content = b"\x2a\x00" * 10_000_000
    node = b"\x0a" + _varint(len(content)) + content
    file.write_bytes(b"\x3a" + _varint(len(node)) + node)


def _empty_inputs(file: Path) -> None:
    """Ten million inputs of one node."""
    content = b"\x0a\x00" * 10_000_000
    node = b"\x0a" + _varint(len(content)) + content
    file.write_bytes(b"\x3a" + _varint(len(node)) + node)


PROCESSES: dict[str, Callable[[Path], Any]] = {
    "3 GB": _giant,
    "1.9 GB of zeros": _almost_giant,
    "1.9 GB, cut short": _cut_giant,
    "ten million nodes": _empty_nodes,
    "ten million attributes": _empty_attributes,
    "ten million inputs": _empty_inputs,
    "a pipe": os.mkfifo,
    "an endless device": lambda file: file.symlink_to("/dev/zero"),
    "a function bomb": lambda file: file.write_bytes(doubling(40).SerializeToString()),
    "a heavy function": lambda file: file.write_bytes(heavy_function().SerializeToString()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("command", ["lint", "inspect"])
def test_a_bomb_takes_neither_time_nor_memory(name: str, command: str, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    PROCESSES[name](file)
    words = ["lint", file, "--target", "rtx-ada"] if command == "lint" else [command, file]
    ended = attacked(*words, timeout_s=60)
    refused(ended, 2 if name in ("a pipe", "an endless device") else 5, "model.onnx")
    assert ended.seconds < SECONDS and ended.peak_mib < MIB, (ended.seconds, ended.peak_mib)


NODES = 300_000


def _chain(op: str, first: str, last: str, count: int) -> list[NodeProto]:
    names = [first, *(f"t{place}" for place in range(count - 1)), last]
    return [
        helper.make_node(op, names[place : place + 1], names[place + 1 : place + 2]) for place in range(count)
    ]


def _moves_behind_codes() -> ModelProto:
    """An int8 weight, and 300,000 Identity nodes behind it, each of which a MatMul reads."""
    codes = arrays.from_array(np.ones((4, 4), np.int8), "codes")
    scale = arrays.from_array(np.float32(0.1), "s")
    nodes = [helper.make_node("DequantizeLinear", ["codes", "s"], ["w"])]
    nodes += _chain("Identity", "w", "z", NODES // 2)
    nodes += [
        helper.make_node("MatMul", ["x", f"t{place}"], [f"m{place}"]) for place in range(NODES // 2 - 2)
    ]
    nodes.append(helper.make_node("MatMul", ["x", "z"], ["y"]))
    return model(nodes, [codes, scale])


def _merged_quantizers() -> ModelProto:
    """A thousand quantizers whose codes run together through 100,000 Identity nodes."""
    scale = arrays.from_array(np.float32(0.1), "s")
    zero = arrays.from_array(np.int8(0), "z")
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], [f"q{place}"]) for place in range(1000)]
    nodes.append(helper.make_node("Concat", [f"q{place}" for place in range(1000)], ["all"], axis=0))
    nodes += _chain("Identity", "all", "last", 100_000)
    nodes.append(helper.make_node("DequantizeLinear", ["last", "s", "z"], ["y"]))
    return model(nodes, [scale, zero])


def _shared_scale() -> ModelProto:
    """50,000 quantizers that share scales of 1 MB."""
    scale = arrays.from_array(np.ones(2**18, np.float32), "s")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], [f"q{place}"], axis=1) for place in range(NODES // 6)
    ]
    nodes += [
        helper.make_node("DequantizeLinear", [f"q{place}", "s"], [f"d{place}"], axis=1)
        for place in range(NODES // 6)
    ]
    return model([*nodes, helper.make_node("Relu", ["x"], ["y"])], [scale])


LARGE: dict[str, tuple[Callable[[], ModelProto], tuple[int, ...]]] = {
    "a chain": (lambda: model(_chain("Relu", "x", "y", NODES)), (0,)),
    "Ifs nested 25 deep": (lambda: nested(25), (0,)),
    "a fan": (lambda: model([helper.make_node("Sum", ["x"] * NODES, ["y"])]), (0,)),
    "moves behind codes": (_moves_behind_codes, (0, 5)),
    "quantizers that run together": (_merged_quantizers, (0, 5)),
    "one scale for many": (_shared_scale, (0, 5)),
    "functions called 100,000 times": (lambda: doubling(6, 10), (0,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_large_graph_takes_seconds(name: str, tmp_path: Path, tried: Callable[[int], None]) -> None:
    make, codes = LARGE[name]
    file = tmp_path / "model.onnx"
    file.write_bytes(make().SerializeToString())
    for words in (["lint", file, "--target", "rtx-ada"], ["inspect", file]):
        ended = attacked(*words, timeout_s=120)
        print(name, words[0], ended.code, f"{ended.seconds:.1f} s, {ended.peak_mib:.0f} MiB")
        no_traceback(ended, *codes)
        assert ended.seconds < SECONDS
    tried(2)
