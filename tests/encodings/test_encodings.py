"""Laws of every encoding, by iteration over the table. Oracles: ONNX Runtime without optimizations, which
decodes the file, and the sizes of the stored initializers.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from lines import Exported, Kind, exported, plain_session
from onnx import numpy_helper
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file

from qcompress.encodings import CODES, ENCODINGS, encoding_of
from qcompress.graph.certificate.layers import with_outputs
from qcompress.graph.tensors import stored_bytes
from qcompress.graph.view import read
from qcompress.graph.weights import stored_weights
from qcompress.models.plan import LayerPlan
from qcompress.quant.types import COMPUTE
from qcompress.schema.formats import WEIGHT_WORDS, CodebookFormat, WeightFormat

KINDS = (
    Kind("mixed"),
    Kind("codebook"),
    Kind("codebook", "fp16", 23, tied=False),
    Kind("w2a16-int2", opset=25),
)
LENGTH = 7


@pytest.fixture(scope="module", params=KINDS, ids=str)
def graph(request: pytest.FixtureRequest, tiny_model: Path, untied_model: Path, text_file: Path) -> Exported:
    return exported(request.param, tiny_model if request.param.tied else untied_model, text_file)


def weights(graph: Exported) -> list[LayerPlan]:
    return [item for item in graph.plan if item.weights is not None and not item.layer.tied_to]


def formats() -> list[WeightFormat | CodebookFormat]:
    """Every weight format that a recipe can say."""
    made: list[WeightFormat | CodebookFormat] = [CodebookFormat(codebook="decode-int8", table="int8")]
    made += [CodebookFormat(table=table, block=block) for table in ("float", "int8") for block in (4, 8)]
    choices = itertools.product(
        (8, 4, 3, 2), (False, True), ("channel", "tensor"), (None, 32, 128), (None, "int8", "int4", "int2")
    )
    for bits, ternary, granularity, block, container in choices:
        try:
            made.append(WeightFormat(bits=bits, ternary=ternary, granularity=granularity, block=block,
                                     container=container))  # fmt: skip
        except ValidationError:
            continue
    return made


def test_every_format_has_one_encoding_and_every_encoding_a_format() -> None:
    made = formats()
    assert len(made) > 50
    assert {encoding_of(form).name for form in made} == {encoding.name for encoding in ENCODINGS}
    assert all(sum(encoding.holds(form) for encoding in ENCODINGS) == 1 for form in made)
    assert all(encoding_of(form) for form in WEIGHT_WORDS.values() if form is not None)


def test_names_of_tensors_tell_encodings_apart() -> None:
    names = [encoding.name for encoding in ENCODINGS]
    assert len(set(names)) == len(names) and len(set(CODES)) == len(CODES) == len(ENCODINGS)
    assert all(set(encoding.parts) <= set(encoding.initializers) for encoding in ENCODINGS)


def test_the_folded_file_has_the_parts_of_each_weight_and_no_others(graph: Exported) -> None:
    stored = load_file(graph.folded.path / "folded.safetensors")
    for item in weights(graph):
        prefix = f"{item.name}.weight."
        parts = {name.removeprefix(prefix) for name in stored if name.startswith(prefix)}
        encoding = encoding_of(item.weights)
        assert encoding.parts[0] in parts and parts <= set(encoding.parts), item.name
        assert f"{item.name}.weight" not in stored


def test_torch_decodes_what_onnx_runtime_decodes(graph: Exported, tmp_path: Path) -> None:
    """Bit for bit, each weight that a matmul or a convolution reads."""
    compute = COMPUTE[graph.kind.compute]
    stored = load_file(graph.folded.path / "folded.safetensors")
    view = read(graph.file)
    wanted = {}
    for item in weights(graph):
        encoding = encoding_of(item.weights)
        if sources := encoding.sources(view, item.name):
            parts = {part: stored.get(f"{item.name}.weight.{part}") for part in encoding.parts}
            wanted[sources[0]] = encoding.decoder(parts, item, compute).decoded().float().numpy()
    assert len(wanted) >= 4
    file = tmp_path / "model.onnx"
    file.write_bytes(with_outputs(graph.file, list(wanted)))
    session = plain_session(file)
    ids = np.arange(LENGTH, dtype=np.int64)[None]
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids}
    names = {given.name for given in session.get_inputs()}
    decoded = session.run(list(wanted), {name: value for name, value in feed.items() if name in names})
    for (source, ours), theirs in zip(wanted.items(), decoded, strict=True):
        np.testing.assert_array_equal(ours, theirs.astype(np.float32), err_msg=source)


def test_predicted_bytes_are_those_of_the_file(graph: Exported) -> None:
    number = 4 if graph.kind.compute == "fp32" else 2
    sizes = {tensor.name: stored_bytes(tensor) for tensor in onnx.load(str(graph.file)).graph.initializer}
    for item in weights(graph):
        encoding = encoding_of(item.weights)
        stored = sum(sizes.get(f"{item.name}.weight.{part}", 0) for part in encoding.parts)
        scalar = number if encoding.parts[-1] == "scale" and item.weights.bounds == (-127, 127) else 0
        predicted = encoding.stored_bytes(item.layer, item.weights, number)
        assert predicted <= stored <= predicted + scalar, item.name  # a table of codes has one scale


def test_a_changed_bit_of_each_part_breaks_the_certificate_of_its_weight(graph: Exported) -> None:
    view, changed = read(graph.file), 0
    with safe_open(graph.folded.path / "folded.safetensors", framework="np") as tensors:
        for item in weights(graph):
            encoding = encoding_of(item.weights)
            assert encoding.certify(view, tensors, item).reasons == []
            for part in encoding.parts:
                tensor = view.constants.get(f"{item.name}.weight.{part}")
                if tensor is None:
                    continue
                raw = bytearray(tensor.raw_data or numpy_helper.to_array(tensor).tobytes())
                before, raw[0] = tensor.raw_data, raw[0] ^ 1
                tensor.raw_data = bytes(raw)
                assert encoding.certify(view, tensors, item).reasons, (item.name, part)
                tensor.raw_data = before
                changed += 1
    assert changed > 10


def test_each_weight_is_found_in_the_graph_by_its_encoding_and_by_no_other(graph: Exported) -> None:
    view = read(graph.file)
    found = {weight.name: weight for weight in stored_weights(view)}
    wanted = {f"{item.name}.weight.{encoding_of(item.weights).parts[0]}": item for item in weights(graph)}
    assert found.keys() == wanted.keys()
    for name, item in wanted.items():
        weight, encoding = found[name], encoding_of(item.weights)
        assert name in {other.name for other in encoding.find(view)}
        assert weight.integers is item.integers and weight.stored_bits == item.weights.stored_bits
        expanded = item.integers and isinstance(item.weights, CodebookFormat)  # decode-int8
        known = weight.stored_bits if expanded else item.weights.information_bits
        assert 0 < weight.information_bits() <= known
        assert sorted(weight.shape) == sorted((item.layer.in_features, item.layer.out_features))
        parts = {part for part in weight.parts() if part in view.constants}
        own = {f"{item.name}.weight.{part}" for part in encoding.parts} & view.constants.keys()
        # two layers may share a scale, and int8 weights have a zero point
        assert f"{item.name}.weight.{encoding.parts[0]}" in own and len(parts - own) <= 2
        operators = {node.op_type for node in weight.readers()}
        assert operators and operators <= {"MatMul", "Gather"}


def test_a_found_weight_is_decoded_as_torch_decodes_it(graph: Exported) -> None:
    """The same values in any order: vectors of a codebook are in the order of the indices."""
    stored = load_file(graph.folded.path / "folded.safetensors")
    found = {weight.name: weight for weight in stored_weights(read(graph.file))}
    for item in weights(graph):
        encoding = encoding_of(item.weights)
        parts = {part: stored.get(f"{item.name}.weight.{part}") for part in encoding.parts}
        decoded = encoding.decoder(parts, item, COMPUTE[graph.kind.compute]).decoded().float().numpy()
        (values,) = found[f"{item.name}.weight.{encoding.parts[0]}"].decoded(2**30)
        assert values.dtype == np.float32
        np.testing.assert_array_equal(np.sort(values, None), np.sort(decoded, None), err_msg=item.name)


def test_a_decoder_has_no_parameters_and_follows_the_compute_type(graph: Exported) -> None:
    stored = load_file(graph.folded.path / "folded.safetensors")
    for item in weights(graph):
        encoding = encoding_of(item.weights)
        parts = {part: stored.get(f"{item.name}.weight.{part}") for part in encoding.parts}
        for dtype in (torch.float32, torch.bfloat16):
            decoder = encoding.decoder(parts, item, dtype)
            assert decoder.decoded().dtype == dtype and not list(decoder.parameters())
