"""Decoders that continue text: Llama, Qwen, Gemma, Mistral, Phi, SmolLM, OLMo, OPT, GPT-NeoX, Falcon and any
other architecture of transformers' AutoModelForCausalLM, discovered.
"""

from __future__ import annotations

from qcompress.models.auto_family import AutoFamily
from qcompress.models.gpt2 import graph_inputs

__all__ = ["graph_inputs"]

DECODER = AutoFamily(
    family="decoder",
    autos={"causal-lm": "AutoModelForCausalLM"},
    inputs=("input_ids", "attention_mask", "position_ids"),
)

TASKS, INPUTS = tuple(DECODER.autos), DECODER.inputs

DEPTH = None
"""Blocks may differ: `model.blocks` and layer drop do not apply."""

CAUSAL = True
"""A token attends only to earlier tokens and itself."""

describe, task_config, signature = DECODER.describe, DECODER.task_config, DECODER.signature
load_float, empty, tie = DECODER.load_float, DECODER.empty, DECODER.tie
install_points, shorten, cache_layout = DECODER.install_points, DECODER.shorten, DECODER.cache_layout
