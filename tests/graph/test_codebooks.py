"""Weights that are looked up, from fold to the file: nothing decodes them on the way, and everybody computes
the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from lines import BOOK, Exported, Kind, exported, plain_session
from onnx import ModelProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file
from tiny import Line, token_ids

from qcompress.graph.certificate.layers import certify
from qcompress.graph.inspect import contents
from qcompress.models.folded import assemble
from qcompress.pipeline.stages.build import build_file
from qcompress.schema.recipe import Build
from qcompress.system.artifacts import read_json

KINDS = (Kind("codebook"), Kind("codebook", "fp16", 23, tied=False))


@pytest.fixture(scope="module", params=KINDS, ids=str)
def graph(request: pytest.FixtureRequest, tiny_model: Path, untied_model: Path, text_file: Path) -> Exported:
    return exported(request.param, tiny_model if request.param.tied else untied_model, text_file)


def feed(ids: np.ndarray) -> dict[str, np.ndarray]:
    mask = np.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(1) - 1}


def stored(model: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def logits(graph: Exported, ids: np.ndarray) -> np.ndarray:
    dtype = torch.float16 if graph.kind.compute == "fp16" else torch.float32
    with torch.no_grad():
        inputs = {name: torch.from_numpy(array) for name, array in feed(ids).items()}
        return assemble(graph.folded, dtype)(**inputs).logits.float().numpy()


def test_the_file_holds_indices_and_tables_and_no_decoded_weight(graph: Exported) -> None:
    """These layers are so small that an exporter which folds constants would fold them."""
    found = stored(onnx.load(str(graph.file)))
    books = [item for item in graph.plan if not item.integers and item.weights and not item.layer.tied_to]
    assert len(books) == (8 if graph.kind.tied else 9)
    for item in books:
        indices, table = (found[f"{item.name}.weight.{part}"] for part in ("assignments", "centroids"))
        rows, block = item.layer.out_features, item.weights.block
        vectors = item.layer.in_features // block
        shape = (rows, vectors) if item.layer.kind == "embedding" else (vectors, rows)
        assert indices.shape == shape and indices.dtype == np.uint8 and indices.max() < 16
        assert table.shape == (16, block)
        floats = np.float16 if graph.kind.compute == "fp16" else np.float32
        assert table.dtype == (np.int8 if item.weights.table == "int8" else floats)
    decoded = found["transformer.h.1.mlp.c_fc.weight.codes"]
    assert decoded.dtype == np.int8 and len(np.unique(decoded.reshape(-1, 8, decoded.shape[1]), axis=0)) > 1
    largest = max(array.size for name, array in found.items() if array.dtype in (np.float32, np.float16))
    assert largest < 1000  # norms, biases, tables


def test_indices_and_tables_are_the_folded_ones_and_the_folded_ones_the_trained(graph: Exported) -> None:
    found = stored(onnx.load(str(graph.file)))
    folded = load_file(graph.folded.path / "folded.safetensors")
    trained = load_file(graph.folded.path.parent / "train" / "trained.safetensors")
    names = [name for name in folded if name.endswith((".assignments", ".centroids"))]
    assert len(names) == (16 if graph.kind.tied else 18)
    for name in names:
        wanted = folded[name].numpy()
        assert np.array_equal(found[name], wanted.astype(found[name].dtype)), name
        if folded[name].dtype == trained[name].dtype:
            turned = name == "lm_head.weight.assignments"  # nn.Linear's, [out, in]
            assert torch.equal(folded[name], trained[name].t() if turned else trained[name])
        else:
            scale = trained[name.replace("centroids", "scale")]
            assert torch.equal(folded[name], (trained[name] / scale).round().to(torch.int8))


def test_onnxruntime_and_the_reference_compute_the_folded_model(graph: Exported) -> None:
    ids = token_ids(16, 5).numpy()
    expected = logits(graph, ids)
    for optimized in (False, True):
        found = plain_session(graph.file, optimized=optimized).run(["logits"], feed(ids))[0]
        difference = np.abs(found.astype(np.float32) - expected) / np.ptp(expected)
        assert difference.mean() < 3e-3 and (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.9
        if graph.kind.compute == "fp32":  # two layers round activations, of which some flip
            assert (difference.max(axis=(1, 2)) <= 1e-5).mean() >= 0.5
    if graph.kind.compute == "fp32":
        found = ReferenceEvaluator(str(graph.file)).run(["logits"], feed(ids[:4, :2]))[0]
        error = np.abs(found - logits(graph, ids[:4, :2])).max(axis=(1, 2)) / np.ptp(expected)
        assert (error <= 1e-5).mean() >= 0.5


def test_tensorrt_rtx_builds_the_graph_and_the_linter_finds_nothing(graph: Exported, tmp_path: Path) -> None:
    assert read_json(graph.folder / "lint.json")["findings"] == []
    pytest.importorskip("tensorrt_rtx")
    options = Build(target="rtx-ada", profiles=[{"batch": [1, 2, 4], "sequence": [1, 8, 32]}])
    build_file(graph.file, options, tmp_path)
    assert read_json(tmp_path / "build.json")["status"] == "built"


def test_inspect_and_sizes_count_indices_tables_and_scales(graph: Exported) -> None:
    found = contents(graph.file)
    weights = {weight["name"]: weight for weight in found["weights"]}
    sizes = {layer["name"]: layer for layer in read_json(graph.folder / "sizes.json")["layers"]}
    arrays = stored(onnx.load(str(graph.file)))
    books = [item for item in graph.plan if not item.integers and item.weights and not item.layer.tied_to]
    for item in books:
        own = f"{item.name}.weight"
        size = sum(arrays[f"{own}.{part}"].nbytes for part in ("assignments", "centroids", "scale")
                   if f"{own}.{part}" in arrays)  # fmt: skip
        assert weights[own]["bytes"] == sizes[item.name]["bytes"] == size
        assert weights[own]["stored_bits"] == sizes[item.name]["stored_bits"] == 8 / item.weights.block
        assert (
            weights[own]["information_bits"] == sizes[item.name]["information_bits"] == 4 / item.weights.block
        )
        features = (item.layer.in_features, item.layer.out_features)
        expected = features[::-1] if item.layer.kind == "embedding" else features
        assert tuple(weights[own]["shape"]) == expected
    totals = found["totals"]
    parts = totals["weights"] + totals["float"] + totals["other"] + totals["graph"]
    assert parts == totals["file"] and len(books) > 7


# The certificate ----------------------------------------------------------------------------------


def decode(model: ModelProto, name: str) -> None:
    """Put a decoded copy where the look-up was: the same outputs, and many times the bytes."""
    arrays = stored(model)
    indices, table = arrays[f"{name}.weight.assignments"], arrays[f"{name}.weight.centroids"]
    weight = table[indices].transpose(0, 2, 1).reshape(-1, indices.shape[1])
    (end,) = [node for node in model.graph.node if node.name == f"{name}.weight/Reshape"]
    model.graph.initializer.append(numpy_helper.from_array(weight, end.output[0]))
    model.graph.node.remove(end)


def change(part: str, by: Callable[[np.ndarray], np.ndarray]) -> Callable[[ModelProto, str], None]:
    def apply(model: ModelProto, name: str) -> None:
        (tensor,) = [one for one in model.graph.initializer if one.name == f"{name}.weight.{part}"]
        tensor.CopyFrom(numpy_helper.from_array(by(numpy_helper.to_array(tensor).copy()), tensor.name))

    return apply


def other_table(model: ModelProto, name: str) -> None:
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] == f"{name}.weight.centroids":
            node.input[0] = "transformer.h.1.attn.c_attn.weight.centroids"


def another_reader(model: ModelProto, name: str) -> None:
    model.graph.node.append(helper.make_node("Identity", [f"{name}.weight.assignments"], ["indices"]))


def negated_table(model: ModelProto, name: str) -> None:
    """The look-ups read -table."""
    table = f"{name}.weight.centroids"
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] == table:
            node.input[0] = "negated"
    model.graph.node.insert(0, helper.make_node("Neg", [table], ["negated"]))


def divided_table(model: ModelProto, name: str) -> None:
    """Another operator than DequantizeLinear reads the codes and the scale."""
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] == f"{name}.weight.centroids":
            node.op_type = "Div"


FAULTS: dict[str, tuple[Callable[[ModelProto, str], None], str, str]] = {
    "another index": (
        change("assignments", lambda a: np.roll(a, 1)),
        "transformer.h.0.attn.c_attn",
        "differ",
    ),
    "another centroid": (change("centroids", lambda a: a + 1e-3), "transformer.h.0.attn.c_attn", "differ"),
    "another table": (other_table, "transformer.h.0.attn.c_attn", "reach no operation"),
    "a decoded copy": (decode, "transformer.h.0.attn.c_attn", "reach no operation"),
    "another scale": (change("scale", lambda a: a * 2), "transformer.h.0.mlp.c_proj", "not decoded with"),
    "another reader": (another_reader, "transformer.h.0.attn.c_attn", "read by Cast and by nothing else"),
    "a negated table": (negated_table, "transformer.h.0.attn.c_attn", "reach no operation"),
    "a divided table": (divided_table, "transformer.h.0.mlp.c_proj", "not decoded with"),
    "another code": (change("centroids", lambda a: a + 1), "transformer.wpe", "differ"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_certificate_sees_every_fault(
    fault: str, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    graph = exported(KINDS[0], tiny_model, text_file)
    apply, name, reason = FAULTS[fault]
    model = onnx.load(str(graph.file))
    apply(model, name)
    file = tmp_path / "model.onnx"
    onnx.save(model, str(file))
    found = certify(file, graph.folded.path, graph.plan)
    broken = {layer["name"]: layer for layer in found["layers"] if not layer["passed"]}
    assert not found["complete"] and list(broken) == [name]
    assert any(reason in text for text in broken[name]["reasons"]), broken[name]["reasons"]


def test_the_certificate_of_the_untouched_graph_is_complete(graph: Exported) -> None:
    found = read_json(graph.folder / "certificate.json")
    assert found["complete"] and found["expected"] == len(found["layers"]) > 8
    pairs = {layer["name"]: layer["qdq_pairs"] for layer in found["layers"]}
    assert sum(pairs.values()) == 3 and pairs["transformer.h.1.attn.c_proj"] == 1


# Training -----------------------------------------------------------------------------------------

STAGED = {
    "method": "ipq",
    "format": {"weights": BOOK, "embeddings": BOOK},
    "train": {"phases": {name: {"steps": 3} for name in ("finetune", "ffn", "embeddings", "attention")}},
}


def test_one_set_after_another_becomes_codebooks_and_indices_stay(line: Callable[..., Line]) -> None:
    made = line(**STAGED)
    seen: list[dict[str, bool]] = []
    indices: dict[str, torch.Tensor] = {}
    patched = watch(seen, indices)
    with patched:
        made.train()
    order = [sorted(name for name, settled in state.items() if settled) for state in seen]
    ffn = [f"transformer.h.{block}.mlp.{layer}" for block in (0, 1) for layer in ("c_fc", "c_proj")]
    tables = ["transformer.wpe", "transformer.wte"]
    attention = [f"transformer.h.{block}.attn.{layer}" for block in (0, 1) for layer in ("c_attn", "c_proj")]
    assert order[:4] == [[], sorted(ffn), sorted([*ffn, *tables]), sorted([*ffn, *tables, *attention])]
    tensors = made.tensors()
    for name in ffn:
        assert torch.equal(tensors[f"{name}.weight.assignments"], indices[name])
        assert f"{name}.weight" not in made.facts()["changed"]
    assert made.facts()["codebooks"].keys() == {*ffn, *tables, *attention}


def test_centroids_train_in_each_phase_that_makes_codebooks(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    """iPQ of Quant-Noise (arXiv:2004.07320, section 3.3) finetunes centroids after each set of layers."""
    from qcompress.training import loop

    original, trained = loop.groups_of, {}

    def groups_of(training: Any, phase: Any, scope: str = "") -> Any:
        groups = original(training, phase, scope)
        trained[phase.name] = {group.role: group.lr > 0 and len(group.parameters) for group in groups}
        return groups

    monkeypatch.setattr(loop, "groups_of", groups_of)
    line(**STAGED).train()
    assert {name: roles.get("centroid") for name, roles in trained.items()} == {
        "finetune": None, "ffn": 10, "embeddings": 10, "attention": 10,
    }  # fmt: skip


def watch(seen: list[dict[str, bool]], indices: dict[str, torch.Tensor]) -> Any:
    """Looks at every phase as it begins, after its codebooks were made."""
    from qcompress.training import loop

    original = loop.groups_of

    def groups_of(training: Any, phase: Any, scope: str = "") -> Any:
        quantizers = dict(training.prepared.weight_quantizers())
        seen.append({name: bool(quantizer.settled) for name, quantizer in quantizers.items()})
        if phase.name == "ffn":
            indices.update({name: quantizers[name].assignments.clone() for name in phase.quantizes})
        noisy = {layer.noisy for layer in training.prepared.layers.values()}
        assert noisy == {phase.name == "finetune"}
        assert {quantizer.waiting for quantizer in quantizers.values()} == {phase.name != "finetune"}
        return original(training, phase, scope)

    patch = pytest.MonkeyPatch()

    class Patched:
        def __enter__(self) -> None:
            patch.setattr(loop, "groups_of", groups_of)

        def __exit__(self, *arguments: object) -> None:
            patch.undo()

    return Patched()


@pytest.mark.parametrize("stop", [("finetune", 1), ("ffn", 0), ("embeddings", 2)], ids=str)
def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch, stop: tuple[str, int]
) -> None:
    from qcompress.training import loop

    recipe = {**STAGED, "quantizer": {"noise": {"p": 0.3, "form": "round"}, "codebook": {"renew": 2}}}
    recipe["train"] = {**STAGED["train"], "checkpoint_every_s": 1}
    whole, stopped = line(**recipe).train(), line(**recipe)
    advance, count = loop.advance, 0
    before = {"finetune": 0, "ffn": 3, "embeddings": 6}[stop[0]] + stop[1]

    def interrupt(prepared: Any) -> None:
        nonlocal count
        if count == before:
            raise KeyboardInterrupt
        count += 1
        advance(prepared)

    monkeypatch.setattr(loop, "advance", interrupt)
    monkeypatch.setattr("qcompress.training.checkpoint.Checkpoints.due", lambda self: True)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    monkeypatch.setattr(loop, "advance", advance)
    stopped.train()
    first, second = whole.tensors(), stopped.tensors()
    assert first.keys() == second.keys() and len(first) > 30
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_noise_trains_as_floats_becomes_codebooks_at_the_end(line: Callable[..., Line]) -> None:
    form = {"weights": BOOK, "embeddings": BOOK}
    made = (
        line(method="quant-noise", format=form, quantizer={"noise": {"form": "zero", "p": 0.2}})
        .train()
        .fold()
    )
    books = made.facts()["codebooks"]
    assert len(books) == 10 and all(book["unused"] == 0 for book in books.values())
    ids = token_ids()
    assert torch.equal(made.logits("train", ids), made.logits("fold", ids))


def test_a_copy_of_the_run_needs_no_training_code(graph: Exported, tmp_path: Path) -> None:
    """Fold reads what was trained, and nothing says how."""
    facts = read_json(graph.folded.path / "folded.json")
    assert "codebooks" not in facts and "noise" not in str(facts)
    shutil.copytree(graph.folded.path, tmp_path / "fold")
    from qcompress.system.artifacts import FoldedModel

    with torch.no_grad():
        assert assemble(FoldedModel(tmp_path / "fold"))(input_ids=token_ids()).logits.isfinite().all()
