"""Files that are no ONNX graph, for the rules about that, and for each rule one that comes close and is one.

TensorRT-RTX sorts nodes itself, and takes a graph without an opset or with an operator of a later one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from graphs import Graph, linear, tensor_value
from lint_cases import Case, Make, small
from onnx import TensorProto as T  # noqa: N817
from onnx import helper


def changed(change: Callable[[onnx.GraphProto], object], make: Make = linear) -> Make:
    """The graph of `make` after a change."""

    def build() -> onnx.ModelProto:
        model = make()
        change(model.graph)
        return model

    return build


def drop(place: int) -> Make:
    """Nodes of `linear`: x.q, x.q.dq, weight.dq, y."""
    return changed(lambda graph: graph.node.pop(place))


def no_opset() -> onnx.ModelProto:
    model = linear()
    del model.opset_import[:]
    return model


def reverse(graph: onnx.GraphProto) -> None:
    nodes = list(graph.node)[::-1]
    del graph.node[:]
    graph.node.extend(nodes)


def weights_first(graph: onnx.GraphProto) -> None:
    nodes = [graph.node[place] for place in (2, 0, 1, 3)]
    del graph.node[:]
    graph.node.extend(nodes)


def circle(graph: onnx.GraphProto) -> None:
    graph.node[0].input[0] = "x.q.dq"


def itself(graph: onnx.GraphProto) -> None:
    graph.node[3].input[0] = "y"


def repeat(graph: onnx.GraphProto) -> None:
    graph.node.append(graph.node[3])


def repeat_tensor(graph: onnx.GraphProto) -> None:
    graph.initializer.append(graph.initializer[0])


def rename_output(graph: onnx.GraphProto) -> None:
    graph.output[0].name = "z"


def tensor(change: Callable[[onnx.TensorProto], object], name: str = "weight.codes") -> Make:
    def edit(graph: onnx.GraphProto) -> None:
        (found,) = [item for item in graph.initializer if item.name == name]
        change(found)

    return changed(edit)


def cut(found: onnx.TensorProto) -> None:
    found.raw_data = found.raw_data[:-1]


def element(kind: int) -> Callable[[onnx.TensorProto], None]:
    return lambda found: setattr(found, "data_type", kind)


def length(value: int) -> Callable[[onnx.TensorProto], None]:
    return lambda found: found.dims.__setitem__(0, value)


def as_numbers(found: onnx.TensorProto) -> None:
    """Values in a field of the message instead of bytes."""
    codes = onnx.numpy_helper.to_array(found)
    found.ClearField("raw_data")
    found.int32_data.extend(codes.reshape(-1).tolist())


def operator(op: str, opset: int = 21, **attributes: object) -> Make:
    def make() -> onnx.ModelProto:
        graph = Graph()
        graph.node(op, ["x"], "y", **attributes)
        ends = [tensor_value("x", T.FLOAT, "batch", 64)], [tensor_value("y", T.FLOAT, "batch", 64)]
        return graph.model(*ends, opset=opset)

    return make


def operands(*names: str) -> Make:
    """Clip has one to three inputs, of which the last two may be empty."""

    def build(graph: Graph) -> None:
        graph.tensor("low", np.float32(0)), graph.tensor("high", np.float32(6))
        graph.node("Clip", list(names), "y")

    return small(build, outputs=128)


def branches() -> onnx.ModelProto:
    """If: both branches make `inside` and read x of the graph around them."""
    graph = Graph()
    graph.tensor("yes", np.array(True), T.BOOL)
    sides = [
        helper.make_graph(
            [helper.make_node(op, ["x"], ["inside"], name=f"{op}.node"),
             helper.make_node("Identity", ["inside"], [f"{op}.out"], name=f"{op}.end")],
            op, [], [tensor_value(f"{op}.out", T.FLOAT, "batch", 64)],
        )
        for op in ("Relu", "Sigmoid")
    ]  # fmt: skip
    graph.node("If", ["yes"], "y", then_branch=sides[0], else_branch=sides[1])
    return graph.model([tensor_value("x", T.FLOAT, "batch", 64)], [tensor_value("y", T.FLOAT, "batch", 64)])


def lose_output(graph: onnx.GraphProto) -> None:
    graph.output.pop()


UNSOUND: tuple[Case, ...] = (
    Case("graph-empty", "no output", changed(lose_output), "(graph)", "no output", "builder"),
    Case("graph-empty", "no opset", no_opset, "(graph)", "no opset"),
    Case("value-missing", "node", drop(0), "x.q.dq", "reads 'x.q', which nothing makes", "parser"),
    Case("value-missing", "output", changed(rename_output), "z", "nothing makes it", "parser"),
    Case("value-twice", "node", changed(repeat), "y", "is made twice", "parser"),
    Case("value-twice", "tensor", changed(repeat_tensor), "x.input.scale", "is made twice", "parser"),
    Case("node-order", "circle", changed(circle), "x.q", "'x.q.dq', which is made by a later node", "parser"),
    Case("node-order", "itself", changed(itself), "y", "reads 'y', which it makes itself", "parser"),
    Case("node-order", "unsorted", changed(reverse), "y", "which is made by a later node"),
    Case("tensor-data", "too short", tensor(cut), "weight.codes", "8,191 bytes for", "parser"),
    Case("tensor-data", "negative", tensor(length(-1)), "weight.codes", r"shape \[-1, 64\]", "parser"),
    Case("tensor-data", "huge", tensor(length(2**40)), "weight.codes", "takes 70,368,744,177,664", "parser"),
    Case("tensor-data", "element", tensor(element(99)), "weight.codes", "element type 99", "parser"),
    Case("operator-unknown", "nonsense", operator("Nonsense"), "y", "no operator 'Nonsense'", "parser"),
    Case("operator-unknown", "not yet", operator("Gelu", 19), "y", "no operator 'Gelu' in opset 19"),
    Case("operator-operands", "none", operands(), "y", "0 inputs of Clip", "parser"),
    Case("operator-operands", "empty", operands("", "low"), "y", "input 0 of Clip is empty", "parser"),
    Case(
        "operator-operands", "too many", operands("x", "low", "high", "x"), "y", "4 inputs of Clip", "crash"
    ),
)
"""`crash`: the parser's process dies."""


def optional_output() -> onnx.ModelProto:
    """LSTM, of whose three optional outputs the first is left out."""
    graph = Graph()
    weights = [graph.tensor("w", np.ones((1, 16, 8))), graph.tensor("r", np.ones((1, 16, 4)))]
    graph.nodes.append(helper.make_node("LSTM", ["x", *weights], ["", "y"], name="y", hidden_size=4))
    ends = [tensor_value("x", T.FLOAT, 5, "batch", 8)], [tensor_value("y", T.FLOAT, 1, "batch", 4)]
    return graph.model(*ends)


def optional_input() -> onnx.ModelProto:
    """A while loop: Loop without a count."""
    graph = Graph()
    graph.tensor("no", np.array(False), T.BOOL)
    graph.tensor("count", np.int64(2), T.INT64)
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go.on"]), helper.make_node("Relu", ["state"], ["next"])],
        "body",
        [
            tensor_value("at", T.INT64),
            tensor_value("go", T.BOOL),
            tensor_value("state", T.FLOAT, "batch", 64),
        ],
        [tensor_value("go.on", T.BOOL), tensor_value("next", T.FLOAT, "batch", 64)],
    )
    graph.node("Loop", ["", "no", "x"], "y", body=body)
    return graph.model([tensor_value("x", T.FLOAT, "batch", 64)], [tensor_value("y", T.FLOAT, "batch", 64)])


SOUND_GRAPHS: dict[str, tuple[Make, str]] = {
    "graph-empty": (linear, "rtx-ampere"),
    "value-missing": (operands("x", "", "high"), "rtx-ampere"),
    "value-twice": (branches, "rtx-ampere"),
    "node-order": (changed(weights_first), "rtx-ampere"),
    "tensor-data": (tensor(as_numbers), "rtx-ampere"),
    "operator-unknown": (operator("Gelu", 21), "rtx-ampere"),
    "operator-operands": (operands("x", "low", "high"), "rtx-ampere"),
}
