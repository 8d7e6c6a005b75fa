"""ViT: what is known of it, against stock transformers; the line from training to the graph, bit by bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vit import (
    BLOCKS,
    HEAD,
    HEADS,
    SIZE,
    TOKENS,
    WIDTH,
    VitLine,
    make_vit,
    pixels,
    save_vit,
    vit_line,
    write_images,
)
from torch import Tensor, nn
from transformers import ViTForImageClassification

from qcompress.errors import ModelError
from qcompress.models import FAMILIES, describe, first_blocks, vit
from qcompress.models.architecture import OPERANDS, Head
from qcompress.models.attention import open_attention
from qcompress.models.folded import assemble
from qcompress.models.plan import rounded
from qcompress.parity.layerwise import TIE, follow
from qcompress.pipeline.smoke import shorten
from qcompress.pipeline.stages.build import build_file
from qcompress.pipeline.stages.export import export
from qcompress.pipeline.stages.load import fingerprint, load
from qcompress.schema.method_options import TeacherIntervention
from qcompress.schema.recipe import Build, Model
from qcompress.system.artifacts import OnnxModel, read_json
from qcompress.training.methods.protocols import Scene
from qcompress.training.methods.teacher_intervention import Intervention
from qcompress.training.observer import observe

OLD = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the task's model."""
    return save_vit(tmp_path_factory.mktemp("vit") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def line(source: Path, data: Path, tmp_path: Path) -> Callable[..., VitLine]:
    """`line(format=...)`: a recipe of a tiny ViT."""
    count = 0

    def make(**sections: Any) -> VitLine:
        nonlocal count
        count += 1
        return vit_line(tmp_path / f"line-{count}", source, data, **sections)

    return make


def stock(folder: Path) -> ViTForImageClassification:
    return ViTForImageClassification.from_pretrained(folder, attn_implementation="eager").eval()


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


# What is known ------------------------------------------------------------------------------------


def test_the_described_layers_are_those_of_the_stock_model(source: Path) -> None:
    model, found = stock(source), describe("vit", source, HEAD)
    expected = {name: (module.in_features, module.out_features)
                for name, module in model.named_modules() if isinstance(module, nn.Linear)}  # fmt: skip
    assert {layer.name: (layer.in_features, layer.out_features) for layer in found.layers} == expected
    assert (
        len(found.layers) == 6 * BLOCKS + 1 and [layer.kind for layer in found.layers[:-1]] == ["linear"] * 12
    )
    assert (found.layers[-1].name, found.layers[-1].kind) == ("classifier", "head")
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (found.context, found.new_head, found.family) == (TOKENS, (), "vit")
    assert [point.kind for point in found.points] == [*["attention"] * 4, *["residual"] * 4] * BLOCKS
    (given,) = vit.signature(json.loads((source / "config.json").read_text()))
    assert (given.name, given.axes, given.element) == ("pixel_values", ("batch", 3, SIZE, SIZE), "float32")
    assert given.name in vit.INPUTS and vit.INPUTS == FAMILIES["vit"].INPUTS


def test_both_spellings_of_the_layers_and_a_bare_model_are_one_architecture(
    source: Path, tmp_path: Path
) -> None:
    """Files of transformers 4 and 5, and the model's own names, which a float run's checkpoint has."""
    written = load_file(source / "model.safetensors")
    own = {name: tensor.clone() for name, tensor in make_vit().state_dict().items()}
    old = {}
    for name, tensor in own.items():
        name = name.replace("vit.layers.", "vit.encoder.layer.").replace(
            "attention.o_proj", "attention.output.dense"
        )
        for new, before in OLD.items():
            name = name.replace(f"attention.{new}", f"attention.{before}")
        old[name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")] = tensor
    expected, inputs = describe("vit", source, HEAD), pixels()
    wanted = logits(make_vit(), inputs)
    assert set(old) != set(own) and set(written) in (set(old), set(own))
    for number, tensors in enumerate((own, old)):
        folder = shutil.copytree(source, tmp_path / str(number))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert describe("vit", folder, HEAD) == expected
        assert torch.equal(logits(vit.load_float(folder), inputs), wanted)
        _, names = first_blocks("vit", folder, 1)
        left = {name for name in tensors if names(name)}
        assert len(tensors) - len(left) == 16 and not any(".1." in name for name in left)
        bare = {
            name.removeprefix("vit."): value for name, value in tensors.items() if name.startswith("vit.")
        }
        save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
        found = describe("vit", folder, HEAD)
        assert found.new_head == ("classifier.weight", "classifier.bias") and found.layers == expected.layers


def test_blocks_attentions_and_sites_are_where_the_stock_model_has_them(source: Path) -> None:
    model, found, inputs = stock(source), describe("vit", source, HEAD), pixels()
    given: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            given[name] = arguments[0] if arguments else None
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 1 + len(found.blocks) == 1 + BLOCKS
    assert torch.equal(outputs[found.embeddings], states[0])
    for block, before, after in zip(found.blocks, states, states[1:], strict=False):
        assert torch.equal(given[block], before) and torch.equal(outputs[block], after)
    read: dict[str, set[str]] = {}
    for site in found.sites:
        assert site.channels == WIDTH
        readers = {name for name, x in given.items() if x is outputs[site.writer]}
        read[site.writer] = {name for name in readers if isinstance(model.get_submodule(name), nn.Linear)}
        assert read[site.writer] == set(site.readers)
        # nothing else multiplies or adds it: what else is given it only hands it on
        sublayer = {"before": "attention", "after": "mlp"}[site.writer.rpartition("_")[2]]
        assert readers - set(site.readers) <= {f"{site.writer.rpartition('.')[0]}.{sublayer}"}
    assert len(read) == 2 * BLOCKS
    for attention, state in zip(found.attentions, states, strict=False):
        names = (attention.query, attention.key, attention.value)
        assert all(given[name] is given[attention.query] for name in names)
        assert torch.equal(given[attention.norm], outputs[attention.output] + state)
        assert outputs[attention.module].shape == (4, TOKENS, WIDTH) and attention.block in found.blocks
    assert len(found.attentions) == BLOCKS


def test_the_float_row_is_stock_transformers_and_nothing_else(
    source: Path, line: Callable[..., VitLine]
) -> None:
    made, inputs = line(), pixels()
    model = made.model("float")
    assert type(model) is ViTForImageClassification and model.config._attn_implementation == "eager"
    assert torch.equal(logits(model, inputs), logits(stock(source), inputs))
    filled = vit.empty(made.float_model.path)
    assert {parameter.device.type for parameter in filled.parameters()} == {"meta"}
    filled.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(logits(filled, inputs), logits(model, inputs))
    assert vit.graph_inputs(**inputs) == inputs


def test_a_new_head_is_a_function_of_the_seed_alone(tmp_path: Path) -> None:
    bare = save_vit(tmp_path / "bare", bare=True)
    heads = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        out.mkdir()
        load(Model(family="vit", source=str(bare)), bare, fingerprint(bare), out, HEAD, seed)
        model = vit.load_float(bare, out)
        heads.append(model.classifier.weight.detach().clone())
        assert model.classifier.out_features == 3 and not model.classifier.bias.detach().any()
        torch.manual_seed(number)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    with pytest.raises(ModelError, match="config.json names the class ViTModel"):
        vit.load_float(bare)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "deit"}, "model_type 'deit', and the recipe says family vit"),
        ({"hidden_size": 48}, r"attention\.q_proj\.weight: config\.json asks for shape \[48, 48\]"),
        ({"num_hidden_layers": 3}, "has no such tensor"),
        ({"num_attention_heads": 7}, "7 heads do not divide a width of 64"),
        ({"head_dim": 16}, "2 heads do not divide a width of 64"),
        ({"intermediate_size": None}, "intermediate_size must be a positive integer, found None"),
        ({"image_size": 18}, "patch_size does not divide image_size"),
        ({"image_size": 32}, r"position_embeddings: config\.json asks for shape \[1, 65, 64\]"),
        ({"image_size": [16, 16, 16]}, "image_size must be one positive integer, or two"),
        ({"num_channels": 1}, "images of 1 channels, and they are read as RGB"),
        ({"id2label": {"0": "a", "1": "b"}}, "config.json names 2 labels"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_the_checkpoints_is_refused(
    changes: dict[str, Any], match: str, source: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(source, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=match):
        describe("vit", folder, HEAD)


def test_a_task_of_text_and_a_checkpoint_without_a_processor_are_refused(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="a vit model cannot carry the task causal-lm"):
        describe("vit", source, Head())
    folder, out = shutil.copytree(source, tmp_path / "model"), tmp_path / "load"
    (folder / "preprocessor_config.json").unlink()
    out.mkdir()
    arguments = (Model(family="vit", source=str(folder)), folder, fingerprint(folder), out, HEAD, 0)
    with pytest.raises(ModelError, match=r"model holds no preprocessor_config\.json") as raised:
        load(*arguments)
    assert "`mean`, `std` and `size`" in raised.value.fix
    load(*arguments, {"do_resize": False})
    assert read_json(out / "preprocessor_config.json") == {"do_resize": False}


def test_sizes_of_two_numbers_and_no_bias_of_the_operands(tmp_path: Path) -> None:
    options = {"qkv_bias": False}
    source = save_vit(tmp_path / "model", **options)
    config = json.loads((source / "config.json").read_text())
    assert config["qkv_bias"] is False
    (source / "config.json").write_text(json.dumps(config | {"image_size": [16, 16], "patch_size": [4, 4]}))
    found = describe("vit", source, HEAD)
    assert found.parameters == sum(parameter.numel() for parameter in make_vit(**options).parameters())
    assert found.context == TOKENS
    assert torch.equal(logits(vit.load_float(source), pixels()), logits(make_vit(**options), pixels()))


def test_a_shortened_checkpoint_is_the_first_blocks(tmp_path: Path) -> None:
    source = save_vit(tmp_path / "deep", blocks=12)
    short = shorten("vit", source, tmp_path / "cache")
    long = make_vit(blocks=12)
    long.vit.layers = long.vit.layers[:2]
    assert torch.equal(logits(vit.load_float(short), pixels()), logits(long, pixels()))
    assert (short / "preprocessor_config.json").is_file() and len(describe("vit", short, HEAD).blocks) == 2


# Attention and points -----------------------------------------------------------------------------


class Noted(nn.Module):
    """Keeps the shape of what passes, and multiplies it."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.shapes = factor, []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return self.factor * x


def test_opened_attention_is_stock_attention_to_the_last_bit() -> None:
    model, inputs = make_vit(), pixels()
    eager = logits(model, inputs)
    open_attention(model)
    assert model.config._attn_implementation == "qcompress"
    assert torch.equal(logits(model, inputs), eager)
    assert float(eager.std(0).max()) > 0.1


@pytest.mark.parametrize("point", OPERANDS)
def test_each_operand_passes_its_point_in_front_of_its_matmul(point: str) -> None:
    """Doubling q or k doubles the scores; doubling v or the probabilities doubles what the heads say."""
    model, inputs = make_vit(), pixels()
    name, width = "vit.layers.0.attention", WIDTH // HEADS
    module = model.get_submodule(name)
    noted = Noted(2.0)
    vit.install_points(model, {f"{name}.{point}": noted})
    found = logits(model, inputs)
    shapes = {"key_point": (4, HEADS, width, TOKENS), "probability_point": (4, HEADS, TOKENS, TOKENS)}
    assert noted.shapes == [shapes.get(point, (4, HEADS, TOKENS, width))]
    other = make_vit()
    with torch.no_grad():
        part = {"query_point": "q_proj", "key_point": "k_proj"}.get(point, "v_proj")
        for parameter in other.get_submodule(f"{name}.{part}").parameters():
            parameter.mul_(2)
    assert torch.equal(found, logits(other, inputs)) and module is model.get_submodule(name)
    assert not torch.equal(found, logits(make_vit(), inputs))


def test_residual_points_see_both_inputs_of_each_addition() -> None:
    inputs = pixels()
    block = "vit.layers.1"
    names = [f"{block}.{place}_{side}_point" for place in ("attention", "mlp") for side in ("branch", "skip")]
    model = make_vit()
    vit.install_points(model, {name: Noted(1.0) for name in names})
    assert torch.equal(logits(model, inputs), logits(make_vit(), inputs))
    assert all(model.get_submodule(name).shapes == [(4, TOKENS, WIDTH)] for name in names)
    branch = make_vit()
    vit.install_points(branch, {names[0]: Noted(0.0), names[2]: Noted(0.0)})
    without = make_vit()
    with torch.no_grad():  # a block whose sublayers say nothing hands on what it was given
        for name in ("attention.o_proj", "mlp.fc2"):
            for parameter in without.get_submodule(f"{block}.{name}").parameters():
                parameter.zero_()
    assert torch.equal(logits(branch, inputs), logits(without, inputs))
    skipped = make_vit()
    vit.install_points(skipped, {names[1]: Noted(0.0)})
    assert not torch.equal(logits(skipped, inputs), logits(make_vit(), inputs))


# The line -----------------------------------------------------------------------------------------

POINTS = {"preset": "w8a8", "attention": "int8", "residual": "int8"}
FORMATS: dict[str, Any] = {
    "w8a8": "w8a8",
    "both": POINTS,
    "some": {**POINTS, "layers": {"*.1.*.key_point": {"activations": "float"}, "classifier": "float"}},
    "narrow": {"preset": "w4a4", "attention": "int4", "residual": "int8"},
    "w4a16": "w4a16-g32",
}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_the_folded_model_computes_the_bits_of_the_trained_one(
    line: Callable[..., VitLine], form: Any
) -> None:
    made = line(format=form, method="lsq").train().fold()
    trained, folded = made.model("train"), made.model("fold")
    for rows in (5, 1):
        inputs = pixels(rows)
        assert torch.equal(logits(trained, inputs), logits(folded, inputs))
    assert not torch.equal(logits(folded, inputs), logits(made.model("float"), inputs))
    assert (made.folded.path / "preprocessor_config.json").is_file()


def test_every_layer_and_every_point_learns(line: Callable[..., VitLine]) -> None:
    made = [line(format=POINTS, method="lsq", steps=steps).train() for steps in (0, 3)]
    tensors = [load_file(one.trained.path / "trained.safetensors") for one in made]
    scales = [name for name in tensors[0] if name.endswith(".scale")]
    assert len(scales) == 2 * 13 + 16 and not any("patch" in name for name in scales)
    assert all(not torch.equal(tensors[0][name], tensors[1][name]) for name in scales)


def test_ranges_are_observed_over_all_images_and_few_vectors_are_kept(line: Callable[..., VitLine]) -> None:
    """A percentile needs a distribution: some 512 vectors of a layer, from all batches and all positions."""
    made = line(format="w8a8", quantizer={"activations": {"name": "minmax", "range": "percentile"}})
    model, name = made.model("float"), "vit.layers.1.mlp.fc1"
    batches = [pixels(10, seed) for seed in range(8)]
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, given: seen.append(given[0].flatten(0, 1))
    )
    found = observe(model, made.plan, batches, None, (), 80)
    handle.remove()
    vectors = torch.cat(seen)
    assert torch.equal(found[name].largest, vectors.abs().amax(0)) and len(vectors) == 80 * TOKENS
    kept = found[name].rows
    assert torch.equal(kept, vectors[:: 80 * TOKENS // 512])
    assert 512 <= len(kept) <= 2 * 512 and len(found["classifier"].rows) == 80


def test_a_resumed_run_sees_the_images_that_an_uninterrupted_one_sees(line: Callable[..., VitLine]) -> None:
    """Training images are varied at random, as a function of the seed, the phase and the step."""
    section = {"train": {"npz": ["images.npz"], "augment": {"flip": True, "crop": 2}},
               "evaluate": {"test": {"npz": ["images.npz"]}}}  # fmt: skip
    options = {"data": section, "method": "lsq", "steps": 6}
    whole, broken = line(**options).train(), line(**options, train={"checkpoint_every_s": 1})
    plain = {**section, "train": {"npz": ["images.npz"]}}
    other = line(**{**options, "data": plain}).train()

    class Stopped(Exception):  # noqa: N818 (a test's own)
        pass

    with pytest.MonkeyPatch.context() as patch:
        from qcompress.training import loop
        from qcompress.training.checkpoint import Checkpoints

        patch.setattr(Checkpoints, "due", lambda self: True)
        real, count = loop.advance, [0]

        def dying(prepared: Any) -> None:
            count[0] += 1
            if count[0] == 4:
                raise Stopped
            real(prepared)

        patch.setattr(loop, "advance", dying)
        with pytest.raises(Stopped):
            broken.train()
    broken.train()
    name = "trained.safetensors"
    assert (whole.trained.path / name).read_bytes() == (broken.trained.path / name).read_bytes()
    assert (whole.trained.path / name).read_bytes() != (other.trained.path / name).read_bytes()


def test_quadapter_rescales_both_norms_of_each_block(line: Callable[..., VitLine]) -> None:
    made = line(format="w4a8", method="quadapter", steps=8).train().fold()
    facts = read_json(made.trained.path / "trained.json")
    assert [site["norm"] for site in facts["rescalings"]] == [
        f"vit.layers.{index}.layernorm_{when}" for index in range(BLOCKS) for when in ("before", "after")
    ]  # fmt: skip
    blocks = [phase for phase in facts["phases"] if "block" in phase]
    assert [phase["block"] for phase in blocks] == ["vit.layers.0", "vit.layers.1"]
    assert all(phase["after"] < phase["before"] for phase in blocks)
    inputs = pixels(5)
    assert torch.equal(logits(made.model("train"), inputs), logits(made.model("fold"), inputs))
    scales = load_file(made.trained.path / "trained.safetensors")
    assert all(
        float((scales[f"{site['norm']}.rescale"] - 1).abs().max()) > 1e-4 for site in facts["rescalings"]
    )


@pytest.mark.parametrize(
    ("mode", "cut", "kept"),
    [
        ("output", ("q_proj", "k_proj", "v_proj", "o_proj"), ()),
        ("context", ("q_proj", "k_proj", "v_proj"), ("o_proj",)),
        ("attention", ("q_proj", "k_proj"), ("v_proj", "o_proj")),
    ],
)
def test_what_the_teacher_replaces_the_student_does_not_say(
    mode: str, cut: tuple[str, ...], kept: tuple[str, ...], source: Path
) -> None:
    student, teacher, batch = make_vit(), make_vit(), pixels()
    objective = Intervention(TeacherIntervention(), lambda logits, batch: logits.mean())
    objective.attach(student, Scene(student, describe("vit", source, HEAD), lambda: teacher))

    def said(replaced: str | None) -> Tensor:
        with torch.no_grad():
            objective.student.replace(replaced, objective.teacher(**batch))
            return objective.student(**batch).logits

    before = said(mode)
    torch.testing.assert_close(before, logits(make_vit(), batch), rtol=0, atol=1e-5)
    for name in (*cut, *kept):
        weight = student.get_parameter(f"vit.layers.1.attention.{name}.weight")
        was = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.5)
        assert torch.equal(said(mode), before) == (name in cut), name
        assert not torch.equal(said(None), before)
        with torch.no_grad():
            weight.copy_(was)
    gradient = objective.loss({**batch, "labels": torch.tensor([0, 1, 2, 0])}, 0.0)
    gradient.backward()
    assert student.vit.layers[0].attention.q_proj.weight.grad.abs().max() > 0
    objective.detach()


def test_teacher_intervention_trains_a_vit(line: Callable[..., VitLine]) -> None:
    made = line(format="ternary-a8", method="teacher-intervention").train().fold()
    assert len(read_json(made.trained.path / "trained.json")["phases"]) == 2
    inputs = pixels(5)
    assert torch.equal(logits(made.model("train"), inputs), logits(made.model("fold"), inputs))


# The graph ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graph:
    """An exported graph and what it was made from."""

    made: VitLine
    name: str
    compute: str

    @property
    def file(self) -> Path:
        return self.made.folder / "export" / "model.onnx"


QUICK = (("both", "fp16"),)
SLOW = tuple(
    (name, compute) for name in FORMATS for compute in ("fp32", "fp16") if (name, compute) not in QUICK
)


@pytest.fixture(
    scope="module",
    params=[*QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)],
    ids="-".join,
)
def graph(
    request: pytest.FixtureRequest, source: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Graph]:
    name, compute = request.param
    form = FORMATS[name]
    form = {**({"preset": form} if isinstance(form, str) else form), "compute": compute}
    made = vit_line(tmp_path_factory.mktemp("graph") / "line", source, data, format=form).train().fold()
    (made.folder / "export").mkdir()
    provenance = {"recipe": "tiny", "recipe_sha256": "", "version": "0", "method": "ptq"}
    export(made.folded, made.recipe.export, "rtx-ada", provenance, made.folder / "export")
    return Graph(made, name, compute)


def test_the_graph_takes_images_of_one_size_and_any_number(graph: Graph) -> None:
    model = onnx.load(str(graph.file))
    onnx.checker.check_model(str(graph.file), full_check=True)
    shapes = {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
              for value in [*model.graph.input, *model.graph.output]}  # fmt: skip
    assert shapes == {"pixel_values": ["batch", 3, SIZE, SIZE], "logits": ["batch", 3]}
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT  # in fp16 as well
    findings = read_json(graph.file.with_name("lint.json"))["findings"]
    assert not [finding for finding in findings if finding["severity"] == "error"]
    assert graph.file.with_name("preprocessor_config.json").is_file()


def test_the_certificate_is_complete_and_counts_every_layer_and_point(graph: Graph) -> None:
    certificate = read_json(graph.file.with_name("certificate.json"))
    assert certificate["complete"] is True and certificate["float_copies"] == []
    quantized = [item.name for item in graph.made.plan if item.weights]
    assert [item["name"] for item in certificate["layers"]] == quantized and len(quantized) >= 12
    assert certificate["expected_points"] == len(rounded(graph.made.points))


def test_onnxruntime_computes_the_folded_model(graph: Graph) -> None:
    """As for the encoders of text: most rows agree to 1e-5 of the range, and a flip moves its row. In fp16
    roundings flip in every row: ONNX Runtime is at most twice as far from torch as torch in fp16 is from
    torch in fp32.
    """
    for rows in (24, 1):
        inputs = pixels(rows)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        session = onnxruntime.InferenceSession(graph.file, options, providers=["CPUExecutionProvider"])
        found = session.run(["logits"], {"pixel_values": inputs["pixel_values"].numpy()})[0].astype(
            np.float32
        )
        single = logits(graph.made.model("fold"), inputs).numpy()
        assert found.shape == single.shape and np.ptp(single) > 0.1
        if graph.compute == "fp16":
            halves = {name: x.half() for name, x in inputs.items()}
            half = logits(assemble(graph.made.folded, torch.float16), halves).float().numpy()
            assert rows < 24 or np.abs(found - half).mean() <= 2 * np.abs(half - single).mean()
        else:
            far = np.abs(found - single).max(1) / np.ptp(single)
            assert far.max() < 0.1 and np.median(far) <= 1e-5


def test_every_code_is_that_of_the_folded_model_or_a_tie(graph: Graph) -> None:
    with follow(graph.made.folded, OnnxModel(graph.file.parent), TIE[graph.compute]) as (places, run):
        for row in pixels(12)["pixel_values"].numpy():
            order = run({"pixel_values": row[None]})
    found = {name: places[name].to_json() for name in order}
    points = [item.name for item in rounded(graph.made.points)]
    assert set(found) == {item.name for item in graph.made.plan} | {*points}
    assert [name for name, place in found.items() if place["codes"] and place["unexplained"]] == []
    assert graph.name == "w4a16" or sum(place["codes"] or 0 for place in found.values()) > 10_000


def test_tensorrt_rtx_builds_the_graph(graph: Graph, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    build_file(graph.file, Build(target="rtx-ada", profiles=[{"batch": [1, 2, 4]}]), tmp_path)
    record = read_json(tmp_path / "build.json")
    assert record["status"] == "built" and list(record["inputs"]) == ["pixel_values"]
