"""How many codes folding changed: activations of the folded model against those of the trained one.

Where a batch norm is folded, fp32 sums come out another way (the factor is in the weight, and not behind the
sum), and a value that lies on a tie between two codes may round to the other one. One such flip changes all
that follows it, so the folded model is *held*: at each place it rounds, compares its codes with the trained
model's, and goes on with the trained model's. What is counted are the flips of each place, and not what they
lead to; a wrong scale or bias changes many codes of the first place behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from qcompress.models import FAMILIES
from qcompress.models.prepare import Prepared, replace_module
from qcompress.quant.affine import to_codes
from qcompress.quant.folded import Rounding


class _Held(nn.Module):
    """In the place of a rounding: compares its codes with the trained model's, and goes on with those."""

    def __init__(
        self, rounding: Rounding, name: str, known: Mapping[str, Tensor], counts: dict[str, int]
    ) -> None:
        super().__init__()
        self.rounding, self.name, self.known, self.counts = rounding, name, known, counts

    def forward(self, x: Tensor) -> Tensor:
        codes = self.known[self.name]
        self.counts["codes"] += codes.numel()
        self.counts["flipped"] += int((self.rounding.codes(x) != codes).sum())
        return codes.to(x.dtype) * self.rounding.scale


@torch.no_grad()
def count_flips(
    trained: Prepared, folded: nn.Module, batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, int]:
    """Codes of activations over some batches of inputs, and how many of them the folded model rounds
    differently. `folded` is spent afterwards.
    """
    known: dict[str, Tensor] = {}
    counts = {"codes": 0, "flipped": 0}
    quantizers = dict(trained.activation_quantizers())

    def remember(name: str):
        def hook(quantizer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            known[name] = to_codes(arguments[0], quantizer.scale_of(), quantizer.bounds)

        return hook

    handles = [one.register_forward_pre_hook(remember(name)) for name, one in quantizers.items()]
    for name in quantizers:
        replace_module(folded, name, _Held(folded.get_submodule(name), name, known, counts))
    complete = FAMILIES[trained.family].graph_inputs
    try:
        for batch in batches:
            trained.model(**complete(**batch))
            folded(**complete(**batch))
    finally:
        for handle in handles:
            handle.remove()
    return counts
