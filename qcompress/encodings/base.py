"""The interface of an encoding, and the result of its certificate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qcompress.schema.formats import CodebookFormat, WeightFormat

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor, dtype, nn

    from qcompress.graph.certificate.edges import Graph
    from qcompress.models.architecture import Layer
    from qcompress.models.plan import LayerPlan
    from qcompress.quant.layers import QuantizedWeight

Form = WeightFormat | CodebookFormat


@dataclass(frozen=True)
class Certified:
    """One weight in an ONNX file, compared bit for bit with the folded one."""

    codes_equal: bool
    """The integers, and a table of centroids."""
    scales_equal: bool
    sources: list[str]
    """Values of the graph that the decoded weight comes out of."""
    reasons: list[str]
    """One sentence a difference; empty for a weight that passed."""


class Encoding(Protocol):
    """One way of storing a weight."""

    name: str
    parts: tuple[str, ...]
    """Names of its tensors in folded.safetensors after `<layer>.weight.`; the integers come first."""
    integers: bool
    """Its codes are multiples of a scale: batch norms fold into them, and runtimes multiply them."""

    def holds(self, form: Form) -> bool:
        """True for the formats that this encoding stores."""

    def fold(self, layer: QuantizedWeight, item: LayerPlan) -> dict[str, Tensor]:
        """Tensors of a trained layer's weight by part. Raises ContractError for codes outside the format.

        Layout: [in, out] of a linear layer, [rows, width] of a table, [out, in / groups, h, w] of a kernel.
        """

    def decoder(self, parts: Mapping[str, Tensor | None], item: LayerPlan, compute: dtype) -> nn.Module:
        """The weight as a module with `decoded()` and, of a table, `rows(ids)`: torch computes the values
        that a runtime decodes, and the exporter writes the nodes.
        """

    def pack(self, initializers: Mapping[str, ir.Value], owner: str, form: Form) -> None:
        """Give the initializers of a weight the types of the file, in place."""

    def lower(self, model: ir.Model) -> None:
        """Replace the nodes that stood for this encoding while exporting by those of ONNX, in place."""

    def certify(self, graph: Graph, tensors: Any, item: LayerPlan) -> Certified:
        """Compare a weight in a graph with `tensors`, those of folded.safetensors."""

    def sources(self, graph: Graph, owner: str) -> list[str]:
        """Values of a graph that the weight `owner`, decoded for a matmul, comes out of."""

    def stored_bytes(self, layer: Layer, form: Form, float_bytes: int) -> int:
        """Bytes of a weight in the ONNX file; `float_bytes`: those of a number of the compute type."""


def is_turned(layer: QuantizedWeight) -> bool:
    """True for a linear layer that trains as [out, in]: its weight is stored [in, out]."""
    from qcompress.quant.layers import QuantizedLinear

    return isinstance(layer, QuantizedLinear) and layer.channel_axis == 0
