"""Names of a recipe that match nothing are said, with the nearest name: at check, or at export."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from graphs import linear, save
from lines import cli, make_project
from tiny_nets import save_images, save_net

from qcompress.engine.profiles import profile_shapes
from qcompress.errors import ExportError, UsageError
from qcompress.graph.keep_fp32 import require_operators
from qcompress.graph.view import read
from qcompress.recipe.check import all_mistakes
from qcompress.schema.recipe import Profile, Recipe

HALF = "format={preset: w8a8, compute: bf16}"
SHORT = "build.profiles=[{batch: [1, 2, 4], sequence: [1, 16, 32], "


@pytest.fixture(scope="module")
def text_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> Path:
    return make_project(tmp_path_factory.mktemp("text"), tiny_model, text_file).recipe


@pytest.fixture(scope="module")
def image_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    save_net(folder / "model", "basic")
    save_images(folder / "images.npz")
    (folder / "recipe.yaml").write_text(
        "name: images\nmodel: {family: resnet, source: model}\n"
        "task: {name: image-classification, mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2], size: [32, 32]}\n"
        "data: {calibration: {npz: [images.npz]}, evaluate: {test: {npz: [images.npz]}}}\n"
        "format: w8a8\nmethod: ptq\n"
    )
    return folder / "recipe.yaml"


TEXT = {
    ("build.target=cpu", "gate.parity={engine: {mean_abs: 0.1}}"): (
        "gate.parity.engine: has limits on the row `engine`, and the target `cpu` builds no engine"
    ),
    (
        HALF,
        "verify.require=[float, onnx]",
        "gate.parity={}",
    ): "verify.require[1]: requires the row `onnx`, and ONNX",
    (
        HALF,
        "gate.parity={deployed: {mean_abs: 0.1}}",
    ): "gate.parity.deployed: has limits on the row `deployed`",
    ("gate.parity={onxn: {mean_abs: 0.1}}",): "gate.parity.onxn: unknown key (fix: did you mean `onnx`?)",
    (SHORT + "past: [0, 1, 2]}]",): (
        "build.profiles[0].past: gives a range to the axis 'past', and the graph has no such dynamic axis "
        "(fix: drop it; the axes are batch, sequence)"
    ),
    (
        SHORT + "axes: {seqence: [1, 2, 3]}}]",
    ): "axes.seqence: gives a range to the axis 'seqence', and the graph has "
    "no such dynamic axis (fix: did you mean `sequence`?)",
    ("export.dynamic=[batch]",): "build.profiles[0].sequence: gives a range to the axis 'sequence'",
    ("gate.recovery={tst.perplexity: {max-degradation: 1}}",): "did you mean `test.perplexity`?",
    ("gate.float_floor={tst.perplexity: 10}",): "did you mean `test.perplexity`?",
    ("gate.regression={tst.perplexity: {max-degradation: 1}}",): "did you mean `test.perplexity`?",
    ("export.keep_fp32=[norm]",): "export.keep_fp32: has no effect: `format.compute` is fp32",
    ("format={preset: w8a8, residual: int8}",): "format.residual: a gpt2 model has no points of this kind",
    ("train.phases={finetun: {steps: 1}}",): "did you mean `finetune`?",
    ("format.layers={lm_hed: float}",): "format.layers.lm_hed: matches none of the",
}
IMAGES = {
    ("format={preset: w8a8, compute: fp16}", "export.keep_fp32=[norm]"): (
        "export.keep_fp32: a resnet model has no layer norm (fix: drop the line)"
    ),
    (
        "format={preset: w8a8, compute: fp16}",
        "export.keep_fp32=[softmax, norm]",
    ): "has no softmax or layer norm",
    (
        "build={target: rtx-ada, profiles: [{sequence: [1, 2, 3]}]}",
    ): "build.profiles[0].sequence: gives a range",
    (
        "format={preset: w8a8, attention: int8}",
    ): "format.attention: a resnet model has no points of this kind",
    ("format={preset: w8a8, cache: int8}",): "format.cache: a resnet model",
}


def said(recipe: Path, overrides: tuple[str, ...]) -> list[str]:
    return [str(mistake) for mistake in all_mistakes(recipe, overrides)[2]]


@pytest.mark.parametrize("overrides", TEXT, ids=lambda one: one[-1])
def test_check_names_what_matches_nothing(text_recipe: Path, overrides: tuple[str, ...]) -> None:
    assert said(text_recipe, ()) == []
    found = said(text_recipe, overrides)
    assert len([line for line in found if TEXT[overrides] in line]) == 1, found


@pytest.mark.parametrize("overrides", IMAGES, ids=lambda one: one[-1])
def test_check_names_what_an_image_model_does_not_have(
    image_recipe: Path, overrides: tuple[str, ...]
) -> None:
    assert said(image_recipe, ()) == []
    found = said(image_recipe, overrides)
    assert len([line for line in found if IMAGES[overrides] in line]) == 1, found
    done = cli("check", image_recipe, *(word for one in overrides for word in ("--set", one)))
    assert done.code == 2 and "Traceback" not in done.stderr


def test_a_key_value_cache_and_a_softmax_may_be_named_where_they_are(text_recipe: Path) -> None:
    cached = ("export.cache=true", SHORT[:-2] + ", past: [0, 4, 16]}]")
    assert said(text_recipe, cached) == []
    kept = ("format={preset: w8a8, compute: fp16}", "export.keep_fp32=[norm, softmax]")
    assert said(text_recipe, kept) == []


def test_bf16_does_not_require_the_row_that_cannot_be_measured(text_recipe: Path) -> None:
    values = {
        "name": "half", "model": {"family": "gpt2", "source": "model"},
        "task": {"name": "causal-lm", "context": 8},
        "data": {"evaluate": {"test": {"text": ["a.txt"]}}},
    }  # fmt: skip
    form = {"preset": "w8a8", "compute": "bf16"}
    assert Recipe.model_validate({**values, "format": form}).verify.require == ["float", "trained", "folded"]
    assert Recipe.model_validate(values).verify.require == ["float", "trained", "folded", "onnx"]
    written = {**values, "format": form, "verify": {"require": ["float"]}}
    assert Recipe.model_validate(written).verify.require == ["float"]


def half_graph(*operators: str, dtype: ir.DataType = ir.DataType.FLOAT16) -> ir.Model:
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape([2, 4]))
    nodes, last = [], x
    for operator in operators:
        nodes.append(ir.node(operator, [last]))
        last = nodes[-1].outputs[0]
        last.dtype = dtype
    return ir.Model(ir.Graph([x], [last], nodes=nodes, opset_imports={"": 21}), ir_version=10)


def test_export_refuses_an_operator_that_is_not_in_the_graph() -> None:
    require_operators(half_graph("Relu", "Softmax"), ["softmax"])
    with pytest.raises(
        ExportError, match=r"keep_fp32: norm: the graph has no LayerNormalization .*Relu, Softmax"
    ):
        require_operators(half_graph("Relu", "Softmax"), ["softmax", "norm"])
    with pytest.raises(ExportError, match=r"no Softmax in half precision \(it has LogSoftmax\)") as error:
        require_operators(half_graph("LogSoftmax"), ["softmax"])
    assert error.value.exit_code == 5 and "drop softmax" in error.value.fix
    with pytest.raises(ExportError, match=r"no Softmax in half precision"):
        require_operators(half_graph("Softmax", dtype=ir.DataType.FLOAT), ["softmax"])


def test_a_range_of_an_axis_that_the_graph_lacks_is_refused(tmp_path: Path) -> None:
    view = read(save(linear(), tmp_path / "model.onnx"))
    with pytest.raises(UsageError, match=r"build.profiles\[1\].axes.bath: no input .* has an axis") as error:
        profile_shapes(view, [Profile(), Profile(axes={"bath": [1, 2, 3]})])
    assert error.value.fix == "did you mean `batch`?"
    done = cli("build", view.file, "--target", "rtx-ada", "--out", tmp_path / "out", "--profiles",
               '[{"axes": {"width": [1, 2, 3]}}]')  # fmt: skip
    assert done.code == 2 and "axes.width" in done.stderr
