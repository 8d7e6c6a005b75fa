"""Pooling of a text's embedding: values of a task, of a config.json, and of sentence-transformers' files. No
torch; `text_embedder.py` computes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcompress.errors import ModelError
from qcompress.models.architecture import Head
from qcompress.models.config_checks import HeadError
from qcompress.system.untrusted_file import demand_file

KEY = "text_embedding"
"""Key of a task model's config.json: {"pooling", "normalize"}."""

MODULES = "modules.json"
"""sentence-transformers' list of the modules after each other."""

POOLING_FILE = "1_Pooling/config.json"

POOLING_FILES = (MODULES, POOLING_FILE)

MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last-token",
}
"""Flags of sentence-transformers' pooling that are supported, and the words of a recipe."""

WORDS = {"mean": "mean", "cls": "cls", "lasttoken": "last-token"}
"""Values of `pooling_mode`, which newer versions of sentence-transformers write."""

SAY_IT = "write `pooling: mean` (or cls, last-token) and `normalize: true` (or false) under `task`"


@dataclass(frozen=True)
class EmbeddingHead(Head):
    """End of a model that gives one embedding to each text. None: as the checkpoint says."""

    pooling: str | None = None
    normalize: bool | None = None


def output_name(config: dict[str, Any]) -> str:
    """Name of the graph's output; `config` is the task model's config.json."""
    return "embeddings" if KEY in config else "logits"


def settled_head(head: Head, directory: Path, config: dict[str, Any]) -> Head:
    """Head with pooling and normalization; other heads are returned unchanged. Values of the task come first,
    then those of `config` (of an earlier run), then those of sentence-transformers' files in `directory`.

    Raises HeadError without any, and for a pooling or a module that is not supported.
    """
    if not isinstance(head, EmbeddingHead) or None not in (head.pooling, head.normalize):
        return head
    known = config[KEY] if KEY in config else pooling_of(directory)
    if known is None:
        lacking = "pooling" if head.pooling is None else "normalize"
        raise HeadError(
            f"`{lacking}` is not given, and {directory} has no {POOLING_FILE} of sentence-transformers",
            fix=SAY_IT,
            key=("task", lacking),
        )
    return replace(
        head,
        pooling=head.pooling or known["pooling"],
        normalize=known["normalize"] if head.normalize is None else head.normalize,
    )


def pooling_of(directory: Path) -> dict[str, Any] | None:
    """Values of sentence-transformers' files as {"pooling", "normalize"}; None without a pooling file.

    Raises HeadError for files that ask for another pooling, or for a module after it.
    """
    if not (directory / POOLING_FILE).is_file():
        return None
    return {"pooling": _pooling(directory), "normalize": _normalizes(directory)}


def _pooling(directory: Path) -> str:
    values = _read(directory / POOLING_FILE)
    if not isinstance(values, dict):
        raise _unread(directory / POOLING_FILE, "not a JSON object")
    word = values.get("pooling_mode")
    asked = [word] if word else [flag for flag in values if flag.startswith("pooling_mode_") and values[flag]]
    known = WORDS | MODES
    if len(asked) != 1 or not isinstance(asked[0], str) or asked[0] not in known:
        shown = ", ".join(map(str, asked)) or "no mode"
        message = (
            f"{directory / POOLING_FILE} asks for {shown:.120}, and one of {', '.join(known)} can be had"
        )
        raise HeadError(message, fix=SAY_IT, key=("task", "pooling"))
    return known[asked[0]]


def _normalizes(directory: Path) -> bool:
    """True if modules.json ends with a normalization."""
    if not (directory / MODULES).is_file():
        return False
    modules = _read(directory / MODULES)
    if not isinstance(modules, list) or not all(isinstance(item, dict) for item in modules):
        raise _unread(directory / MODULES, "not a list of modules")
    kinds = [str(item.get("type")).rpartition(".")[2] for item in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        message = f"{directory / MODULES} lists {', '.join(kinds):.120}, and Transformer, Pooling can be had"
        raise HeadError(f"{message}, with or without Normalize", fix=SAY_IT, key=("task", "normalize"))
    return kinds[2:] == ["Normalize"]


def _read(file: Path) -> Any:
    try:
        return json.loads(demand_file(file).read_bytes())
    except (ValueError, RecursionError) as error:
        raise _unread(file, f"not JSON ({error})") from None


def _unread(file: Path, why: str) -> ModelError:
    return ModelError(f"{file} is {why:.200}", fix="copy it again from the checkpoint")
