"""Number of activation codes that folding changes: the folded model against the trained one.

Folding a batch norm changes the order of fp32 operations (the factor is in the weight, and not behind the
sum), and a value near a rounding tie may round to the neighbouring code. One such flip changes all later
values, so the folded model's codes are *forced*: each activation quantizer compares its codes with the
trained model's, and passes on the trained model's. The counts are therefore the flips of each quantizer
alone, without their consequences; a wrong scale or bias changes many codes of the next quantizer.
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
    """Replacement of an activation quantizer that compares its codes with the trained model's and passes
    on the latter.
    """

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
    """Number of activation codes over some batches of inputs, and number of them that the folded model rounds
    differently. Consumes `folded`, whose quantizers are replaced.
    """
    known: dict[str, Tensor] = {}
    counts = {"codes": 0, "flipped": 0}
    quantizers = dict(trained.activation_quantizers())

    def remember(name: str):
        def hook(quantizer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            known[name] = to_codes(arguments[0], quantizer.scale_of(), quantizer.bounds)

        return hook

    handles = [quantizer.register_forward_pre_hook(remember(name)) for name, quantizer in quantizers.items()]
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
