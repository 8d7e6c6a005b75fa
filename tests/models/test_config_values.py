"""Values of a config.json against the model, and blocks of a checkpoint that config.json leaves over.

The oracles are transformers' own tables and its exceptions.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_bert import save_encoder
from tiny_nets import save_net
from tiny_vit import save_vit

from qcompress.errors import ModelError
from qcompress.models import describe
from qcompress.models.architecture import CAUSAL_LM, Head
from qcompress.models.config_values import ACTIVATIONS
from qcompress.tasks.labels import named_outputs

SEQUENCE = Head("sequence-classification", None, None)
IMAGES = Head("image-classification", None, None)
HEADS = {"gpt2": CAUSAL_LM, "bert": SEQUENCE, "roberta": SEQUENCE, "distilbert": SEQUENCE}
KINDS = {
    "resnet": "basic", "efficientnet": "efficientnet", "cifar-resnet": "cifar", "mobilenet-v2": "mobilenet",
}  # fmt: skip

Checkpoints = dict[str, Path]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> Checkpoints:
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {"gpt2": tiny_model, "vit": save_vit(folder / "vit")}
    made |= {family: save_net(folder / family, kind) for family, kind in KINDS.items()}
    texts = ("bert", "roberta", "distilbert")
    return made | {family: save_encoder(folder / family, text_file, family) for family in texts}


def edited(source: Path, folder: Path, **keys: Any) -> Path:
    """A copy of a checkpoint with other values in its config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


def described(family: str, source: Path, blocks: Any = None) -> Any:
    return describe(family, source, HEADS.get(family, IMAGES), blocks)


def added(folder: Path, *names: str) -> Path:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **{name: torch.ones(3) for name in names}}, file, {"format": "pt"})
    return folder


# Blocks that config.json leaves over --------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("gpt2", "n_layer"), ("bert", "num_hidden_layers"), ("roberta", "num_hidden_layers"),
        ("distilbert", "n_layers"), ("vit", "num_hidden_layers"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("blocks", [None, "pairs", "every-other"])
def test_blocks_that_config_json_does_not_count_are_told(
    checkpoints: Checkpoints, tmp_path: Path, family: str, key: str, blocks: str | None
) -> None:
    count = json.loads((checkpoints[family] / "config.json").read_text())[key]
    source = edited(checkpoints[family], tmp_path / "model", **{key: count - 1})
    says = f"{key} {count - 1}, and the checkpoint has {count} blocks"
    with pytest.raises(ModelError, match=says) as error:
        described(family, source, blocks)
    assert f'write "{key}": {count}' in str(error.value.fix)
    assert len(described(family, checkpoints[family], [0]).blocks) == 1
    assert len(described(family, source, [0]).blocks) == 1  # the recipe says which


def test_depths_of_a_resnet_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    whole = save_net(tmp_path / "whole", "basic")
    depths = json.loads((whole / "config.json").read_text())["depths"]
    assert max(depths) > 1
    shallow = edited(whole, tmp_path / "shallow", depths=[1] * len(depths))
    with pytest.raises(ModelError, match=r"the checkpoint has encoder\.stages\."):
        described("resnet", shallow)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("resnet", "resnet.encoder.stages.0.layers.1.shortcut.convolution.weight"),
        ("resnet", "resnet.encoder.stages.9.layers.0.layer.0.convolution.weight"),
        ("efficientnet", "efficientnet.encoder.blocks.99.projection.project_conv.weight"),
        ("mobilenet-v2", "mobilenet_v2.layer.16.conv_3x3.convolution.weight"),
        ("cifar-resnet", "layer1.7.conv1.weight"),
        ("cifar-resnet", "layer4.0.conv1.weight"),
        ("gpt2", "transformer.h.0.crossattention.c_attn.weight"),
        ("gpt2", "transformer.h.1.attn.c_attn.lora_A.weight"),
        ("bert", "bert.encoder.layer.0.attention.self.distance_embedding.weight"),
        ("distilbert", "distilbert.transformer.layer.1.attention.q_lin.SCB"),
        ("vit", "vit.encoder.layer.0.layer_scale1.lambda1"),
    ],
)
def test_a_tensor_of_a_block_without_a_place_is_told(
    checkpoints: Checkpoints, tmp_path: Path, family: str, name: str
) -> None:
    source = added(Path(shutil.copytree(checkpoints[family], tmp_path / "model")), name)
    with pytest.raises(ModelError, match="which config.json does not ask for"):
        described(family, source)


def test_biases_that_config_json_switches_off_are_told(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = edited(checkpoints["vit"], tmp_path / "model", qkv_bias=False)
    with pytest.raises(ModelError, match=r"_proj\.bias.*which config.json does not ask for"):
        described("vit", source)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
        ("bert", ["cls.predictions.bias", "bert.embeddings.position_ids", "cls.seq_relationship.bias"]),
        ("roberta", ["lm_head.bias", "roberta.pooler.dense.bias", "roberta.embeddings.position_ids"]),
        ("distilbert", ["vocab_layer_norm.bias", "qa_outputs.bias"]),
        ("vit", ["vit.pooler.dense.bias", "vit.embeddings.mask_token"]),
        ("resnet", ["resnet.encoder.stages.0.layers.0.layer.0.normalization.num_batches_tracked"]),
    ],
)
def test_what_other_tasks_and_old_files_hold_is_taken(
    checkpoints: Checkpoints, tmp_path: Path, family: str, names: list[str]
) -> None:
    described(family, added(Path(shutil.copytree(checkpoints[family], tmp_path / "model")), *names))


# Values -------------------------------------------------------------------------------------------


def test_activations_are_those_of_transformers() -> None:
    from transformers.activations import ACT2FN

    assert sorted(ACTIVATIONS) == sorted(ACT2FN)


WRONG = [
    ("bert", "hidden_act", "gleu"),
    ("bert", "hidden_act", None),
    ("bert", "hidden_act", ["gelu"]),
    ("gpt2", "activation_function", "gelu-new"),
    ("distilbert", "activation", "GELU"),
    ("resnet", "hidden_act", "rleu"),
    ("vit", "hidden_act", 1),
    ("bert", "hidden_dropout_prob", 1.5),
    ("bert", "hidden_dropout_prob", -0.1),
    ("bert", "hidden_dropout_prob", "0.1"),
    ("bert", "classifier_dropout", 7),
    ("roberta", "attention_probs_dropout_prob", float("nan")),
    ("gpt2", "resid_pdrop", 10),
    ("gpt2", "attn_pdrop", True),
    ("distilbert", "dropout", None),
    ("efficientnet", "drop_connect_rate", 2.0),
    ("bert", "layer_norm_eps", "1e-12"),
    ("bert", "layer_norm_eps", 0.0),
    ("vit", "layer_norm_eps", -1e-6),
    ("roberta", "layer_norm_eps", 1),
    ("gpt2", "layer_norm_epsilon", None),
    ("efficientnet", "batch_norm_eps", 0),
    ("mobilenet-v2", "depth_multiplier", 0),
    ("mobilenet-v2", "expand_ratio", "6"),
    ("mobilenet-v2", "tf_padding", 1),
    ("mobilenet-v2", "finegrained_output", None),
    ("mobilenet-v2", "classifier_dropout_prob", 1.5),
    ("bert", "initializer_range", "0.02"),
    ("bert", "dtype", "float99"),
    ("gpt2", "torch_dtype", "fp16"),
    ("vit", "dtype", 16),
    ("gpt2", "dtype", "int8"),
    ("gpt2", "n_head", 5),
    ("gpt2", "n_head", 0),
    ("bert", "num_attention_heads", 5),
    ("vit", "num_attention_heads", 7),
    ("gpt2", "n_inner", 0),
    ("gpt2", "tie_word_embeddings", "false"),
    ("gpt2", "scale_attn_weights", "no"),
    ("bert", "chunk_size_feed_forward", "8"),
    ("bert", "pruned_heads", {"0": [1]}),
    ("gpt2", "pruned_heads", {"1": [0, 1]}),
    ("vit", "pruned_heads", {"0": [0]}),
]


@pytest.mark.parametrize(("family", "key", "value"), WRONG)
def test_a_value_that_no_model_can_have_is_named_without_loading(
    checkpoints: Checkpoints, tmp_path: Path, family: str, key: str, value: Any
) -> None:
    named = {"num_attention_heads": "heads do not divide"}.get(key, key)
    with pytest.raises(ModelError, match=f"config.json.*{named}"):
        described(family, edited(checkpoints[family], tmp_path / "model", **{key: value}))


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit", "resnet"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
def test_a_quantized_checkpoint_is_refused(
    checkpoints: Checkpoints, tmp_path: Path, family: str, method: str
) -> None:
    source = edited(checkpoints[family], tmp_path / "model", quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match="quantized already") as error:
        described(family, source)
    assert "float checkpoint" in str(error.value.fix)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("bert", {"hidden_dropout_prob": 0, "classifier_dropout": None, "dtype": "float16"}),
        ("bert", {"torch_dtype": "torch.bfloat16", "dtype": None, "pruned_heads": {}}),
        ("gpt2", {"resid_pdrop": 0.0, "attn_pdrop": 1, "n_inner": None, "activation_function": "gelu_new"}),
        ("vit", {"hidden_act": "gelu_fast", "quantization_config": None, "pruned_heads": None}),
    ],
)
def test_values_that_models_have_are_taken(
    checkpoints: Checkpoints, tmp_path: Path, family: str, keys: dict[str, Any]
) -> None:
    described(family, edited(checkpoints[family], tmp_path / "model", **keys))


# Names of outputs ---------------------------------------------------------------------------------

LABELS: list[tuple[dict[str, Any], str, str]] = [
    ({"id2label": {"0": "no", "2": "yes"}}, "numbers 0, 2", '"id2label": {"0": "no", "1": "yes"}'),
    ({"id2label": {"1": "no", "2": "yes"}}, "numbers 1, 2", '"id2label": {"0": "no", "1": "yes"}'),
    ({"id2label": {"-1": "no", "0": "yes"}}, "numbers -1, 0", '"id2label": {"0": "no", "1": "yes"}'),
    ({"id2label": {"0": "no", "00": "yes"}}, "numbers 0, 00", '"id2label"'),
    ({"id2label": {"0": "no", "1": "no"}}, "outputs 0 and 1 one name, 'no'", '"1": "no_1"'),
    ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "outputs 0 and 2 one name", '"2": "a_2"'),
    ({"id2label": ["no", "yes"]}, "must be a map", '"id2label": {"0": "no", "1": "yes"}'),
    ({"id2label": "no,yes"}, "must be a map", '"id2label"'),
    ({"id2label": {"no": 0, "yes": 1}}, "keys that are not numbers", "numbers of the outputs"),
    ({"id2label": {"0": None, "1": "yes"}}, "not a text: None", '"LABEL_0"'),
    (
        {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 1, "yes": 0}},
        "'no' is the output 0 in id2label and 1 in label2id",
        '"label2id": {"no": 0, "yes": 1}',
    ),
    ({"id2label": {"0": "no", "1": "yes"}, "label2id": {"yes": None}}, "None in label2id", '"label2id"'),
    ({"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 2}}, "2 in label2id", '"label2id"'),
    ({"id2label": {"0": "no", "1": "yes"}, "label2id": ["no", "yes"]}, "must be a map", '"label2id"'),
]


@pytest.mark.parametrize(("config", "says", "fix"), LABELS)
def test_names_of_outputs_are_one_for_each_from_0(config: dict[str, Any], says: str, fix: str) -> None:
    with pytest.raises(ModelError) as error:
        named_outputs(config)
    assert says in str(error.value) and fix in str(error.value.fix)


def test_check_of_a_checkpoint_reads_the_same_names(checkpoints: Checkpoints, tmp_path: Path) -> None:
    wrong = ({"0": "a", "1": "b", "3": "c"}, ["a", "b", "c"], {"0": "a", "1": "b", "2": "a"})
    for place, names in enumerate(wrong):
        source = edited(checkpoints["bert"], tmp_path / str(place), id2label=names)
        with pytest.raises(ModelError, match="config.json: id2label"):
            described("bert", source)


@pytest.mark.parametrize(
    "config",
    [
        {"id2label": {"1": "yes", "0": "no"}, "label2id": {"no": 0, "yes": 1}},
        {"id2label": {"0": "no", "1": "yes"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
        {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": "0", "yes": "1"}},
        {"id2label": {"0": "no", "1": "yes"}, "label2id": {"bad": 0, "good": 1}},
        {"id2label": {"0": "no", "1": "yes"}},
    ],
)
def test_names_of_outputs_that_agree_are_taken(config: dict[str, Any]) -> None:
    assert named_outputs(config) == ("no", "yes")
