"""The certificate of layers: weights in the ONNX file against the folded model, bit for bit. No torch.

Checks for each quantized layer the codes, the scales, axis and block of the DequantizeLinear node, and the
number of Q/DQ pairs in front of the matmul, by following the graph's edges and not by node names. Parity
cannot detect a weight that the exporter decoded to floats; the certificate does.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto
from safetensors import safe_open

from qcompress.encodings import encoding_of
from qcompress.encodings.walk import DEQUANTIZE, QUANTIZE, is_a, lookup_of, operand, pair_of, result
from qcompress.graph.certificate.edges import Use, own_matmuls, uses_of, verdict
from qcompress.graph.view import View, read
from qcompress.models.plan import LayerPlan, call_name

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def certify(file: Path, folded: Path, plan: tuple[LayerPlan, ...]) -> dict[str, Any]:
    """Compare an ONNX file with folded.safetensors in `folded`. `complete` is True only if every layer passed
    and the file has no float copy of a quantized weight.
    """
    return certify_view(read(file, separated=True), folded, plan)


def certify_view(view: View, folded: Path, plan: tuple[LayerPlan, ...]) -> dict[str, Any]:
    """Compare a graph with folded.safetensors in `folded`, as `certify` does."""
    uses = uses_of(plan)
    with safe_open(folded / "folded.safetensors", framework="np") as tensors:
        layers = [_certify(view, tensors, item, uses.get(item.name, Use())) for item in plan if item.weights]
        copies = _float_copies(view, plan, tensors)
    expected = sum(1 for item in plan if item.weights)
    complete = len(layers) == expected and all(layer["passed"] for layer in layers) and not copies
    return {"layers": layers, "float_copies": copies, "expected": expected, "complete": complete}


def _certify(view: View, tensors: Any, item: LayerPlan, use: Use) -> dict[str, Any]:
    """Certify one layer: its weight through the encoding, and the Q/DQ pair of its input."""
    weight = encoding_of(item.weights).certify(view, tensors, item)
    equal = weight.codes_equal, weight.scales_equal
    return verdict(view, weight.sources, tensors, item, use, *equal, weight.reasons)


def matmul_inputs(view: View, plan: tuple[LayerPlan, ...]) -> dict[str, tuple[str, str | None]]:
    """Map each layer to the names of its matmul's float input and of that input's codes (None: not
    quantized). Further calls of a layer have names of their own (`call_name`).

    The order is that of the graph's nodes, which is topological. Layers whose weight is not read by a matmul
    are left out.
    """
    uses = uses_of(plan)
    inputs: dict[str, tuple[str, str | None]] = {}
    places: dict[str, int] = {}
    for item in plan:
        if item.layer.kind == "embedding":
            continue
        owner = item.layer.tied_to or item.name
        rounded = item.weights is not None
        sources = encoding_of(item.weights).sources(view, owner) if rounded else [f"{owner}.weight"]
        for call, (matmul, own) in enumerate(own_matmuls(view, sources, uses[item.name])):
            name = call_name(item.name, call)
            value = next(one for one in matmul.input[:2] if one != own)
            pair = pair_of(view, view.producers.get(value))
            inputs[name] = (operand(pair.quantize, 0), operand(pair.dequantize, 0)) if pair else (value, None)
            places[name] = view.places[id(matmul)]
    return {name: inputs[name] for name in sorted(inputs, key=places.__getitem__)}


def with_outputs(file: Path, names: list[str]) -> bytes:
    """Serialize the graph with `names` as further outputs of inferred types. External data is not loaded."""
    model = onnx.load(str(file), load_external_data=False)
    known = {info.name for info in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return model.SerializeToString()


def _float_copies(view: View, plan: tuple[LayerPlan, ...], tensors: Any) -> list[str]:
    """Float constants with the shape of a quantized weight: decoded copies or unquantized weights. Float
    parameters of the folded model are none, also if the exporter transposed or reshaped them.
    """
    shapes = {item.layer.shape for item in plan if item.weights}
    kept = {item.layer.shape for item in plan if not item.weights}
    shapes = {*shapes, *(shape[::-1] for shape in shapes)} - kept - {shape[::-1] for shape in kept}
    suspects = [
        name
        for name, tensor in view.constants.items()
        if tensor.data_type in FLOATS and tuple(tensor.dims) in shapes and not _is_scale(view, name)
    ]
    if not suspects:
        return []
    stored = {name: tensors.get_slice(name) for name in tensors.keys() if ".weight." not in name}  # noqa: SIM118
    sizes = {math.prod(shape) for shape in shapes}
    floats = [
        tensors.get_tensor(name)
        for name, part in stored.items()
        if part.get_dtype() in ("F32", "F16") and math.prod(part.get_shape()) in sizes
    ]
    return sorted(name for name in suspects if not _is_one_of(view.values(name), floats))


def _is_one_of(constant: np.ndarray | None, floats: list[np.ndarray]) -> bool:
    """True for one of the float tensors in any shape, or for its transpose."""
    return constant is not None and any(
        np.array_equal(constant.ravel(), tensor.ravel()) or np.array_equal(constant, tensor.T)
        for tensor in floats
    )


def _is_scale(view: View, name: str) -> bool:
    """True if only Q/DQ nodes read a tensor, as a scale, or rows of it; block scales [in // block, out] may
    have a weight's shape.
    """
    readers = view.readers.get(name, [])
    return bool(readers) and all(_reads_scale(view, node, name) for node in readers)


def _reads_scale(view: View, node: NodeProto, name: str) -> bool:
    """True if a node reads a tensor as a scale."""
    if is_a(node, "Gather"):
        behind = view.readers.get(result(node), [])
        return bool(behind) and all(_reads_scale(view, one, result(node)) for one in behind)
    if lookup := lookup_of(view, node):
        return name in (lookup.scale, operand(node, 1))
    return is_a(node, QUANTIZE, DEQUANTIZE) and operand(node, 1) == name
