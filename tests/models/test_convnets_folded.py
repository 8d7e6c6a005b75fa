"""Convolutional nets through train, fold and export: batch norms in scales, codes in the graph."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file
from tiny_nets import CLASSIFIERS, FAMILY, KINDS, STEMS, Done, NetLine, net_line, pixels, save_images
from torch import nn

from qcompress.graph.certificate.points import certify_all
from qcompress.graph.lint.lint import lint
from qcompress.models.architecture import Point, convolution
from qcompress.models.folded import assemble
from qcompress.models.plan import LayerPlan, PointPlan
from qcompress.models.prepare import Prepared, replace_module
from qcompress.models.rebuild import rebuild
from qcompress.parity.fold_flips import ForcedFold
from qcompress.parity.forced_codes import TIE, summary
from qcompress.parity.layerwise import follow
from qcompress.parity.runners import REWRITERS
from qcompress.pipeline.stages.export import _nonnegative, export
from qcompress.quant.batchnorm import statistics
from qcompress.quant.conv import QuantizedConv
from qcompress.quant.folded_conv import FoldedConv
from qcompress.schema.formats import ActivationFormat
from qcompress.schema.recipe import Export
from qcompress.schema.targets import TARGETS
from qcompress.system.artifacts import FoldedModel, OnnxModel, read_json

FORMATS: dict[str, dict[str, Any]] = {
    "w8a8": {"format": "w8a8"},
    "w4a4": {"format": {"preset": "w4a4", "residual": "int4"}, "method": "lsq"},
    "stem": {"format": {"preset": "w8a8", "residual": "int8", "layers": {}}},
    "fp16": {"format": {"preset": "w8a8", "compute": "fp16"}},
    "ternary": {
        "format": {"preset": "ternary-a8", "embeddings": "int8"},
        "quantizer": {"weights": "ternary"},
    },
}
"""`stem` keeps the stem and the classifier float."""


def sections(kind: str, name: str) -> dict[str, Any]:
    found = json.loads(json.dumps(FORMATS[name]))
    if name == "stem":
        family = FAMILY[kind]
        found["format"]["layers"] = {STEMS[family]: "float", CLASSIFIERS[family]: "float"}
    return found


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory):
    """One line until fold of each kind and format that is asked for."""
    root, known = tmp_path_factory.mktemp("lines"), {}
    archive = save_images(root / "images.npz")

    def make(kind: str, name: str) -> NetLine:
        if (kind, name) not in known:
            folder = root / f"{kind}-{name}"
            known[kind, name] = net_line(folder, kind, archive, **sections(kind, name)).train().fold()
        return known[kind, name]

    return make


@pytest.fixture(scope="module")
def made(lines):
    """One line with its graph."""
    known = {}

    def make(kind: str, name: str) -> Done:
        if (kind, name) not in known:
            line = lines(kind, name)
            out = line.folder / "export"
            out.mkdir()
            export(line.folded, Export(), "rtx-ada", {"version": "0", "recipe": "tiny"}, out)
            known[kind, name] = Done(line, out)
        return known[kind, name]

    return make


CASES = [*((kind, "w8a8") for kind in KINDS), ("basic", "w4a4"), ("cifar", "w4a4"), ("cifar", "fp16"),
         ("efficientnet", "stem"), ("bottleneck", "ternary")]  # fmt: skip
FEW = (("basic", "w8a8"), ("cifar", "w4a4"), ("efficientnet", "w8a8"))
"""Enough for every run of the tests."""


def each_case(few: Iterable[tuple[str, str]]) -> pytest.MarkDecorator:
    cases = [pytest.param(*case, marks=[] if case in few else [pytest.mark.slow]) for case in CASES]
    return pytest.mark.parametrize(("kind", "name"), cases)


each_line = each_case((*FEW, ("mobilenet", "w8a8")))
each_graph = each_case(FEW)


@each_line
def test_folding_changes_no_code_but_ties(kind: str, name: str, lines) -> None:
    line = lines(kind, name)
    batches = [{"pixel_values": part} for part in pixels(16).split(8)]
    limit = TIE["fp16" if name == "fp16" else "fp32"]
    both = ForcedFold(rebuild(line.float_model, line.trained), line.model("fold"), limit)
    for batch in batches:
        trained, folded = both.run(batch)
        assert np.abs(folded - trained).max() <= 1e-5 * np.ptp(trained)
    places = sum(bool(item.weights and item.activations) for item in line.plan)
    found = summary(both.places)
    assert found["codes"] > 1000 * places > 0
    assert found["differ"] <= 1e-4 * found["codes"] and found["unexplained"] == 0


@each_line
def test_the_folded_model_has_no_batch_norm_but_behind_floats(kind: str, name: str, lines) -> None:
    line = lines(kind, name)
    folded = line.model("fold")
    kept = {layer.layer.norm for layer in line.plan if layer.layer.norm and not layer.weights}
    norms = {name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert norms == kept and len(kept) == (name == "stem")
    convs = [module for module in folded.modules() if isinstance(module, FoldedConv)]
    assert len(convs) == sum(layer.layer.kind == "conv" and layer.weights is not None for layer in line.plan)
    tensors = load_file(line.folded.path / "folded.safetensors")
    for layer in line.plan:
        if layer.weights:
            codes, scale = (tensors[f"{layer.name}.weight.{part}"] for part in ("codes", "scale"))
            low, high = layer.weights.bounds
            assert codes.dtype == torch.int8 and low <= int(codes.min()) <= int(codes.max()) <= high
            assert scale.shape == (layer.layer.out_features,) and bool((scale > 0).all())
            assert layer.layer.kind != "conv" or codes.shape == layer.layer.shape
        if layer.weights and layer.layer.norm:
            dead = [not bool(channel.any()) for channel in codes]
            moved = line.recipe.method != "ptq"
            assert (moved or dead[2]) and sum(dead) < len(dead)  # gamma is 0 there until it is trained
    facts = read_json(line.folded.path / "folded.json")
    assert facts["codes"] == sum(layer.layer.weights for layer in line.plan if layer.weights)


@each_graph
def test_the_graph_is_certified_and_computes_what_was_folded(kind: str, name: str, made) -> None:
    done, x = made(kind, name), pixels(6)
    line = done.line
    certificate = read_json(done.path / "certificate.json")
    assert certificate["complete"] and not certificate["float_copies"]
    assert len(certificate["layers"]) == sum(bool(layer.weights) for layer in line.plan)
    model = onnx.load(done.file)
    onnx.checker.check_model(model, full_check=True)
    wanted = line.logits("fold", x).numpy()
    spread = float(np.ptp(wanted))
    limit = {"fp16": 2e-2, "w4a4": 2e-2}.get(name, 5e-3)  # one flip of few bits moves much
    found = [(done.run(x), wanted)]
    if name == "w8a8":  # an evaluator in Python: two images are enough
        reference = ReferenceEvaluator(model).run(["logits"], {"pixel_values": x[:2].numpy()})[0]
        found.append((reference, wanted[:2]))
    for logits, folded in found:
        error = np.abs(logits.astype(np.float32) - folded) / spread
        assert error.mean() < limit and np.median(error) < limit / 5
        assert (logits.argmax(1) == folded.argmax(1)).mean() >= 5 / 6
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["DequantizeLinear"] == counts["QuantizeLinear"] + sum(
        bool(one.weights) for one in line.plan
    )
    # a block's first convolution and its shortcut's read one pair, where their scales agree
    for layer in certificate["layers"]:
        assert layer["qdq_pairs"] == layer["expected_pairs"]
    assert counts["Conv"] == sum(layer.layer.kind == "conv" for layer in line.plan)
    clipped = sum(
        form is not None and form.bits < 8 for form in [one.activations for one in (*line.plan, *line.points)]
    )
    codes = {node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    clips = [node for node in model.graph.node if node.op_type == "Clip" and node.input[0] in codes]
    assert len(clips) <= clipped and (len(clips) > 0) is (clipped > 0)


@each_graph
def test_no_target_refuses_the_graph(kind: str, name: str, made) -> None:
    done = made(kind, name)
    for target in ("rtx-ada", "a100"):
        assert lint(done.file, TARGETS[target]) == []
    warned = {(item.rule, item.layer) for item in lint(done.file, TARGETS["cpu"])}
    classifier = done.line.plan[-1].name  # a matmul of rank 2 with a float bias
    assert warned <= {("gemm-float-bias", f"{classifier}.weight.codes")}


def test_sizes_count_the_convolutions(made) -> None:
    done = made("cifar", "w4a4")
    sizes = read_json(done.path / "sizes.json")
    by_name = {layer["name"]: layer for layer in sizes["layers"]}
    assert len(by_name) == 8
    # 16 * 16 * 3 * 3 codes of a byte and 16 scales of four; zero points are shared by all
    assert by_name["layer1.0.conv1"]["bytes"] in (2304 + 64, 2304 + 64 + 16)
    assert by_name["layer1.0.conv1"]["stored_bits"] == 8
    assert by_name["layer1.0.conv1"]["information_bits"] == 4
    assert by_name["layer1.0.conv1"]["weights"] == 2304


def test_unsigned_codes_are_those_behind_a_relu(made) -> None:
    """And with them 15 steps where signed codes have 7; the classifier's and later blocks' inputs alike."""
    plan = {item.name: item.activations for item in made("cifar", "w4a4").line.plan}
    assert {name for name, form in plan.items() if form.bounds == (-8, 7)} == {"conv1"}
    assert {form.bounds for name, form in plan.items() if name != "conv1"} == {(0, 15)}
    points = made("cifar", "w4a4").line.points
    assert {item.activations.bounds for item in points if item.name.endswith("skip_point")} == {(0, 15)}
    assert {item.activations.bounds for item in points if item.name.endswith("branch_point")} == {(-8, 7)}
    # of ResNet's skips those through a convolution can be negative
    skips = [item for item in made("basic", "w4a4").line.points if item.name.endswith("skip_point")]
    names = [item.name for item in made("basic", "w4a4").line.plan]
    projected = {name.partition(".shortcut.")[0] for name in names if ".shortcut." in name}
    assert 0 < len(projected) < len(skips)
    for item in skips:
        signed = item.name.removesuffix(".skip_point") in projected
        assert item.activations.bounds == ((-8, 7) if signed else (0, 15)), item.name
    assert {item.activations.bounds for item in made("cifar", "w8a8").line.plan} == {(-128, 127)}
    assert {str(item.activations) for item in made("efficientnet", "w8a8").line.plan} == {"int8"}


def test_training_moves_statistics_and_its_artifact_has_them(made) -> None:
    line = made("basic", "w4a4").line
    trained, start = line.model("train"), line.model("float")
    before, after = dict(statistics(start)), dict(statistics(trained))
    assert before.keys() == after.keys() and len(after) == 3 * 9
    for name, tensor in after.items():
        assert not torch.equal(tensor, before[name]), name
        if name.endswith("num_batches_tracked"):
            assert int(tensor) == 7 + 3  # one for each update
    assert not line.model("train").training


def test_calibration_alone_leaves_statistics_as_they_were(made) -> None:
    line = made("basic", "w8a8").line
    before, after = dict(statistics(line.model("float"))), dict(statistics(line.model("train")))
    assert len(after) == 27 and all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_float_run_keeps_batch_norms_and_is_a_checkpoint(tmp_path: Path) -> None:
    """What another recipe starts from: statistics and all, the same function to the last bit."""
    archive = save_images(tmp_path / "images.npz")
    for kind in ("cifar", "basic"):
        line = net_line(tmp_path / kind, kind, archive, format="float", method="float").train().fold()
        (line.folded.path / "folded.safetensors").rename(line.folded.path / "model.safetensors")
        again = net_line(tmp_path / f"{kind}-2", kind, archive, source=line.folded.path)
        x = pixels()
        trained = line.logits("train", x)
        assert torch.equal(again.logits("float", x), trained)
        assert not torch.allclose(trained, line.logits("float", x))
        assert int(dict(statistics(again.model("float")))[_counted(kind)]) == 10


def _counted(kind: str) -> str:
    return {"cifar": "bn1", "basic": "resnet.embedder.embedder.normalization"}[kind] + ".num_batches_tracked"


def forced(trained: Prepared, folded: nn.Module, images: torch.Tensor) -> ForcedFold:
    """The codes of the folded model against the trained one's."""
    both = ForcedFold(trained, folded, TIE["fp32"])
    both.run({"pixel_values": images})
    return both


def test_a_wrong_bias_is_more_than_flips(made) -> None:
    line = made("cifar", "w8a8").line
    trained = rebuild(line.float_model, line.trained)
    folded = line.model("fold")
    folded.get_submodule("layer1.0.conv1").bias += 0.02
    both = forced(trained, folded, pixels(8))
    counts = summary(both.places)
    assert counts["differ"] > 1e-3 * counts["codes"]
    assert [place.name for place in both.places if place.unexplained] == ["layer1.0.conv2.input"]
    assert counts["first_unexplained"] == "layer1.0.conv2.input"


def test_flips_of_one_place_reach_no_other(made) -> None:
    """A place whose scale is wrong flips its own codes and its reader's alone."""
    line = made("cifar", "w8a8").line
    trained, folded = rebuild(line.float_model, line.trained), line.model("fold")
    rounding = folded.get_submodule("layer2.0.conv1.input")
    rounding.scale = rounding.scale * 1.5
    both = forced(trained, folded, pixels(4))
    reader = "layer2.0.conv2.input"  # reads codes that are multiplied by the wrong scale
    unexplained = [place.name for place in both.places if place.unexplained]
    assert unexplained == ["layer2.0.conv1.input", reader]


def test_ortruntimes_rounding_of_biases_is_why_it_is_left_out(made) -> None:
    """At the basic level it computes something else than the graph says, unless it is told not to."""
    import onnxruntime

    done, x = made("basic", "w8a8"), pixels(6)
    assert REWRITERS == ("WeightBiasQuantization",)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(done.file), options, providers=["CPUExecutionProvider"])
    rewritten = session.run(["logits"], {"pixel_values": x.numpy()})[0]
    wanted = done.line.logits("fold", x).numpy()
    spread = np.ptp(wanted)
    assert np.abs(done.run(x) - wanted).mean() < 1e-5 * spread < np.abs(rewritten - wanted).mean() / 10


@pytest.mark.parametrize("kind", KINDS)
def test_integer_sums_are_the_float_ones(kind: str, lines) -> None:
    line, x = lines(kind, "w8a8"), pixels(6)
    with torch.no_grad():
        found = assemble(line.folded, integer=True)(pixel_values=x).logits
    wanted = line.logits("fold", x)
    assert float((found - wanted).abs().mean()) < 5e-3 * float(wanted.max() - wanted.min())


def test_a_graph_that_reads_a_float_kernel_is_not_certified(made, tmp_path: Path) -> None:
    done = made("cifar", "w8a8")
    model = onnx.load(done.file)
    name = "layer1.0.conv2"
    decoder = next(node for node in model.graph.node if f"{name}.weight.codes" in node.input)
    reader = next(node for node in model.graph.node if decoder.output[0] in node.input)
    assert reader.op_type == "Conv"
    weight = done.line.model("fold").get_submodule(name).weight.decoded().numpy()
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "copy"))
    reader.input[1] = "copy"
    onnx.save(model, tmp_path / "model.onnx")
    found = certify_all(tmp_path / "model.onnx", done.line.folded.path, done.line.plan, done.line.points)
    broken = [layer for layer in found["layers"] if not layer["passed"]]
    assert [layer["name"] for layer in broken] == [name] and found["float_copies"] == ["copy"]
    assert "the decoded codes reach no Conv" in broken[0]["reasons"]
    assert not found["complete"]


def test_a_conv_without_its_batch_norm_would_be_noticed(made) -> None:
    """The trained model without one of its norms is another function: the law above has something to hold."""
    line, x = made("cifar", "w8a8").line, pixels(6)
    model = line.model("train")
    conv = model.get_submodule("layer3.0.conv2")
    assert isinstance(conv, QuantizedConv) and conv.norm is model.get_submodule("layer3.0.bn2")
    with torch.no_grad():
        before = model(pixel_values=x).logits
        replace_module(model, "layer3.0.bn2", nn.Identity())
        assert not torch.allclose(model(pixel_values=x).logits, before)


@pytest.mark.parametrize("kind", ["efficientnet", pytest.param("lite", marks=pytest.mark.slow)])
def test_the_points_of_squeeze_and_excite_reach_the_graph(kind: str, tmp_path: Path) -> None:
    """The graph for ONNX Runtime pads in its convolutions and shifts codes; every code is that of the folded
    model, which does neither.
    """
    archive = save_images(tmp_path / "images.npz")
    line = net_line(tmp_path, kind, archive, format={"preset": "w8a8", "residual": "int8"}).train().fold()
    out = tmp_path / "export"
    out.mkdir()
    export(line.folded, Export(), "cpu", {"version": "0", "recipe": "tiny"}, out)
    model = onnx.load(out / "model.onnx")
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["Pad"] == 0 and operators["GlobalAveragePool"] == 3
    names = [point.name for point in line.points]
    assert [name.rpartition(".")[2] for name in names].count("gate_point") == 3 and len(names) == 8
    certificate = read_json(out / "certificate.json")
    assert [point["name"] for point in certificate["points"] if point["passed"]] == names
    with follow(line.folded, OnnxModel(out), TIE["fp32"]) as (places, run):
        order = run({"pixel_values": pixels(2).numpy()})
    assert [name for name in order if name in names] == names
    assert sum(place.unexplained for place in places.values()) == 0
    assert sum(place.differ for place in places.values()) < 1e-3 * sum(
        place.codes for place in places.values()
    )
    # without the pair at the first product, the certificate names its point
    pair = [node for node in model.graph.node if node.name.startswith(f"{names[0]}/")]
    decoder = next(node for node in pair if node.op_type == "DequantizeLinear")
    quantize = next(node for node in pair if node.op_type == "QuantizeLinear")
    for node in model.graph.node:
        node.input[:] = [quantize.input[0] if name == decoder.output[0] else name for name in node.input]
    onnx.save(model, tmp_path / "model.onnx")
    broken = certify_all(tmp_path / "model.onnx", line.folded.path, line.plan, line.points)
    assert [point["name"] for point in broken["points"] if not point["passed"]] == [names[0]]
    assert not broken["complete"]


def test_a_pair_with_the_scale_of_a_signed_point_counts_as_signed(tmp_path: Path) -> None:
    """Equal scales are stored once, so that the names of pairs cannot tell the two apart."""
    points = tuple(
        PointPlan(Point(name, "residual", 4, nonnegative), ActivationFormat())
        for name, nonnegative in (("a", True), ("b", True), ("c", False))
    )
    layers = tuple(LayerPlan(convolution(name, 4, 4, 1, nonnegative=True), None, None) for name in "de")
    scales = {"a": 0.5, "b": 0.25, "c": 0.5, "d.input": 0.5, "e.input": 0.125}
    tensors = {f"{name}.scale": torch.tensor(value) for name, value in scales.items()}
    save_file(tensors, tmp_path / "folded.safetensors")
    assert _nonnegative(layers, points, FoldedModel(tmp_path)) == {"b", "e.input"}


@pytest.mark.slow
def test_the_graph_of_a_net_that_pads_like_tensorflow_pads_in_its_convolutions(tmp_path: Path) -> None:
    """Sides of a map are even, so that convolutions with stride 2 pad one side alone."""
    archive = save_images(tmp_path / "images.npz")
    form = {"preset": "w8a8", "residual": "int8"}
    line = net_line(tmp_path, "mobilenet", archive, format=form).train().fold()
    out = tmp_path / "export"
    out.mkdir()
    export(line.folded, Export(), "cpu", {"version": "0", "recipe": "tiny"}, out)
    nodes = onnx.load(out / "model.onnx").graph.node
    assert [node.name for node in nodes if node.op_type == "Pad"] == []
    convs = [
        {one.name: tuple(one.ints) for one in node.attribute} for node in nodes if node.op_type == "Conv"
    ]
    pads = Counter(
        (one["strides"], one["dilations"], one["pads"]) for one in convs if one["kernel_shape"] == (3, 3)
    )
    assert pads == {
        ((2, 2), (1, 1), (0, 0, 1, 1)): 3, ((1, 1), (1, 1), (1, 1, 1, 1)): 5,
        ((1, 1), (2, 2), (2, 2, 2, 2)): 7, ((1, 1), (4, 4), (4, 4, 4, 4)): 3,
    }  # fmt: skip
    assert read_json(out / "certificate.json")["complete"]
    with follow(line.folded, OnnxModel(out), TIE["fp32"]) as (places, run):
        run({"pixel_values": pixels(2).numpy()})
    assert len(places) == len(line.points) + 53
    assert sum(place.unexplained for place in places.values()) == 0
    assert sum(place.differ for place in places.values()) < 1e-3 * sum(
        place.codes for place in places.values()
    )


@pytest.mark.parametrize(
    ("kind", "layer"), [("efficientnet", "*depthwise_conv"), ("mobilenet", "*conv_3x3*")]
)
def test_a_padded_convolution_that_reads_floats_is_compared_too(
    kind: str, layer: str, tmp_path: Path
) -> None:
    """The model pads in front of the convolution, the graph of target cpu inside it."""
    archive = save_images(tmp_path / "images.npz")
    sections = {"preset": "w8a8", "layers": {layer: {"activations": "float"}}}
    line = net_line(tmp_path, kind, archive, format=sections).train().fold()
    out = tmp_path / "export"
    out.mkdir()
    export(line.folded, Export(), "cpu", {"version": "0", "recipe": "tiny"}, out)
    assert "Pad" not in {node.op_type for node in onnx.load(out / "model.onnx").graph.node}
    with follow(line.folded, OnnxModel(out), TIE["fp32"]) as (places, run):
        run({"pixel_values": pixels(2).numpy()})
    floats = [place for place in places.values() if not place.rounds and place.margins]
    assert len({place.margins for place in floats}) > 1
    far = [place.onnx.to_json() for place in floats]
    assert all(one["positions"] > 0 and one["max_abs"] <= 1e-4 * one["range"] for one in far)


@pytest.mark.parametrize("kind", ["basic", "efficientnet", pytest.param("mobilenet", marks=pytest.mark.slow)])
def test_a_float_net_is_folded_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    """There are no flips to judge then: the gate asks for no difference at all."""
    archive = save_images(tmp_path / "images.npz")
    line = net_line(tmp_path / "line", kind, archive, format="float", method="float").train().fold()
    x = pixels(8)
    assert torch.equal(line.logits("train", x), line.logits("fold", x))
