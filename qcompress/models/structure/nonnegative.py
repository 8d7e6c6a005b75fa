"""Tensors that are never negative, by the operations that made them rather than by their values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MAKERS = frozenset({
    "relu", "relu_", "relu6", "sigmoid", "sigmoid_", "hardsigmoid", "softmax", "softplus", "abs", "square",
})  # fmt: skip
"""Operations whose result is never negative, whatever they read."""

KEEPERS = frozenset({
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "mean", "amax", "flatten", "reshape", "view", "permute",
    "transpose", "contiguous", "squeeze", "unsqueeze", "clone", "dropout", "__getitem__", "chunk", "split",
    "to", "float", "type_as",
})  # fmt: skip
"""Operations whose results are never negative if their first argument is not."""

COMBINERS = frozenset({"add", "add_", "__iadd__", "mul", "mul_", "__imul__", "cat", "concat"})
"""Operations whose result is never negative if none of their arguments is."""

CLAMPS = {"hardtanh": "min_val", "hardtanh_": "min_val", "clamp": "min", "clamp_": "min",
          "clamp_min": "min", "clamp_min_": "min"}  # fmt: skip
"""Operations with a lower limit, their second argument, and its keyword."""


class Nonnegative:
    """Record of the tensors that are known to be never negative, updated operation by operation."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        """Id of a tensor -> the tensor, and the address of its storage."""

    def holds(self, tensor: object) -> bool:
        """True for a tensor that is known to be never negative."""
        known = self._known.get(id(tensor))
        return known is not None and known[0]() is tensor

    def observe(
        self, function: Callable[..., Any], args: Sequence[Any], keywords: Mapping[str, Any], result: Any
    ) -> None:
        """Record an operation that has run."""
        name, first = getattr(function, "__name__", ""), args[0] if args else None
        kept = self._keeps(name, args, keywords)
        if isinstance(first, Tensor) and not kept and (result is first or name == "__setitem__"):
            self._forget(first)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if kept and isinstance(tensor, Tensor):
                self._known[id(tensor)] = weakref.ref(tensor), tensor.untyped_storage().data_ptr()
            elif self.holds(tensor) and tensor is not first:
                del self._known[id(tensor)]

    def _keeps(self, name: str, args: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
        if name in MAKERS:
            return True
        if name in CLAMPS:
            limit = args[1] if len(args) > 1 else keywords.get(CLAMPS[name])
            return isinstance(limit, int | float) and limit >= 0
        if name in COMBINERS and "alpha" not in keywords:
            terms = args[0] if name in ("cat", "concat") and args else args[:2]
            return bool(terms) and all(self._is_term(term) for term in terms)
        if name == "pad":
            mode, value = _argument(args, keywords, 2, "mode"), _argument(args, keywords, 3, "value")
            return (
                bool(args)
                and self.holds(args[0])
                and ((mode or "constant") != "constant" or (value or 0) >= 0)
            )
        return name in KEEPERS and bool(args) and self.holds(args[0])

    def _is_term(self, term: object) -> bool:
        return term >= 0 if isinstance(term, int | float) else self.holds(term)

    def _forget(self, changed: Tensor) -> None:
        """Forget a tensor that an operation in place has changed, and all views of its storage."""
        storage = changed.untyped_storage().data_ptr()
        self._known = {key: known for key, known in self._known.items() if known[1] != storage}


def _argument(args: Sequence[Any], keywords: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else keywords.get(name)


def first_tensor(args: Sequence[Any], keywords: Mapping[str, Any]) -> torch.Tensor | None:
    """The first argument of a module's forward that is a tensor."""
    return next((value for value in (*args, *keywords.values()) if isinstance(value, Tensor)), None)
