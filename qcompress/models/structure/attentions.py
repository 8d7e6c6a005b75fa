"""Modules that call the attention interface of transformers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

Sizes = tuple[int, int]
"""Key/value heads, and width of a head."""


def find_attentions(model: nn.Module, run: Callable[[], Any]) -> dict[str, Sizes]:
    """Attention modules in call order, with key/value heads and width. `run` calls the model.

    Every attention function that transformers can look up is replaced by an observer during one run; the
    results of that run are not used. A model that loaded nothing of transformers has no such module.
    """
    if "transformers.modeling_utils" not in sys.modules:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    sizes: dict[str, Sizes] = {}

    def observe(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **keywords: Any
    ) -> tuple[Tensor, None]:
        if id(module) in names:
            sizes.setdefault(names[id(module)], (key.shape[1], key.shape[-1]))
        batch, heads, length, _ = query.shape
        return query.new_zeros(batch, length, heads, value.shape[-1]), None

    with _replaced(observe):
        run()
    return sizes


@contextlib.contextmanager
def _replaced(function: Callable[..., Any]) -> Iterator[None]:
    """Replace all attention functions, eager ones included, and restore them."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    before = {name: FUNCTIONS.get(name) for name in ("eager", *FUNCTIONS.keys())}
    for name in before:
        FUNCTIONS[name] = function
    try:
        yield
    finally:
        for name, stock in before.items():
            del FUNCTIONS[name]  # an entry of this object hides the one that all share
            if stock is not None and (name not in FUNCTIONS or FUNCTIONS[name] is not stock):
                FUNCTIONS[name] = stock
