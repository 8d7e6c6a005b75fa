"""One pretrained BERT in the layouts of three families: the same numbers under other names.

RoBERTa has no token types, and its first row of positions belongs to the padding; DistilBERT has no token
types and no pooler. The token type of a single sentence goes into the positions, so that both compute what
the BERT computes (`tests/test_matrix.py`).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, cat, zeros

FAMILIES = ("bert", "roberta", "distilbert")

DISTILBERT = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
"""Parts of a layer, the longest first."""


def lay_out(source: Path, family: str, out: Path) -> Path:
    """Write the checkpoint `source` (a BertModel without a head) for a family; returns `out`."""
    if family == "bert":
        return source
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(source / "model.safetensors")
    tensors.pop("embeddings.position_ids", None)
    made, settings = {"roberta": _roberta, "distilbert": _distilbert}[family](tensors, config)
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(settings, indent=1, sort_keys=True), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copyfile(source / name, out / name)
    return out


def _positions(tensors: dict[str, Tensor]) -> Tensor:
    types = tensors.pop("embeddings.token_type_embeddings.weight")
    return tensors.pop("embeddings.position_embeddings.weight") + types[0]


def _roberta(tensors: dict[str, Tensor], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    padding, width = config["pad_token_id"], config["hidden_size"]
    table = cat([zeros(padding + 1, width), _positions(tensors)])
    pooler = {name: tensors.pop(name) for name in list(tensors) if name.startswith("pooler.")}
    made = {f"roberta.{name}": tensor for name, tensor in tensors.items()}
    made["roberta.embeddings.position_embeddings.weight"] = table
    made["roberta.embeddings.token_type_embeddings.weight"] = zeros(1, width)
    # RoBERTa's head begins with what BERT's pooler is: a square layer and tanh on the first token
    made |= {name.replace("pooler.dense", "classifier.dense"): tensor for name, tensor in pooler.items()}
    settings = {key: value for key, value in config.items() if key not in ("_name_or_path", "architectures")}
    settings |= {"model_type": "roberta", "type_vocab_size": 1, "max_position_embeddings": len(table)}
    return made, settings


def _distilbert(
    tensors: dict[str, Tensor], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    table = _positions(tensors)
    made = {"distilbert.embeddings.position_embeddings.weight": table}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name):
            made[f"distilbert.transformer.layer.{found[1]}.{DISTILBERT[found[2]]}.{found[3]}"] = tensor
        elif name.startswith("embeddings."):
            made[f"distilbert.{name}"] = tensor
    settings = {
        "model_type": "distilbert",
        "activation": config["hidden_act"],
        "dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_layers": config["num_hidden_layers"],
        "max_position_embeddings": len(table),
        "vocab_size": config["vocab_size"],
        "pad_token_id": config["pad_token_id"],
    }
    return made, settings
