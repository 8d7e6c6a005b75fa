"""Stage `export`: the graph says what was folded, and nothing about where it was made."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from lines import NAME, ONNX_ONLY, QUICK, SLOW, Exported, Kind, exported, finished, plain_session, python
from onnx import ModelProto, TensorProto
from onnx.reference import ReferenceEvaluator
from tiny import VOCABULARY, WIDTH, make_recipe, start_line, token_ids

from qcompress.errors import ExportError
from qcompress.graph.certificate.layers import certify
from qcompress.models.folded import assemble
from qcompress.parity.layerwise import TIE, follow
from qcompress.pipeline.keys import provenance
from qcompress.pipeline.stages.build import build_file
from qcompress.pipeline.stages.export import export
from qcompress.schema.recipe import Build
from qcompress.system.artifacts import FoldedModel, OnnxModel, read_json

LINE = "line"
"""The graph of the finished run: W8A8, trained with quadapter."""

WARNED = {
    "w4a8-blocks": {"int4-weight-int8-activation"},
    "w2a16": {"int4-per-channel"},
    "ternary-a8": {"int4-per-channel", "int4-weight-int8-activation"},
}
"""Rules that a format breaks; they make it slow, and it builds all the same."""

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
CODES = {8: TensorProto.INT8, 4: TensorProto.INT4, 2: TensorProto.INT2}
INPUTS = ["input_ids", "attention_mask", "position_ids"]


@pytest.fixture(
    scope="module",
    params=[LINE, *QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)],
    ids=str,
)
def graph(request: pytest.FixtureRequest, tiny_model: Path, untied_model: Path, text_file: Path) -> Exported:
    """Each kind of graph in turn."""
    if request.param == LINE:
        project = finished(tiny_model, text_file)
        return Exported(Kind("w8a8"), FoldedModel(project.entry("fold")), project.entry("export"))
    return exported(request.param, tiny_model if request.param.tied else untied_model, text_file)


@pytest.fixture(scope="module")
def model(graph: Exported) -> ModelProto:
    return onnx.load(str(graph.file))


def initializers(model: ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def feed(ids: np.ndarray, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Inputs of the graph; padding may stand on either side."""
    mask = np.ones_like(ids) if mask is None else mask
    return {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}


def ids_of(rows: int, length: int, seed: int = 1) -> np.ndarray:
    return token_ids(rows, length, seed).numpy()


# The file -----------------------------------------------------------------------------------------


def test_the_file_is_valid_and_has_the_opset_that_was_asked_for(graph: Exported, model: ModelProto) -> None:
    onnx.checker.check_model(str(graph.file), full_check=True)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", graph.kind.opset)]
    assert model.ir_version >= 10


def test_inputs_and_outputs_have_their_names_and_two_dynamic_axes(model: ModelProto) -> None:
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    dynamic = ["batch", "sequence"]
    assert shapes == {**dict.fromkeys(INPUTS, dynamic), "logits": [*dynamic, VOCABULARY]}


def test_integers_are_stored_as_such_and_no_float_copy_is_left(graph: Exported, model: ModelProto) -> None:
    stored, plan = initializers(model), graph.plan
    quantized = [item for item in plan if item.weights and not item.layer.tied_to]
    for item in quantized:
        tensor = stored[f"{item.name}.weight.codes"]
        assert tensor.data_type == CODES[item.weights.stored_bits], item.name
        shape = [item.layer.in_features, item.layer.out_features]
        assert list(tensor.dims) == (shape[::-1] if item.layer.kind == "embedding" else shape)
    matrices = [
        sorted(tensor.dims)
        for name, tensor in stored.items()
        if tensor.data_type in FLOATS and len(tensor.dims) > 1 and not name.endswith(".scale")
    ]
    kept = [item.layer for item in plan if not item.weights and not item.layer.tied_to]
    assert sorted(matrices) == sorted(sorted((layer.in_features, layer.out_features)) for layer in kept)
    assert len(quantized) + len(kept) == len(plan) - graph.kind.tied


def test_a_tied_table_is_stored_once(graph: Exported, model: ModelProto) -> None:
    shape = [WIDTH, VOCABULARY]
    tables = [name for name, tensor in initializers(model).items() if sorted(tensor.dims) == shape]
    assert len(tables) == (1 if graph.kind.tied else 2), tables


def test_q_and_dq_nodes_are_named_after_their_layers(graph: Exported, model: ModelProto) -> None:
    expected = set()
    for item in graph.plan:
        if item.weights and not item.layer.tied_to:
            expected.add(f"{item.name}.weight/DequantizeLinear")
        if item.weights and item.activations:
            expected |= {f"{item.name}.input/{word}Linear" for word in ("Quantize", "Dequantize")}
    found = [node.name for node in model.graph.node if node.op_type.endswith("quantizeLinear")]
    found += [node.name for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert sorted(found) == sorted(expected)
    assert len(expected) == 0 if graph.kind.format == "float" else len(expected) > 8


def test_metadata_says_where_the_model_comes_from(graph: Exported, model: ModelProto) -> None:
    found = {item.key: item.value for item in model.metadata_props}
    assert found.keys() == {
        f"qcompress.{key}" for key in ("recipe", "recipe_sha256", "version", "method", "formats")
    }
    assert found["qcompress.recipe"] == NAME and len(found["qcompress.recipe_sha256"]) == 64
    formats = json.loads(found["qcompress.formats"])
    assert formats.keys() == {item.name for item in graph.plan if item.weights}
    assert model.producer_name == "qcompress"


def test_nothing_in_the_file_depends_on_where_it_was_made(graph: Exported, model: ModelProto) -> None:
    assert len(model.graph.node) > 50
    for node in model.graph.node:
        assert not node.metadata_props and not node.doc_string
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    assert not any(value.metadata_props or value.doc_string for value in values)
    assert not any(tensor.metadata_props or tensor.doc_string for tensor in model.graph.initializer)
    assert not model.doc_string and not model.graph.doc_string and not model.graph.metadata_props
    content = graph.file.read_bytes()
    for trace in (b"site-packages", b".py", str(Path(__file__).parents[2]).encode()):
        assert trace not in content


# What the graph computes --------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 32), (5, 3), (2, 17)])
def test_every_batch_and_length_runs_at_every_level(graph: Exported, rows: int, length: int) -> None:
    inputs = feed(ids_of(rows, length))
    for optimized in (False, True):
        logits = plain_session(graph.file, optimized=optimized).run(["logits"], inputs)[0]
        assert logits.shape == (rows, length, VOCABULARY) and np.isfinite(logits).all()
        assert np.ptp(logits) > 1


def test_padding_on_the_left_changes_nothing(graph: Exported) -> None:
    session = plain_session(graph.file)
    ids = ids_of(6, 9)
    alone = session.run(["logits"], feed(ids))[0].astype(np.float32)
    padded = np.concatenate([np.zeros((6, 4), np.int64), ids], 1)
    mask = np.concatenate([np.zeros((6, 4), np.int64), np.ones_like(ids)], 1)
    beside = session.run(["logits"], feed(padded, mask))[0][:, 4:].astype(np.float32)
    without = session.run(["logits"], feed(padded))[0][:, 4:].astype(np.float32)
    assert close(alone, beside, graph).mean() >= 0.5 and np.abs(alone - beside).mean() < 0.01
    assert np.abs(alone - without).mean() > 0.05  # the mask matters


def close(a: np.ndarray, b: np.ndarray, graph: Exported) -> np.ndarray:
    """For each row whether all its logits agree: to 1e-5 in fp32, to fp16's precision in fp16.

    A rounding that flips, because sums were made in another order, moves its row visibly; which rows flip
    depends on the machine, so tests ask for most of the rows. The figure is relative to the logits' range.
    """
    limit = 1e-5 if graph.kind.compute == "fp32" else 4e-3
    return np.abs(a - b).max(axis=tuple(range(1, a.ndim))) <= limit * np.ptp(a)


def folded_logits(graph: Exported, ids: np.ndarray) -> np.ndarray:
    """Logits of the folded model in torch, in the graph's compute type."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[graph.kind.compute]
    with torch.no_grad():
        inputs = {name: torch.from_numpy(array) for name, array in feed(ids).items()}
        return assemble(graph.folded, dtype)(**inputs).logits.float().numpy()


def test_onnxruntime_computes_the_folded_model(graph: Exported) -> None:
    ids = ids_of(32, 3)
    expected = folded_logits(graph, ids)
    found = plain_session(graph.file).run(["logits"], feed(ids))[0].astype(np.float32)
    if graph.kind.compute == "fp16":
        if all(item.activations.bits < 8 for item in graph.plan if item.activations):
            pytest.skip("flips of wide steps move a random model far; the next test looks at each code")
        # fp16 sums flip roundings in every row; the design allows a trained one 2e-3
        assert np.abs(found - expected).mean() <= 5e-3 * np.ptp(expected)
        assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.9
        return
    agree = close(found, expected, graph)
    if not any(item.activations for item in graph.plan):
        assert agree.all()  # nothing rounds, so nothing can flip
    assert agree.mean() >= 0.5, agree
    assert np.abs(found - expected).mean() <= 2e-3 * np.ptp(expected)


def test_every_code_is_that_of_the_folded_model_or_a_tie(graph: Exported) -> None:
    with follow(graph.folded, OnnxModel(graph.folder), TIE[graph.kind.compute]) as (places, run):
        for row in ids_of(16, 9):
            run({"input_ids": row[None], "attention_mask": np.ones((1, 9), np.int64)})
    codes = {name: place.codes for name, place in places.items() if place.codes}
    assert set(codes) == {item.name for item in graph.plan if item.weights and item.activations}
    assert {name: place.unexplained for name, place in places.items() if place.unexplained} == {}


def test_the_onnx_reference_computes_the_folded_model(graph: Exported) -> None:
    """An implementation that shares no kernel with torch and onnxruntime; slow, hence few short rows."""
    if graph.kind.compute != "fp32":
        pytest.skip("the reference computes fp16 in fp16 sums")
    ids = ids_of(12, 2)
    found = ReferenceEvaluator(str(graph.file)).run(["logits"], feed(ids))[0]
    agree = close(found, folded_logits(graph, ids), graph)
    assert agree.mean() >= 0.5, agree


def test_int8_layers_become_integer_matmuls_in_the_deployed_session(graph: Exported, tmp_path: Path) -> None:
    """Or the deployed model is slower than float: ONNX Runtime fuses only the form it knows."""
    if graph.kind.compute != "fp32":
        pytest.skip("ONNX Runtime fuses integer matmuls with fp32 scales only")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(graph.file), options, providers=["CPUExecutionProvider"])
    words = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    # behind a Clip, ONNX Runtime decodes narrower codes and multiplies floats
    wide = [item for item in graph.plan if item.activations and item.activations.bits == 8]
    int8 = [item for item in wide if item.weights.stored_bits == 8]
    assert words.count("MatMulIntegerToFloat") == len(int8)


def test_tensorrt_rtx_builds_the_graph(graph: Exported, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    if graph.kind.format in ONNX_ONLY:
        pytest.skip("TensorRT-RTX computes neither int4 blocks by int8 activations nor int2")
    options = Build(target="rtx-ada", profiles=[{"batch": [1, 2, 4], "sequence": [1, 8, 32]}])
    build_file(graph.file, options, tmp_path)
    record = read_json(tmp_path / "build.json")
    assert record["status"] == "built" and list(record["inputs"]) == sorted(INPUTS)
    assert all(message["severity"] == "warning" for message in record["messages"])


# What is written beside it ------------------------------------------------------------------------


def test_the_folder_has_the_graph_its_proofs_and_what_a_user_needs(graph: Exported) -> None:
    names = {file.name for file in graph.folder.iterdir()} - {"manifest.json"}
    assert names == {"model.onnx", "lint.json", "certificate.json", "sizes.json", "config.json",
                     "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    assert read_json(graph.folder / "certificate.json")["complete"] is True
    findings = read_json(graph.folder / "lint.json")["findings"]
    assert all(finding["severity"] == "warning" for finding in findings)
    assert {finding["rule"] for finding in findings} == WARNED.get(graph.kind.format, set())


def test_what_the_target_would_refuse_ends_the_export_and_is_written_down(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """The linter is the last to see what `check` was not asked about."""
    source = exported(QUICK[0], tiny_model, text_file)
    recipe = make_recipe(text_file)
    stage = importlib.import_module(export.__module__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_trace", lambda *arguments: Traced(source.file))
        with pytest.raises(ExportError, match="(?s)t4 would refuse or change this graph.*int4") as refused:
            export(source.folded, recipe.export, "t4", provenance(recipe), tmp_path)
    assert refused.value.exit_code == 5
    lint = read_json(tmp_path / "lint.json")
    assert lint["target"] == "t4" and any(item["severity"] == "error" for item in lint["findings"])


class Traced:
    """Stands for torch's export of a graph that was exported before."""

    def __init__(self, file: Path) -> None:
        self.model = onnx_ir.load(file)
        for item in self.model.graph.initializers.values():
            if item.dtype == onnx_ir.DataType.INT4:  # torch has no such type
                codes = item.const_value.numpy().astype(np.int8)
                item.const_value = onnx_ir.Tensor(codes, name=item.name)
                item.dtype = onnx_ir.DataType.INT8


def test_a_graph_that_is_not_what_was_folded_ends_the_export(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    source = exported(QUICK[0], tiny_model, text_file)
    recipe = make_recipe(text_file)
    traced = Traced(source.file)
    tensor = traced.model.graph.initializers["transformer.h.1.attn.c_proj.weight.codes"]
    tensor.const_value = onnx_ir.Tensor(tensor.const_value.numpy() * 0, name=tensor.name)
    stage = importlib.import_module(export.__module__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_trace", lambda *arguments: traced)
        with pytest.raises(
            ExportError, match="differs from the folded model: .'transformer.h.1.attn.c_proj'."
        ):
            export(source.folded, recipe.export, "rtx-ada", provenance(recipe), tmp_path)
    assert read_json(tmp_path / "certificate.json")["complete"] is False


@pytest.mark.slow
def test_two_layers_with_equal_scales_keep_their_names(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """The exporter stores equal scales once; TensorRT's messages must name the layer all the same."""
    from safetensors.torch import load_file, save_file

    twins = shutil.copytree(tiny_model, tmp_path / "twins")
    tensors = load_file(twins / "model.safetensors")
    for name in list(tensors):
        if ".h.1." in name:
            tensors[name] = tensors[name.replace(".h.1.", ".h.0.")].clone()
    save_file(tensors, twins / "model.safetensors", {"format": "pt"})
    graph = exported(Kind("w8a16"), twins, text_file)
    names = [node.name for node in onnx.load(str(graph.file)).graph.node if "quantizeLinear" in node.op_type]
    assert sorted(names) == sorted(
        f"{item.name}.weight/DequantizeLinear" for item in graph.plan if not item.layer.tied_to
    )
    assert len(names) == 10


@pytest.mark.slow
def test_large_initializers_go_into_a_file_of_their_own(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    source = exported(QUICK[0], tiny_model, text_file)
    recipe = make_recipe(text_file)
    stage = importlib.import_module(export.__module__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "EXTERNAL_BYTES", 0)
        export(source.folded, recipe.export, "rtx-ada", provenance(recipe), tmp_path)
    data = tmp_path / "model.onnx.data"
    assert data.stat().st_size > 100_000 > (tmp_path / "model.onnx").stat().st_size
    assert certify(tmp_path / "model.onnx", source.folded.path, source.plan)["complete"]
    sizes = read_json(tmp_path / "sizes.json")
    assert sizes["file_bytes"] == data.stat().st_size + (tmp_path / "model.onnx").stat().st_size
    ids = ids_of(3, 7)
    near, far = (plain_session(folder / "model.onnx") for folder in (source.folder, tmp_path))
    assert np.array_equal(near.run(None, feed(ids))[0], far.run(None, feed(ids))[0])


@pytest.mark.slow
def test_a_bf16_graph_is_exported_and_built(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = exported(Kind("w8a8", "bf16", 22), tiny_model, text_file)
    stored = initializers(onnx.load(str(graph.file)))
    assert stored["transformer.h.0.mlp.c_fc.weight.scale"].data_type == TensorProto.BFLOAT16
    assert stored["transformer.h.0.mlp.c_fc.weight.codes"].data_type == TensorProto.INT8
    build_file(graph.file, Build(target="rtx-ada", profiles=[{"sequence": [1, 8, 32]}]), tmp_path)
    assert read_json(tmp_path / "build.json")["status"] == "built"


SAME = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from qcompress.system.artifacts import FoldedModel
from qcompress.pipeline.stages.export import export
from qcompress.schema.recipe import Export
import qcompress
folded, out = map(Path, sys.argv[1:3])
out.mkdir()
export(FoldedModel(folded), Export(), "rtx-ada", json.loads(sys.argv[3]), out)
print(Path(qcompress.__file__).parent)
"""


@pytest.mark.slow
def test_another_process_and_another_install_directory_write_the_same_bytes(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    source = exported(QUICK[0], tiny_model, text_file)
    elsewhere = tmp_path / "a" / "much" / "longer" / "path"
    shutil.copytree(Path(__file__).parents[2] / "qcompress", elsewhere / "qcompress")
    folded = shutil.copytree(source.folded.path, tmp_path / "folded")
    metadata = {item.key: item.value for item in onnx.load(str(source.file)).metadata_props}
    facts = {key: metadata[f"qcompress.{key}"] for key in ("recipe", "recipe_sha256", "version", "method")}
    done = python(SAME, str(folded), str(tmp_path / "out"), json.dumps(facts), folder=elsewhere)
    assert done.code == 0, done.stderr
    assert done.stdout.strip() == str(elsewhere / "qcompress")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == source.file.read_bytes()


@pytest.mark.slow
def test_a_fixed_axis_is_fixed_in_the_file(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = make_recipe(text_file, export={"dynamic": ["sequence"]})
    line = start_line(tmp_path / "line", tiny_model, text_file, recipe).train().fold()
    export(line.folded, recipe.export, "cpu", provenance(recipe), tmp_path)
    shape = onnx.load(str(tmp_path / "model.onnx")).graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_value > 0 and shape[1].dim_param == "sequence"
