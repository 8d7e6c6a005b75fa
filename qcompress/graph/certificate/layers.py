"""The certificate: what the ONNX file holds, bit for bit, against the folded model. No torch.

For each quantized layer: the integers, the scales, the axis and block of the DequantizeLinear node, and the
number of Q/DQ pairs in front of the matmul, followed through the graph and not believed from names. Parity
cannot see a weight that the exporter decoded back to float; this can.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto
from safetensors import safe_open

from qcompress.graph.certificate.codebooks import certify_codebook, looked_up
from qcompress.graph.certificate.edges import (
    FLOATS,
    Graph,
    Use,
    first_difference,
    input_pair,
    matmuls,
    own_matmuls,
    same,
    uses_of,
    verdict,
    zero_is_zero,
)
from qcompress.models.plan import LayerPlan

DTYPES = {8: TensorProto.INT8, 4: TensorProto.INT4, 2: TensorProto.INT2}


def certify(file: Path, folded: Path, plan: tuple[LayerPlan, ...]) -> dict[str, Any]:
    """Compare `file` with `folded`/folded.safetensors; `complete` only if every layer passed."""
    graph, uses = Graph.read(file), uses_of(plan)
    with safe_open(folded / "folded.safetensors", framework="np") as tensors:
        layers = [
            (certify_codebook if item.codebook else _certify_layer)(
                graph, tensors, item, uses.get(item.name, Use())
            )
            for item in plan
            if item.weights
        ]
        copies = _float_copies(graph, plan)
    expected = sum(1 for item in plan if item.weights)
    complete = len(layers) == expected and all(layer["passed"] for layer in layers) and not copies
    return {"layers": layers, "float_copies": copies, "expected": expected, "complete": complete}


def _certify_layer(graph: Graph, tensors: Any, item: LayerPlan, use: Use) -> dict[str, Any]:
    owner = item.layer.tied_to or item.name
    codes_name, scale_name = f"{owner}.weight.codes", f"{owner}.weight.scale"
    reasons: list[str] = []
    codes = graph.array(codes_name)
    codes_equal = codes is not None and same(codes.astype(np.int8), tensors.get_tensor(codes_name))
    if codes is None:
        reasons.append(f"no initializer {codes_name}")
    elif not codes_equal:
        reasons.append(first_difference(codes.astype(np.int8), tensors.get_tensor(codes_name), "codes"))
    elif graph.initializers[codes_name].data_type != DTYPES[item.weights.stored_bits]:
        reasons.append(
            f"codes are stored as {TensorProto.DataType.Name(graph.initializers[codes_name].data_type)}"
        )

    decoders = [node for node in graph.readers.get(codes_name, []) if node.op_type == "DequantizeLinear"]
    if not decoders or len(decoders) != len(graph.readers.get(codes_name, [])):
        reasons.append("codes must be read by DequantizeLinear and by nothing else")
    wrong_scales = _wrong_scales(graph, decoders, tensors.get_tensor(scale_name))
    reasons += wrong_scales + _wrong_layout(decoders, item) + _unread(graph, decoders, item)

    sources = [node.output[0] for node in decoders]
    scales_equal = bool(decoders) and not wrong_scales
    return verdict(graph, sources, tensors, item, use, bool(codes_equal), scales_equal, reasons)


def _wrong_scales(graph: Graph, decoders: list[NodeProto], reference: np.ndarray) -> list[str]:
    """Scales and zero points of a weight; all decoders of a tied table count."""
    found = []
    for node in decoders:
        scale = graph.array(node.input[1])
        if scale is None:
            found.append(f"{node.name}: no initializer {node.input[1]}")
        elif not same(scale, reference.astype(scale.dtype)):
            found.append(first_difference(scale, reference.astype(scale.dtype), "scale"))
        if not zero_is_zero(graph, node):
            found.append(f"{node.name}: the zero point is not 0")
    return found


def _unread(graph: Graph, decoders: list[NodeProto], item: LayerPlan) -> list[str]:
    """Decoded codes that reach no operation of their layer: it reads something else, such as a float copy."""
    if not decoders:
        return []
    outputs = [node.output[0] for node in decoders]
    if item.layer.kind == "embedding":
        readers = [node for name in outputs for node in graph.readers.get(name, [])]
        read = any(node.op_type == "Gather" and node.input[0] in outputs for node in readers)
        return [] if read else ["the decoded codes reach no Gather"]
    wanted = "Conv" if item.layer.kind == "conv" else "MatMul"
    return [] if any(matmuls(graph, name) for name in outputs) else [f"the decoded codes reach no {wanted}"]


def _wrong_layout(decoders: list[NodeProto], item: LayerPlan) -> list[str]:
    tied_head = item.layer.kind == "head" and item.layer.tied_to is not None
    table = item.layer.kind in ("embedding", "conv") or tied_head
    channel_axis = 0 if table else 1
    axis = channel_axis if item.block is None else 1 - channel_axis
    found = []
    for node in decoders:
        values = {attribute.name: attribute.i for attribute in node.attribute}
        if values.get("axis", 1) != axis or values.get("block_size", 0) != (item.block or 0):
            found.append(f"{node.name} has {values}, expected axis {axis}, block {item.block}")
    return found


def matmul_inputs(graph: Graph, plan: tuple[LayerPlan, ...]) -> dict[str, tuple[str, str | None]]:
    """Layer -> names of the float input of its matmul and of that input's codes (None: not quantized).

    In the order of the graph's nodes, which is a topological one. A layer whose weight no matmul reads under
    its own name is left out.
    """
    uses = uses_of(plan)
    found: dict[str, tuple[str, str | None]] = {}
    places: dict[str, int] = {}
    for item in plan:
        if item.layer.kind == "embedding":
            continue
        owner = item.layer.tied_to or item.name
        decoders = [
            node for node in graph.readers.get(f"{owner}.weight.codes", []) if node.op_type.startswith("Dequ")
        ]
        sources = [node.output[0] for node in decoders] if item.weights else [f"{owner}.weight"]
        sources = looked_up(graph, owner) if item.codebook else sources
        for matmul, own in own_matmuls(graph, sources, uses[item.name]):
            value = next(name for name in matmul.input[:2] if name != own)
            pair = input_pair(graph, value)
            found[item.name] = (pair.quantize.input[0], pair.dequantize.input[0]) if pair else (value, None)
            places[item.name] = graph.order[matmul.output[0]]
    return {name: found[name] for name in sorted(found, key=places.__getitem__)}


def with_outputs(file: Path, names: list[str]) -> bytes:
    """The graph with further values as outputs; their types are inferred. External data stays where it is."""
    model = onnx.load(str(file), load_external_data=False)
    known = {info.name for info in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return model.SerializeToString()


def _float_copies(graph: Graph, plan: tuple[LayerPlan, ...]) -> list[str]:
    """Float initializers with the shape of a quantized weight: a decoded copy, or a weight left behind."""
    shapes = {item.layer.shape for item in plan if item.weights}
    kept = {item.layer.shape for item in plan if not item.weights}
    shapes = {*shapes, *(shape[::-1] for shape in shapes)} - kept - {shape[::-1] for shape in kept}
    return sorted(
        name
        for name, tensor in graph.initializers.items()
        if tensor.data_type in FLOATS and tuple(tensor.dims) in shapes and not _is_scale(graph, name)
    )


def _is_scale(graph: Graph, name: str) -> bool:
    """Whether a tensor is nothing but a scale: those of blocks, [in // block, out], may have a weight's."""
    readers = graph.readers.get(name, [])
    return bool(readers) and all(
        node.op_type in ("QuantizeLinear", "DequantizeLinear") and list(node.input).index(name) == 1
        for node in readers
    )
