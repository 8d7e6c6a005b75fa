"""One answer from the newest artifact of a run: greedy continuation of a text on ONNX Runtime.

Without a key-value cache the whole prefix runs again for every token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qcompress.errors import UsageError
from qcompress.models import load_tokenizer
from qcompress.runners import OnnxRunner
from qcompress.schema import CausalLm

if TYPE_CHECKING:
    from qcompress.api import LoadedRun


def continue_text(run: LoadedRun, text: str, tokens: int) -> str:
    """The text with `tokens` more tokens, or fewer where the model ends it; the context bounds its length."""
    if not isinstance(run.recipe.task, CausalLm):
        raise UsageError(
            f"only a model of the task causal-lm continues a text, and this one is of {run.recipe.task.name}",
            fix="measure it with `qcompress verify`, or run model.onnx with onnxruntime",
        )
    tokenizer = load_tokenizer(run.path)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    context = run.recipe.task.context
    if not ids:
        raise UsageError("the text has no tokens", fix="give at least one word")
    if len(ids) + tokens > context:
        raise UsageError(
            f"{len(ids)} tokens of text and {tokens} more exceed the context of {context}",
            fix="shorten the text or lower --tokens",
        )
    runner = OnnxRunner(
        run.path / "model.onnx", run.recipe.model.family, run.parity["threads"], optimized=True
    )
    for _ in range(tokens):
        array = np.array([ids], np.int64)
        ids.append(int(runner({"input_ids": array})[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids, skip_special_tokens=True)
