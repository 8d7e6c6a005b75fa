"""One file per family, and the only door to transformers. `FAMILIES` is the table of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qcompress.models import bert, distilbert, gpt2, roberta
from qcompress.models.architecture import CAUSAL_LM, Architecture, Head, read_config, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAMILIES = {"gpt2": gpt2, "bert": bert, "roberta": roberta, "distilbert": distilbert}
"""Family name -> module with `describe`, `task_config`, `load_float`, `empty`, `tie`, `graph_inputs`,
`install_points`, `shorten`, and the constants LINEAR_AXIS, CAUSAL, INPUTS, TASKS."""


def describe(family: str, directory: Path, head: Head = CAUSAL_LM) -> Architecture:
    """The architecture of a checkpoint with a task's head, from config.json and the safetensors header
    alone.
    """
    return FAMILIES[family].describe(read_config(directory), read_tensors(directory), head)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, from local files, without running code of the checkpoint."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
