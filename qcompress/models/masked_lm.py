"""Stock models that predict masked tokens: the bias of a decoder that shares the table of words.

A tied layer has the weight of its table and nothing else, so that the bias becomes a parameter of the model,
`output_bias`, which is added to the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qcompress.errors import ModelError


def separate_bias(model: PreTrainedModel, source: Path) -> None:
    """Move the bias of a tied decoder to `output_bias`; a model with an untied decoder stays as it is.

    Raises ModelError for a decoder that config.json ties to a table with other values.
    """
    if not model.config.tie_word_embeddings:
        return
    decoder = model.get_output_embeddings()
    if decoder.weight is not model.get_input_embeddings().weight and not decoder.weight.is_meta:
        raise ModelError(
            f"{source}: config.json ties the decoder to the table of words, and the checkpoint's decoder has "
            "other values",
            fix="set tie_word_embeddings to false in config.json",
        )
    bias, decoder.bias = decoder.bias, None
    for module in model.modules():  # BERT and RoBERTa have the bias beside the decoder as well
        if module.__dict__.get("_parameters", {}).get("bias") is bias:
            module.bias = None
    model.output_bias = nn.Parameter(bias.detach().clone())
    model.register_forward_hook(_add_bias)


def _add_bias(model: nn.Module, inputs: Any, output: Any) -> Any:
    output.logits = output.logits + model.output_bias
    return output


def tie_decoder(model: PreTrainedModel) -> None:
    """Share a float table with a float decoder; quantized layers share by themselves."""
    table, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    if (
        model.config.tie_word_embeddings
        and isinstance(table, nn.Embedding)
        and isinstance(decoder, nn.Linear)
    ):
        decoder.weight = table.weight
