"""Rules for config.json values that all families share: types and ranges, by key. No torch.

transformers reads most keys when it makes the model, where a wrong value raises an exception of its own or is
misinterpreted. These rules run before anything is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from qcompress.errors import ModelError

ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu",
    "relu", "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh", "xielu",
)  # fmt: skip
"""Names of activation functions in transformers (`ACT2FN`)."""

DTYPES = ("float16", "bfloat16", "float32", "float64")
"""Types of a float checkpoint's weights."""

FLOAT_CHECKPOINT = "use the float checkpoint that it was made from"


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_positive_float(value: object) -> bool:
    return type(value) is float and math.isfinite(value) and value > 0


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_type_of_floats(value: object) -> bool:
    return isinstance(value, str) and (value == "auto" or value.removeprefix("torch.") in DTYPES)


def _is_factor(value: object) -> bool:
    return _is_positive_float(value) and value <= 1000


def _is_scale(value: object) -> bool:
    return _is_number(value) and 0 < value <= 1000


Rule = tuple[Callable[[Any], bool], str]

ACTIVATION: Rule = (lambda value: value in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
SHARE: Rule = (_is_share, "a number from 0 to 1")
POSITIVE: Rule = (_is_positive_float, "a float above 0, such as 1e-12 or 0.02")
FACTOR: Rule = (_is_factor, "a float above 0, up to 1000")
SCALE: Rule = (_is_scale, "a number above 0, up to 1000")
FLAG: Rule = (lambda value: type(value) is bool, "true or false")
COUNT: Rule = (_is_count, "an integer from 0")
SIZE: Rule = (lambda value: type(value) is int and value > 0, "a positive integer")
FLOATS: Rule = (_is_type_of_floats, f"one of {', '.join(DTYPES)}")

RULES: dict[str, Rule] = {
    **dict.fromkeys(("hidden_act", "activation_function", "activation"), ACTIVATION),
    **dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "attn_pdrop",
         "embd_pdrop", "resid_pdrop", "summary_first_dropout", "dropout", "attention_dropout", "qa_dropout",
         "seq_classif_dropout", "dropout_rate", "drop_connect_rate", "batch_norm_momentum",
         "classifier_dropout_prob"),
        SHARE,
    ),
    **dict.fromkeys(
        ("layer_norm_eps", "layer_norm_epsilon", "batch_norm_eps", "initializer_range"),
        POSITIVE,
    ),
    **dict.fromkeys(("width_coefficient", "depth_coefficient", "squeeze_expansion_ratio"), FACTOR),
    **dict.fromkeys(("depth_multiplier", "expand_ratio"), SCALE),
    **dict.fromkeys(
        ("tie_word_embeddings", "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
         "reorder_and_upcast_attn", "qkv_bias", "downsample_in_first_stage", "downsample_in_bottleneck",
         "sinusoidal_pos_embds", "is_decoder", "add_cross_attention", "first_layer_is_expansion",
         "finegrained_output", "tf_padding"),
        FLAG,
    ),
    "chunk_size_feed_forward": COUNT,
    **dict.fromkeys(("n_inner", "n_head"), SIZE),
    **dict.fromkeys(("dtype", "torch_dtype"), FLOATS),
}  # fmt: skip
"""Rule for the value of each key, if config.json has it."""

NULLABLE = ("classifier_dropout", "n_inner", "dtype", "torch_dtype")
"""Keys whose null stands for transformers' default."""

HEADS = (("n_embd", "n_head", 12),)
"""Keys of the width and of the number of heads, and its default in transformers, for families without a
rule of their own.
"""


FLOAT_TENSORS = re.compile(
    r"(^|\.)(weight|running_mean|running_var|gamma|beta|cls_token|position_embeddings)$"
)
"""Names of tensors that are floats in every family. Biases are left out: old GPT-2s call a mask
`attn.bias`.
"""

FLOAT_TYPES = ("F16", "BF16", "F32", "F64")


def check_floats(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Refuse weights that are not floats."""
    for name, (dtype, _) in tensors.items():
        if dtype not in FLOAT_TYPES and FLOAT_TENSORS.search(name):
            raise ModelError(
                f"{name} is of the type {dtype}, and weights must be one of {', '.join(FLOAT_TYPES)}",
                fix=FLOAT_CHECKPOINT,
            )


CHOOSERS = {
    "transformers_weights": "it names another file of weights",
    "configuration_files": "it names other files in the place of config.json",
    "auto_map": "it selects model code of the checkpoint, which is never run",
    "fusion_config": "it changes what the model computes",
    "kernel_config": "it changes what the model computes",
    "distributed_config": "it spreads the model over devices",
    "pretrained_cfg": "the model is one of timm",
    "compression_config": "the weights are compressed",
}
"""Keys with which a config.json makes transformers load another model than the stock one, and their
effect.
"""

ANSWERS = {"return_dict": True, "use_return_dict": True, "torchscript": False}
"""Keys that change the return value of a model's forward pass, and the only supported value."""

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def _check_choosers(config: dict[str, Any]) -> None:
    for key, effect in CHOOSERS.items():
        if config.get(key):
            raise ModelError(
                f"config.json has {key} ({config[key]!r:.60}): {effect}",
                fix=f"use a checkpoint without {key}; where the stock model is meant, remove it",
            )
    for key, wanted in ANSWERS.items():
        if config.get(key, wanted) is not wanted:
            raise ModelError(
                f"config.json: {key} is {config[key]!r:.60}: it changes what the model returns",
                fix=f"remove {key} from config.json",
            )
    for key in ("attn_implementation", "_attn_implementation"):
        if config.get(key) is not None and config[key] not in ATTENTIONS:
            raise ModelError(
                f"config.json: {key} is {config[key]!r:.60}, which is external code, and not one of "
                f"{', '.join(ATTENTIONS)}",
                fix=f"remove {key} from config.json",
            )


def check_values(config: dict[str, Any]) -> None:
    """Raise ModelError for a value of a config.json from which a model cannot be made."""
    if config.get("quantization_config") is not None:
        raise ModelError(
            "config.json has a quantization_config: the checkpoint is quantized already",
            fix=FLOAT_CHECKPOINT,
        )
    _check_choosers(config)
    if config.get("pruned_heads"):
        raise ModelError(
            "config.json has pruned_heads, and attention whose heads were removed is not supported",
            fix="use a checkpoint with all its heads",
        )
    for key, (holds, wanted) in RULES.items():
        if key not in config or (config[key] is None and key in NULLABLE):
            continue
        value = config[key]
        if isinstance(value, list | dict) or not holds(value):
            fix = f"mend {key} in config.json, or copy it again from the checkpoint"
            if wanted == FLOATS[1]:
                fix = f"write the type of the float weights as {key}, or {FLOAT_CHECKPOINT}"
            raise ModelError(f"config.json: {key} is {value!r:.60}, and must be {wanted}", fix=fix)
    for width, key, default in HEADS:
        heads = config.get(key, default)
        if width in config and type(config[width]) is int and config[width] % heads:
            raise ModelError(
                f"config.json: {heads} heads ({key}) do not divide a width of {config[width]} ({width})",
                fix="copy config.json again from the checkpoint",
            )
