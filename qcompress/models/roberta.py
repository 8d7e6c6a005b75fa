"""RoBERTa: an encoder of text, without token types, with a head of two layers."""

from __future__ import annotations

from qcompress.models.encoder import CAUSAL, TASKS, Encoder
from qcompress.models.hf_loader import Stock

__all__ = ["CAUSAL", "TASKS"]

NAMES = Encoder(
    family="roberta",
    title="Roberta",
    width="hidden_size",
    heads="num_attention_heads",
    blocks="num_hidden_layers",
    inner="intermediate_size",
    types=False,
    type_table=True,
    stack="encoder.layer",
    attention="attention.self",
    operands=("query", "key", "value"),
    output="attention.output.dense",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    linears=("intermediate.dense", "output.dense"),
    additions=("attention.output.", "output."),
    masked=("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
    head={
        "question-answering": ("qa_outputs",),
        "sequence-classification": ("classifier.dense", "classifier.out_proj"),
        "token-classification": ("classifier",),
    },
    padding=1,
)
STOCK = Stock(NAMES)

INPUTS = NAMES.inputs
describe, task_config, DEPTH = NAMES.describe, NAMES.task_config, NAMES.depth
positions, signature = NAMES.positions, NAMES.signature
load_float, empty, tie = STOCK.load_float, STOCK.empty, STOCK.tie
graph_inputs, install_points = STOCK.graph_inputs, STOCK.install_points
