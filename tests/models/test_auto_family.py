"""Decoders and image models whose structure is discovered, through the stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from lines import cli
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, Line, make_recipe, make_tokenizer, start_line, token_ids

from qcompress.errors import ModelError
from qcompress.models import FAMILIES, describe, first_blocks
from qcompress.models.architecture import Head
from qcompress.models.checkpoint_files import read_config, read_tensors
from qcompress.models.folded import assemble
from qcompress.models.structure.reduced import fill_random
from qcompress.models.structure.whole import image_inputs, text_inputs
from qcompress.parity.generate import Generator
from qcompress.pipeline.stages.export import export
from qcompress.schema.recipe import Export
from qcompress.system.artifacts import read_json

LLM = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip


def save(folder: Path, name: str, text: Path, **changes: Any) -> Path:
    """A random checkpoint of a decoder with its tokenizer."""
    values = {key: value for key, value in LLM.items() if (name, key) != ("falcon", "head_dim")}
    config = transformers.AutoConfig.for_model(name, **(values | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    fill_random(model, 3)
    model.save_pretrained(folder)
    make_tokenizer(folder, text.read_text(encoding="utf-8"))
    return folder


DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8, "num_hidden_layers": 6},
    "phi3": {"sliding_window": None},
    "gpt_neox": {},
    "falcon": {"multi_query": True, "new_decoder_architecture": False},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
QUICK = ("llama", "gemma2", "gpt_neox")
each_decoder = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in DECODERS]
)
FORMAT = {"preset": "w8a8", "attention": "int8"}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[[str], Line]:
    """W8A8 lines until fold; int8 attention where the attention can be opened."""
    root, made = tmp_path_factory.mktemp("decoders"), {}

    def line(name: str) -> Line:
        if name not in made:
            source = save(root / name, name, text_file, **DECODERS[name])
            points = describe("decoder", source).points
            recipe = make_recipe(text_file, format=FORMAT if points else "w8a8")
            made[name] = (
                start_line(root / f"{name}-line", source, text_file, recipe, "decoder").train().fold()
            )
        return made[name]

    return line


@each_decoder
def test_the_float_model_is_the_stock_model(name: str, lines) -> None:
    line, ids = lines(name), token_ids()
    model = FAMILIES["decoder"].load_float(line.source)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, line.logits("float", ids))


@each_decoder
def test_the_folded_decoder_is_the_trained_one_bit_for_bit(name: str, lines) -> None:
    line, ids = lines(name), token_ids()
    trained = line.logits("train", ids)
    assert torch.equal(line.logits("fold", ids), trained)
    stock = line.logits("float", ids)
    likeness = torch.cosine_similarity(trained.flatten(), stock.flatten(), 0)
    assert 0.9 < likeness < 1 - 1e-6  # quantized, and the same model


@each_decoder
def test_the_graph_with_a_cache_computes_the_model_token_by_token(name: str, lines, tmp_path: Path) -> None:
    """Generated token by token from left-padded prompts of two lengths: the whole model's tokens."""
    line = lines(name)
    export(line.folded, Export(cache=True), "cpu", {"version": "0", "recipe": "tiny"}, tmp_path)
    assert read_json(tmp_path / "certificate.json")["complete"]
    generator = Generator(tmp_path / "model.onnx", "decoder", 1, optimized=False)
    assert generator.cached
    prompts = [token_ids(1, 9, seed=3)[0].tolist(), token_ids(1, 4, seed=4)[0].tolist()]
    folded = assemble(line.folded)
    for prompt, new in zip(prompts, generator(prompts, 8), strict=True):
        ids = torch.tensor([prompt])
        for token in new:
            with torch.no_grad():
                (best,) = folded(input_ids=ids).logits[:, -1].argmax(-1).tolist()
            assert token == best
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_a_tied_head_reads_the_table(lines) -> None:
    layers = {item.name: item.layer for item in lines("gemma2").plan}
    assert layers["lm_head"].kind == "head" and layers["lm_head"].tied_to == "model.embed_tokens"
    layers = {item.name: item.layer for item in lines("llama").plan}
    assert layers["lm_head"].tied_to is None


def test_a_recipe_without_a_family_is_one_of_its_task(text_file: Path) -> None:
    recipe = make_recipe(text_file, model={"source": "unused"})
    assert recipe.model.family == "decoder"
    assert make_recipe(text_file, model={"source": "unused", "family": "gpt2"}).model.family == "gpt2"


def edited(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("lm_head.weight"), "lm_head.weight.*has no such tensor"),
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            "the checkpoint has no such tensor",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}),
            r"shape \[32\], the checkpoint",
        ),
        (lambda tensors: tensors.pop("model.layers.0.input_layernorm.weight"), "no such tensor"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_is_refused(
    change: Callable[[dict[str, torch.Tensor]], None], said: str, lines, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=said):
        describe("decoder", edited(lines("llama").source, tmp_path / "copy", change))


def test_a_checkpoint_of_the_base_model_is_taken(lines, tmp_path: Path) -> None:
    """Names without the model's prefix; the head is tied."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    source = lines("gemma2").source
    copy = edited(source, tmp_path / "base", rename)
    assert describe("decoder", copy) == describe("decoder", source)


def test_experts_that_share_a_tensor_stay_float_and_are_named(tmp_path: Path, text_file: Path) -> None:
    source = save(tmp_path / "moe", "mixtral", text_file, num_local_experts=4, num_experts_per_tok=2)
    architecture = describe("decoder", source)
    assert architecture.covered < 0.5
    assert architecture.uncovered[0][0] == "model.layers.0.mlp.experts.gate_up_proj"
    assert "model.layers.0.self_attn.q_proj" in {layer.name for layer in architecture.layers}


def test_another_task_is_refused(lines) -> None:
    with pytest.raises(ModelError, match="a decoder cannot carry the task image-classification"):
        describe("decoder", lines("llama").source, Head("image-classification"))


def test_the_first_blocks_are_a_checkpoint_of_their_own(lines) -> None:
    source = lines("llama").source
    config, names = first_blocks("decoder", source, 1)
    assert config["num_hidden_layers"] == 1
    assert names("model.layers.0.mlp.up_proj.weight") and names("model.layers.1.mlp.up_proj.weight") is None
    assert names("model.norm.weight") == "model.norm.weight"


# Text encoders and image models -------------------------------------------------------------------

BERT = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=40, pad_token_id=0,
)  # fmt: skip
LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "modernbert": ("text-model", "SequenceClassification", BERT | LABELS | dict(
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=8,
        num_hidden_layers=3,
    )),
    "deberta-v2": ("text-model", "SequenceClassification", BERT | LABELS | dict(
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True,
        norm_rel_ebd="layer_norm", position_biased_input=False,
    )),
    "albert": ("text-model", "SequenceClassification", BERT | LABELS | {"embedding_size": 16}),
    "electra": ("text-model", "TokenClassification", BERT | LABELS | {"embedding_size": 16}),
    "mpnet": ("text-model", "SequenceClassification", BERT | LABELS),
    "roformer": ("text-model", "MaskedLM", BERT | {"embedding_size": 16}),
    "convbert": ("text-model", "MaskedLM", BERT),
    "ernie": ("text-model", "QuestionAnswering", BERT),
    "dinov2": ("image-model", "ImageClassification", LABELS | dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=16, patch_size=4,
    )),
    "swin": ("image-model", "ImageClassification", LABELS | dict(
        image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
    )),
    "convnext": ("image-model", "ImageClassification", LABELS | dict(
        image_size=16, patch_size=2, hidden_sizes=[16, 32], depths=[2, 2], num_stages=2,
    )),
    "regnet": ("image-model", "ImageClassification", LABELS | dict(
        image_size=32, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8,
        layer_type="y",
    )),
}  # fmt: skip
TASKS = {
    "SequenceClassification": "sequence-classification",
    "TokenClassification": "token-classification",
    "ImageClassification": "image-classification",
    "MaskedLM": "fill-mask",
    "QuestionAnswering": "question-answering",
}
WIDTHS = {"MaskedLM": VOCABULARY, "QuestionAnswering": 2}
"""Outputs of a head; of the others 3."""
DEFAULT = ("modernbert", "dinov2", "roformer", "ernie")
each_other = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in OTHERS],
)


def other(folder: Path, name: str) -> tuple[Path, str, Head]:
    """A random checkpoint of a classifier; also returns its family and the head of its task."""
    family, ending, values = OTHERS[name]
    config = transformers.AutoConfig.for_model(name, architectures=[], **values)
    model = getattr(transformers, f"AutoModelFor{ending}").from_config(config).eval()
    fill_random(model, 3)
    model.save_pretrained(folder)
    return folder, family, Head(TASKS[ending])


@each_other
def test_a_classifier_of_any_architecture_is_read(name: str, tmp_path: Path) -> None:
    """Layers hold most of it, the last one is the head, and the loaded model is the stock model."""
    source, family, head = other(tmp_path / "model", name)
    architecture = describe(family, source, head)
    assert architecture.family == family and architecture.covered > 0.7 and not architecture.new_head
    heads = [layer for layer in architecture.layers if layer.kind == "head"]
    assert [layer.out_features for layer in heads] == [WIDTHS.get(OTHERS[name][1], 3)]
    assert architecture.layers[-1] == heads[0]
    loaded = tmp_path / "load"
    loaded.mkdir()
    config = FAMILIES[family].task_config(read_config(source), read_tensors(source), head)
    (loaded / "config.json").write_text(json.dumps(config))
    model = FAMILIES[family].load_float(source, loaded)
    stock = getattr(transformers, f"AutoModelFor{OTHERS[name][1]}").from_pretrained(
        source, attn_implementation="eager"
    )
    inputs = image_inputs(stock, 12) if family == "image-model" else text_inputs(stock, 12)
    inputs.pop("position_ids", None)
    given = FAMILIES[family].graph_inputs(**inputs)
    with torch.no_grad():
        ours, theirs = model(**given), stock.eval()(**inputs)
    if head.task == "question-answering":
        assert torch.equal(ours.logits, torch.stack([theirs.start_logits, theirs.end_logits], -1))
    elif head.task == "fill-mask":  # the bias is added apart
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-6, rtol=1e-6)
    else:
        assert torch.equal(ours.logits, theirs.logits)


def test_a_new_classifier_is_drawn_for_other_labels(tmp_path: Path) -> None:
    """A checkpoint without a head: its tensors are the new head's, and no others."""
    source, family, _ = other(tmp_path / "model", "modernbert")
    base = edited(source, tmp_path / "base", lambda tensors: (
        tensors.pop("classifier.weight"), tensors.pop("classifier.bias"),
    ))  # fmt: skip
    values = json.loads((base / "config.json").read_text())
    dropped = {key: value for key, value in values.items() if key not in ("id2label", "label2id")}
    (base / "config.json").write_text(json.dumps(dropped))
    head = Head("sequence-classification", labels=("x", "y", "z", "w"))
    architecture = describe(family, base, head)
    assert architecture.new_head == ("classifier.weight", "classifier.bias")
    assert architecture.layers[-1].out_features == 4
    with pytest.raises(ModelError, match="no such tensor"):
        describe(family, edited(base, tmp_path / "broken", lambda tensors: tensors.pop(
            "model.layers.1.attn.Wo.weight"
        )), head)  # fmt: skip


def test_token_types_are_inputs_of_models_that_have_two(tmp_path: Path) -> None:
    inputs = {}
    for name in ("modernbert", "electra"):
        source, family, head = other(tmp_path / name, name)
        config = FAMILIES[family].task_config(read_config(source), read_tensors(source), head)
        inputs[name] = [item.name for item in FAMILIES[family].signature(config)]
    assert inputs["modernbert"] == ["input_ids", "attention_mask"]
    assert inputs["electra"] == ["input_ids", "attention_mask", "token_type_ids"]


def test_layers_that_are_called_twice_are_layers(tmp_path: Path) -> None:
    """DeBERTa projects content and positions with one query layer."""
    source, family, head = other(tmp_path / "model", "deberta-v2")
    architecture = describe(family, source, head)
    calls = {layer.name: layer.calls for layer in architecture.layers}
    for block in (0, 1):
        attention = f"deberta.encoder.layer.{block}.attention"
        assert calls[f"{attention}.self.query_proj"] == 2
        assert calls[f"{attention}.output.dense"] == 1
    assert not any("called more than once" in why for _, why in architecture.floats)
    assert architecture.covered > 0.97  # all but the table of relative positions, which no module looks up


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A finished run of a Llama without a stated family, with a cache and a chat template."""
    folder = tmp_path_factory.mktemp("run")
    source = save(folder / "model", "llama", text_file)
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (source / "chat_template.jinja").write_text(template)
    data = {"text": [str(text_file)], "limit": 4}
    recipe = {
        "name": "llama", "model": {"source": str(source)}, "task": {"name": "causal-lm", "context": 24},
        "data": {"calibration": data, "evaluate": {"test": data}}, "method": "ptq",
        "format": {"preset": "w8a8", "cache": "int8"}, "export": {"cache": True}, "build": {"target": "cpu"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = cli("run", folder / "recipe.yaml", "--out", folder / "runs")
    assert done.code == 0, done.stderr
    return (folder / "runs" / "llama" / "latest").resolve()


def test_a_llama_runs_from_recipe_to_verdict(run: Path) -> None:
    verdict = read_json(run / "verdict.json")
    assert verdict["verdict"] == "accept" and verdict["not_measured"] == ["engine"]
    assert read_json(run / "certificate.json")["complete"]
    assert "family: decoder" in (run / "recipe.resolved.yaml").read_text()


def test_an_answer_in_the_chat_template_continues_its_prompt(run: Path) -> None:
    """The template of this model is the question alone."""
    question = "abe fig"
    whole = cli("predict", run, question, "--tokens", "6")
    answer = cli("predict", run, question, "--chat", "--tokens", "6")
    assert answer.code == whole.code == 0, answer.stderr
    assert whole.stdout == question + answer.stdout and len(answer.stdout) > 1


def test_a_template_that_cannot_be_used_is_refused(run: Path, tmp_path: Path) -> None:
    for template, said in ((None, "no chat template"), ("{{ raise_exception('none') }}", "cannot be filled")):
        copy = tmp_path / said.replace(" ", "-")
        shutil.copytree(run, copy)
        (copy / "chat_template.jinja").unlink()
        if template:
            (copy / "chat_template.jinja").write_text(template)
        refused = cli("predict", copy, "abe", "--chat")
        assert refused.code == 2 and said in refused.stderr and "drop --chat" in refused.stderr


@pytest.mark.parametrize(
    ("padding", "most"), [({}, 512), ({"pad_token_id": None}, 512), ({"pad_token_id": 0}, 513)]
)
def test_positions_that_are_counted_from_the_padding_are_fewer(padding: dict[str, Any], most: int) -> None:
    config = {"model_type": "xlm-roberta", "max_position_embeddings": 514, **padding}
    assert FAMILIES["text-model"].positions(config) == most
    assert FAMILIES["text-model"].positions({**config, "model_type": "bert"}) == 514
