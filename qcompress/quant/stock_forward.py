"""The forward of a stock module, run with other tensors in the place of its own.

A norm or an embedding may compute more than its torch base class: RMSNorm, Gemma's 1 + weight, BART's scaled
embedding, OPT's positions with an offset. Its own code stays the only statement of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class StockForward(nn.Module):
    """Base class of modules that replace a stock module and run its forward.

    The stock module is not registered: its parameters and buffers are those of the replacement, under the
    names that they had.
    """

    def hold(self, stock: nn.Module) -> None:
        """Keep a stock module, and register its buffers."""
        self._stock = (stock,)  # a tuple, so that torch registers no submodule
        for name, buffer in stock.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name in stock.state_dict())

    @property
    def stock(self) -> nn.Module:
        """The stock module; its tensors may be unset, or on another device."""
        return self._stock[0]

    def run_stock(self, tensors: Mapping[str, Tensor], *arguments: Any, **named: Any) -> Any:
        """Run the stock forward with `tensors`, by parameter name, and with the buffers of this module."""
        if self.stock.training != self.training:
            self.stock.train(self.training)
        buffers = {name: getattr(self, name) for name, _ in self.stock.named_buffers(recurse=False)}
        return torch.func.functional_call(self.stock, {**buffers, **tensors}, arguments, named)
