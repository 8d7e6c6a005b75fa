"""Weight quantizers by kind of weight format: the trainable one, and the frozen one of the trained artifact.

A kind of format is a class of `schema/formats.py`. Training, the trained artifact and the report build their
weight quantizers here and do not switch on formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from qcompress.quant.affine import Grid
from qcompress.quant.codebook import PARTS, CodebookWeight, FrozenCodebook
from qcompress.quant.quantizers import WEIGHT_QUANTIZERS, FrozenWeight
from qcompress.quant.weight_quantizer import CodedWeight
from qcompress.schema.custom import class_of
from qcompress.schema.formats import AnyWeightFormat, CodebookFormat, WeightFormat
from qcompress.schema.quantizers import Codebook, Noise, WeightQuantizer


class FormatQuantizers(Protocol):
    """Weight quantizers of one kind of format."""

    parts: tuple[str, ...]
    """Tensors of a quantizer in trained.safetensors, called `<layer>.weight.<part>`."""

    def trainable(
        self, options: WeightQuantizer | Codebook, form: AnyWeightFormat, axis: int,
        shape: torch.Size, noise: Noise | None,
    ) -> CodedWeight:  # fmt: skip
        """Build the trainable quantizer of a weight [shape], whose output channels lie along `axis`."""

    def frozen(self, parts: Mapping[str, Tensor | None], form: AnyWeightFormat, axis: int) -> CodedWeight:
        """Build the quantizer after training from its tensors by part; absent parts are None."""


class IntegerQuantizers:
    """Quantizers `minmax`, `lsq`, `ternary` and custom ones, for integer formats."""

    parts = ("scale", "threshold")

    def trainable(self, options, form, axis, shape, noise) -> CodedWeight:
        """Build the class of the quantizer's name."""
        kind = class_of("quantizer", options.name, WEIGHT_QUANTIZERS)
        return kind(options, _grid(form, axis), form.bounds, shape)

    def frozen(self, parts, form, axis) -> FrozenWeight:
        """Build a FrozenWeight."""
        return FrozenWeight(parts["scale"], _grid(form, axis), form.bounds, parts["threshold"])


class CodebookQuantizers:
    """Quantizer `codebook`, for codebook formats."""

    parts = PARTS

    def trainable(self, options, form, axis, shape, noise) -> CodebookWeight:
        """Build a CodebookWeight; with noise of the form `round` it estimates centroids while it is float."""
        estimates = noise is not None and noise.form == "round"
        return CodebookWeight(options, form, axis, shape, estimates)

    def frozen(self, parts, form, axis) -> FrozenCodebook:
        """Build a FrozenCodebook."""
        return FrozenCodebook(*(parts[part] for part in PARTS), axis)


def _grid(form: WeightFormat, axis: int) -> Grid:
    return Grid(axis, form.scale_block, form.granularity)


FORMAT_QUANTIZERS: dict[type[AnyWeightFormat], FormatQuantizers] = {
    WeightFormat: IntegerQuantizers(),
    CodebookFormat: CodebookQuantizers(),
}


def quantizers_of(form: AnyWeightFormat) -> FormatQuantizers:
    """Return the quantizers of a format's kind."""
    return FORMAT_QUANTIZERS[type(form)]
