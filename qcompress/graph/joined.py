"""Matmuls that read one input, as one matmul of their joined weights: names, and the way back. No torch.

Query, key and value (or gate and up) become one MatMul whose weight has the columns of all of them, behind
it one Add of the joined biases, and a Split whose outputs are those of the separate layers:

    PARENT.query, PARENT.key, PARENT.value      ->  PARENT.query+key+value
    PARENT.query.weight.codes  [in, a] ...      ->  PARENT.query+key+value.weight.codes  [in, a + b + c]

`separate` undoes it in a loaded model, so that the certificate and the byte counts see each layer with its
own columns. The columns of a product are independent of each other, and so are their codes and scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qcompress.encodings.walk import DEQUANTIZE, is_a, operand, result

BETWEEN = "+"
"""Separates the layers in a joined name; Python's attributes cannot have it."""


def joined_name(layers: Sequence[str]) -> str:
    """Name of the joined layer. The layers have one parent.

    >>> joined_name(["h.0.query", "h.0.key"])
    'h.0.query+key'
    """
    parent, dot, _ = layers[0].rpartition(".")
    return parent + dot + BETWEEN.join(layer.rpartition(".")[2] for layer in layers)


def layers_of(name: str) -> list[str]:
    """Names of the layers behind the name of a layer, which may be joined.

    >>> layers_of("h.0.query+key"), layers_of("head")
    (['h.0.query', 'h.0.key'], ['head'])
    """
    parent, dot, ends = name.rpartition(".")
    return [parent + dot + end for end in ends.split(BETWEEN)]


@dataclass(frozen=True)
class Columns:
    """A range of a stored tensor's last axis."""

    tensor: TensorProto
    first: int
    end: int

    def of(self, values: np.ndarray) -> np.ndarray:
        """The columns of the tensor's values."""
        return np.ascontiguousarray(values[..., self.first : self.end])


def separate(model: ModelProto) -> dict[str, Columns]:
    """Replace joined matmuls by those of their layers, in place. Returns the columns for which the new
    initializers stand; these have a type, a shape and no data. Without joined names nothing changes.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    if not any(BETWEEN in name for name in stored):
        return {}
    columns: dict[str, Columns] = {}
    replaced: dict[int, list[NodeProto]] = {}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for decoder in graph.node:
        owner, _, part = operand(decoder, 0).rpartition(".weight.")
        names = layers_of(owner)
        is_stored = all(name in stored for name in decoder.input)
        if not (is_a(decoder, DEQUANTIZE) and part and len(names) > 1 and is_stored):
            continue
        chains = [_chain(readers, matmul, stored) for matmul in readers.get(result(decoder), [])]
        sizes = [numpy_helper.to_array(stored[operand(chain[-1], 1)]) if chain else () for chain in chains]
        width = stored[operand(decoder, 0)].dims[-1]
        if not chains or any(len(size) != len(names) or sum(size) != width for size in sizes):
            continue
        if any(list(size) != list(sizes[0]) for size in sizes):
            continue
        if any(len(chain[-1].output) != len(names) for chain in chains):
            continue
        ends = np.cumsum(sizes[0]).tolist()
        parts = [(name, end - int(size), end) for name, end, size in zip(names, ends, sizes[0], strict=True)]
        replaced[id(decoder)] = [_part(decoder, owner, part, stored, columns) for part in parts]
        for chain in chains:
            for node in chain:
                replaced[id(node)] = []
            replaced[id(chain[0])] = [
                node for place, part in enumerate(parts)
                for node in _separated(chain, decoder, owner, place, part, stored, columns)
            ]  # fmt: skip
    nodes = [one for node in graph.node for one in replaced.get(id(node), [node])]
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    graph.initializer.extend(_header(name, one) for name, one in columns.items())
    return columns


def _chain(
    readers: dict[str, list[NodeProto]], matmul: NodeProto, stored: dict[str, TensorProto]
) -> list[NodeProto]:
    """The MatMul, the Add of a bias if there is one, and the Split behind it; empty for anything else."""
    chain = [matmul]
    if not is_a(matmul, "MatMul"):
        return []
    for _ in range(2):
        behind = readers.get(result(chain[-1]), [])
        if len(behind) != 1:
            return []
        chain.append(behind[0])
        if is_a(behind[0], "Split"):
            return chain if operand(behind[0], 1) in stored else []
        if not (is_a(behind[0], "Add") and any(name in stored for name in behind[0].input)):
            return []
    return []


Part = tuple[str, int, int]
"""Name of a layer, and the range of its columns."""


def _part(
    decoder: NodeProto, owner: str, part: Part, stored: dict[str, TensorProto], columns: dict[str, Columns]
) -> NodeProto:
    """DequantizeLinear of one layer's columns."""
    copy = NodeProto()
    copy.CopyFrom(decoder)
    copy.name, copy.output[0] = (
        decoder.name.replace(owner, part[0]),
        _renamed(result(decoder), owner, part[0]),
    )
    for place, name in enumerate(decoder.input):
        copy.input[place] = _sliced(name, owner, part, stored, columns)
    return copy


def _separated(
    chain: list[NodeProto], decoder: NodeProto, owner: str, place: int, part: Part,
    stored: dict[str, TensorProto], columns: dict[str, Columns],
) -> list[NodeProto]:  # fmt: skip
    """MatMul and Add of one layer, whose output is that of the Split."""
    matmul, *adds, split = chain
    inputs = [_renamed(name, owner, part[0]) if name == result(decoder) else name for name in matmul.input]
    product = f"{result(matmul)}/{part[0]}" if adds else split.output[place]
    nodes = [helper.make_node("MatMul", inputs, [product], f"{matmul.name}/{part[0]}")]
    for add in adds:
        terms = [
            product if name == result(matmul) else _sliced(name, owner, part, stored, columns)
            for name in add.input
        ]
        nodes.append(helper.make_node("Add", terms, [split.output[place]], f"{add.name}/{part[0]}"))
    return nodes


def _sliced(
    name: str, owner: str, part: Part, stored: dict[str, TensorProto], columns: dict[str, Columns]
) -> str:
    """Name of the initializer with one layer's columns of the initializer `name`."""
    layer, first, end = part
    new = _renamed(name, owner, layer)
    columns[new] = Columns(stored[name], first, end)
    return new


def _renamed(name: str, owner: str, layer: str) -> str:
    """Name of a tensor of a layer; zero points, which layers share, get the layer's name behind theirs."""
    return name.replace(owner, layer) if owner in name else f"{name}/{layer}"


def _header(name: str, one: Columns) -> TensorProto:
    """Type and shape of a range of columns, without data."""
    return TensorProto(
        name=name, data_type=one.tensor.data_type, dims=[*one.tensor.dims[:-1], one.end - one.first]
    )
