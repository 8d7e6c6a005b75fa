"""Folded codebook weight: uint8 indices and a table of floats or of int8 codes.

The ONNX form is Cast -> Gather -> Transpose -> Reshape (a matmul's weight, [in, out]) and Cast -> Gather ->
Gather -> Reshape (rows of a table); a convolution's weight is Cast -> Gather -> Reshape. The exporter would
fold these constants and store the decoded weight. During export the look-up is therefore one node of a
private domain; `encodings/lookup_nodes.py` replaces it after the last optimizer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.quant.codebook import from_vectors
from qcompress.quant.folded import onnx_node

LOOKUP = "qcompress::Lookup"
"""Placeholder node of a look-up: inputs indices, table and optional row ids; attribute `axis`."""


class FoldedCodebook(nn.Module):
    """Weight stored as uint8 indices, [in / block, out] (axis 1) or [rows, width / block] (axis 0), and a
    table [k, block]. `kernel`: weight shape of a convolution; each row is one output channel.
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

    @property
    def shape(self) -> torch.Size:
        """Shape of the decoded weight."""
        shape = list(self.assignments.shape)
        shape[1 - self.axis] *= self.centroids.shape[1]
        return torch.Size(self.kernel or shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the decoded weight; stock code casts a layer's input to it."""
        return (self.centroids if self.scale is None else self.scale).dtype

    @property
    def device(self) -> torch.device:
        """Device of the indices."""
        return self.assignments.device

    def table(self) -> Tensor:
        """Centroids as floats; during export an int8 table emits one DequantizeLinear."""
        if self.scale is None:
            return self.centroids
        if torch.onnx.is_in_onnx_export():
            inputs = (self.centroids, self.scale)
            return onnx_node("DequantizeLinear", inputs, self.scale.dtype, self.centroids.shape)
        return self.centroids.to(self.scale.dtype) * self.scale

    def decoded(self, zero_point: bool = True) -> Tensor:
        """The weight as [in, out], [rows, width] or a kernel. `zero_point` is ignored."""
        table = self.table()
        if not torch.onnx.is_in_onnx_export():
            weight = from_vectors(F.embedding(self.assignments.int(), table), self.axis)
            return weight if self.kernel is None else weight.view(self.kernel)
        return self._node((self.assignments, table), self.shape)

    def rows(self, ids: Tensor) -> Tensor:
        """Look up rows of a table, [..., width], without decoding the other rows."""
        table = self.table()
        if not torch.onnx.is_in_onnx_export():
            return F.embedding(F.embedding(ids, self.assignments.int()), table).flatten(-2)
        shape = torch.Size((*ids.shape, self.assignments.shape[1] * table.shape[1]))
        return self._node((self.assignments, table, ids), shape)

    def _node(self, inputs: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
        return onnx_node(LOOKUP, inputs, inputs[1].dtype, shape, {"axis": self.axis}, version=1)
