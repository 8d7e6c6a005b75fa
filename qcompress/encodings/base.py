"""The interface of an encoding, and the result of its certificate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qcompress.schema.formats import CodebookFormat, WeightFormat

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor, dtype, nn

    from qcompress.graph.view import View
    from qcompress.models.architecture import Layer
    from qcompress.models.plan import LayerPlan
    from qcompress.quant.layers import QuantizedWeight

Form = WeightFormat | CodebookFormat


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


class Encoding(Protocol):
    """Storage of a weight in folded.safetensors and model.onnx."""

    name: str
    parts: tuple[str, ...]
    """Tensor names in folded.safetensors after `<layer>.weight.`; the integers come first."""
    integers: bool
    """True if weight = code * scale: batch norms fold into the scales, and runtimes multiply the codes."""

    def holds(self, form: Form) -> bool:
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

    def pack(self, initializers: Mapping[str, ir.Value], owner: str, form: Form) -> None:
        """Convert the initializers of a weight to their types in the ONNX file, in place."""

    def lower(self, model: ir.Model) -> None:
        """Replace this encoding's placeholder nodes by ONNX nodes, in place."""

    def certify(self, view: View, tensors: Any, item: LayerPlan) -> Certified:
        """Compare a weight in a graph with `tensors`, the content of folded.safetensors."""

    def sources(self, view: View, owner: str) -> list[str]:
        """Return the graph values that hold the weight of layer `owner`, decoded for a matmul."""

    def stored_bytes(self, layer: Layer, form: Form, float_bytes: int) -> int:
        """Bytes of a weight in the ONNX file; `float_bytes`: bytes per element of the compute type."""


def is_turned(layer: QuantizedWeight) -> bool:
    """True if `layer` is a linear layer with an [out, in] weight, which must be transposed to [in, out]."""
    from qcompress.quant.layers import QuantizedLinear

    return isinstance(layer, QuantizedLinear) and layer.channel_axis == 0
