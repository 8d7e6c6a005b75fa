"""One file per family, and the only door to transformers. `FAMILIES` is the table of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qcompress.models import gpt2
from qcompress.models.architecture import Architecture, read_config, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAMILIES = {"gpt2": gpt2}
"""Family name -> module with `describe`, `load_float`, `attach`, `decode`..."""


def describe(family: str, directory: Path) -> Architecture:
    """The architecture of a checkpoint, from config.json and the safetensors header alone."""
    return FAMILIES[family].describe(read_config(directory), read_tensors(directory))


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, from local files, without running code of the checkpoint."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
