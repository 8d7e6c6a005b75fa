"""Indices into a table of vectors (product quantization), decoded by Gather.

    assignments   uint8, [in / block, out]; table [rows, width / block]; kernel [out, in * h * w / block]
    centroids     [k, block], floats or int8 codes with one scale

A decoded float copy would pass every comparison of outputs and take eight times the bytes. The certificate
therefore follows the path node by node (Cast, Gather from the table, Reshape) and refuses other readers of
the indices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompress.encodings.base import Certified, Stored, is_turned, rows_of
from qcompress.encodings.walk import (
    DEQUANTIZE,
    MOVES,
    attribute,
    first_difference,
    is_a,
    matmuls,
    operand,
    readers_of,
    result,
    same,
    users_of,
    zero_is_zero,
)
from qcompress.errors import ContractError
from qcompress.schema.formats import AnyWeightFormat, CodebookFormat

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import NodeProto
    from torch import Tensor, dtype, nn

    from qcompress.graph.view import View
    from qcompress.models.architecture import Layer
    from qcompress.models.plan import LayerPlan
    from qcompress.quant.layers import QuantizedWeight


class GatheredCodebook:
    """Encoding that stores uint8 indices and a centroid table."""

    name = "codebook"
    parts = ("assignments", "centroids", "scale")
    initializers = parts

    def holds(self, form: AnyWeightFormat) -> bool:
        """True for codebook formats with `codebook: gather`."""
        return isinstance(form, CodebookFormat) and not form.integers

    def fold(self, layer: QuantizedWeight, item: LayerPlan) -> dict[str, Tensor]:
        """Return indices, the table or its int8 codes, and the scale [] of an int8 table."""
        quantizer = layer.weight_quantizer
        indices = quantizer.assignments
        highest, count = int(indices.max()), item.weights.centroids
        if highest >= count:
            raise ContractError(f"{item.name}: index {highest} of {count} centroids")
        indices = indices.t() if is_turned(layer) else indices
        parts = {"assignments": indices, "centroids": quantizer.centroids}
        if quantizer.scale is not None:
            parts |= {"centroids": quantizer.codes(), "scale": quantizer.scale}
        return {part: tensor.clone().contiguous() for part, tensor in parts.items()}

    def decoder(self, parts: Mapping[str, Tensor | None], item: LayerPlan, compute: dtype) -> nn.Module:
        """Build a FoldedCodebook."""
        from qcompress.quant.folded_codebook import FoldedCodebook

        centroids, scale = parts["centroids"], parts["scale"]
        centroids, scale = (centroids.to(compute), None) if scale is None else (centroids, scale.to(compute))
        axis = 0 if item.layer.kind in ("embedding", "conv") else 1
        kernel = item.layer.shape if item.layer.kind == "conv" else None
        return FoldedCodebook(parts["assignments"], centroids, scale, axis, kernel)

    def pack(self, initializers: Mapping[str, ir.Value], owner: str, form: AnyWeightFormat) -> None:
        """No change: indices are uint8 in both files."""

    def lower(self, model: ir.Model) -> None:
        """Replace look-up nodes by Cast, Gather, Transpose and Reshape."""
        from qcompress.encodings.lookup_nodes import spell_out

        spell_out(model)

    def certify(self, view: View, tensors: Any, item: LayerPlan) -> Certified:
        """Compare indices and table bit for bit, check the table's scale, and follow the path."""
        owner = item.layer.tied_to or item.name
        reasons: list[str] = []
        indices = _is_stored(view, tensors, f"{owner}.weight.assignments", reasons)
        table = _is_stored(view, tensors, f"{owner}.weight.centroids", reasons)
        scales = _is_scaled(view, tensors, owner, reasons) if item.weights.table == "int8" else True
        ends = _ends(view, owner, item, reasons)
        return Certified(indices and table, scales, ends, reasons)

    def sources(self, view: View, owner: str) -> list[str]:
        """Return the outputs of the Reshape nodes behind the look-ups."""
        return looked_up(view, owner)

    def find(self, view: View) -> Iterator[Stored]:
        """Yield each Gather from a constant table with two axes, whose indices are a constant of narrow
        integers behind a Cast, or rows of such a constant.
        """
        for gather in view.named("Gather"):
            decoder = view.producers.get(operand(gather, 0))
            decoder = decoder if is_a(decoder, DEQUANTIZE) else None
            table = operand(gather if decoder is None else decoder, 0)
            indices, by_rows = _indices(view, operand(gather, 1))
            dims = view.constants[table].dims if table in view.constants else ()
            if indices and len(dims) == 2 and dims[1]:
                first = gather if decoder is None else decoder
                yield StoredIndices(view, indices, table, first, gather, by_rows)

    def stored_bytes(self, layer: Layer, form: AnyWeightFormat, float_bytes: int) -> int:
        """Bytes of the indices and the table."""
        table = form.centroids * form.block * (1 if form.table == "int8" else float_bytes)
        return int(layer.weights * form.stored_bits / 8) + table


NARROW = ("UINT8", "INT8", "UINT16", "INT16")
"""Types of stored indices; Gather accepts none of them, hence the Cast."""


def _indices(view: View, name: str) -> tuple[str, bool]:
    """Name of the constant behind indices (empty if there is none), and True if they are rows of it."""
    maker, by_rows = view.producers.get(name), False
    if is_a(maker, "Gather"):
        maker, by_rows = view.producers.get(operand(maker, 0)), True
    name = operand(maker, 0) if is_a(maker, "Cast") else ""
    tensor = view.constants.get(name)
    is_narrow = tensor is not None and len(tensor.dims) == 2 and view.word(name) in NARROW
    return (name, by_rows) if is_narrow else ("", False)


@dataclass(frozen=True, slots=True)
class StoredIndices(Stored):
    """Constant indices that a Gather looks up in a table."""

    gather: NodeProto = field(repr=False)
    """The look-up in the table."""
    by_rows: bool
    """True if another Gather selects rows of the indices first, as for an embedding."""

    indices = True

    @property
    def block(self) -> int:
        """Length of the vectors."""
        return self.view.constants[self.source].dims[1]

    @property
    def granularity(self) -> str:
        """`vectors of N`."""
        return f"vectors of {self.block}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Vectors lie along the axis that a Transpose moves to the front, else along the last axis."""
        first, second = self.view.constants[self.name].dims
        readers = self.view.readers.get(result(self.gather), [])
        is_turned = any(node.op_type == "Transpose" for node in readers)
        if is_turned and attribute(self.gather, "axis", 0) == 0:
            return first * self.block, second
        return first, second * self.block

    @property
    def stored_as(self) -> str:
        """Types of indices and table."""
        return f"{self.view.label(self.name)} into {self.view.label(self.source)}"

    @property
    def stored_bits(self) -> float:
        """Bits of an index per weight."""
        bits = self.view.bits(self.name) / self.block
        return int(bits) if bits == int(bits) else bits

    def parts(self) -> Iterator[str]:
        """Yield indices, table, and the scale and zero point of the table."""
        yield from (self.name, self.source)
        if self.node is not self.gather:
            yield from self.node.input[1:]

    def readers(self) -> Iterator[NodeProto]:
        """Yield the nodes that read looked-up vectors; for rows, the Gather itself."""
        if self.by_rows:
            return iter([self.gather])
        return (node for node, _ in users_of(self.view, result(self.gather), MOVES))

    def information_bits(self) -> float:
        """log2(centroids) bits per index."""
        return math.log2(max(self.view.constants[self.source].dims[0], 2)) / self.block

    def decoded(self, most: int) -> Iterator[np.ndarray]:
        """Yield the vectors in the order of the indices, [a, b, block]."""
        table, indices = self.view.values(self.source), self.view.values(self.name)
        if self.node is not self.gather:
            scale = self.view.values(operand(self.node, 1))
            table = None if scale is None else table.astype(scale.dtype) * scale  # as the graph rounds it
        if table is not None and table.size and indices.size:
            rows = rows_of(most, indices[:1].size * table.shape[1])
            yield table.astype(np.float32)[indices[:rows].astype(np.int64)]


def _is_stored(view: View, tensors: Any, name: str, reasons: list[str]) -> bool:
    """True if an initializer equals the folded tensor; a float table is compared in the compute type."""
    actual, wanted = view.initializer(name), tensors.get_tensor(name)
    if actual is None:
        reasons.append(f"no initializer {name}")
        return False
    floats = actual.dtype in (np.float32, np.float16) or actual.dtype.name == "bfloat16"
    wanted = wanted.astype(actual.dtype) if floats and wanted.dtype == np.float32 else wanted
    if not same(actual, wanted):
        reasons.append(first_difference(actual, wanted, name.rpartition(".")[2]))
        return False
    return True


def _is_scaled(view: View, tensors: Any, owner: str, reasons: list[str]) -> bool:
    """True if DequantizeLinear nodes with the folded scale are the only readers of an int8 table."""
    readers = view.readers.get(f"{owner}.weight.centroids", [])
    wanted = tensors.get_tensor(f"{owner}.weight.scale")
    for node in readers:
        scale = view.initializer(operand(node, 1)) if is_a(node, DEQUANTIZE) else None
        if scale is None or not same(scale, wanted.astype(scale.dtype)) or not zero_is_zero(view, node):
            reasons.append(f"{node.name}: the table is not decoded with its scale")
            return False
    return bool(readers)


def _ends(view: View, owner: str, item: LayerPlan, reasons: list[str]) -> list[str]:
    """Outputs of the look-ups that feed this layer."""
    readers = view.readers.get(f"{owner}.weight.assignments", [])
    if not readers or not all(is_a(node, "Cast") for node in readers):
        reasons.append("indices must be read by Cast and by nothing else")
    rows = item.layer.kind == "embedding"
    ends = looked_up(view, owner, rows)
    if not ends:
        reasons.append("the indices reach no operation of the layer")
    return ends


def looked_up(view: View, owner: str, rows: bool = False) -> list[str]:
    """Return the Reshape outputs that hold the weight of layer `owner`, decoded for a matmul, or with `rows`
    those that hold selected rows. Follows the indices through Cast and Gather; a Gather from another table is
    ignored.
    """
    table = f"{owner}.weight.centroids"
    values: list[str] = []
    for cast in readers_of(view, f"{owner}.weight.assignments", "Cast"):
        level = _gathers(view, cast, first=True) if rows else [cast]
        for gather in (after for node in level for after in _gathers(view, node, first=False)):
            if _is_table(view, operand(gather, 0), table):
                values += _reshaped(view, gather)
    return values if rows else [name for name in values if matmuls(view, name)]


def _gathers(view: View, node: NodeProto, first: bool) -> list[NodeProto]:
    """Gather nodes that read a node's output as data (`first`) or as indices."""
    name = result(node)
    return [after for after in readers_of(view, name, "Gather") if operand(after, 0 if first else 1) == name]


def _reshaped(view: View, gather: NodeProto) -> list[str]:
    """Outputs of the Reshape nodes behind a Gather, directly or after a Transpose."""
    turned = readers_of(view, result(gather), "Transpose")
    ends = [result(gather), *(result(node) for node in turned)]
    return [result(node) for name in ends for node in readers_of(view, name, "Reshape")]


def _is_table(view: View, name: str, table: str) -> bool:
    """True if a value is the initializer `table` or the output of its DequantizeLinear."""
    decoder = view.producers.get(name)
    return name == table or (is_a(decoder, DEQUANTIZE) and operand(decoder, 0) == table)
