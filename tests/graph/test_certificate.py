"""The certificate: complete on a sound file, and on a changed one it names the layer and what differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from lines import QUICK, Exported, exported
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qcompress.errors import ExportError
from qcompress.graph.certificate.layers import _is_one_of, certify
from qcompress.graph.certificate.points import KINDS
from qcompress.graph.view import read

C_ATTN, C_PROJ = "transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"
BLOCKED, NARROW, WEIGHT_ONLY = (
    "transformer.h.0.mlp.c_fc",
    "transformer.h.0.attn.c_proj",
    "transformer.h.1.mlp.c_fc",
)
TABLE, HEAD = "transformer.wte", "lm_head"


@pytest.fixture(scope="module", params=QUICK, ids=str)
def graph(request: pytest.FixtureRequest, tiny_model: Path, untied_model: Path, text_file: Path) -> Exported:
    """Every kind of layer, in fp32 with a tied table and in fp16 without."""
    return exported(request.param, tiny_model if request.param.tied else untied_model, text_file)


class Graph:
    """A graph under the knife."""

    def __init__(self, file: Path) -> None:
        self.model: ModelProto = onnx.load(str(file))

    def tensor(self, name: str) -> TensorProto:
        (found,) = [tensor for tensor in self.model.graph.initializer if tensor.name == name]
        return found

    def node(self, name: str) -> NodeProto:
        (found,) = [node for node in self.model.graph.node if node.name == name]
        return found

    def readers(self, name: str) -> list[NodeProto]:
        return [node for node in self.model.graph.node if name in node.input]

    def array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.tensor(name))

    def put(self, name: str, values: np.ndarray) -> str:
        """An initializer with these values, in the place of one of that name."""
        self.drop(name)
        self.model.graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    def drop(self, name: str) -> None:
        kept = [tensor for tensor in self.model.graph.initializer if tensor.name != name]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(kept)

    def reread(self, old: str, new: str, reader: NodeProto | None = None) -> None:
        """Let every reader of a tensor, or one of them, read another one."""
        for node in self.readers(old) if reader is None else [reader]:
            for place, name in enumerate(node.input):
                if name == old:
                    node.input[place] = new

    def decoded(self, layer: str) -> str:
        """The output of a weight's DequantizeLinear."""
        return self.node(f"{layer}.weight/DequantizeLinear").output[0]


Change = Callable[[Graph], None]


@pytest.fixture
def broken(graph: Exported, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """`broken(change)`: the layers that the certificate refuses after a change, with their reasons."""

    def certify_changed(change: Change, *, copies: list[str] | None = None) -> dict[str, str]:
        cut = Graph(graph.file)
        change(cut)
        onnx.save(cut.model, str(tmp_path / "model.onnx"))
        found = certify(tmp_path / "model.onnx", graph.folded.path, graph.plan)
        assert found["float_copies"] == (copies or [])
        assert found["complete"] is False
        return {
            layer["name"]: "; ".join(layer["reasons"]) for layer in found["layers"] if not layer["passed"]
        }

    return certify_changed


def layer_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    (layer,) = [layer for layer in found["layers"] if layer["name"] == name]
    return layer


# A sound file -------------------------------------------------------------------------------------


def test_a_sound_file_passes_with_every_layer_listed(graph: Exported) -> None:
    found = certify(graph.file, graph.folded.path, graph.plan)
    quantized = [item.name for item in graph.plan if item.weights]
    assert [layer["name"] for layer in found["layers"]] == quantized and len(quantized) == 10
    assert found["complete"] is True and found["expected"] == 10 and found["float_copies"] == []
    for layer in found["layers"]:
        assert layer["passed"] and layer["weight_codes_equal"] and layer["scales_equal"], layer
        assert layer["reasons"] == [] and layer["qdq_pairs"] == layer["expected_pairs"]
    pairs = {layer["name"] for layer in found["layers"] if layer["qdq_pairs"] == 1}
    assert pairs == {NARROW, "transformer.h.0.mlp.c_proj", C_ATTN, C_PROJ, "transformer.h.1.mlp.c_proj", HEAD}


# Codes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [C_ATTN, NARROW, BLOCKED, "transformer.wpe"])
def test_one_flipped_bit_of_one_code_is_found(layer: str, broken: Callable[..., dict[str, str]]) -> None:
    def flip(cut: Graph) -> None:
        tensor = cut.tensor(f"{layer}.weight.codes")
        raw = bytearray(tensor.raw_data)
        raw[len(raw) // 3] ^= 1
        tensor.raw_data = bytes(raw)

    found = broken(flip)
    assert found.keys() == {layer}
    assert found[layer].startswith("codes: 1 differ, first at [")


def test_a_changed_table_is_every_layer_that_reads_it(
    graph: Exported, broken: Callable[..., dict[str, str]]
) -> None:
    def change(cut: Graph) -> None:
        codes = cut.array(f"{TABLE}.weight.codes").copy()
        codes[7, 3] ^= 1
        cut.put(f"{TABLE}.weight.codes", codes)

    found = broken(change)
    assert found.keys() == ({TABLE, HEAD} if graph.kind.tied else {TABLE})
    assert all("first at [7, 3]" in reason for reason in found.values())


@pytest.mark.parametrize("layer", [C_PROJ, BLOCKED])
def test_codes_that_are_missing_are_found(layer: str, broken: Callable[..., dict[str, str]]) -> None:
    def rename(cut: Graph) -> None:
        name = f"{layer}.weight.codes"
        cut.tensor(name).name = "renamed"
        cut.reread(name, "renamed")

    found = broken(rename)
    assert found.keys() == {layer} and f"no initializer {layer}.weight.codes" in found[layer]


def test_codes_of_another_shape_are_found(broken: Callable[..., dict[str, str]]) -> None:
    def cut_short(cut: Graph) -> None:
        cut.put(f"{C_PROJ}.weight.codes", cut.array(f"{C_PROJ}.weight.codes")[:, :-1])

    assert "codes: shape [64, 63], expected [64, 64]" in broken(cut_short)[C_PROJ]


def test_four_bit_codes_in_eight_bits_are_found(broken: Callable[..., dict[str, str]]) -> None:
    def widen(cut: Graph) -> None:
        cut.put(f"{BLOCKED}.weight.codes", cut.array(f"{BLOCKED}.weight.codes").astype(np.int8))

    assert broken(widen) == {BLOCKED: "codes are stored as INT8"}


def test_codes_that_something_else_reads_as_well_are_found(broken: Callable[..., dict[str, str]]) -> None:
    def cast(cut: Graph) -> None:
        node = helper.make_node("Cast", [f"{C_PROJ}.weight.codes"], ["cast"], to=TensorProto.FLOAT)
        cut.model.graph.node.append(node)

    assert "read by DequantizeLinear and by nothing else" in broken(cast)[C_PROJ]


# Scales -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [C_ATTN, BLOCKED, NARROW, "transformer.wpe"])
def test_a_scale_that_is_one_step_off_is_found(layer: str, broken: Callable[..., dict[str, str]]) -> None:
    def nudge(cut: Graph) -> None:
        scale = cut.array(f"{layer}.weight.scale").copy()
        scale.flat[3] = np.nextafter(scale.flat[3], np.array(np.inf, scale.dtype))
        cut.put(f"{layer}.weight.scale", scale)

    found = broken(nudge)
    assert found.keys() == {layer} and "scale: 1 differ, first at [" in found[layer]


def test_a_scale_that_is_computed_is_found(broken: Callable[..., dict[str, str]]) -> None:
    """A value that is no initializer could be anything."""

    def compute(cut: Graph) -> None:
        scale = numpy_helper.from_array(cut.array(f"{C_PROJ}.weight.scale") * 2)
        cut.drop(f"{C_PROJ}.weight.scale")
        cut.model.graph.node.insert(
            0, helper.make_node("Constant", [], [f"{C_PROJ}.weight.scale"], value=scale)
        )

    found = broken(compute)
    assert found.keys() == {C_PROJ} and f"no initializer {C_PROJ}.weight.scale" in found[C_PROJ]


def test_a_zero_point_other_than_zero_is_found(broken: Callable[..., dict[str, str]]) -> None:
    def shift(cut: Graph) -> None:
        node = cut.node(f"{C_ATTN}.weight/DequantizeLinear")
        zero = cut.array(node.input[2]).copy()
        zero[5] = 1
        node.input[2] = cut.put("shifted", zero)

    found = broken(shift)
    assert found.keys() == {C_ATTN} and "the zero point is not 0" in found[C_ATTN]


@pytest.mark.parametrize(("attribute", "value"), [("axis", 0), ("block_size", 64)])
def test_another_axis_or_block_is_found(
    attribute: str, value: int, broken: Callable[..., dict[str, str]]
) -> None:
    layer = C_PROJ if attribute == "axis" else BLOCKED

    def turn(cut: Graph) -> None:
        node = cut.node(f"{layer}.weight/DequantizeLinear")
        (found,) = [item for item in node.attribute if item.name == attribute]
        found.i = value

    found = broken(turn)
    expected = "expected axis 1, block None" if attribute == "axis" else "expected axis 0, block 32"
    assert found.keys() == {layer} and expected in found[layer]


# Inputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [C_ATTN, NARROW, HEAD])
def test_a_dropped_pair_in_front_of_a_matmul_is_found(
    layer: str, broken: Callable[..., dict[str, str]]
) -> None:
    def drop(cut: Graph) -> None:
        quantize = cut.node(f"{layer}.input/QuantizeLinear")
        cut.reread(cut.node(f"{layer}.input/DequantizeLinear").output[0], quantize.input[0])

    assert broken(drop) == {layer: "0 Q/DQ pairs in front of the matmul, 1 expected"}


def test_a_pair_that_was_not_asked_for_is_found(broken: Callable[..., dict[str, str]]) -> None:
    """The input of a weight-only layer is float; rounding it is another model."""

    def add(cut: Graph) -> None:
        (matmul,) = cut.readers(cut.decoded(WEIGHT_ONLY))
        scale, zero = cut.node(f"{C_ATTN}.input/QuantizeLinear").input[1:3]
        nodes = [
            helper.make_node("QuantizeLinear", [matmul.input[0], scale, zero], ["q"]),
            helper.make_node("DequantizeLinear", ["q", scale, zero], ["dq"]),
        ]
        for node in nodes:
            cut.model.graph.node.insert(list(cut.model.graph.node).index(matmul), node)
        matmul.input[0] = "dq"

    assert broken(add) == {WEIGHT_ONLY: "1 Q/DQ pairs in front of the matmul, 0 expected"}


@pytest.mark.parametrize("word", ["Quantize", "Dequantize", "both"])
@pytest.mark.parametrize("what", ["scale", "zero point"])
def test_a_changed_rounding_of_the_input_is_found(
    word: str, what: str, broken: Callable[..., dict[str, str]]
) -> None:
    def change(cut: Graph) -> None:
        for half in ("Quantize", "Dequantize") if word == "both" else (word,):
            node = cut.node(f"{C_PROJ}.input/{half}Linear")
            if what == "scale":
                node.input[1] = cut.put("changed", np.nextafter(cut.array(node.input[1]), np.float16(9)))
            else:
                node.input[2] = cut.put("changed", np.array(3, np.int8))

    def same_type(cut: Graph) -> None:
        name = cut.node(f"{C_PROJ}.input/QuantizeLinear").input[1]
        kind = cut.array(name).dtype
        change(cut)
        if what == "scale":
            cut.put("changed", cut.array("changed").astype(kind))

    found = broken(same_type)
    assert found == {C_PROJ: "the input's scale, zero point or bounds differ"}


@pytest.mark.parametrize("how", ["wider", "lost", "bypassed", "on int8"])
def test_bounds_of_narrow_codes_are_found(how: str, broken: Callable[..., dict[str, str]]) -> None:
    """The input of C_ATTN is int4: codes of -8 to 7 behind a Clip."""

    def change(cut: Graph) -> None:
        quantize = cut.node(f"{C_ATTN}.input/QuantizeLinear")
        (clip,) = [node for node in cut.readers(quantize.output[0]) if node.op_type == "Clip"]
        assert [int(cut.array(name)) for name in clip.input[1:]] == [-8, 7]
        if how == "wider":
            clip.input[2] = cut.put("changed", np.array(8, np.int8))
        elif how == "bypassed":  # the Clip is still there, and nothing reads it
            cut.reread(clip.output[0], quantize.output[0])
        elif how == "lost":
            cut.reread(clip.output[0], quantize.output[0])
            cut.model.graph.node.remove(clip)
        else:
            other = cut.node(f"{C_PROJ}.input/QuantizeLinear")
            (decode,) = cut.readers(other.output[0])
            node = helper.make_node("Clip", [other.output[0], *clip.input[1:]], ["clipped"])
            cut.model.graph.node.insert(list(cut.model.graph.node).index(decode), node)
            decode.input[0] = "clipped"

    layer = C_PROJ if how == "on int8" else C_ATTN
    assert broken(change) == {layer: "the input's scale, zero point or bounds differ"}


# Float copies -------------------------------------------------------------------------------------


def float_copy(cut: Graph, layer: str) -> str:
    """The decoded weight as an initializer."""
    codes, scale = cut.array(f"{layer}.weight.codes"), cut.array(f"{layer}.weight.scale")
    wide = codes.astype(np.float32)
    if scale.ndim == 2:
        scale = np.repeat(scale, len(codes) // len(scale), axis=0)
    return cut.put("copy", (wide * scale).astype(scale.dtype))


@pytest.mark.parametrize("layer", [C_PROJ, BLOCKED, WEIGHT_ONLY])
def test_a_weight_that_was_decoded_into_a_float_copy_is_found(
    layer: str, broken: Callable[..., dict[str, str]]
) -> None:
    """Parity cannot see it: the copy computes the same function."""

    def decode(cut: Graph) -> None:
        node = cut.node(f"{layer}.weight/DequantizeLinear")
        cut.reread(node.output[0], float_copy(cut, layer))
        cut.model.graph.node.remove(node)
        cut.drop(f"{layer}.weight.codes")

    found = broken(decode, copies=["copy"])
    assert found.keys() == {layer} and "no initializer" in found[layer]


@pytest.mark.parametrize("layer", [C_PROJ, BLOCKED, WEIGHT_ONLY])
def test_a_float_copy_beside_codes_that_nobody_uses_is_found(
    layer: str, broken: Callable[..., dict[str, str]]
) -> None:
    def bypass(cut: Graph) -> None:
        cut.reread(cut.decoded(layer), float_copy(cut, layer))

    found = broken(bypass, copies=["copy"])
    assert found.keys() == {layer} and "the decoded codes reach no MatMul" in found[layer]


@pytest.mark.parametrize("turned", [False, True])
def test_a_float_copy_fails_a_file_whose_layers_all_pass(
    turned: bool, broken: Callable[..., dict[str, str]]
) -> None:
    def add(cut: Graph) -> None:
        float_copy(cut, BLOCKED)
        (tensor,) = [one for one in cut.model.graph.initializer if one.name == "copy"]
        array = numpy_helper.to_array(tensor)
        assert array.shape[0] != array.shape[1]
        array = np.ascontiguousarray(array.T) if turned else array
        tensor.CopyFrom(numpy_helper.from_array(array, "copy"))

    assert broken(add, copies=["copy"]) == {}


def test_a_float_copy_with_the_shape_of_a_float_layer_is_found(
    broken: Callable[..., dict[str, str]],
) -> None:
    """h.0's c_attn is float in this graph, so the shape alone proves nothing against h.1's."""

    def bypass(cut: Graph) -> None:
        cut.reread(cut.decoded(C_ATTN), float_copy(cut, C_ATTN))

    found = broken(bypass)
    assert found.keys() == {C_ATTN} and "the decoded codes reach no MatMul" in found[C_ATTN]


def test_an_embedding_that_looks_up_a_float_copy_is_found(
    graph: Exported, broken: Callable[..., dict[str, str]]
) -> None:
    def bypass(cut: Graph) -> None:
        codes, scale = cut.array(f"{TABLE}.weight.codes"), cut.array(f"{TABLE}.weight.scale")
        table = cut.put("copy", (codes * scale[:, None]).astype(scale.dtype))
        (gather,) = [node for node in cut.readers(cut.decoded(TABLE)) if node.op_type == "Gather"]
        cut.reread(cut.decoded(TABLE), table, gather)

    # an untied float head of the same shape would hide the copy; here both are quantized
    found = broken(bypass, copies=["copy"])
    assert found == {TABLE: "the decoded codes reach no Gather"}


# Files that no exporter writes ---------------------------------------------------------------------


def subgraph(cut: Graph, nodes: list[NodeProto], tensors: list[TensorProto]) -> None:
    """Append an If whose branches hold these nodes and tensors."""
    condition = cut.put("condition", np.array(True))
    result = helper.make_tensor_value_info("branch", TensorProto.FLOAT, None)
    inner = [*nodes, helper.make_node("Identity", ["branch.value"], ["branch"])]
    held = [*tensors, numpy_helper.from_array(np.float32(0), "branch.value")]
    branch = helper.make_graph(inner, "branch", [], [result], held)
    cut.model.graph.node.append(
        helper.make_node("If", [condition], ["chosen"], then_branch=branch, else_branch=branch)
    )


@pytest.mark.parametrize("part", ["codes", "scale"])
def test_a_tensor_of_a_subgraph_does_not_stand_for_that_of_the_graph(
    part: str, broken: Callable[..., dict[str, str]]
) -> None:
    """Both have one name, and the graph's was changed."""

    def shadow(cut: Graph) -> None:
        name = f"{C_PROJ}.weight.{part}"
        sound = numpy_helper.from_array(cut.array(name), name)
        subgraph(cut, [], [sound])
        changed = cut.array(name).copy()
        changed.flat[3] += 1
        cut.put(name, changed)

    refused = broken(shadow)
    assert refused.keys() == {C_PROJ} and f"{part}: 1 differ" in refused[C_PROJ]


def test_a_node_of_a_subgraph_that_reads_the_codes_is_found(broken: Callable[..., dict[str, str]]) -> None:
    def read(cut: Graph) -> None:
        subgraph(cut, [helper.make_node("Cast", [f"{C_PROJ}.weight.codes"], ["c"], to=TensorProto.FLOAT)], [])

    assert "read by DequantizeLinear and by nothing else" in broken(read)[C_PROJ]


OTHER_DOMAIN = {
    "weight/DequantizeLinear": "read by DequantizeLinear and by nothing else",
    "input/QuantizeLinear": "0 Q/DQ pairs in front of the matmul",
    "input/DequantizeLinear": "0 Q/DQ pairs in front of the matmul",
    "MatMul": "the decoded codes reach no MatMul",
}


@pytest.mark.parametrize("which", OTHER_DOMAIN)
def test_an_operator_of_another_domain_is_not_that_of_onnx(
    which: str, broken: Callable[..., dict[str, str]]
) -> None:
    """It may compute anything."""

    def change(cut: Graph) -> None:
        (matmul,) = cut.readers(cut.decoded(C_PROJ))
        node = matmul if which == "MatMul" else cut.node(f"{C_PROJ}.{which}")
        node.domain = "ours"
        cut.model.opset_import.append(helper.make_opsetid("ours", 1))

    refused = broken(change)
    assert refused.keys() == {C_PROJ} and OTHER_DOMAIN[which] in refused[C_PROJ]


def test_codes_of_a_constant_node_are_found(broken: Callable[..., dict[str, str]]) -> None:
    """The certificate compares initializers only."""

    def convert(cut: Graph) -> None:
        name = f"{C_PROJ}.weight.codes"
        value = numpy_helper.from_array(cut.array(name))
        cut.drop(name)
        cut.model.graph.node.insert(0, helper.make_node("Constant", [], [name], value=value))

    refused = broken(convert)
    assert refused.keys() == {C_PROJ} and f"no initializer {C_PROJ}.weight.codes" in refused[C_PROJ]


def test_a_float_copy_in_a_constant_node_is_found(broken: Callable[..., dict[str, str]]) -> None:
    def bypass(cut: Graph) -> None:
        cut.reread(cut.decoded(BLOCKED), float_copy(cut, BLOCKED))
        value = numpy_helper.from_array(cut.array("copy"))
        cut.drop("copy")
        cut.model.graph.node.insert(0, helper.make_node("Constant", [], ["copy"], value=value))

    refused = broken(bypass, copies=["copy"])
    assert refused.keys() == {BLOCKED} and "the decoded codes reach no MatMul" in refused[BLOCKED]


def test_an_omitted_bound_is_not_the_tensor_without_a_name(broken: Callable[..., dict[str, str]]) -> None:
    """An empty input name is no input: the Clip has no upper bound."""

    def omit(cut: Graph) -> None:
        quantize = cut.node(f"{C_ATTN}.input/QuantizeLinear")
        (clip,) = [node for node in cut.readers(quantize.output[0]) if node.op_type == "Clip"]
        cut.put("", cut.array(clip.input[2]))
        clip.input[2] = ""

    assert broken(omit) == {C_ATTN: "the input's scale, zero point or bounds differ"}


@pytest.mark.parametrize("between", ["Transpose", "Concat", "Identity"])
def test_an_operator_between_the_two_nodes_of_an_input_is_found(
    between: str, broken: Callable[..., dict[str, str]]
) -> None:
    """Only the codes of attention may be moved, and appended to those of earlier tokens."""

    def insert(cut: Graph) -> None:
        quantize = cut.node(f"{C_PROJ}.input/QuantizeLinear")
        decode = cut.node(f"{C_PROJ}.input/DequantizeLinear")
        inputs = ["past", quantize.output[0]] if between == "Concat" else [quantize.output[0]]
        node = helper.make_node(between, inputs, ["moved"], **({"axis": 1} if between == "Concat" else {}))
        cut.model.graph.node.insert(list(cut.model.graph.node).index(decode), node)
        decode.input[0] = "moved"

    assert broken(insert) == {C_PROJ: "0 Q/DQ pairs in front of the matmul, 1 expected"}


def test_a_zero_point_that_is_zero_in_eight_bits_is_found(broken: Callable[..., dict[str, str]]) -> None:
    def shift(cut: Graph) -> None:
        node = cut.node(f"{C_PROJ}.weight/DequantizeLinear")
        node.input[2] = cut.put("shifted", np.full(cut.array(node.input[2]).shape, 256, np.int32))

    assert "the zero point is not 0" in broken(shift)[C_PROJ]


@pytest.mark.parametrize("count", [0, 1])
def test_a_decoder_without_its_inputs_is_found(count: int, broken: Callable[..., dict[str, str]]) -> None:
    def cut_off(cut: Graph) -> None:
        del cut.node(f"{C_PROJ}.input/DequantizeLinear").input[count:]

    expected = "bounds differ" if count else "0 Q/DQ pairs"
    assert expected in broken(cut_off)[C_PROJ]


def test_a_circle_behind_the_decoded_codes_ends(broken: Callable[..., dict[str, str]]) -> None:
    def turn(cut: Graph) -> None:
        decoded = cut.decoded(C_PROJ)
        cut.reread(decoded, "other")
        cut.model.graph.node.append(helper.make_node("Transpose", [decoded], ["turned"]))
        cut.model.graph.node.append(helper.make_node("Transpose", ["turned"], [decoded]))

    assert "reach no MatMul" in broken(turn)[C_PROJ]


def test_data_outside_the_folder_are_not_read(graph: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    model = onnx.load(str(graph.file))
    tensor = next(one for one in model.graph.initializer if one.name == f"{C_PROJ}.weight.codes")
    (tmp_path / "secret").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="lie outside the model's folder"):
        certify(folder / "model.onnx", graph.folded.path, graph.plan)


@pytest.mark.parametrize("cut", ["", "before", "after"])
def test_a_matmul_of_attention_without_its_second_input_is_refused(cut: str, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["scores"], name="before"),
        helper.make_node("Softmax", ["scores"], ["shares"]),
        helper.make_node("MatMul", ["shares", "v"], ["y"], name="after"),
    ]
    for node in nodes:
        if node.name == cut:
            del node.input[1:]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in ("q", "k", "v", "y")]
    model = helper.make_model(helper.make_graph(nodes, "attention", values[:3], values[3:]))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    if cut:
        with pytest.raises(ExportError, match="a matmul beside Softmax has one input"):
            KINDS["attention"](read(tmp_path / "model.onnx"))
    else:
        assert KINDS["attention"](read(tmp_path / "model.onnx")) == ["q", "k", "shares", "v"]


# What the helpers of these tests rest on ----------------------------------------------------------


def test_int4_initializers_survive_reading_and_writing(graph: Exported) -> None:
    cut = Graph(graph.file)
    codes = cut.array(f"{BLOCKED}.weight.codes")
    assert (
        codes.dtype == ml_dtypes.int4 and cut.tensor(f"{BLOCKED}.weight.codes").data_type == TensorProto.INT4
    )
    assert len(cut.tensor(f"{BLOCKED}.weight.codes").raw_data) == codes.size // 2


def test_a_float_parameter_is_no_decoded_copy_also_if_it_was_transposed() -> None:
    """The exporter transposes the weight of a layer that stays float."""
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert _is_one_of(weight.T.copy(), [weight]) and _is_one_of(weight, [weight])
    assert not _is_one_of(weight + 1, [weight]) and not _is_one_of(None, [weight])
