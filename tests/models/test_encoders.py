"""BERT, RoBERTa and DistilBERT: what is said about them, against transformers' own models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_bert import (
    BLOCKS,
    CLASSES,
    CONTEXT,
    KINDS,
    LABELS,
    SEQUENCE,
    TOKEN,
    VOCABULARY,
    WIDTH,
    encoder_line,
    save_encoder,
    token_inputs,
)
from torch import Tensor, nn
from transformers import AutoModel, BertForMaskedLM

from qcompress.errors import ModelError
from qcompress.models import FAMILIES, describe
from qcompress.models.architecture import CAUSAL_LM, Architecture, Head
from qcompress.parity.runners import float_runner
from qcompress.pipeline.smoke import shorten
from qcompress.pipeline.stages.load import fingerprint, load
from qcompress.schema.families import DISCOVERED
from qcompress.schema.recipe import Model
from qcompress.system.artifacts import read_json

ENCODERS = ("bert", "roberta", "distilbert")
OF_THEIR_OWN = ("feature-extraction", "fill-mask", "question-answering")
"""Tasks that test_text_embedder.py, test_masked_lm.py and test_question_answering.py are about."""
HEADS = {task: Head(task, LABELS) for task in (SEQUENCE, TOKEN)}


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def source(kind: tuple[str, str], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the task's model. Read only."""
    return save_encoder(tmp_path_factory.mktemp("-".join(kind)), text_file, *kind)


@pytest.fixture(scope="module")
def bare(kind: tuple[str, str], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without a head. Read only."""
    return save_encoder(tmp_path_factory.mktemp("bare"), text_file, *kind, bare=True)


def stock(kind: tuple[str, str], source: Path, **options: Any) -> nn.Module:
    """The model as transformers alone loads it."""
    return CLASSES[kind].from_pretrained(source, **options).eval()


def test_there_is_a_test_for_every_family_with_these_tasks() -> None:
    stated = {name: family for name, family in FAMILIES.items() if name not in DISCOVERED.values()}
    carried = {(name, task) for name, family in stated.items() for task in family.TASKS}
    images = {(name, task) for name, task in carried if task == "image-classification"}
    own = {(name, task) for name, task in carried if task in OF_THEIR_OWN}
    assert carried - {("gpt2", "causal-lm")} - images - own == set(KINDS)


def test_the_described_layers_are_those_of_the_stock_model(kind: tuple[str, str], source: Path) -> None:
    model, architecture = stock(kind, source), describe(kind[0], source, HEADS[kind[1]])
    expected: dict[str, tuple[bool, int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            expected[name] = (True, module.embedding_dim, module.num_embeddings)
        elif isinstance(module, nn.Linear):
            expected[name] = (False, module.in_features, module.out_features)
    found = {
        layer.name: (layer.kind == "embedding", layer.in_features, layer.out_features)
        for layer in architecture.layers
    }
    assert found == expected and len(found) >= 2 + 6 * BLOCKS + 1
    heads = [layer for layer in architecture.layers if layer.kind == "head"]
    assert heads == [architecture.layers[-1]] and heads[0].out_features == len(LABELS)
    assert heads[0].name in dict(model.named_modules()) and not any(
        layer.tied_to for layer in architecture.layers
    )
    assert architecture.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (architecture.context, architecture.vocabulary) == (CONTEXT, VOCABULARY)
    assert len(architecture.sites) == BLOCKS and architecture.new_head == ()


def calls(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[str], dict[str, Tensor], dict[str, Any]]:
    """Modules in the order in which they ran, what each returned, and what each was given first."""
    order: list[str] = []
    outputs: dict[str, Tensor] = {}
    given: dict[str, Any] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            order.append(name)
            outputs[name] = output[0] if isinstance(output, tuple) else output
            given[name] = arguments[0] if arguments else None

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return order, outputs, given


def test_blocks_attentions_and_hidden_states_are_where_the_stock_model_has_them(
    kind: tuple[str, str], source: Path
) -> None:
    model, architecture = stock(kind, source), describe(kind[0], source, HEADS[kind[1]])
    inputs = token_inputs(kind[0])
    order, outputs, given = calls(model, inputs)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 1 + BLOCKS == 1 + len(architecture.blocks)
    assert torch.equal(outputs[architecture.embeddings], states[0])
    for block, state in zip(architecture.blocks, states[1:], strict=True):
        assert torch.equal(outputs[block], state)
    assert len(architecture.attentions) == BLOCKS
    for attention, state in zip(architecture.attentions, states, strict=False):
        for operand in (attention.query, attention.key, attention.value):
            assert torch.equal(given[operand], state)
        names = [attention.query, attention.key, attention.value, attention.output, attention.norm]
        assert [order.index(name) for name in names] == sorted(order.index(name) for name in names)
        assert torch.equal(given[attention.norm], outputs[attention.output] + state)
        assert attention.module in order and attention.block in architecture.blocks
        assert outputs[attention.module].shape == (4, 12, WIDTH)


def test_the_float_row_is_stock_transformers_and_nothing_else(
    kind: tuple[str, str], source: Path, text_file: Path, tmp_path: Path
) -> None:
    line = encoder_line(tmp_path, source, text_file, *kind, format="float", method="float")
    model = line.model("float")
    assert type(model) is CLASSES[kind] and not model.training
    assert model.config._attn_implementation == "eager" and model.dtype == torch.float32
    expected = stock(kind, source, attn_implementation="eager")
    for pad in ("", "left", "right"):
        inputs = token_inputs(kind[0], pad=pad)
        with torch.no_grad():
            wanted = expected(**inputs).logits
        assert torch.equal(line.logits("float", inputs), wanted) and float(wanted.std()) > 0.2
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        found = float_runner(line.float_model, torch.device("cpu"))(arrays)
        assert (found == wanted.numpy()).all()


def test_graph_inputs_add_what_is_missing_and_keep_what_is_there(kind: tuple[str, str]) -> None:
    family = FAMILIES[kind[0]]
    ids = torch.tensor([[5, 6, 7]])
    plain = family.graph_inputs(ids)
    assert tuple(plain) == family.INPUTS and plain["input_ids"] is ids
    assert plain["attention_mask"].tolist() == [[1, 1, 1]]
    mask = torch.tensor([[1, 1, 0]])
    assert family.graph_inputs(ids, attention_mask=mask)["attention_mask"] is mask
    if kind[0] == "bert":
        assert plain["token_type_ids"].tolist() == [[0, 0, 0]]
        assert family.graph_inputs(ids, mask, token_type_ids=ids)["token_type_ids"] is ids


# Heads ------------------------------------------------------------------------------------------------


def test_a_bare_checkpoint_lacks_the_head_and_nothing_else(kind: tuple[str, str], bare: Path) -> None:
    model = AutoModel.from_pretrained(bare)
    own = {f"{kind[0]}.{name}" for name in load_file(bare / "model.safetensors")}
    architecture = describe(kind[0], bare, HEADS[kind[1]])
    assert set(architecture.new_head) == {
        name for name, _ in CLASSES[kind](model.config).named_parameters() if name not in own
    }
    assert architecture.new_head and architecture.layers[-1].out_features == len(LABELS)


def test_a_new_head_is_a_function_of_the_seed_alone(
    kind: tuple[str, str], bare: Path, text_file: Path, tmp_path: Path
) -> None:
    lines = {seed: encoder_line(tmp_path / f"{seed}", bare, text_file, *kind, seed=seed) for seed in (0, 1)}
    facts = read_json(lines[1].float_model.path / "float.json")["new_head"]
    assert facts == {"seed": 1, "tensors": list(lines[1].architecture.new_head)}
    torch.manual_seed(77)
    first = dict(lines[0].model("float").named_parameters())
    torch.manual_seed(78)
    again, other = (dict(lines[seed].model("float").named_parameters()) for seed in (0, 1))
    encoder = load_file(bare / "model.safetensors")
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
        if name in facts["tensors"]:
            drawn = name.endswith(".weight")
            assert torch.equal(parameter, other[name]) is not drawn
            assert 0.01 < float(parameter.detach().std()) < 0.03 if drawn else not parameter.any()
        else:
            assert torch.equal(parameter, encoder[name.removeprefix(f"{kind[0]}.")])


def test_the_load_folder_has_the_config_of_the_tasks_model(
    kind: tuple[str, str], bare: Path, tmp_path: Path
) -> None:
    family, task = kind
    model = Model(family=family, source="unused")
    head = Head(task, ("a", "b"), "multi_label_classification")
    load(model, bare, fingerprint(bare), tmp_path, head, seed=3)
    config = read_json(tmp_path / "config.json")
    assert config["architectures"] == [CLASSES[kind].__name__]
    assert config["id2label"] == {"0": "a", "1": "b"} and config["label2id"] == {"a": 0, "b": 1}
    assert config["problem_type"] == "multi_label_classification"
    loaded = FAMILIES[family].load_float(bare, tmp_path)
    assert loaded.config.num_labels == 2 and loaded.config.problem_type == config["problem_type"]


def test_without_the_load_stage_a_missing_head_is_refused(kind: tuple[str, str], bare: Path) -> None:
    with pytest.raises(ModelError, match="names the class .*Model, which is not one of"):
        FAMILIES[kind[0]].load_float(bare)


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be changed."""
    return shutil.copytree(source, tmp_path / "copy")


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "remove"}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def described(kind: tuple[str, str], folder: Path, labels: tuple[str, ...] | None = LABELS) -> Architecture:
    return describe(kind[0], folder, Head(kind[1], labels))


def test_labels_come_from_the_recipe_or_else_from_the_checkpoint(kind: tuple[str, str], copy: Path) -> None:
    assert described(kind, copy, None).layers[-1].out_features == 3
    with pytest.raises(ModelError, match=r"differ in name: .*\(no, yes, maybe\), the recipe 3 \(x, y, z\)"):
        described(kind, copy, ("x", "y", "z"))
    with pytest.raises(
        ModelError, match=r"differ in number: the checkpoint has 3 \(no, yes, maybe\), the recipe 2 \(a, b\)"
    ):
        described(kind, copy, ("a", "b"))
    with pytest.raises(ModelError, match=r"differ in order: .*\(no, yes, maybe\), the recipe 3 \(yes, no"):
        described(kind, copy, ("yes", "no", "maybe"))
    edit_config(copy, id2label="remove", label2id="remove")
    assert described(kind, copy, None).layers[-1].out_features == 3
    assert described(kind, copy, ("x", "y", "z")).layers[-1].out_features == 3  # nobody named the outputs
    edit_config(copy, id2label={"0": "a", "1": "b"})
    with pytest.raises(ModelError, match=r"names 2 labels \(a, b\), and the checkpoint's head has 3"):
        described(kind, copy)


@pytest.mark.parametrize("padding", [None, VOCABULARY, -1, "0", 0])
def test_the_padding_id_is_a_row_of_the_table(padding: Any, kind: tuple[str, str], copy: Path) -> None:
    """Without one BERT has no padding row; RoBERTa counts its positions from it."""
    edit_config(copy, pad_token_id=padding)
    if padding == 0 or (padding is None and kind[0] != "roberta"):
        assert described(kind, copy).layers[0].out_features == VOCABULARY
        return
    with pytest.raises(
        ModelError, match="pad_token_id is .*, and must be a row of the embedding table"
    ) as refused:
        described(kind, copy)
    assert json.dumps(padding) in refused.value.message and refused.value.fix


def test_a_checkpoint_without_labels_needs_a_task_with_labels(kind: tuple[str, str], bare: Path) -> None:
    folder = bare.parent / f"{bare.name}-nameless"
    shutil.copytree(bare, folder, dirs_exist_ok=True)
    edit_config(folder, id2label="remove", label2id="remove")
    with pytest.raises(ModelError, match="neither the task nor config.json names the labels"):
        described(kind, folder, None)
    regression = describe(kind[0], folder, Head(kind[1], None, "regression"))
    assert regression.layers[-1].out_features == 1


# Refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "says model_type 'gpt2', and the recipe says family"),
        ({"vocab_size": "300"}, "vocab_size must be a positive integer, found '300'"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be a positive integer, found 0"),
        ({"vocab_size": 301}, r"word_embeddings.weight: config.json asks for shape \[301, 64\]"),
        ({"position_embedding_type": "relative_key"}, "an encoder with absolute positions"),
        ({"is_decoder": True}, "an encoder with absolute positions"),
        ({"num_attention_heads": 7, "n_heads": 7}, "7 heads do not divide a width of 64"),
        ({"num_hidden_layers": 3, "n_layers": 3}, r"layer.2.* the checkpoint has no such tensor"),
        ({"intermediate_size": 32, "hidden_dim": 32}, r"asks for shape \[32, 64\], the checkpoint has \[96"),
    ],
)
def test_a_config_that_is_not_the_checkpoints_is_refused(
    kind: tuple[str, str], copy: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(copy, **changes)
    with pytest.raises(ModelError, match=message):
        described(kind, copy)


def test_a_task_that_the_family_cannot_carry_is_refused(kind: tuple[str, str], source: Path) -> None:
    with pytest.raises(ModelError, match=f"a {kind[0]} model cannot carry the task causal-lm"):
        describe(kind[0], source, CAUSAL_LM)


@pytest.mark.parametrize("part", ["query", "norm", "embeddings", "head"])
def test_a_missing_tensor_is_refused_and_not_filled_at_random(
    kind: tuple[str, str], copy: Path, part: str
) -> None:
    architecture = described(kind, copy)
    attention = architecture.attentions[0]
    name = {
        "query": f"{attention.query}.bias",
        "norm": f"{attention.norm}.weight",
        "embeddings": f"{architecture.embeddings}.LayerNorm.bias",
        "head": f"{architecture.layers[-1].name}.bias",  # half a head is none that anybody trained
    }[part]
    edit_tensors(copy, lambda some: some.pop(name))
    with pytest.raises(ModelError, match=f"{name}: .* the checkpoint has no such tensor"):
        described(kind, copy)
    with pytest.raises(ModelError, match=rf"lacks {name} \(1 tensors in all\)"):
        FAMILIES[kind[0]].load_float(copy)


def test_heads_of_other_tasks_and_old_buffers_are_left_alone(text_file: Path, tmp_path: Path) -> None:
    """A checkpoint of a masked language model: it has no pooler, and a head that nobody wants."""
    folder = save_encoder(tmp_path / "model", text_file, "bert")
    BertForMaskedLM.from_pretrained(folder).save_pretrained(folder)
    edit_tensors(folder, lambda some: some.update({"bert.embeddings.position_ids": torch.arange(3)[None]}))
    whole = describe("bert", folder, HEADS[SEQUENCE])
    assert whole.new_head == (
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias",
    )  # fmt: skip
    assert describe("bert", folder, HEADS[TOKEN]).new_head == ("classifier.weight", "classifier.bias")


def test_norms_of_the_first_checkpoints_are_called_gamma_and_beta(text_file: Path, tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "new", text_file, "bert")
    line = encoder_line(tmp_path / "line", source, text_file, "bert")
    expected = line.logits("float", token_inputs("bert"))
    old = shutil.copytree(source, tmp_path / "old")

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "LayerNorm" in name]:
            end = {"weight": "gamma", "bias": "beta"}[name.rpartition(".")[2]]
            tensors[f"{name.rpartition('.')[0]}.{end}"] = tensors.pop(name)

    edit_tensors(old, rename)
    assert not any(name.endswith("LayerNorm.weight") for name in load_file(old / "model.safetensors"))
    again = encoder_line(tmp_path / "again", old, text_file, "bert")
    assert torch.equal(again.logits("float", token_inputs("bert")), expected)


def test_a_shortened_checkpoint_is_the_first_blocks(
    kind: tuple[str, str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompress.pipeline.smoke.BLOCKS", 1)
    short = shorten(kind[0], source, tmp_path)
    architecture = describe(kind[0], short, HEADS[kind[1]])
    assert len(architecture.blocks) == 1 and architecture.new_head == ()
    inputs = token_inputs(kind[0])
    _, outputs, _ = calls(stock(kind, source), inputs)
    _, found, _ = calls(stock(kind, short), inputs)
    assert torch.equal(found[architecture.blocks[0]], outputs[architecture.blocks[0]])


# A real checkpoint -------------------------------------------------------------------------------------


def test_a_real_sentence_encoder_gets_a_head(assets: Path, tmp_path: Path) -> None:
    source = assets / "models" / "all-MiniLM-L6-v2"
    head = Head(SEQUENCE, ("unacceptable", "acceptable"), "single_label_classification")
    architecture = describe("bert", source, head)
    assert architecture.new_head == ("classifier.weight", "classifier.bias")
    assert len(architecture.layers) == 3 + 6 * 6 + 2 and architecture.context == 512
    model = Model(family="bert", source="unused")
    load(model, source, fingerprint(source), tmp_path, head)
    loaded = FAMILIES["bert"].load_float(source, tmp_path)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == architecture.parameters
    plain = AutoModel.from_pretrained(source, attn_implementation="eager").eval()
    inputs = token_inputs("bert", pad="right")
    with torch.no_grad():
        assert torch.equal(loaded.bert(**inputs).pooler_output, plain(**inputs).pooler_output)
