"""A weight that is looked up, after folding: indices, and a table of floats or of int8 codes.

The ONNX form is Cast -> Gather -> Transpose -> Reshape (a matmul's weight, [in, out]) and Cast -> Gather ->
Gather -> Reshape (rows of a table); a convolution's weight is Cast -> Gather -> Reshape. An exporter folds
constants, and would put the decoded weight into the file: the look-up is one node of a private domain
while exporting; `encodings/lookup_nodes.py` replaces it after the last optimizer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.quant.codebook import from_vectors
from qcompress.quant.folded import onnx_node

LOOKUP = "qcompress::Lookup"
"""The node that stands for a look-up: inputs indices and table, attribute `axis`; with ids, their rows."""


class FoldedCodebook(nn.Module):
    """Indices uint8, [in / block, out] (axis 1) or [rows, width / block] (axis 0), and a table [k, block].
    `kernel`: shape of the weight of a convolution, whose rows are its output channels.
    """

    def __init__(
        self, assignments: Tensor, centroids: Tensor, scale: Tensor | None, axis: int,
        kernel: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.axis, self.kernel = axis, kernel
        self.register_buffer("assignments", assignments)
        self.register_buffer("centroids", centroids)
        self.register_buffer("scale", scale)

    def table(self) -> Tensor:
        """The centroids as floats; of int8 codes one DequantizeLinear node while exporting."""
        if self.scale is None:
            return self.centroids
        if torch.onnx.is_in_onnx_export():
            inputs = (self.centroids, self.scale)
            return onnx_node("DequantizeLinear", inputs, self.scale.dtype, self.centroids.shape)
        return self.centroids.to(self.scale.dtype) * self.scale

    def decoded(self, zero_point: bool = True) -> Tensor:
        """The weight, [in, out], [rows, width] or a kernel; there is no zero point."""
        table = self.table()
        if not torch.onnx.is_in_onnx_export():
            weight = from_vectors(F.embedding(self.assignments.int(), table), self.axis)
            return weight if self.kernel is None else weight.view(self.kernel)
        shape = list(self.assignments.shape)
        shape[1 - self.axis] *= table.shape[1]
        return self._node((self.assignments, table), torch.Size(self.kernel or shape))

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of a table, [..., width], without decoding the others."""
        table = self.table()
        if not torch.onnx.is_in_onnx_export():
            return F.embedding(F.embedding(ids, self.assignments.int()), table).flatten(-2)
        shape = torch.Size((*ids.shape, self.assignments.shape[1] * table.shape[1]))
        return self._node((self.assignments, table, ids), shape)

    def _node(self, inputs: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
        return onnx_node(LOOKUP, inputs, inputs[1].dtype, shape, {"axis": self.axis}, version=1)
