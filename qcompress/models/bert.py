"""BERT and its smaller relatives (MiniLM): an encoder of text, with token types and a pooler."""

from __future__ import annotations

from qcompress.models.encoder import CAUSAL, TASKS, Encoder
from qcompress.models.hf_loader import Stock

__all__ = ["CAUSAL", "TASKS"]

NAMES = Encoder(
    family="bert",
    title="Bert",
    width="hidden_size",
    heads="num_attention_heads",
    blocks="num_hidden_layers",
    inner="intermediate_size",
    types=True,
    type_table=True,
    stack="encoder.layer",
    attention="attention.self",
    operands=("query", "key", "value"),
    output="attention.output.dense",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    linears=("intermediate.dense", "output.dense"),
    additions=("attention.output.", "output."),
    masked=(
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
    ),  # fmt: skip
    head={
        "question-answering": ("qa_outputs",),
        "sequence-classification": ("bert.pooler.dense", "classifier"),
        "token-classification": ("classifier",),
    },
)
STOCK = Stock(NAMES)

INPUTS = NAMES.inputs
describe, task_config, DEPTH = NAMES.describe, NAMES.task_config, NAMES.depth
positions, signature = NAMES.positions, NAMES.signature
load_float, empty, tie = STOCK.load_float, STOCK.empty, STOCK.tie
graph_inputs, install_points = STOCK.graph_inputs, STOCK.install_points
