"""The interface of an encoding, the result of its certificate, and a weight that it finds in a graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from qcompress.schema.formats import AnyWeightFormat

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from onnx import NodeProto
    from torch import Tensor, dtype, nn

    from qcompress.graph.view import View
    from qcompress.models.architecture import Layer
    from qcompress.models.plan import LayerPlan
    from qcompress.quant.layers import QuantizedWeight


@dataclass(frozen=True)
class Certified:
    """Result of comparing one weight of an ONNX file bit for bit with the folded weight."""

    codes_equal: bool
    """True if the integers, and the centroid table of a codebook, are equal."""
    scales_equal: bool
    sources: list[str]
    """Graph values that hold the decoded weight."""
    reasons: list[str]
    """One sentence per difference; empty for a weight that passed."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One decoding of a weight, as an encoding finds it in a graph of any origin: a weight that two nodes
    decode is found twice. `information_bits` and `decoded` read tensors, everything else does not.
    """

    view: View = field(repr=False)
    name: str
    """Initializer of the codes, or of the floats that the graph itself quantizes."""
    source: str
    """Initializer that `node` reads: `name`, or the table of a codebook."""
    node: NodeProto = field(repr=False)
    """First node that decodes the weight."""

    integers = False
    """True if weight = code * scale, so that a runtime may multiply the codes."""
    indices = False
    """True if the codes are indices that Gather reads."""

    @property
    def code_type(self) -> str:
        """ONNX word of the codes' type, such as INT4; empty if unknown."""
        return self.view.word(self.name)

    @property
    def block(self) -> int:
        """Number of weights that share a scale or an index; 0 if it is not fixed."""
        raise NotImplementedError

    @property
    def granularity(self) -> str:
        """`tensor`, `channel`, `block N` or `vectors of N`; empty if unknown."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded weight."""
        raise NotImplementedError

    @property
    def stored_as(self) -> str:
        """Element type in the file, such as `int4` or `uint8 into fp32`."""
        return self.view.label(self.name)

    @property
    def stored_bits(self) -> float:
        """Bits per weight in the file, without scales and tables."""
        return self.view.bits(self.name)

    def parts(self) -> Iterator[str]:
        """Yield the names of the weight's tensors: codes, scales, zero points, bounds, centroids."""
        raise NotImplementedError

    def readers(self) -> Iterator[NodeProto]:
        """Yield the nodes that compute with the decoded weight, directly or behind MOVES."""
        raise NotImplementedError

    def information_bits(self) -> float:
        """Return the bits per weight that the codes need."""
        raise NotImplementedError

    def decoded(self, most: int) -> Iterator[np.ndarray]:
        """Yield the decoded values, fp32, of whole rows with about `most` elements in all. A float weight
        that the graph quantizes is also yielded as it is stored. Yields nothing if a tensor is missing.
        """
        raise NotImplementedError


def rows_of(most: int, width: int) -> int:
    """Number of rows of `width` elements that have about `most` elements, at least 1."""
    return max(1, most // max(1, width))


def level_bits(levels: int) -> float:
    """Bits of a code with `levels` values: ceil(log2(levels)), at least 1, and log2(3) for three.

    >>> [level_bits(levels) for levels in (1, 2, 4, 15)]
    [1, 1, 2, 4]
    """
    return math.log2(3) if levels == 3 else max((levels - 1).bit_length(), 1)


class Encoding(Protocol):
    """Storage of a weight in folded.safetensors and model.onnx."""

    name: str
    parts: tuple[str, ...]
    """Tensor names in folded.safetensors after `<layer>.weight.`; the integers come first."""
    initializers: tuple[str, ...]
    """Names of the initializers in model.onnx after `<layer>.weight.`; a part may be absent."""

    def holds(self, form: AnyWeightFormat) -> bool:
        """True if this encoding stores weights of `form`."""

    def fold(self, layer: QuantizedWeight, item: LayerPlan) -> dict[str, Tensor]:
        """Return the tensors of a trained layer's weight by part. Raises ContractError for codes outside the
        format.

        Shapes: linear layer [in, out], embedding table [rows, width], kernel [out, in / groups, h, w].
        """

    def decoder(self, parts: Mapping[str, Tensor | None], item: LayerPlan, compute: dtype) -> nn.Module:
        """Build the module that decodes the weight: `decoded()` and, for a table, `rows(ids)`. Torch computes
        the same values as a runtime; the exporter writes the ONNX nodes.
        """

    def pack(self, initializers: Mapping[str, ir.Value], owner: str, form: AnyWeightFormat) -> None:
        """Convert the initializers of a weight to their types in the ONNX file, in place."""

    def lower(self, model: ir.Model) -> None:
        """Replace this encoding's placeholder nodes by ONNX nodes, in place."""

    def certify(self, view: View, tensors: Any, item: LayerPlan) -> Certified:
        """Compare a weight in a graph with `tensors`, the content of folded.safetensors."""

    def sources(self, view: View, owner: str) -> list[str]:
        """Return the graph values that hold the weight of layer `owner`, decoded for a matmul."""

    def find(self, view: View) -> Iterator[Stored]:
        """Yield the weights that a graph of any origin stores in this encoding, in the order of its nodes.
        Weights are recognised by structure, not by name.
        """

    def stored_bytes(self, layer: Layer, form: AnyWeightFormat, float_bytes: int) -> int:
        """Bytes of a weight in the ONNX file; `float_bytes`: bytes per element of the compute type."""


def is_turned(layer: QuantizedWeight) -> bool:
    """True if `layer` is a linear layer with an [out, in] weight, which must be transposed to [in, out]."""
    from qcompress.quant.layers import QuantizedLinear

    return isinstance(layer, QuantizedLinear) and layer.channel_axis == 0
