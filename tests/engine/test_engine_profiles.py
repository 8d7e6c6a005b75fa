from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from graphs import Graph, Shape, decoder, linear, quantize_activation, save, tensor_value
from onnx import TensorProto, helper

from qcompress.engine.profiles import model_context, profile_shapes
from qcompress.errors import UsageError
from qcompress.graph.view import View, read
from qcompress.schema.recipe import Profile

SHORT = Profile(batch=[1, 2, 4], sequence=[1, 32, 64])


def view(folder: Path, model: onnx.ModelProto) -> View:
    return read(save(model, folder / "model.onnx"))


def with_axes(*shape: int | str | None) -> onnx.ModelProto:
    """A graph whose one input has these dimensions."""
    graph = Graph()
    graph.node("Relu", ["x"], "y")
    return graph.model(
        [tensor_value("x", TensorProto.FLOAT, *shape)], [tensor_value("y", TensorProto.FLOAT, *shape)]
    )


def test_every_input_gets_the_ranges_of_its_axes(tmp_path: Path) -> None:
    shapes = profile_shapes(view(tmp_path, decoder()), [SHORT, Profile(batch=[1, 1, 1], sequence=[8, 8, 8])])
    names = ["input_ids", "attention_mask", "position_ids"]
    assert shapes == [
        {name: [[1, 1], [2, 32], [4, 64]] for name in names},
        {name: [[1, 8], [1, 8], [1, 8]] for name in names},
    ]


def test_a_fixed_dimension_stays_as_it_is(tmp_path: Path) -> None:
    shapes = profile_shapes(view(tmp_path, with_axes(3, "sequence", "batch")), [SHORT])
    assert shapes == [{"x": [[3, 1, 1], [3, 32, 2], [3, 64, 4]]}]


def test_a_graph_without_dynamic_axes_needs_no_profile(tmp_path: Path) -> None:
    assert profile_shapes(view(tmp_path, with_axes(3, 8)), [SHORT]) == []


def test_an_initializer_among_the_inputs_is_none(tmp_path: Path) -> None:
    model = linear()
    model.graph.input.append(tensor_value("weight.codes", TensorProto.INT8, 128, 64))
    assert list(profile_shapes(view(tmp_path, model), [SHORT])[0]) == ["x"]


def test_an_axis_that_the_profile_does_not_know_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="input 'x' has an axis 'frames', .* for batch, sequence") as error:
        profile_shapes(view(tmp_path, with_axes("batch", "frames")), [SHORT])
    assert error.value.exit_code == 2
    assert error.value.fix == "give it one: `axes: {frames: [min, opt, max]}`"


def test_axes_of_other_names_have_ranges_of_their_own(tmp_path: Path) -> None:
    profile = Profile(batch=[1, 2, 4], axes={"frames": [8, 16, 32]})
    shapes = profile_shapes(view(tmp_path, with_axes("batch", "frames", 80)), [profile])
    assert shapes == [{"x": [[1, 8, 80], [2, 16, 80], [4, 32, 80]]}]
    with pytest.raises(ValueError, match=r"frames must be 1 <= min <= opt <= max, found \[8, 4, 32\]"):
        Profile(axes={"frames": [8, 4, 32]})
    with pytest.raises(ValueError, match="axes is for other names than batch"):
        Profile(axes={"batch": [1, 2, 4]})


def test_the_whole_is_the_past_and_what_follows(tmp_path: Path) -> None:
    profile = Profile(batch=[1, 1, 1], sequence=[1, 4, 16], past=[0, 8, 48])
    model = with_axes("batch", "total")
    model.graph.input.append(tensor_value("past_key_values.0.key", TensorProto.FLOAT, "batch", 2, "past", 4))
    (shapes,) = profile_shapes(view(tmp_path, model), [profile])
    assert shapes["x"] == [[1, 1], [1, 12], [1, 64]]
    assert shapes["past_key_values.0.key"] == [[1, 2, 0, 4], [1, 2, 8, 4], [1, 2, 48, 4]]


def test_a_past_beyond_the_model_is_told_with_the_longest_that_fits(tmp_path: Path) -> None:
    model = decoder(Shape(context=48))
    model.graph.input.append(tensor_value("past_key_values.0.key", TensorProto.FLOAT, "batch", 2, "past", 4))
    graph = view(tmp_path, model)
    with pytest.raises(UsageError, match="past goes to 48 tokens, and the model has 48 positions") as error:
        profile_shapes(graph, [Profile(sequence=[1, 8, 48], past=[0, 8, 48])])
    assert error.value.fix == "set `past: [0, 8, 47]`"
    assert profile_shapes(graph, [Profile(sequence=[1, 8, 48], past=[0, 8, 47])])


@pytest.mark.parametrize("shape", [(None, 4), ("batch", None)])
def test_a_dimension_without_name_or_size_is_told(tmp_path: Path, shape: tuple) -> None:
    with pytest.raises(UsageError, match="dimension without a name or a size(.|\n)*batch and sequence"):
        profile_shapes(view(tmp_path, with_axes(*shape)), [SHORT])


def test_an_input_without_a_shape_is_told(tmp_path: Path) -> None:
    model = with_axes("batch", 4)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(UsageError, match="dimension without a name or a size"):
        profile_shapes(view(tmp_path, model), [SHORT])


def test_a_profile_beyond_the_model_is_told_with_the_longest_that_fits(tmp_path: Path) -> None:
    graph = view(tmp_path, decoder(Shape(context=48)))
    with pytest.raises(UsageError, match=r"profiles\[1\].sequence goes to 64 .* 48 positions") as error:
        profile_shapes(graph, [Profile(sequence=[1, 2, 48]), SHORT])
    assert "[1, 32, 48]" in error.value.fix


@pytest.mark.parametrize("bits", [8, None])
def test_the_context_is_the_length_of_the_table_of_positions(tmp_path: Path, bits: int | None) -> None:
    graph = view(tmp_path, decoder(Shape(context=48), bits=bits, table_bits=bits))
    assert model_context(graph) == 48


def test_the_context_is_found_behind_what_an_exporter_puts_before_it(tmp_path: Path) -> None:
    model = decoder(Shape(context=48))
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[1] == "position_ids":
            node.input[1] = "cast"
    model.graph.node.insert(0, helper.make_node("Cast", ["position_ids"], ["cast"], to=TensorProto.INT32))
    assert model_context(view(tmp_path, model)) == 48


def test_a_model_without_positions_has_no_limit(tmp_path: Path) -> None:
    graph = Graph()
    graph.node("Relu", [quantize_activation(graph, "x")], "y")
    ends = [tensor_value("x", 1, "batch", "sequence")], [tensor_value("y", 1, "batch", "sequence")]
    opened = view(tmp_path, graph.model(*ends))
    assert model_context(opened) is None
    assert profile_shapes(opened, [Profile(sequence=[1, 2, 100_000])])
