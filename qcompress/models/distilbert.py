"""DistilBERT: an encoder of text, without token types and pooler."""

from __future__ import annotations

from qcompress.models.encoder import CAUSAL, TASKS, Encoder
from qcompress.models.hf_loader import Stock

__all__ = ["CAUSAL", "TASKS"]

NAMES = Encoder(
    family="distilbert",
    title="DistilBert",
    width="dim",
    heads="n_heads",
    blocks="n_layers",
    inner="hidden_dim",
    types=False,
    type_table=False,
    stack="transformer.layer",
    attention="attention",
    operands=("q_lin", "k_lin", "v_lin"),
    output="attention.out_lin",
    norms=("sa_layer_norm", "output_layer_norm"),
    linears=("ffn.lin1", "ffn.lin2"),
    additions=("attention_", "ffn_"),
    masked=("vocab_transform", "vocab_layer_norm", "vocab_projector"),
    head={
        "question-answering": ("qa_outputs",),
        "sequence-classification": ("pre_classifier", "classifier"),
        "token-classification": ("classifier",),
    },
)
STOCK = Stock(NAMES)

INPUTS = NAMES.inputs
describe, task_config, DEPTH = NAMES.describe, NAMES.task_config, NAMES.depth
positions, signature = NAMES.positions, NAMES.signature
load_float, empty, tie = STOCK.load_float, STOCK.empty, STOCK.tie
graph_inputs, install_points = STOCK.graph_inputs, STOCK.install_points
