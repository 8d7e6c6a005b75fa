"""Broken ONNX files: sound graphs with one to three changes, of their structure or of their bytes.

`mutated(number, folder)` always makes the same file of that number.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import onnx
from graphs import decoder, linear, save
from onnx import TensorProto, helper

Random = random.Random
Change = Callable[[onnx.ModelProto, Random], None]

NUMBERS = (-(2**63), -(2**31), -129, -1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**62, 2**63 - 1)
"""Sizes, axes and block sizes that nobody means."""

PLACES = (
    "/etc/passwd",
    "../model.onnx",
    "sub/../../x",
    "",
    ".",
    "missing.data",
    "model.onnx",
    "a\0b",
    "x" * 300,
)
"""Where external data do not lie."""


def some(values: list, chance: Random):
    return chance.choice(values) if values else None


def tensors(model: onnx.ModelProto) -> list[TensorProto]:
    return list(model.graph.initializer)


def drop_node(model: onnx.ModelProto, chance: Random) -> None:
    del model.graph.node[chance.randrange(len(model.graph.node))]


def repeat_node(model: onnx.ModelProto, chance: Random) -> None:
    model.graph.node.append(some(list(model.graph.node), chance))


def shuffle_nodes(model: onnx.ModelProto, chance: Random) -> None:
    nodes = list(model.graph.node)
    chance.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def rename_operator(model: onnx.ModelProto, chance: Random) -> None:
    node = some(list(model.graph.node), chance)
    node.op_type = some(
        ["MatMul", "Gather", "DequantizeLinear", "QuantizeLinear", "Nonsense", "", "If"], chance
    )
    node.domain = some(["", "", "ai.onnx", "com.nobody"], chance)


def rewire(model: onnx.ModelProto, chance: Random) -> None:
    node = some([node for node in model.graph.node if node.input], chance)
    names = [name for other in model.graph.node for name in (*other.input, *other.output)]
    node.input[chance.randrange(len(node.input))] = some([*names, "", "nobody"], chance)


def go_in_circles(model: onnx.ModelProto, chance: Random) -> None:
    node = some([node for node in model.graph.node if node.input and node.output], chance)
    node.input[0] = node.output[0]


def lose_operands(model: onnx.ModelProto, chance: Random) -> None:
    node = some(list(model.graph.node), chance)
    del node.input[chance.randrange(len(node.input) + 1) :]
    if chance.random() < 0.3:
        del node.output[:]


def claim_an_output(model: onnx.ModelProto, chance: Random) -> None:
    first, second = (some([node for node in model.graph.node if node.output], chance) for _ in "ab")
    first.output[0] = second.output[0]


def change_attribute(model: onnx.ModelProto, chance: Random) -> None:
    node = some(list(model.graph.node), chance)
    value = some([*NUMBERS, 0.5, "text", [1, 2], helper.make_tensor("t", TensorProto.INT8, [1], [1])], chance)
    name = some(
        ["axis", "block_size", "perm", "to", "output_dtype", "value", *(a.name for a in node.attribute)],
        chance,
    )
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def change_type(model: onnx.ModelProto, chance: Random) -> None:
    some(tensors(model), chance).data_type = some([*range(24), 99, 2**31 - 1], chance)


def change_shape(model: onnx.ModelProto, chance: Random) -> None:
    tensor = some(tensors(model), chance)
    if tensor.dims and chance.random() < 0.7:
        tensor.dims[chance.randrange(len(tensor.dims))] = some(list(NUMBERS), chance)
    elif chance.random() < 0.5:
        tensor.dims.extend([some(list(NUMBERS), chance)] * chance.randrange(1, 40))
    else:
        del tensor.dims[:]


def drop_tensor(model: onnx.ModelProto, chance: Random) -> None:
    del model.graph.initializer[chance.randrange(len(model.graph.initializer))]


def swap_tensors(model: onnx.ModelProto, chance: Random) -> None:
    first, second = (some(tensors(model), chance) for _ in "ab")
    first.name, second.name = second.name, first.name


def cut_data(model: onnx.ModelProto, chance: Random) -> None:
    tensor = some(tensors(model), chance)
    tensor.raw_data = tensor.raw_data[: chance.randrange(len(tensor.raw_data) + 1)]


def move_data(model: onnx.ModelProto, chance: Random) -> None:
    tensor = some(tensors(model), chance)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    values = {"location": some(list(PLACES), chance), "offset": str(some(list(NUMBERS), chance)),
              "length": some([*map(str, NUMBERS), "many", "1e9", ""], chance)}  # fmt: skip
    for key in chance.sample(list(values), chance.randrange(4)):
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=values[key]))


def change_opset(model: onnx.ModelProto, chance: Random) -> None:
    del model.opset_import[:]
    for _ in range(chance.randrange(3)):
        version = some([-1, 0, 1, 7, 13, 21, 25, 26, 2**31, 2**62], chance)
        model.opset_import.append(helper.make_opsetid(some(["", "ai.onnx", "x"], chance), version))
    model.ir_version = some([0, 1, 3, 8, 10, 11, 99, 2**62], chance)


def change_ends(model: onnx.ModelProto, chance: Random) -> None:
    ends = some([model.graph.input, model.graph.output], chance)
    if chance.random() < 0.3:
        del ends[:]
        return
    kind = some(list(ends), chance).type.tensor_type
    if chance.random() < 0.3:
        kind.ClearField("shape")
    elif chance.random() < 0.5:
        kind.elem_type = some([0, 2, 7, 10, 99], chance)
    else:
        kind.shape.dim.add().dim_value = some(list(NUMBERS), chance)


def nest(model: onnx.ModelProto, chance: Random) -> None:
    inner = helper.make_graph([some(list(model.graph.node), chance)], "inner", [], [])
    for _ in range(some([1, 5, 40], chance)):
        node = helper.make_node("If", ["x"], [f"z{chance.random()}"], then_branch=inner, else_branch=inner)
        inner = helper.make_graph([node], "inner", [], [])
        if inner.ByteSize() > 2**15:
            break
    model.graph.node.append(inner.node[0])


def add_functions(model: onnx.ModelProto, chance: Random) -> None:
    nodes = [some(list(model.graph.node), chance)]
    if chance.random() < 0.5:
        nodes.append(helper.make_node("Self", ["a"], ["b"], domain="mine"))  # calls itself
    model.functions.append(helper.make_function("mine", "Self", ["a"], ["b"], nodes, model.opset_import))
    model.graph.node.append(helper.make_node("Self", ["x"], ["mine.out"], domain="mine"))


def forge_metadata(model: onnx.ModelProto, chance: Random) -> None:
    value = some(["{", "[" * 100_000, '{"a": {"bits": "x"}}', "\0?", "null"], chance)
    model.metadata_props.append(onnx.StringStringEntryProto(key="qcompress.formats", value=value))


STRUCTURE: tuple[Change, ...] = (
    drop_node, repeat_node, shuffle_nodes, rename_operator, rewire, go_in_circles, lose_operands,
    claim_an_output, change_attribute, change_type, change_shape, drop_tensor, swap_tensors, cut_data,
    move_data, change_opset, change_ends, nest, add_functions, forge_metadata,
)  # fmt: skip


def break_bytes(content: bytes, chance: Random) -> bytes:
    """Cut, flipped, or with something in between."""
    broken = bytearray(content)
    kind = chance.randrange(3)
    if kind == 0:
        return bytes(broken[: chance.randrange(len(broken))])
    for _ in range(chance.randrange(1, 30)):
        place = chance.randrange(min(len(broken), 4000))  # weights are at the end
        if kind == 1:
            broken[place] ^= 1 << chance.randrange(8)
        else:
            broken[place:place] = chance.randbytes(chance.randrange(1, 9))
    return bytes(broken)


def bases() -> list[Callable[[], onnx.ModelProto]]:
    """Sound graphs: quantized matmuls in int8 and int4, and a decoder."""
    return [linear, lambda: linear(bits=4, block=32, activations=False), decoder]


def mutated(number: int, folder: Path) -> tuple[Path, str]:
    """The broken file of that number, and what was done to it."""
    chance = Random(number)
    file = folder / f"broken-{number}" / "model.onnx"
    file.parent.mkdir(parents=True)
    model = some(bases(), chance)()
    if number % 5 == 4:
        save(model, file, external=chance.random() < 0.3)
        file.write_bytes(break_bytes(file.read_bytes(), chance))
        return file, "bytes"
    done = []
    for change in [
        STRUCTURE[(number - number // 5) % len(STRUCTURE)],
        *chance.sample(STRUCTURE, chance.randrange(3)),
    ]:
        try:
            change(model, chance)
            done.append(change.__name__)
        except (IndexError, TypeError, AttributeError):
            continue  # nothing of that kind is left
    file.write_bytes(model.SerializeToString())
    return file, " ".join(done)
