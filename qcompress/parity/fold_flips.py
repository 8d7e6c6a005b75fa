"""Activation codes that folding changes: the folded model against the trained one, under forced codes.

Folding a batch norm changes the order of fp32 operations (the factor is in the weight, and not behind the
sum), and a value near a rounding tie may round to the neighbouring code. One such flip changes all later
values, and a deep net amplifies it: of 685 flips in 200 images the logits of a MobileNetV2 move by a third of
the quantization error. Therefore each activation quantizer of the folded model compares its codes with the
trained model's and passes on the trained model's. Flips are then counted without their consequences, and the
distance of the logits is that of the folded arithmetic alone; a wrong scale or bias changes many codes of the
next quantizer by more than a tie.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.models import FAMILIES
from qcompress.models.plan import new_call
from qcompress.models.prepare import Prepared, replace_module
from qcompress.parity.forced_codes import Held, Inputs, Place
from qcompress.quant.affine import to_codes


class ForcedFold:
    """The trained model, and the folded one with the trained one's activation codes.

    `limit`: largest distance of a rounding tie from the middle between two codes, in steps. Consumes
    `folded`, whose quantizers are replaced, and leaves hooks on `trained`.
    """

    def __init__(self, trained: Prepared, folded: nn.Module, limit: float) -> None:
        self.trained, self.folded = trained, folded
        self._codes: Inputs = {}
        self._places: dict[str, Place] = {}
        for name, quantizer in dict(trained.activation_quantizers()).items():
            self._places[name] = Place(name, limit, rounds=True)
            quantizer.register_forward_pre_hook(self._remember(name))
            held = Held(folded.get_submodule(name), self._places[name], self._codes)
            replace_module(folded, name, held)

    @property
    def places(self) -> list[Place]:
        """Comparisons by quantization point, in execution order."""
        return [self._places[name] for name in self._codes if name in self._places]

    @torch.no_grad()
    def run(self, batch: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Update the comparisons with a batch of inputs; returns the logits of the trained and of the folded
        model, fp32.
        """
        self._codes.clear()
        inputs = FAMILIES[self.trained.family].graph_inputs(**batch)
        trained, folded = (model(**inputs).logits for model in (self.trained.model, self.folded))
        return trained.float().numpy(), folded.float().numpy()

    def _remember(self, name: str):
        def hook(quantizer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            codes = to_codes(arguments[0], quantizer.scale_of(), quantizer.bounds)
            self._codes[new_call(self._codes, name)] = codes.short().numpy()

        return hook
