"""What sizes.json says, recounted from the bytes of the file."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
import pytest
from lines import QUICK, Exported, exported

from qcompress.graph.sizes import measure_sizes
from qcompress.system.artifacts import read_json


@pytest.fixture(scope="module", params=QUICK, ids=str)
def graph(request: pytest.FixtureRequest, tiny_model: Path, untied_model: Path, text_file: Path) -> Exported:
    """Every kind of layer, in fp32 with a tied table and in fp16 without."""
    return exported(request.param, tiny_model if request.param.tied else untied_model, text_file)


@pytest.fixture(scope="module")
def stored(graph: Exported) -> dict[str, int]:
    """Bytes of each initializer as they lie in the file."""
    tensors = onnx.load(str(graph.file)).graph.initializer
    assert all(tensor.HasField("raw_data") for tensor in tensors)
    return {tensor.name: len(tensor.raw_data) for tensor in tensors}


@pytest.fixture(scope="module")
def sizes(graph: Exported) -> dict:
    return read_json(graph.folder / "sizes.json")


def test_measuring_again_says_the_same(graph: Exported, sizes: dict) -> None:
    assert measure_sizes(graph.file, graph.plan, {}) == sizes


def test_all_initializers_are_counted_to_the_byte(stored: dict[str, int], sizes: dict) -> None:
    assert sizes["initializer_bytes"] == sum(stored.values()) > 50_000


def test_the_file_is_counted_whole_and_is_little_more_than_its_initializers(
    graph: Exported, sizes: dict
) -> None:
    assert sizes["file_bytes"] == graph.file.stat().st_size
    assert 0 < sizes["file_bytes"] - sizes["initializer_bytes"] < 60_000


def test_each_layer_is_its_codes_scales_and_zero_points(
    graph: Exported, stored: dict[str, int], sizes: dict
) -> None:
    quantized = [item for item in graph.plan if item.weights and not item.layer.tied_to]
    assert [layer["name"] for layer in sizes["layers"]] == [item.name for item in quantized]
    assert len(quantized) == (9 if graph.kind.tied else 10)
    for layer, item in zip(sizes["layers"], quantized, strict=True):
        own = [size for name, size in stored.items() if name.startswith(f"{item.name}.weight.")]
        assert layer["bytes"] == sum(own) and 2 <= len(own) <= 3
        assert layer["weights"] == item.layer.in_features * item.layer.out_features
        assert layer["information_bits"] == (math.log2(3) if item.weights.ternary else item.weights.bits)
        assert stored[f"{item.name}.weight.codes"] * 8 == layer["weights"] * layer["stored_bits"]
    assert sizes["quantized_bytes"] == sum(layer["bytes"] for layer in sizes["layers"])


def test_four_bits_take_half_of_eight_where_the_container_is_int4(graph: Exported, sizes: dict) -> None:
    layers = {layer["name"]: layer for layer in sizes["layers"]}
    int4, int8 = layers["transformer.h.0.mlp.c_fc"], layers["transformer.h.1.mlp.c_fc"]
    narrow = layers["transformer.h.0.attn.c_proj"]
    assert (int4["stored_bits"], int8["stored_bits"], narrow["stored_bits"]) == (4, 8, 8)
    assert (int4["information_bits"], narrow["information_bits"]) == (4, 4)
    ternary = layers["transformer.h.1.attn.c_proj"]
    assert (ternary["stored_bits"], ternary["information_bits"]) == (8, math.log2(3))
    weights, width = 64 * 256, 4 if graph.kind.compute == "fp32" else 2
    assert int4["bytes"] == weights // 2 + weights // 32 * width  # a scale for every 32 inputs of a channel
    assert int8["bytes"] in (weights + 256 * width, weights + 256 * width + 256)  # zero points may be shared


def test_what_the_layers_would_take_in_float_is_the_checkpoints(graph: Exported, sizes: dict) -> None:
    floats = sum(math.prod((item.layer.in_features, item.layer.out_features)) for item in graph.plan
                 if not item.layer.tied_to)  # fmt: skip
    assert sizes["float_layer_bytes"] == 4 * floats
    assert 0.2 < sizes["quantized_bytes"] / sizes["float_layer_bytes"] < 0.3
